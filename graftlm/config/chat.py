"""Options of `graft chat`."""

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


class ChatConfig(Config):
    """Options of `graft chat`."""

    model: str = option(..., "base model: a directory, a hub id, or `demo`")
    adapter: str | None = option(
        None, "adapter that answers: a version such as formal@prod, or a folder; default the base"
    )
    beside: str | None = option(None, "second adapter, shown side by side with the first, or `base`")
    store: Path = option(Path("adapters"), "store of named adapters")
    system: str | None = option(None, "system message in front of the conversation")
    format: Literal["auto", "chat", "text"] = option(
        "auto", "chat applies the chat template; auto does what the adapter was trained with"
    )
    max_tokens: int = option(256, "most tokens in an answer", ge=1)
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
        if self.beside is not None and self.beside == (self.adapter or "base"):
            raise ValueError(f"beside: '{self.beside}' is what answers already; name another one")
        refuse_unused_sampling_options(self.temperature, self.model_fields_set)
        return self
