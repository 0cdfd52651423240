"""`graft generate`: one prompt, through a base and, if one is named, an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graftlm import progress
from graftlm.adapters.peft_format import AdapterFolder
from graftlm.adapters.store import open_adapter
from graftlm.base.loading import Base, checkpoint_precision, load_base
from graftlm.config import ChatConfig, GenerateConfig
from graftlm.progress import working
from graftlm.serving.engine.generate import encode_prompts, generate_all
from graftlm.serving.engine.request import RequestOutput, SamplingParams


def generate(config: GenerateConfig, show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Answer the config's prompt; `show` gets the text as it comes. Returns what `--json` prints. Raises GraftError."""
    base, adapters = load_with_adapters(config, [config.adapter])
    prompts = encode_prompts(base, [config.prompt], adapters, style=config.format, system=config.system)
    with working("answering") as task:

        def on_output(output: RequestOutput) -> None:
            if show is not None and output.text:
                progress.end(task)  # from here on the answer itself is what is seen
                show(output.text)

        (answer,) = generate_all(
            base, prompts, max_tokens=config.max_tokens, sampling=sampling_of(config), on_output=on_output
        )
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(prompts[0].ids),
        "tokens": answer.tokens,
        "format": prompts[0].style,
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
        "precision": base.precision,
        "notes": list(answer.notes),
    }


def load_with_adapters(
    config: GenerateConfig | ChatConfig, names: Sequence[str | Path | None]
) -> tuple[Base, list[AdapterFolder | None]]:
    """The config's base, in the precision of the first adapter that has a manifest unless the config names one; and the
    adapters' folders, None for the bare base. Raises GraftError."""
    adapters = [None if name is None else open_adapter(name, config.store, model=config.model) for name in names]
    manifests = [folder.manifest for folder in adapters if folder is not None and folder.manifest]
    trained_on = manifests[0].get("base", {}).get("precision") if manifests else None
    precision = config.base_precision or trained_on or checkpoint_precision(config.model, config.trust_remote_code)
    base = load_base(
        config.model, precision=precision, compute_dtype=config.compute_dtype, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    return base, adapters


def sampling_of(config: GenerateConfig | ChatConfig) -> SamplingParams:
    """How the config's tokens are sampled."""
    return SamplingParams(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
