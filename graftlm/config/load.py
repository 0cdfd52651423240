"""Options of `graft.load` in Python."""

from __future__ import annotations

from graftlm.config.fields import ComputeDtype, Config, Precision, option


class LoadConfig(Config):
    """Options of `graft.load`."""

    model: str = option(..., "base model: a directory, a hub id, or `demo`")
    base_precision: Precision | None = option(None, "how the base is stored; default the checkpoint's own type")
    compute_dtype: ComputeDtype | None = option(None, "matmul dtype; default by hardware")
    device: str | None = option(None, "cpu, cuda, ...; default the first GPU, else the CPU")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
