"""A loaded base that outlives a run: lent to it, and afterwards as it was.

A run may add tokens to the tokenizer, switch activation checkpointing on, change the compute dtype and give weights
gradients. On a base of its own none of that matters; on one that is shared, the next run would depend on the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from graftlm.base.loading import Base, load_tokenizer
from graftlm.base.precision import DTYPES, default_compute_dtype
from graftlm.config import ComputeDtype
from graftlm.errors import ConfigError


@contextmanager
def computing_in(base: Base, asked: ComputeDtype | None, *, training: bool) -> Iterator[None]:
    """Run matmuls in `asked`, or in what is fastest here, for a while.

    bf16-mixed and float32 share their activations, so a base can change between them. Raises ConfigError for a dtype that
    the base was not loaded for.
    """
    before = base.compute_dtype
    wanted = asked or default_compute_dtype(base.device, training=training)
    if DTYPES[wanted] != DTYPES[before]:
        if asked is not None:
            raise ConfigError(
                f"compute-dtype {asked} is asked for, and the model was loaded in {before}; load it with "
                f"compute_dtype='{asked}'"
            )
        wanted = before
    _set(base, wanted)
    try:
        yield
    finally:
        _set(base, before)


def _set(base: Base, dtype: ComputeDtype) -> None:
    base.compute_dtype = dtype
    for module in base.stored().values():
        module.bf16_mixed = dtype == "bf16-mixed"


@contextmanager
def borrowed(base: Base, compute_dtype: ComputeDtype | None, *, adds_tokens: bool) -> Iterator[Base]:
    """Lend a base to one run. What full training made of its weights stays; everything else is as before."""
    tokenizer = base.tokenizer
    if adds_tokens:  # in place, so the run gets a tokenizer of its own
        base.tokenizer = load_tokenizer(base.folder)
    try:
        with computing_in(base, compute_dtype, training=True):
            yield base
    finally:
        base.tokenizer = tokenizer
        base.structure.checkpoint_layers(False)
        for parameter in base.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
