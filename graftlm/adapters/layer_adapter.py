"""The trained tensors of one adapter on one layer, as a `LayerBank` holds it.

    LowRank           A and B, and DoRA's magnitude
    ModulesToSave     a full copy of the weight (PEFT's `modules_to_save`)
    TrainableTokens   some rows of an embedding (PEFT's `trainable_token_indices`)

Letters: `in`, `out` features, r rank, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from graftlm import kernels
from graftlm.adapters.dora import combined_norm, row_norms
from graftlm.adapters.factor_copies import FactorCopies
from graftlm.base.modules import Stored, StoredStack
from graftlm.base.precision import Weight
from graftlm.kernels.counter_rng import hash_words, uniform


def scale_of(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """s = alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


@dataclass(eq=False)
class LowRank:
    """One adapter's A and B on one layer. For stacked experts both hold all experts, in PEFT's layout."""

    A: nn.Parameter  # (r, in), or (E r, in)
    B: nn.Parameter  # (out, r), or (out, r E) with the expert running fastest
    scale: float
    alpha: float
    rank: int
    dropout: float = 0.0
    dropout_key: int = 0
    """Identifies this layer in the random numbers of dropout."""
    experts: int = 0
    magnitude: nn.Parameter | None = None  # (out,), DoRA's m
    copies: FactorCopies | None = field(default=None, init=False)
    """Set by `attach` for an adapter that is trained on a GPU."""
    _dora_scale: Tensor | None = None

    def factors(self, expert: int | None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the layer, or of one of its experts."""
        if expert is None:
            return self.A, self.B
        A = self.A.view(self.experts, self.rank, -1)[expert]
        B = self.B.view(-1, self.rank, self.experts)[:, :, expert]
        return A, B

    def factors_in(self, dtype: torch.dtype, expert: int | None) -> tuple[Tensor, ...]:
        """A (r, in) and B (out, r) in `dtype`, for matmuls alone, where they are at hand (`copies`); else none."""
        if self.copies is None or expert is not None or self.A.dtype == dtype:
            return ()
        return self.copies.of(self, dtype)

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (E, r, in) and B (E, out, r) of all experts of a stack in `dtype`, each end to end; gradients flow to A and B."""
        A = self.A.view(self.experts, self.rank, -1)
        B = self.B.view(-1, self.rank, self.experts).permute(2, 0, 1)
        return A.to(dtype), B.to(dtype, memory_format=torch.contiguous_format).contiguous()

    def for_decoding(self, gpu_dtype: torch.dtype | None = None) -> LowRank:
        """The same values in the layout that decodes fastest: B transposed in memory, and bfloat16 if that is lossless.

        `gpu_dtype` is that of matmuls on a GPU, in which A and B are used there, and kept; DoRA's scale needs them as they are.
        """
        rounded = gpu_dtype if self.A.is_cuda and self.magnitude is None else None

        def in_bfloat16(tensor: Tensor) -> Tensor:
            if rounded is not None:
                return tensor.to(rounded)
            half = tensor.to(torch.bfloat16)
            return half if torch.equal(half.float(), tensor) else tensor

        if self.experts:
            return self
        A, B = in_bfloat16(self.A.detach()).contiguous(), in_bfloat16(self.B.detach()).T.contiguous().T
        return replace(self, A=nn.Parameter(A, requires_grad=False), B=nn.Parameter(B, requires_grad=False))

    @property
    def decode_ready(self) -> bool:
        """Whether decoding's kernels can use these factors (see `for_decoding`)."""
        return not (self.experts or self.A.requires_grad) and self.decode_factors.ready

    @cached_property
    def decode_factors(self) -> kernels.Factors:
        """A, B and the scale in the form of decoding's kernels."""
        return kernels.Factors(self.A.detach(), self.B.detach(), self.scale)

    def norm(self, weight: Weight, squares: Tensor, dtype: torch.dtype) -> Tensor:
        """|w + s b A| of each row (out,), of W (out, in) whose rows have `squares` |w|^2, for an input of `dtype`."""
        used = self.factors_in(dtype, None)
        return combined_norm(squares, weight, self.A.float(), self.B.float(), self.scale, used[0] if used else None)

    def dora_scale(self, weight: Weight, squares: Tensor) -> Tensor:
        """m / |W + s B A| (out,), for forward passes without gradients; cached, since a server's A and B do not change."""
        assert self.magnitude is not None
        if self._dora_scale is None:
            self._dora_scale = self.magnitude.detach() / self.norm(weight, squares, torch.float32)
        return self._dora_scale

    def named(self) -> dict[str, nn.Parameter]:
        """The trained tensors, under the names that PEFT gives them."""
        found = {"lora_A.weight": self.A, "lora_B.weight": self.B}
        if self.magnitude is not None:
            found["lora_magnitude_vector"] = self.magnitude
        return found


@dataclass(eq=False)
class ModulesToSave:
    """A module trained in full for one adapter (PEFT's `modules_to_save`): a copy of its weight, in float32."""

    weight: nn.Parameter  # (out, in)

    def named(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}


@dataclass(eq=False)
class TrainableTokens:
    """Some rows of an embedding (and of a head tied to it) trained for one adapter (PEFT's `trainable_token_indices`)."""

    tokens: tuple[int, ...]
    values: nn.Parameter  # (rows, width), the rows themselves
    lookup: Tensor = field(init=False)  # (vocabulary,) row of a token id, -1 for others

    vocabulary: int = 0

    def __post_init__(self) -> None:
        self.lookup = torch.full((self.vocabulary,), -1, dtype=torch.long)
        self.lookup[list(self.tokens)] = torch.arange(len(self.tokens))
        self.lookup = self.lookup.to(self.values.device)

    def named(self) -> dict[str, nn.Parameter]:
        return {"token_adapter.trainable_tokens_delta": self.values}


LayerAdapter = LowRank | ModulesToSave | TrainableTokens


def new_low_rank(
    module: Stored,
    name: str,
    *,
    rank: int,
    alpha: float,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
) -> LowRank:
    """An untrained adapter of one layer: A uniform within 1 / sqrt(in), like `nn.Linear`; B zero, so the output stays.

    A depends on (seed, layer name) only, whatever other layers or trials there are.
    """
    device = module.value.device
    experts = module.experts if isinstance(module, StoredStack) else 0
    out_features, in_features = module.shape[-2:]
    bound = 1.0 / math.sqrt(in_features)
    rows = rank * max(experts, 1)
    A = (uniform((rows, in_features), seed, "A", name) * 2 - 1) * bound
    B = torch.zeros(out_features, rows)
    magnitude = None
    if dora:
        magnitude = nn.Parameter(row_norms(module.whole))
    return LowRank(
        A=nn.Parameter(A.to(device)),
        B=nn.Parameter(B.to(device)),
        scale=scale_of(alpha, rank, rank_stabilized),
        alpha=alpha,
        rank=rank,
        dropout=dropout,
        dropout_key=hash_words("dropout", name),
        experts=experts,
        magnitude=magnitude,
    )
