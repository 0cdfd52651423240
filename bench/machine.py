"""What a figure was measured on and with: processor, threads, versions, date."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from graftlm.training.run_folder import environment

PEERS = ("peft", "bitsandbytes", "trl", "triton")


def processor() -> str:
    """The processor's own name, as far as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Memory of the machine, where the system says it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")), None)


def described() -> dict[str, Any]:
    """The machine and the versions of both sides, now."""
    found = environment()
    versions = dict(found["versions"])
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "architecture": found["machine"],
        "system": found["system"],
        "cpus": found["cpus"],
        "threads": found["threads"],
        "memory_bytes": memory_bytes(),
        "gpus": found["gpus"],
        "kernels": found["kernels"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "date": found["started"],
    }
