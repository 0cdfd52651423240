"""Merge adapters into their base's weights, tensor by tensor of the checkpoint.

    W' = round(W + s B A)                          LoRA; in float32 from the pristine W, rounded once
    W' = round(m / |W + s B A| (W + s B A))        DoRA, row by row
    W' = round(V)                                  a module trained in full, or rows of it

W is the checkpoint's own weight (`original`), or the weight as the base stored it in training (`dequantized`). With the latter
every stored layer is written dequantized, adapted or not, since that is the model that was trained. Tensors are processed in
blocks of rows, so that memory holds one tensor in its final dtype and a few blocks.

Letters: n rows of a block; W (out, in), or a stack (E, out, in) whose rows count through all experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftlm.adapters.attach import Adapter
from graftlm.adapters.combine import MergeRecipe, combine, dropped, threshold
from graftlm.adapters.layer_adapter import LayerAdapter, LowRank, ModulesToSave, TrainableTokens
from graftlm.base.checkpoint_layout import RowSpan, names_of
from graftlm.base.meta_base import MetaBase
from graftlm.base.modules import StoredLinear
from graftlm.base.precision import DTYPES, dequantize, embedding_precision, quantize
from graftlm.base.safetensors_writer import dtype_of
from graftlm.config import Precision
from graftlm.config.merge import Onto
from graftlm.errors import AdapterError, ModelError
from graftlm.kernels import Int8, Nf4, Weight

_BLOCK = 1 << 19
"""Most values in a block: 2 MB in float32; about ten blocks are in memory at a time."""


@dataclass
class Rounding:
    """How much of the updates was lost to rounding when they were written."""

    wanted: float = 0.0
    """Sum of squares of the updates."""
    lost: float = 0.0
    """Sum of squares of the rounding errors."""
    changed: int = 0
    unmoved: int = 0
    """Number of values that an update should change and that rounded to the base's value."""

    def add(self, base: Tensor, merged: Tensor, dtype: torch.dtype) -> None:
        """Count a block: base and merged (n, in) in float32, and the dtype they are rounded to."""
        update = merged - base
        written = merged.to(dtype).float() - base.to(dtype).float()
        hit = update != 0
        self.changed += int(hit.sum())
        self.unmoved += int((hit & (written == 0)).sum())
        self.wanted += float(update.square().sum(dtype=torch.float64))
        self.lost += float(update.sub_(written).square_().sum(dtype=torch.float64))

    @property
    def share(self) -> float:
        """|U - written| / |U| over all updates."""
        return (self.lost / self.wanted) ** 0.5 if self.wanted else 0.0


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and its merge weight."""

    adapter: Adapter
    weight: float = 1.0


@dataclass
class Merger:
    """Computes a base's tensors with adapters merged into them."""

    base: MetaBase
    adapters: Sequence[WeightedAdapter]
    recipe: MergeRecipe = field(default_factory=MergeRecipe)
    onto: Onto = "original"
    rounding: Rounding = field(default_factory=Rounding)

    def __post_init__(self) -> None:
        """Group the adapters' tensors by weight. Raises AdapterError for a layer that cannot be merged into any weight."""
        base = self.base
        self.parts: dict[str, list[tuple[int, LayerAdapter]]] = {}
        embedding, head = (f"{n}.weight" for n in (base.structure.embedding_name, base.structure.head_name))
        for index, given in enumerate(self.adapters):
            for layer, part in given.adapter.layers.items():
                parameter = base.parameter_of(layer)
                if parameter not in base.forms:
                    raise AdapterError(
                        f"'{layer}' has no weight of its own in the checkpoint, so nothing can be merged"
                    )
                self.parts.setdefault(parameter, []).append((index, part))
                # As in `attach`: rows of a tied embedding are the head's too, a full copy of the embedding is not.
                shared = (
                    base.tied and isinstance(part, TrainableTokens) and isinstance(base.structure.head, StoredLinear)
                )
                if shared and parameter == embedding and base.structure.head_name not in given.adapter.layers:
                    self.parts.setdefault(head, []).append((index, part))
        same = [(i, id(s)) for i, s in self.parts.get(embedding, [])] == [
            (i, id(s)) for i, s in self.parts.get(head, [])
        ]
        self.unties = base.tied and not same
        """Whether embedding and head are tied in the base and no longer can be."""
        self.embedding, self.head = embedding, head
        if base.tied and not self.unties:
            self.parts.pop(head, None)
        self._stored: dict[str, Weight] = {}
        self._cuts: dict[tuple[str, int, int], float] = {}
        self._precisions: dict[str, Precision] = {n: p for n, (_, p) in base.stored_forms().items()}
        kept = embedding_precision(base.precision)
        self._precisions.update({embedding: kept, head: kept})
        self.spans = base.spans()
        heads = [n for n, (p, _) in names_of(base.plain, base.checkpoint.tensors).items() if p == head]
        self.head_copies = heads if base.tied else []
        """Tensors of the checkpoint that repeat a tied embedding as the head."""
        self._by_tensor: dict[str, list[RowSpan]] = {}
        for weight, spans in self.spans.items():
            if self.touches(weight):
                for span in spans:
                    self._by_tensor.setdefault(span.tensor, []).append(span)

    # ---- merged tensors ----------------------------------------------------------------------------------------------

    def touches(self, weight: str) -> bool:
        """Whether a weight may differ from the checkpoint's after merging."""
        return weight in self.parts or (self.onto != "original" and self._precisions[weight] != "float32")

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A merged tensor of the checkpoint, in its own layout."""
        spans = self._by_tensor.get(name)
        old = self.base.checkpoint.read(name)
        if spans is None:
            return old.to(dtype) if old.is_floating_point() else old
        # Rows outside the spans keep their values.
        whole = sum(s.count for s in spans) * self.base.forms[spans[0].weight].shape[-1] == old.numel()
        new = torch.empty(old.shape, dtype=dtype) if whole else old.to(dtype, copy=True)
        for span in spans:
            for row, rows in self._blocks(span.weight, span):
                first = span.first + row - span.row
                if not span.by_column:
                    new.view(-1, new.shape[-1])[first : first + len(rows)] = self._rounded(
                        span.weight, row, rows, dtype
                    )
                else:
                    expert, column = divmod(first, new.shape[-1]) if new.ndim == 3 else (0, first)
                    into = new[expert] if new.ndim == 3 else new
                    into[:, column : column + len(rows)] = self._rounded(span.weight, row, rows, dtype).T
        self._forget(name)
        return new

    def weight(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """A merged weight, (out, in) or (E, out, in), from whichever tensors of the checkpoint hold it."""
        form = self.base.forms[parameter]
        if self.base.tied and parameter == self.head:
            spans = [
                RowSpan(parameter, s.row, s.tensor, s.first, s.count, s.by_column) for s in self.spans[self.embedding]
            ]
        else:
            spans = self.spans[parameter]
        new = torch.empty(form.rows, form.shape[-1], dtype=dtype)
        for span in spans:
            for row, rows in self._blocks(parameter, span):
                new[row : row + len(rows)] = self._rounded(parameter, row, rows, dtype)
        self._stored.pop(parameter, None)
        return new.view(form.shape)

    def source_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the checkpoint. Raises ModelError for one that torch cannot compute with."""
        kind = self.base.checkpoint.tensors[name].dtype
        dtype = dtype_of(kind)
        if dtype is None:
            raise ModelError(
                f"{self.base.folder}: tensor '{name}' is of type {kind}; merge into the 16-bit original of this model"
            )
        return dtype

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _blocks(self, weight: str, span: RowSpan) -> Iterator[tuple[int, Tensor]]:
        """The base's rows of a span in float32, a block at a time: (number of the first row, (n, in))."""
        compressed = self._compressed(weight)
        step = max(1, _BLOCK // self.base.forms[weight].shape[-1])
        for start in range(0, span.count, step):
            count = min(step, span.count - start)
            row = span.row + start
            if compressed is not None:
                yield row, _rows_of(compressed, self.base.forms[weight].out, row, count)
                continue
            piece = RowSpan(weight, row, span.tensor, span.first + start, count, span.by_column)
            rows = self.base.checkpoint.rows(piece)
            if self.onto != "original":
                rows = rows.to(DTYPES[self._precisions[weight]])
            yield row, rows.float()

    def _compressed(self, weight: str) -> Nf4 | Int8 | None:
        """The weight as the base stores it in 4 or 8 bits; None if it is stored in 16 or 32 bits, or for `original`."""
        precision = self._precisions[weight]
        if self.onto == "original" or precision not in ("nf4", "int8"):
            return None
        if weight not in self._stored:
            form = self.base.forms[weight]
            spans = self.spans[weight]
            dense = self.base.checkpoint.read(spans[0].tensor)
            if spans[0].by_column or tuple(dense.shape) != form.shape:  # transposed, or assembled from several tensors
                dense = torch.empty(form.rows, form.shape[-1], dtype=dense.dtype)
                for span in spans:
                    dense[span.row : span.row + span.count] = self.base.checkpoint.rows(span)
            self._stored[weight] = quantize(dense.reshape(form.shape), precision)
        found = self._stored[weight]
        assert isinstance(found, Nf4 | Int8)
        return found

    def _forget(self, tensor: str) -> None:
        """Free the stored forms of weights whose last tensor has been computed."""
        for span in self._by_tensor.pop(tensor, []):
            left = any(s.weight == span.weight for spans in self._by_tensor.values() for s in spans)
            if not left:
                self._stored.pop(span.weight, None)

    def _rounded(self, weight: str, row: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Merged rows (n, in) in the dtype they are written in."""
        merged = self.merged(weight, row, rows)
        if dtype != torch.float32 and weight in self.parts:
            self.rounding.add(rows, merged, dtype)
        return merged.to(dtype)

    @torch.no_grad()
    def merged(self, weight: str, row: int, rows: Tensor) -> Tensor:
        """Merged rows (n, in) in float32, from base rows that start at row `row` of the weight."""
        parts = self.parts.get(weight)
        if not parts:
            return rows
        form = self.base.forms[weight]
        expert, first = divmod(row, form.out) if len(form.shape) == 3 else (None, row)
        if len(parts) == 1 and self.adapters[parts[0][0]].weight == 1 and self.recipe.kind == "linear":
            return applied(parts[0][1], rows, expert, first)
        updates: list[Tensor] = []
        for index, part in parts:
            update = update_of(part, rows, expert, first)
            if self.recipe.kind == "ties":
                cut = self._cut(weight, index, part, expert)
                update = update * (update.abs() >= cut)
            elif self.recipe.kind != "linear":
                key = (weight, -1 if expert is None else expert, index)
                update = dropped(update, self.recipe.density, self.recipe.seed, key, first)
            updates.append(update)
        weights = [self.adapters[index].weight for index, _ in parts]
        return rows + combine(updates, weights, self.recipe.kind)

    def _cut(self, weight: str, index: int, part: LayerAdapter, expert: int | None) -> float:
        """The threshold at which TIES trims an adapter's update of a weight, or of one expert of a stack; computed once."""
        key = (weight, -1 if expert is None else expert, index)
        if key not in self._cuts:
            form = self.base.forms[weight]
            begin = (expert or 0) * form.out
            pieces: list[Tensor] = []
            for span in self.spans.get(weight) or self.spans[self.embedding]:
                if begin <= span.row < begin + form.out:
                    for row, rows in self._blocks(weight, span):
                        pieces.append(update_of(part, rows, expert, row - begin))
            self._cuts[key] = threshold(torch.cat(pieces), self.recipe.density)
        return self._cuts[key]


def applied(part: LayerAdapter, rows: Tensor, expert: int | None, first: int) -> Tensor:
    """Rows `first ..` of W (n, in) in float32 with one adapter applied."""
    last = first + len(rows)
    if isinstance(part, ModulesToSave):
        return part.weight[first:last].float()
    if isinstance(part, TrainableTokens):
        new = rows.clone()
        for place, token in enumerate(part.tokens):
            if first <= token < last:
                new[token - first] = part.values[place].float()
        return new
    combined = rows + low_rank_rows(part, expert, first, last)
    if part.magnitude is None:
        return combined
    norms = torch.linalg.vector_norm(combined, dim=1, keepdim=True)  # (n, 1)
    return combined * (part.magnitude[first:last, None] / norms)


def low_rank_rows(part: LowRank, expert: int | None, first: int, last: int) -> Tensor:
    """Rows first..last of s B A, (n, in)."""
    A, B = part.factors(expert)
    return part.scale * (B[first:last].float() @ A.float())


def update_of(part: LayerAdapter, rows: Tensor, expert: int | None, first: int) -> Tensor:
    """The update that one adapter makes to rows `first ..` of W, (n, in)."""
    if isinstance(part, LowRank) and part.magnitude is None:
        return low_rank_rows(part, expert, first, first + len(rows))
    return applied(part, rows, expert, first) - rows


def _rows_of(stored: Nf4 | Int8, out: int, row: int, count: int) -> Tensor:
    """Rows of a quantized weight in float32; all within one expert of a stack."""
    if len(stored.shape) == 3:
        expert, row = divmod(row, out)
        stored = stored[expert]
    return dequantize(stored.narrow(row, count), torch.float32)
