"""A fast kernel is used only after it has given the reference's result on this machine.

A backend lists its operations, each with a check: a small, odd-shaped comparison that returns whether the results agree. The
check runs before the first use of an operation on a kind of device. An operation that is missing, fails or differs is not
used in this process, with one warning for each backend; the reference is used instead. Checks compare float32 with float32: a
user may have chosen TF32 for PyTorch's matmuls, which would be another answer.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

Check = Callable[[torch.device], bool]


class SelfCheck:
    """Which operations of the backend called `what` can run; `ready` returns why none can, or an empty string."""

    def __init__(self, what: str, ready: Callable[[], str], checks: Mapping[str, Check]) -> None:
        self.what = what
        self.reason = ""  # why an operation is not used, the last one
        self._ready = ready
        self._checks = checks
        self._passed: dict[tuple[str, str], bool] = {}
        self._warned = False
        self._lock = threading.RLock()

    @property
    def operations(self) -> list[str]:
        return list(self._checks)

    def allows(self, operation: str, device: torch.device) -> bool:
        key = (operation, device.type)
        passed = self._passed.get(key)
        if passed is None:
            with self._lock:
                passed = self._passed.get(key)
                if passed is None:
                    passed = self._passed[key] = self._try(operation, device)
        return passed

    def _try(self, operation: str, device: torch.device) -> bool:
        reason = self._ready()
        if not reason:
            try:
                with _float32_matmuls():
                    if self._checks[operation](device):
                        return True
                reason = f"{operation} does not give the reference's answer on this machine"
            except Exception as error:
                reason = f"{operation} failed its check: {error!r}"
        self.reason = reason
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"Graft's {self.what} are not used: {reason}. PyTorch does their work, more slowly.",
                RuntimeWarning,
                stacklevel=5,
            )
        return False


@contextlib.contextmanager
def _float32_matmuls() -> Iterator[None]:
    """PyTorch's float32 matmuls are not rounded to TF32 or bfloat16 in here, whatever the user chose for them."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


# ---- parts of checks ----------------------------------------------------------------------------------------------


def sample(*shape: int, step: float = 0.7, sizes: int = 1, device: torch.device | None = None) -> Tensor:
    """Fixed values of both signs, no larger than `sizes`, without touching any generator's state; float32."""
    n = math.prod(shape)
    values = torch.arange(n, dtype=torch.float32).mul_(step).sin_().mul_(torch.arange(n).remainder(sizes).add_(1))
    return values.view(shape).to(device or "cpu")


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether the relative difference is at most `tolerance`, by norms; False for values that are not finite."""
    found, wanted = found.float(), wanted.float()
    return bool(((found - wanted).norm() <= tolerance * wanted.norm()).item())
