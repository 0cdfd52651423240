"""Options of `graft generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from graftlm.config.fields import (
    ComputeDtype,
    Config,
    Precision,
    option,
    refuse_unused_sampling_options,
    temperature_option,
)


class GenerateConfig(Config):
    """Options of `graft generate`."""

    model: str = option(..., "base model: a directory, a hub id, or `demo`")
    adapter: Path | None = option(None, "adapter to use: a folder, or a version in the store such as formal@prod")
    store: Path | None = option(None, "store of named adapters; default ./adapters")
    prompt: str = option(..., "what to answer; `-` reads standard input")
    system: str | None = option(None, "system message in front of a chat prompt")
    format: Literal["auto", "chat", "text"] = option(
        "auto", "chat applies the chat template; auto does what the adapter was trained with"
    )
    max_tokens: int = option(128, "most tokens to generate", ge=1)
    temperature: float = temperature_option()
    top_p: float = option(
        1.0, "nucleus sampling: sample from the likeliest tokens that together have this probability", gt=0, le=1
    )
    seed: int = option(0, "seed of sampling", ge=0)
    base_precision: Precision | None = option(
        None, "how the base is stored; default what the adapter was trained on, else the checkpoint's own type"
    )
    compute_dtype: ComputeDtype | None = option(None, "matmul dtype; default by hardware")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    device: str | None = option(None, "cpu, cuda, ...; default the first GPU, else the CPU")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.store is not None and self.adapter is None:
            raise ValueError("--store is for --adapter NAME, such as formal@prod; give both, or leave it out")
        refuse_unused_sampling_options(self.temperature, self.model_fields_set)
        return self
