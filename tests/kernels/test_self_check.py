"""The check of a kernel before its first use."""

from __future__ import annotations

import pytest
import torch

from graftlm.kernels.self_check import SelfCheck


@pytest.mark.parametrize("error", [False, True])
def test_checks_are_made_in_float32_whatever_the_user_chose_for_matmuls(error: bool) -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    seen: list[tuple[str, str]] = []

    def check(device: torch.device) -> bool:
        seen.append((cuda.fp32_precision, cpu.fp32_precision))
        if error:
            raise ValueError("no kernel")
        return True

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        kernels = SelfCheck("kernels", lambda: "", {"multiply": check})
        if error:
            with pytest.warns(RuntimeWarning, match="no kernel"):
                assert not kernels.allows("multiply", torch.device("cpu"))
        else:
            assert kernels.allows("multiply", torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "medium"
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", "bf16")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("ieee", "ieee")]
