"""Where a model's weights are in its checkpoint: which rows of which tensor of which file.

A checkpoint's tensors are not always the model's: separate experts are stacked, gate and up projections are joined, names
have changed. transformers converts them while it loads. To write a checkpoint in its own layout, the same conversion runs
once on row numbers instead of rows; the result says which tensor each row of a weight comes from.

    span        rows `first .. first + count` of a tensor  are  rows `row .. row + count` of a weight
    rows        of W (out, in) its out; of a stack (E, out, in) all of them, expert by expert
    by_column   the tensor has W transposed (Conv1D), so its rows are columns
"""

# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    _MODEL_TO_CONVERSION_PATTERN,
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from graftlm.base.fingerprint import weight_files
from graftlm.base.gguf_tensors import read_tensor
from graftlm.base.precision import dequantize
from graftlm.errors import ModelError
from graftlm.gguf.folder import gguf_of, layout_of
from graftlm.gguf.layout import checkpoint_names
from graftlm.tensorfile import TensorInfo, read_header


@dataclass(frozen=True)
class WeightLayout:
    """A weight in the model: W (out, in) or (E, out, in), and whether its parameter is transposed."""

    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def out(self) -> int:
        return self.shape[-2]


@dataclass(frozen=True)
class RowSpan:
    """Some rows of a weight, and where they are in the checkpoint; all within one expert."""

    weight: str
    row: int
    tensor: str
    first: int
    count: int
    by_column: bool


class Checkpoint:
    """The tensors of a model folder's safetensors files, read in place, or of the GGUF file that it stands for, as float32."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises ModelError for files that are missing, damaged, or have one tensor twice."""
        self.folder = folder
        self.files = weight_files(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.place: dict[str, Path] = {}
        self.gguf = gguf_of(folder)
        if self.gguf is not None:
            self._layout = layout_of(self.gguf)
            self._names = checkpoint_names(self.gguf.path, self._layout, self.gguf.tensors)
            for name, place in self._names.items():
                tensor = self.gguf.tensors[place]
                self.tensors[name] = TensorInfo("F32", tensor.shape, tensor.first, tensor.last)
                self.place[name] = Path("model.safetensors")  # where a folder with these weights has them
            return
        for file in self.files:
            for name, info in read_header(file, ModelError).items():
                if name in self.place:
                    raise ModelError(f"{folder}: tensor '{name}' is in {self.place[name].name} and in {file.name}")
                self.tensors[name], self.place[name] = info, file
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """A tensor, memory-mapped from its file, which takes no memory of this process.

        One of a GGUF file is dequantized to float32, which takes memory for this one tensor.
        """
        if self.gguf is not None:
            return dequantize(read_tensor(self.gguf, self._layout, name, self._names[name]), torch.float32)
        file = self.place[name]
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file].get_tensor(name)

    def rows(self, span: RowSpan) -> Tensor:
        """The rows of a span, (count, in), as a view if the tensor's layout allows it."""
        tensor, last = self.read(span.tensor), span.first + span.count
        if not span.by_column:
            return tensor.reshape(-1, tensor.shape[-1])[span.first : last]
        if tensor.ndim == 2:
            return tensor[:, span.first : last].T
        expert, first = divmod(span.first, tensor.shape[-1])
        return tensor[expert, :, first : first + span.count].T

    def close(self) -> None:
        """Close the files."""
        self._open.clear()


def names_of(model: Any, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Each tensor's parameter, as in transformers' loader: tensor -> (parameter, converter's pattern or None).

    Tensors that the architecture does not use are left out.
    """
    renamings, converters = _mapping(model)
    prefix, known = model.base_model_prefix, model.state_dict()
    found: dict[str, tuple[str, str | None]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if renamed in known:
            found[name] = (renamed, pattern)
    return found


def _mapping(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    steps = get_model_conversion_mapping(model)
    return (
        [step for step in steps if isinstance(step, WeightRenaming)],
        [step for step in steps if isinstance(step, WeightConverter)],
    )


def spans_of(
    model: Any, shapes: Mapping[str, tuple[int, ...]], forms: Mapping[str, WeightLayout], folder: Path | str
) -> dict[str, list[RowSpan]]:
    """For each weight, by its parameter's name, the spans that its rows come from, in order.

    `model` may be on the meta device, `shapes` are the checkpoint's tensors. Raises ModelError for a weight that is missing,
    or whose conversion does more than move rows.
    """
    found: dict[str, list[RowSpan]] = {}
    joined: dict[str, dict[str, list[str]]] = {}  # parameter -> converter's pattern -> tensors
    for name, (parameter, pattern) in names_of(model, shapes).items():
        if pattern is not None:
            joined.setdefault(parameter, {}).setdefault(pattern, []).append(name)
        elif parameter in forms:
            form = forms[parameter]
            expected = (*form.shape[:-2], form.shape[-1], form.shape[-2]) if form.transposed else form.shape
            if shapes[name] != expected:
                raise ModelError(f"{folder}: tensor '{name}' has shape {shapes[name]}, the config asks for {expected}")
            found[parameter] = [
                RowSpan(parameter, start, name, start, form.out, form.transposed)
                for start in range(0, form.rows, form.out)
            ]
    _, converters = _mapping(model)
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    for parameter, groups in joined.items():
        step = by_pattern[next(iter(groups))]
        names = [parameter.replace(step.target_patterns[0], t) for t in step.target_patterns]
        if not any(name in forms for name in names):
            continue
        for by_column in (False, True):
            made = _converted(model, step, parameter, groups, shapes, by_column)
            spans = {n: _spans(n, forms[n], *made[n], by_column) for n in names if n in forms and n in made}
            if spans and all(spans.values()):
                found.update({n: s for n, s in spans.items() if s})
                break
        else:
            raise ModelError(
                f"{folder}: '{parameter}' is converted in another way than by moving rows, so it cannot be written "
                "back; please report this architecture"
            )
    missing = sorted(forms.keys() - found.keys())
    if missing:
        raise ModelError(f"{folder}: the checkpoint has no tensor for '{missing[0]}'")
    return found


def _converted(
    model: Any, step: WeightConverter, parameter: str, groups: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]], by_column: bool,
) -> dict[str, tuple[Tensor, list[tuple[str, int]]]]:  # fmt: skip
    """Run a converter on row numbers: parameter -> (its row numbers, where each tensor's numbers begin)."""
    run = deepcopy(step)
    starts: list[tuple[str, int]] = []
    start = 0
    for pattern, names in groups.items():
        for name in names:
            shape = list(shapes[name])
            shape[-2 if by_column else -1] = 1
            numbers = torch.arange(start, start + math.prod(shape)).view(shape)
            run.add_tensor(parameter, name, pattern, numbers)  # pyright: ignore[reportArgumentType]
            starts.append((name, start))
            start += numbers.numel()
    try:
        made = run.convert(parameter, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError):
        return {}
    first: dict[str, Any] = {n: t[0] if isinstance(t, list) else t for n, t in made.items()}  # pyright: ignore
    return {n: (t, starts) for n, t in first.items()}


def _spans(
    weight: str, form: WeightLayout, numbers: Tensor, starts: list[tuple[str, int]], by_column: bool
) -> list[RowSpan] | None:
    """Row numbers as spans; None if they are not exactly this weight's rows."""
    if numbers.numel() != form.rows or numbers.dtype != torch.int64:
        return None
    flat = numbers.flatten().tolist()
    spans: list[RowSpan] = []
    at = 0
    bounds = [s for _, s in starts]
    while at < len(flat):
        which = bisect.bisect_right(bounds, flat[at]) - 1
        name, begin = starts[which]
        end = bounds[which + 1] if which + 1 < len(bounds) else math.inf
        stop = at - at % form.out + form.out  # the end of this expert
        last = at + 1
        while last < stop and flat[last] == flat[last - 1] + 1 and flat[last] < end:
            last += 1
        spans.append(RowSpan(weight, at, name, flat[at] - begin, last - at, by_column))
        at = last
    return spans


def mixture_of_v4(model: PreTrainedModel) -> str | None:
    """The mixture for which PEFT rewrites transformers 4 names in a config: `mixtral`, `qwen2_moe`, or None.

    The same as in `_convert_peft_config_moe` of PEFT 0.21.
    """
    kind = str(getattr(model.config, "model_type", ""))
    known = {**_MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    return known.get(kind) if get_checkpoint_conversion_mapping(kind) is not None else None
