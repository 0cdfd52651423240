"""Answering prompts on this machine, without a server: the engine, asked once or for a list.

The prompt goes through the same `base/chat.py` that training used, so what was trained is what is asked; with `--format auto`
the adapter's manifest says whether it was trained on chats or on texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from graftlm import progress
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.adapters.store import open_adapter
from graftlm.base.caches import Decoding
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_base, load_config, resolve
from graftlm.config import GenerateConfig, Precision
from graftlm.errors import AdapterError, ConfigError
from graftlm.progress import working
from graftlm.serving.engine.engine import Engine, EngineLimits
from graftlm.serving.engine.prompts import PromptEncoder, PromptEncoderCache, hidden_ids
from graftlm.serving.engine.request import Request, RequestOutput, SamplingParams

Show = Callable[[str], None]

GREEDY = SamplingParams()
ATTACHED = "attached"  # what the engine calls an adapter that was put into its slot by somebody else


def generate_text(config: GenerateConfig, show: Show | None = None) -> dict[str, Any]:
    """Load what the config names and answer its prompt; `show` gets the text as it comes. Raises GraftError."""
    found = open_adapter(config.adapter, config.store, model=config.model) if config.adapter else None
    trained_on = ((found and found.manifest) or {}).get("base", {}).get("precision")
    precision = config.base_precision or trained_on or checkpoint_precision(config.model, config.trust_remote_code)
    base = load_base(
        config.model, precision=precision, compute_dtype=config.compute_dtype, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    slot = 0
    notes: list[str] = []
    book = PromptEncoderCache(base, config.format)
    prompts = book.base
    if found is not None:
        adapter = adapter_format.load(base, found)
        attach(base, adapter, slot=1)
        slot = 1
        assert adapter.origin is not None
        notes.extend(adapter.origin.notes)
        prompts = book.of(found.digest, found.path, lambda: found.manifest)
    prompt = prompt_ids(prompts, config.prompt, config.system)
    room = room_for(base, len(prompt))
    if room is not None and room < config.max_tokens:
        notes.append(f"at most {room} tokens fit behind this prompt, {config.max_tokens} were asked for")
    with working("answering") as task:

        def told(text: str) -> None:
            progress.end(task)  # from its first output on the answer itself is what is seen
            if show is not None:
                show(text)

        done = complete(
            base, prompts.encoder, prompt, slot=slot, max_tokens=config.max_tokens, show=told if show else None,
            sampling=SamplingParams(temperature=config.temperature, top_p=config.top_p, seed=config.seed),
        )  # fmt: skip
    return {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": len(prompt),
        "tokens": done.tokens,
        "format": prompts.style,
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
        "precision": precision,
        "notes": notes,
    }


def checkpoint_precision(model: str, trust_remote_code: bool = False) -> Precision:
    """The 16- or 32-bit type that the checkpoint itself is stored in."""
    folder = resolve(model, trust_remote_code)
    kind = getattr(load_config(folder, trust_remote_code).get_text_config(), "dtype", None)
    return "bfloat16" if kind in (torch.bfloat16, torch.float16) else "float32"


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


@dataclass(frozen=True)
class Generation:
    """What a model wrote, and whether it stopped by itself or at the limit."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


def complete(
    base: Base, encoder: Encoder, prompt: Sequence[int], *, slot: int = 0, max_tokens: int = 128,
    sampling: SamplingParams = GREEDY, show: Show | None = None,
) -> Generation:  # fmt: skip
    """Continue a prompt until a stop token or the limit; `show` gets the text piece by piece."""

    def told(output: RequestOutput) -> None:
        if show is not None and output.text:
            show(output.text)

    return complete_all(base, encoder, [prompt], slot=slot, max_tokens=max_tokens, sampling=sampling, told=told)[0]


@dataclass(frozen=True)
class Question:
    """One prompt to an engine, and the adapter that answers it."""

    prompt: Sequence[int]
    encoder: Encoder
    """Of its adapter, or of the base: the tokens that end an answer, and how its text is read."""
    adapter: str = ""
    """Digest of an adapter, or the name of one that is in a slot already; empty for the bare base."""
    folder: Path | None = None
    """Where the adapter is loaded from; None where it is in a slot."""


def complete_all(
    base: Base, encoder: Encoder, prompts: Sequence[Sequence[int]], *, slot: int = 0, max_tokens: int = 128,
    sampling: SamplingParams = GREEDY, told: Callable[[RequestOutput], None] | None = None,
) -> list[Generation]:  # fmt: skip
    """Continue many prompts, several at a time, through what is attached in `slot`. Raises ConfigError as `room_for`."""
    asked = [Question(prompt, encoder, ATTACHED if slot else "") for prompt in prompts]
    attached = {ATTACHED: slot} if slot else {}
    return answer_all(base, asked, max_tokens=max_tokens, sampling=sampling, attached=attached, told=told)


def answer_texts(
    base: Base, encoder: Encoder, prompts: Sequence[Sequence[int]], *, slot: int, max_tokens: int,
    answered: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """Greedy answers to prompts through what is attached in `slot`, as texts: how a run is asked while it trains.

    `answered` hears how many are complete. Raises ConfigError as `room_for`.
    """
    complete = 0

    def told(output: RequestOutput) -> None:
        nonlocal complete
        complete += output.finish_reason is not None
        answered(complete)

    done = complete_all(base, encoder, prompts, slot=slot, max_tokens=max_tokens, told=told)
    return [answer.text for answer in done]


def answer_all(
    base: Base, questions: Sequence[Question], *, max_tokens: int = 128, sampling: SamplingParams = GREEDY,
    attached: Mapping[str, int] | None = None, decoding: Decoding | None = None,
    told: Callable[[RequestOutput], None] | None = None,
) -> list[Generation]:  # fmt: skip
    """Answer questions, several at a time and each through its own adapter, in one batch; answers in the questions' order.

    `attached` names adapters that are in slots already, `decoding` is what was proven of the base if it was asked before.
    Raises ConfigError as `room_for`, and AdapterError for an adapter that cannot be loaded onto this base.
    """
    rooms = [room_for(base, len(asked.prompt)) for asked in questions]
    wanted = [max_tokens if room is None else min(max_tokens, room) for room in rooms]
    at_once = min(len(questions), 16)
    longest = max((len(asked.prompt) + n for asked, n in zip(questions, wanted)), default=1)
    adapters = {asked.adapter for asked in questions if asked.adapter}
    limits = EngineLimits(
        max_num_seqs=at_once,
        queue=len(questions),
        cache_tokens=at_once * (longest + 16),
        max_loras=max(1, len(adapters)),
    )
    engine = Engine(base, limits, decoding=decoding)
    for name, slot in (attached or {}).items():
        engine.adapter_cache.adopt(name, slot)
    requests: list[tuple[Request, Path | None]] = []
    for i, (asked, most) in enumerate(zip(questions, wanted)):
        encoder = asked.encoder
        request = Request(
            id=str(i), prompt=tuple(asked.prompt), max_tokens=most, adapter=asked.adapter, sampling=sampling,
            stop_ids=encoder.stop_ids, hidden_ids=hidden_ids(encoder), tokenizer=encoder.tokenizer,
        )  # fmt: skip
        requests.append((request, asked.folder))
    texts = [""] * len(questions)
    done: list[Generation | None] = [None] * len(questions)
    try:
        for output in engine.run(requests):
            if told is not None:
                told(output)
            at = int(output.id)
            texts[at] += output.text
            if output.finish_reason == "error":
                raise AdapterError(f"prompt {at}: {output.error}")
            if output.finish_reason is not None:
                stopped = output.finish_reason == "stop"
                finish_reason: Literal["stop", "length"] = "stop" if stopped else "length"
                done[at] = Generation(texts[at], output.completion_tokens - stopped, finish_reason)
    finally:
        engine.close()
    return [answer for answer in done if answer is not None]


def prompt_ids(prompts: PromptEncoder, prompt: str, system: str | None) -> list[int]:
    """The prompt as the model reads it."""
    if prompts.style == "text":
        return prompts.text(prompt if system is None else f"{system}\n{prompt}")
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return prompts.chat(messages)
