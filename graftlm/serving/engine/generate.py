"""Answering prompts on this machine, without a server: an engine for a list of prompts, each with its adapter.

    prompts = encode_prompts(base, texts, adapters, style, system)
    answers = generate_all(base, prompts, max_tokens=64)

A prompt goes through the same `base/chat.py` that training used, so the model is asked as it was trained; with `--format auto`
the adapter's manifest says whether it was trained on chats or on texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.adapters.peft_format import AdapterFolder
from graftlm.base.caches import Decoding
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.errors import AdapterError, ConfigError
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.prompts import PromptEncoder, PromptEncoderCache, Style, hidden_ids
from graftlm.serving.engine.request import Request, RequestOutput, SamplingParams
from graftlm.serving.engine.scheduler import EngineLimits

GREEDY = SamplingParams()
ATTACHED = "attached"  # the engine's name for an adapter that its caller attached in a slot
NO_LIMIT = 1 << 62
"""Bytes of adapters: all that were named are needed."""
_MAX_NUM_SEQS = 16


@dataclass(frozen=True)
class AdapterPrompt:
    """One prompt, and the adapter that answers it."""

    ids: Sequence[int]
    encoder: Encoder
    """Of its adapter, or of the base: the tokens that end an answer, and how its text is decoded."""
    adapter: str = ""
    """Digest of an adapter, or the name of one that is in a slot already; empty for the bare base."""
    folder: Path | None = None
    """Where the adapter is loaded from; None where it is in a slot."""
    style: Style = "text"


@dataclass(frozen=True)
class Generation:
    """What a model generated, and whether it stopped by itself or at the limit."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]
    notes: tuple[str, ...] = ()
    """What the user should know of the adapter on this base, and of the limit."""


def encode_prompts(
    base: Base, prompts: Sequence[str | Sequence[Mapping[str, Any]]], adapters: Sequence[AdapterFolder | None], *,
    style: str = "auto", system: str | None = None,
) -> list[AdapterPrompt]:  # fmt: skip
    """Prompts, each a text or a list of messages, as their adapters were trained to read them; None is the bare base.

    Raises AdapterError, DataError, ModelError.
    """
    encoders = PromptEncoderCache(base, style)
    found: list[AdapterPrompt] = []
    for prompt, folder in zip(prompts, adapters):
        if folder is None:
            encoder, digest, path = encoders.base, "", None
        else:
            digest, path = folder.digest, folder.path
            encoder = encoders.of(digest, path, lambda folder=folder: folder.manifest)
        found.append(AdapterPrompt(prompt_ids(encoder, prompt, system), encoder.encoder, digest, path, encoder.style))
    return found


def prompt_ids(encoder: PromptEncoder, prompt: str | Sequence[Mapping[str, Any]], system: str | None) -> list[int]:
    """The tokens of a prompt, or of a conversation, with the generation prompt of the template behind it."""
    if isinstance(prompt, str) and encoder.style == "text":
        return encoder.text(prompt if system is None else f"{system}\n{prompt}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
    if system is not None and (not messages or messages[0].get("role") != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return encoder.chat(messages)


def room_for(base: Base, prompt_tokens: int) -> int | None:
    """How many tokens fit behind a prompt; None where the model names no longest position. Raises ConfigError for none."""
    if prompt_tokens == 0:
        raise ConfigError("the prompt is empty: 0 tokens; give at least one word with --prompt")
    limit = base.structure.max_positions
    if limit and prompt_tokens >= limit:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, and this model's longest position is {limit}; shorten the prompt"
        )
    return limit - prompt_tokens if limit else None


def stream(
    engine: Engine, prompts: Sequence[AdapterPrompt], max_tokens: Sequence[int], sampling: SamplingParams = GREEDY
) -> Iterator[RequestOutput]:
    """Answer prompts through an engine that has nothing else to do; an output's `id` is the index of its prompt."""
    requests: list[tuple[Request, Path | None]] = []
    for i, (prompt, limit) in enumerate(zip(prompts, max_tokens)):
        request = Request(
            id=str(i), prompt=tuple(prompt.ids), max_tokens=limit, adapter=prompt.adapter, sampling=sampling,
            stop_ids=prompt.encoder.stop_ids, hidden_ids=hidden_ids(prompt.encoder), tokenizer=prompt.encoder.tokenizer,
        )  # fmt: skip
        requests.append((request, prompt.folder))
    return engine.generate(requests)


def generate_all(
    base: Base, prompts: Sequence[AdapterPrompt], *, max_tokens: int = 128, sampling: SamplingParams = GREEDY,
    attached: Mapping[str, int] | None = None, decoding: Decoding | None = None,
    on_output: Callable[[RequestOutput], None] | None = None,
) -> list[Generation]:  # fmt: skip
    """Answer prompts, several at a time and each through its own adapter, in one batch; answers in the prompts' order.

    `attached` names adapters that are in slots already, `decoding` is what was proven of the base if it was proven before.
    Raises ConfigError as `room_for`, and AdapterError for an adapter that cannot be loaded onto this base.
    """
    rooms = [room_for(base, len(prompt.ids)) for prompt in prompts]
    limits = [max_tokens if room is None else min(max_tokens, room) for room in rooms]
    engine = _engine_for(base, prompts, limits, decoding)
    for name, slot in (attached or {}).items():
        engine.adapter_cache.pin(name, slot)
    texts = [""] * len(prompts)
    done: list[Generation | None] = [None] * len(prompts)
    try:
        for output in stream(engine, prompts, limits, sampling):
            if on_output is not None:
                on_output(output)
            at = int(output.id)
            texts[at] += output.text
            if output.finish_reason == "error":
                raise AdapterError(f"prompt {at}: {output.error}" if len(prompts) > 1 else output.error)
            if output.finish_reason is not None:
                finish_reason: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
                notes = list(engine.adapter_cache.notes(prompts[at].adapter))
                if limits[at] < max_tokens:
                    notes.append(f"at most {limits[at]} tokens fit behind this prompt, {max_tokens} were asked for")
                tokens = output.completion_tokens - (finish_reason == "stop")
                done[at] = Generation(texts[at], tokens, finish_reason, tuple(notes))
    finally:
        engine.close()
    return [answer for answer in done if answer is not None]


def _engine_for(
    base: Base, prompts: Sequence[AdapterPrompt], max_tokens: Sequence[int], decoding: Decoding | None
) -> Engine:
    """An engine that has room for all of these prompts and their adapters."""
    max_num_seqs = min(len(prompts), _MAX_NUM_SEQS)
    longest = max((len(prompt.ids) + limit for prompt, limit in zip(prompts, max_tokens)), default=1)
    adapters = {prompt.adapter for prompt in prompts if prompt.adapter}
    limits = EngineLimits(
        max_num_seqs=max_num_seqs, queue=len(prompts), cache_tokens=max_num_seqs * (longest + 16),
        max_loras=max(1, len(adapters)), adapter_bytes=NO_LIMIT,
    )  # fmt: skip
    return Engine(base, limits, decoding=decoding)


def complete_all(
    base: Base, encoder: Encoder, prompts: Sequence[Sequence[int]], *, slot: int = 0, max_tokens: int = 128,
    sampling: SamplingParams = GREEDY, on_output: Callable[[RequestOutput], None] | None = None,
) -> list[Generation]:  # fmt: skip
    """`generate_all` of prompts through what is attached in `slot`; 0 is the bare base."""
    given = [AdapterPrompt(prompt, encoder, ATTACHED if slot else "") for prompt in prompts]
    attached = {ATTACHED: slot} if slot else {}
    return generate_all(base, given, max_tokens=max_tokens, sampling=sampling, attached=attached, on_output=on_output)


def answer_texts(
    base: Base, encoder: Encoder, prompts: Sequence[Sequence[int]], *, slot: int, max_tokens: int,
    on_answers: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """The texts of `complete_all`, greedy, for `graft train --score`; `on_answers` gets the number of finished answers."""
    finished = 0

    def on_output(output: RequestOutput) -> None:
        nonlocal finished
        finished += output.finish_reason is not None
        on_answers(finished)

    answers = complete_all(base, encoder, prompts, slot=slot, max_tokens=max_tokens, on_output=on_output)
    return [answer.text for answer in answers]


def complete(
    base: Base, encoder: Encoder, prompt: Sequence[int], *, slot: int = 0, max_tokens: int = 128,
    sampling: SamplingParams = GREEDY, show: Callable[[str], None] | None = None,
) -> Generation:  # fmt: skip
    """`complete_all` of one prompt; `show` gets the text as it comes."""

    def on_output(output: RequestOutput) -> None:
        if show is not None and output.text:
            show(output.text)

    (answer,) = complete_all(
        base, encoder, [prompt], slot=slot, max_tokens=max_tokens, sampling=sampling, on_output=on_output
    )
    return answer
