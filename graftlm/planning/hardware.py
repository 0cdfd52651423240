"""Machines: the cards that are planned for, and the one at hand.

    card("rtx-4090")     one of cards.toml          from_memory("24GB")   a card of which only the memory is known
    local()              this machine: its first GPU, else its processor

Not all of a card's memory is free for a run: the driver's context and PyTorch's cache take their share, which `usable` takes
off. Rates are those of the data sheets; how much of them training reaches is in `timing.py`.
"""

from __future__ import annotations

import os
import platform
import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from graftlm.config.fields import COMPUTE_DTYPE_NAMES
from graftlm.errors import ConfigError, nearest

GiB = 1 << 30
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
# CUDA's context with cuBLAS's workspaces; measured between 0.4 and 0.6 GB since Ampere.
CONTEXT_BYTES = 600_000_000
# NCCL's buffers, of a communicator of several ranks on each card; from experience.
NCCL_BYTES = 400_000_000
# What PyTorch's caching allocator holds beyond the tensors in use: its blocks are cut to sizes and not always filled.
HELD_BY_CACHE = 0.04
# A processor's memory is everybody's: the system, and this process before it has loaded anything.
SYSTEM_BYTES, INTERPRETER_BYTES = 500_000_000, 350_000_000
# Apple lets a GPU take about three quarters of the machine's memory.
SHARED_PART = 0.75
_FLOP_PER_CYCLE = {"avx512": 64, "avx2": 32, "other": 16}  # float32, of one core: two fused multiply-adds a cycle
_CLOCK = 3.0e9  # hertz, under such load
_CORE_BANDWIDTH, _MOST_BANDWIDTH = 12e9, 200e9  # bytes a second of one core, and of a socket
# Where Linux has a GPU: NVIDIA's driver, AMD's, and Windows' for WSL2.
_GPU_PATHS = ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg")
_MAKERS = ("nvidia", "tesla", "quadro", "geforce", "amd", "instinct", "radeon")
_FORM = re.compile(r"\d+gb?|sxm\d?|pcie|hbm\d?e?|oam|gpu")  # memory and form in a name: of the same card for its rates


@dataclass(frozen=True, kw_only=True)
class Card:
    """One accelerator, or a processor with its memory."""

    key: str
    name: str
    kind: Literal["cuda", "cpu", "mps"]
    memory: int
    """Bytes."""
    bandwidth: float = 0.0
    """Bytes a second; 0 where unknown."""
    float32: float = 0.0
    """FLOP a second of matmuls; 0 where unknown."""
    bfloat16: float = 0.0
    """The same in bfloat16; 0 where it has none."""
    bf16_mixed: float = 0.0
    """The same with both sides rounded to bfloat16 and sums in float32, as training takes them on some processors; else 0."""
    here: bool = False
    """Whether it is this machine's."""
    fused_dequant: bool = False
    """Whether its matmuls read weights as they are stored, so that no upcast copy is made (`kernels/native/gemm.c`)."""

    @property
    def usable(self) -> int:
        """Bytes that a run may plan with."""
        if self.kind == "cuda":
            return int((self.memory - CONTEXT_BYTES) * (1 - HELD_BY_CACHE))
        if self.kind == "mps":
            return int(self.memory * SHARED_PART - INTERPRETER_BYTES)
        return self.memory - SYSTEM_BYTES - INTERPRETER_BYTES

    def of_one_rank(self, ranks: int, on_machine: int = 1) -> Card:
        """What one of several ranks has of it: a GPU but for NCCL's buffers, or its part of a processor's memory, which the
        ranks `on_machine` share."""
        if self.kind == "cpu":
            return replace(self, memory=self.memory // on_machine)
        return replace(self, memory=self.memory - NCCL_BYTES) if self.kind == "cuda" and ranks > 1 else self

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """The type of the residual stream on it."""
        return "bfloat16" if self.bfloat16 > self.float32 or (self.kind == "cuda" and not self.float32) else "float32"

    @property
    def rate(self) -> float:
        """FLOP a second of training's matmuls; 0 where unknown."""
        return self.bf16_mixed or (self.bfloat16 if self.compute_dtype == "bfloat16" else self.float32)

    @property
    def matmul_dtype(self) -> str:
        """The matmul dtype of training, as a message names it."""
        return COMPUTE_DTYPE_NAMES["bf16-mixed" if self.bf16_mixed else self.compute_dtype]


@cache
def cards() -> dict[str, Card]:
    """Every known card by its key, smallest memory first."""
    entries = tomllib.loads(Path(__file__).with_name("cards.toml").read_text(encoding="utf-8"))
    found = [
        Card(
            key=key,
            name=entry["name"],
            kind="mps" if entry.get("shared") else "cuda",
            memory=int(entry["memory"] * GiB),
            bandwidth=entry["bandwidth"] * 1e9,
            float32=entry["fp32"] * 1e12,
            bfloat16=entry.get("bf16", 0) * 1e12,
        )
        for key, entry in entries.items()
    ]
    return {c.key: c for c in sorted(found, key=lambda c: (c.memory, c.rate))}


def card(name: str) -> Card:
    """A known card by its key or its maker's name, or `cpu` and `local` for this machine; ConfigError with the nearest."""
    if name.lower() == "local":
        return local()
    if name.lower() == "cpu":
        return processor()
    wanted = _plain(name)
    for known in cards().values():
        if wanted in (_plain(known.key), _plain(known.name)):
            return known
    keys = [*cards(), "cpu", "local"]
    raise ConfigError(
        f"unknown card '{name}'{nearest(name.lower().replace(' ', '-'), keys)} known: {', '.join(keys)}; or give its memory, "
        "such as --memory 24GB"
    )


def _plain(name: str) -> str:
    return "".join(_words(name))


def _words(name: str) -> list[str]:
    """The words of a card's name that tell cards apart."""
    return [w for w in re.sub(r"[^a-z0-9]+", " ", name.lower()).split() if w not in _MAKERS]


def from_memory(text: str) -> Card:
    """A card of which only the memory is known, "24GB" or "24GiB"; ConfigError without a unit."""
    return Card(key=text, name=f"a card of {text}", kind="cuda", memory=memory_bytes(text))


def memory_bytes(text: str) -> int:
    """Bytes of "24GB" (10^9) or "24GiB" (2^30); ConfigError for a number without a unit, or none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found and not found[2]:
        raise ConfigError(f"memory '{text}' has no unit; did you mean {found[1]}GB? GB is 10^9 bytes, GiB 2^30")
    if not found or unit is None:
        raise ConfigError(f"memory '{text}' is not understood; give a number and a unit, such as 24GB or 24GiB")
    if float(found[1]) * unit < 1e8:
        raise ConfigError(f"memory '{text}' is less than 100 MB; no run fits there")
    return int(float(found[1]) * unit)


def local(device: str | None = None) -> Card:
    """This machine: the GPU that a run would take, else the processor. PyTorch is imported only where there may be a GPU."""
    if device is None or device.startswith("cuda"):
        found = _gpu(device)
        if found is not None:
            return found
    return processor()


def _gpu(device: str | None) -> Card | None:
    """The GPU that is asked for, or the first one where none is and one may be here. What PyTorch sees decides."""
    if device is None and not any(Path(path).exists() for path in _GPU_PATHS) and platform.system() != "Windows":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.device(device or "cuda"))
    known = known_gpu(properties.name)
    narrow = torch.cuda.is_bf16_supported()
    return Card(
        key=known.key if known else "local",
        name=properties.name,
        kind="cuda",
        memory=properties.total_memory,
        bandwidth=known.bandwidth if known else 0.0,
        float32=known.float32 if known else 0.0,
        bfloat16=(known.bfloat16 if known else 0.0) if narrow else 0.0,
        here=True,
    )


def known_gpu(driver_name: str) -> Card | None:
    """The known card that a driver's name means, such as `NVIDIA A100-SXM4-40GB`: one of all its words, else the one that
    shares most of them.

    Words that the known one lacks may only say how much memory it has or how it is built in. `RTX 4090 Laptop GPU`, or a
    part of an A100 (`MIG 3g.20gb`), is another card: None, so that a plan counts with no rates rather than with wrong ones.
    """
    words = _words(driver_name)
    gpus = [known for known in cards().values() if known.kind == "cuda"]
    exact = next((known for known in gpus if _words(known.name) == words), None)
    if exact is not None:
        return exact
    alike = [
        known
        for known in gpus
        if (own := set(_words(known.name))) <= set(words)
        and all(_FORM.fullmatch(word) for word in words if word not in own)
    ]
    return max(alike, key=lambda known: len(_words(known.name)), default=None)


def processor() -> Card:
    """This machine's processor: the cores and the memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    float32 = cores * _FLOP_PER_CYCLE[_instructions()] * _CLOCK
    return Card(
        key="cpu",
        name=f"this machine's processor, {cores} {'core' if cores == 1 else 'cores'}",
        kind="cpu",
        memory=machine_memory(),
        bandwidth=min(cores * _CORE_BANDWIDTH, _MOST_BANDWIDTH),
        float32=float32,
        bf16_mixed=2 * float32 if _bf16_mixed_is_default() else 0.0,
        here=True,
        fused_dequant=_instructions() != "other" and "GenuineIntel" not in _cpuinfo(),  # as gemm.c decides
    )


def _bf16_mixed_is_default() -> bool:
    """Whether training rounds to bfloat16 and sums in float32 here by default (`base.precision.default_compute_dtype`)."""
    flags = _cpuinfo()
    if "avx512_bf16" not in flags or "amx_bf16" in flags:
        return False
    from graftlm import kernels as kernels  # PyTorch is imported only where the answer depends on it

    return kernels.has_bf16_matmul()


def _instructions() -> str:
    flags = _cpuinfo()
    return "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "other"


def _cpuinfo() -> str:
    """What Linux says of the processor; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [total]
    for limit in _group_limits():
        try:
            limits.append(int(limit.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def free_machine_memory() -> int:
    """Bytes that this process may still take: those that the machine has, or its control groups where these have fewer left.

    A group has left what its limit is above its use; files that were read once and may be dropped are not use, as the kubelet
    counts.
    """
    free = [_available_memory()]
    for limit in _group_limits():
        first = limit.name == "memory.limit_in_bytes"  # control groups of version 1
        used, idle = ("memory.usage_in_bytes", "total_inactive_file") if first else ("memory.current", "inactive_file")
        try:
            most = int(limit.read_text(encoding="utf-8"))
            use = int(limit.with_name(used).read_text(encoding="utf-8"))
            lines = limit.with_name("memory.stat").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):  # no such group, or "max"
            continue
        reclaimed = sum(int(line.split()[1]) for line in lines if line.startswith(f"{idle} "))
        free.append(most - use + reclaimed)
    return max(min(free), 0)


def _available_memory() -> int:
    """Bytes that no process of the machine uses."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 4 << 30


def _group_limits() -> list[Path]:
    """Where the limits of this process's control groups stand (versions 2 and 1), from its own group up to the root."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        own = Path(group.strip("/"))
        for place in (own, *own.parents):
            if controllers == "":
                found.append(root / place / "memory.max")
            elif "memory" in controllers.split(","):
                found.append(root / "memory" / place / "memory.limit_in_bytes")
    return found
