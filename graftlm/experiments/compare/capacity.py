"""Is the rank of an adapter used up? The spectrum of s B A, layer by layer.

A trained adapter changes a weight by s B A, which has at most r singular values above zero. Its effective rank is exp(H(p)),
with p the singular values divided by their sum and H the entropy (Roy & Vetterli 2007): r if all are equal, 1 if there is a
single direction.

B A is never formed. With thin QR, B = Q_b R_b and A^T = Q_a R_a, so B A = Q_b (R_b R_a^T) Q_a^T, and Q's columns are
orthonormal: the singular values of B A are those of the r x r matrix R_b R_a^T.

An even spectrum alone does not mean that a higher rank would help, so advice considers the measured gap first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.adapters.patterns import Expressions
from graftlm.adapters.peft_format import CONFIG, TENSORS
from graftlm.errors import AdapterError
from graftlm.jsonfile import read_json

SATURATED = 0.75
"""Share of the rank in use from which a higher rank may help."""
ROOMY = 0.5
"""Share of the rank in use up to which a lower rank may be enough."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer's change, largest first, as shares of the largest."""

    layer: str
    values: tuple[float, ...]
    effective: float

    @property
    def kind(self) -> str:
        """The kind of layer: the last part of its name that is no number, `q_proj`."""
        return next((part for part in reversed(self.layer.split(".")) if not part.isdecimal()), self.layer)

    @property
    def rank(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Capacity:
    """How much of its rank an adapter uses."""

    rank: int
    """The rank of most layers."""
    effective: float
    """Median over layers."""
    share: float
    """Median over layers of effective rank / rank."""
    by_kind: dict[str, float]
    """Median effective rank of each sort of layer."""
    spectra: tuple[Spectrum, ...]

    @property
    def saturated(self) -> bool:
        return self.share >= SATURATED


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """A (r, in), B (out, r) -> the singular values of B A, (min(r, in, out),), largest first, in float64."""
    R_a = torch.linalg.qr(A.double().T, mode="r").R  # (min(in, r), r)
    R_b = torch.linalg.qr(B.double(), mode="r").R  # (min(out, r), r)
    return torch.linalg.svdvals(R_b @ R_a.T)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007); 0 where all are zero."""
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values / total
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def measure(adapter: Path) -> Capacity:
    """Spectra of every layer of a saved adapter; each expert of a stack is a layer."""
    config: dict[str, Any] = read_json(adapter / CONFIG, AdapterError)
    spectra = tuple(_spectra(load_file(adapter / TENSORS), config))
    kinds: dict[str, list[float]] = defaultdict(list)
    for spectrum in spectra:
        kinds[spectrum.kind].append(spectrum.effective)
    return Capacity(
        rank=int(_median([s.rank for s in spectra])),
        effective=_median([s.effective for s in spectra]),
        share=_median([s.effective / s.rank for s in spectra]),
        by_kind={kind: _median(found) for kind, found in sorted(kinds.items())},
        spectra=spectra,
    )


def _spectra(tensors: dict[str, Tensor], config: dict[str, Any]) -> Iterator[Spectrum]:
    ranks = Expressions(CONFIG).values("rank_pattern", config.get("rank_pattern"))
    for name in sorted(n for n in tensors if n.endswith(_A)):
        A, B = tensors[name], tensors[name.removesuffix(_A) + _B]
        layer = name.removesuffix(_A).removeprefix("base_model.model.").replace(".base_layer", "")
        # A stack of experts is one pair in PEFT's layout: A's rows expert after expert, B's columns with the expert fastest.
        experts = A.shape[0] // ranks.of_place(layer, int(config["r"]))
        for expert in range(experts):
            one_A = A.view(experts, -1, A.shape[1])[expert]  # (r, in)
            one_B = B.view(B.shape[0], -1, experts)[:, :, expert]  # (out, r)
            values = singular_values(one_A, one_B)
            shares = values / values[0] if values[0] > 0 else values
            yield Spectrum(
                f"{layer}.{expert}" if experts > 1 else layer, tuple(shares.tolist()), effective_rank(values)
            )


def _median(values: list[float] | list[int]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return float(ordered[middle]) if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
