"""The tensors of a checkpoint: what is whole in one file, and the rows of split weights, which each rank writes into its own.

    trainable.safetensors, optimizer.safetensors   NAME; mean.NAME, square.NAME, and in 8 bits mean_scale.NAME, ...
    rows-00002-of-00004.safetensors                the same of the second rank's rows, parameters as value.NAME

Ranks keep rows in order, so a tensor is the rows of all files one after another, and any number of ranks reads those that it
needs. What makes a whole is in the checkpoint's state (how many files) and in the headers (how many rows): a file that is
missing, or of other sizes, is refused. PyTorch's DCP would write the same rows; its reader of safetensors leaves rows that it
finds no file for as they were, without an error, and its writer makes each file in memory first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm import kernels
from graftlm.base.safetensors_writer import TensorSpec, dtype_of, write_tensors
from graftlm.distributed.group import Ranks
from graftlm.distributed.shard import local, offset
from graftlm.errors import RunError
from graftlm.files import atomic_folder, sha256
from graftlm.kernels import Moments
from graftlm.kernels.moments import MOMENT_BLOCK
from graftlm.progress import sign_of_life
from graftlm.tensorfile import TensorInfo, read_header

TRAINABLE, OPTIMIZER = "trainable.safetensors", "optimizer.safetensors"
_MOMENTS = ("mean", "square", "mean_scale", "square_scale")


def rows_file(rank: int, ranks: int) -> str:
    """The name of a rank's file."""
    return f"rows-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One tensor after another, the widest types first, so that each begins at a multiple of its type.

    The library's own function makes all of the file in memory before it writes: once more what a run holds already.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    write_tensors(path, specs, lambda name: ordered[name].detach().cpu().contiguous())


@dataclass(frozen=True)
class _Part:
    """Some values of a tensor: from number `first` on, in a file."""

    first: int
    file: Path
    info: TensorInfo

    @property
    def count(self) -> int:
        return math.prod(self.info.shape)


class SavedTensors:
    """The tensors of one checkpoint, none of them read yet."""

    def __init__(self, folder: Path, ranks: int = 1) -> None:
        """`ranks` wrote it. Raises RunError for files that are missing, unreadable, or that do not belong together."""
        self.folder = folder
        self._parts: dict[str, list[_Part]] = {}
        for file, prefix in ((folder / TRAINABLE, "value."), (folder / OPTIMIZER, "")):
            for name, info in read_header(file, RunError).items():
                self._parts[prefix + name] = [_Part(0, file, info)]
        for rank in range(ranks) if ranks > 1 else ():
            file = folder / rows_file(rank, ranks)
            for name, info in read_header(file, RunError).items():
                before = self._parts.setdefault(name, [])
                if before and (rank == 0 or before[0].info.shape[1:] != info.shape[1:]):
                    raise RunError(f"{folder} holds '{name}' twice, in {before[0].file.name} and {file.name}")
                before.append(_Part(before[-1].first + before[-1].count if before else 0, file, info))

    @property
    def names(self) -> set[str]:
        """The trained tensors."""
        return {key.removeprefix("value.") for key in self._parts if key.startswith("value.")}

    @property
    def with_moments(self) -> set[str]:
        """The tensors that the optimizer has states of."""
        return {key.partition(".")[2] for key in self._parts if key.partition(".")[0] in _MOMENTS}

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """A trained tensor's shape, and its type as torch names it."""
        parts = self._parts[f"value.{name}"]
        shape, dtype = parts[0].info.shape, dtype_of(parts[0].info.dtype)
        if len(parts) > 1:
            shape = (sum(part.info.shape[0] for part in parts), *shape[1:])
        return shape, str(dtype).removeprefix("torch.")

    def own_rows(self, name: str, parameter: Tensor) -> Tensor:
        """This rank's rows of a trained tensor that has the parameter's shape."""
        first, own = offset(parameter), local(parameter)
        return self._values(f"value.{name}", first, first + own.numel()).view(own.shape)

    def own_moments(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The states of this rank's values of a tensor, by kind, flat: in 8 bits where its blocks are whole ones there.

        Raises ValueError for states of another number of values.
        """
        kinds = [kind for kind in _MOMENTS if f"{kind}.{name}" in self._parts]
        first, last = offset(parameter), offset(parameter) + local(parameter).numel()
        found = {kind: sum(part.count for part in self._parts[f"{kind}.{name}"]) for kind in kinds}
        blocks = -(-parameter.numel() // MOMENT_BLOCK)
        wrong = [k for k, n in found.items() if n != (blocks if k.endswith("_scale") else parameter.numel())]
        if wrong:
            raise ValueError(f"{wrong[0]} of '{name}' has {found[wrong[0]]} values, which has {parameter.numel()}")
        if "mean_scale" not in kinds:
            return {kind: self._values(f"{kind}.{name}", first, last) for kind in kinds}
        begin, end = first // MOMENT_BLOCK, -(-last // MOMENT_BLOCK)
        start, stop = begin * MOMENT_BLOCK, min(end * MOMENT_BLOCK, parameter.numel())
        around = {
            kind: self._values(f"{kind}.{name}", *((begin, end) if kind.endswith("_scale") else (start, stop)))
            for kind in kinds
        }
        if (start, stop) == (first, last):
            return around
        wide = kernels.moments_in(Moments(**around), False, key=())
        return {kind: tensor[first - start : last - start] for kind, tensor in wide.tensors().items()}

    def _values(self, key: str, first: int, last: int) -> Tensor:
        """Values `first` .. `last` of a tensor, flat."""
        found: list[Tensor] = []
        for part in self._parts[key]:
            begin, end = max(first, part.first), min(last, part.first + part.count)
            if begin < end or (first == last and not found):
                found.append(_read(part.file, part.info, begin - part.first, max(begin, end) - part.first))
        return found[0] if len(found) == 1 else torch.cat(found)


def _read(file: Path, info: TensorInfo, first: int, last: int) -> Tensor:
    """Values `first` .. `last` of a file's tensor, flat. Raises RunError."""
    dtype = dtype_of(info.dtype)
    if dtype is None:
        raise RunError(f"{file} holds values of type {info.dtype}, which no checkpoint has")
    tensor = torch.empty(last - first, dtype=dtype)
    if not tensor.numel():
        return tensor
    target: Any = tensor.view(torch.uint8).numpy()
    try:
        with file.open("rb") as stream:
            stream.seek(info.first + first * dtype.itemsize)
            read = stream.readinto(memoryview(target))
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from None
    if read != tensor.nbytes:
        raise RunError(f"{file} is cut short")
    sign_of_life()
    return tensor


@contextmanager
def written_by_all(place: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder that ranks write their rows into; the first renames it to `place`, with the checksums of all.

    Every rank enters, and leaves once it is in place. Raises RunError, on every rank, where one of them cannot write.
    """
    sums: dict[str, dict[str, Any]] = {}
    with ExitStack() as held:
        name = ranks.from_first(lambda: _opened(held, place, sums))
        folder, own = place.parent / name, rows_file(ranks.part, ranks.parts)
        with ranks.agreeing():
            if not folder.is_dir():
                raise RunError(f"{folder} is not there: --out must be on storage that all ranks share")
            try:
                yield folder
                if ranks.counted:
                    sums[own] = {"bytes": (folder / own).stat().st_size, "sha256": sha256(folder / own)}
            except OSError as error:
                raise RunError(f"{folder} could not be written to ({error})") from None
        for entries in ranks.of_all(sums):
            sums.update(entries)
        with ranks.agreeing():  # nobody goes on before it is in place
            try:
                held.close()
            except OSError as error:
                raise RunError(f"{place} could not be written to ({error})") from None


def _opened(held: ExitStack, place: Path, sums: Mapping[str, dict[str, Any]]) -> str:
    """Make the folder that is written into; returns its name. Raises RunError."""
    try:
        return held.enter_context(atomic_folder(place, manifest=True, sums=sums)).name
    except OSError as error:
        raise RunError(f"{place} could not be written to ({error})") from None
