"""Answering one prompt: the base, an adapter on it if one is given, and a plain decoding loop.

The prompt goes through the same `base/chat.py` that training used, so what was trained is what is asked; with `--format auto`
the adapter's manifest says whether it was trained on chats or on texts. This is the simplest way to hear a model; the
batching engine of `graft serve` is another room.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from graftlm.adapters import format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.base import hf
from graftlm.base.chat import Encoder
from graftlm.base.load import Base, load_base, load_config, load_tokenizer, resolve
from graftlm.config import GenerateConfig, Precision
from graftlm.errors import AdapterError, ConfigError
from graftlm.segments import Segments, running

Show = Callable[[str], None]


def generate_text(config: GenerateConfig, show: Show | None = None) -> dict[str, Any]:
    """Load what the config names and answer its prompt; `show` gets the text as it comes. Raises GraftError."""
    manifest = adapter_format.read_manifest(config.adapter) if config.adapter else None
    trained_on = (manifest or {}).get("base", {}).get("precision")
    precision = config.precision or trained_on or checkpoint_precision(config)
    base = load_base(
        config.model, precision=precision, compute=config.compute, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    slot = 0
    if config.adapter is not None:
        if (config.adapter / "tokenizer.json").is_file():  # trained with tokens of its own
            base.tokenizer = load_tokenizer(config.adapter)
        attach(base, adapter_format.load(base, config.adapter), slot=1)
        slot = 1
    known = manifest or _read_json(base.folder / "graft.json")
    encoder = Encoder(base.tokenizer, date=(known or {}).get("template", {}).get("date"))
    _check_tokenizer(encoder, manifest, config.adapter)
    style = choose_format(config.format, known, encoder)
    prompt = prompt_ids(encoder, style, config.prompt, config.system)
    notes: list[str] = []
    if trained_on and trained_on != precision:
        notes.append(f"the adapter was trained on a base in {trained_on} and runs on {precision}; answers may differ")
    room = room_for(base, len(prompt))
    if room is not None and room < config.max_tokens:
        notes.append(f"at most {room} tokens fit behind this prompt, {config.max_tokens} were asked for")
    done = complete(
        base, encoder, prompt, slot=slot, max_tokens=config.max_tokens, temperature=config.temperature,
        top_p=config.top_p, generator=torch.Generator().manual_seed(config.seed), show=show,
    )  # fmt: skip
    return {
        "text": done.text, "finish": done.finish, "prompt_tokens": len(prompt), "tokens": done.tokens, "format": style,
        "model": config.model, "adapter": str(config.adapter) if config.adapter else None, "precision": precision,
        "notes": notes,
    }  # fmt: skip


def checkpoint_precision(config: GenerateConfig) -> Precision:
    """The 16- or 32-bit type that the checkpoint itself is stored in."""
    folder = resolve(config.model, config.trust_remote_code)
    kind = getattr(load_config(folder, config.trust_remote_code).get_text_config(), "dtype", None)
    return "bfloat16" if kind in (torch.bfloat16, torch.float16) else "float32"


def room_for(base: Base, prompt_tokens: int) -> int | None:
    """How many tokens fit behind a prompt; None where the model names no longest position. Raises ConfigError for none."""
    if prompt_tokens == 0:
        raise ConfigError("the prompt is empty: 0 tokens; give at least one word with --prompt")
    limit = base.anatomy.max_positions
    if limit and prompt_tokens >= limit:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, and this model's longest position is {limit}; shorten the prompt"
        )
    return limit - prompt_tokens if limit else None


@dataclass(frozen=True)
class Completion:
    """What a model wrote, and whether it stopped by itself or at the limit."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


def complete(
    base: Base,
    encoder: Encoder,
    prompt: Sequence[int],
    *,
    slot: int = 0,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator,
    show: Show | None = None,
) -> Completion:
    """Continue a prompt until a stop token or the limit; `show` gets the text piece by piece."""
    ids: list[int] = []
    text = ""
    finish: Literal["stop", "length"] = "length"
    for token in decode(base, prompt, slot, max_tokens, temperature, top_p, generator):
        if token in encoder.stop_ids:
            finish = "stop"
            break
        ids.append(token)
        if show is not None:
            now = shown_text(base, encoder, ids)
            if not now.endswith("\ufffd"):  # half of a character: wait for its rest
                show(now[len(text) :])
                text = now
    final = shown_text(base, encoder, ids)
    if show is not None:
        show(final[len(text) :])
    return Completion(final, len(ids), finish)


def shown_text(base: Base, encoder: Encoder, ids: Sequence[int]) -> str:
    """Tokens as text; only what begins, ends and pads is left out, a special token that a model was taught to write stays."""
    tokenizer: Any = base.tokenizer
    hidden = {*encoder.stop_ids, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)


def choose_format(asked: str, manifest: dict[str, Any] | None, encoder: Encoder) -> Literal["chat", "text"]:
    """`auto`: what the adapter (or the tuned model) was trained on; else chat where the tokenizer has a template."""
    if asked in ("chat", "text"):
        return "chat" if asked == "chat" else "text"
    formats = ((manifest or {}).get("data") or {}).get("train", {}).get("formats")
    if formats:
        return "chat" if "chat" in formats else "text"
    return "chat" if encoder.has_own_template else "text"


def prompt_ids(encoder: Encoder, style: str, prompt: str, system: str | None) -> list[int]:
    """The prompt as the model reads it."""
    if style == "text":
        return encoder.prompt_text(prompt if system is None else f"{system}\n{prompt}")
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return encoder.prompt(messages)


@torch.no_grad()
def decode(
    base: Base,
    prompt: Sequence[int],
    slot: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Yield token after token through the adapter in `slot`; the caller stops when it has enough."""
    room = room_for(base, len(prompt))
    # A model that keeps its past in another way gets the whole text again for every token.
    cached = "past_key_values" in inspect.signature(base.anatomy.body.forward).parameters
    cache: dict[str, Any] = {"past_key_values": DynamicCache(config=base.model.config)} if cached else {}
    fed = torch.tensor([list(prompt)], device=base.device)  # (1, new tokens)
    implementation = base.model.config._attn_implementation
    hf.switch(base.model, base.own_attention)
    try:
        for _ in range(max_tokens if room is None else min(max_tokens, room)):
            with running(Segments(lengths=(fed.shape[1],), slots=(slot,), stacked=True)):
                output = base.anatomy.body(input_ids=fed, use_cache=cached, **cache)
            with running(Segments(lengths=(1,), slots=(slot,))):
                logits = base.logits(output.last_hidden_state[:, -1])[0]  # (vocabulary,)
            token = sample(logits, temperature, top_p, generator)
            yield token
            new = torch.tensor([[token]], device=base.device)
            fed = new if cached else torch.cat([fed, new], dim=1)
    finally:
        hf.switch(base.model, implementation)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn from the likeliest that hold `top_p` of the probability."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ordered, index = probabilities.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p  # the first token that passes top_p still counts
    choice = torch.multinomial(ordered * kept, 1, generator=generator)
    return int(index[choice])


def _check_tokenizer(encoder: Encoder, manifest: dict[str, Any] | None, folder: Path | None) -> None:
    """Another tokenizer, or for chats another template, would ask the adapter something else than it was taught."""
    if manifest is None:
        return
    trained = manifest.get("tokenizer_digest")
    if trained and trained != encoder.tokenizer_digest:
        raise AdapterError(
            f"{folder} was trained with tokenizer {trained[:12]}, this one is {encoder.tokenizer_digest[:12]}; "
            "use the tokenizer it was trained with"
        )
    chats = "chat" in ((manifest.get("data") or {}).get("train") or {}).get("formats", {})
    trained = (manifest.get("template") or {}).get("digest")
    if chats and trained and trained != encoder.template_digest:
        raise AdapterError(
            f"{folder} was trained with chat template {trained[:12]}, this one is {encoder.template_digest[:12]}; "
            "use the template it was trained with"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
