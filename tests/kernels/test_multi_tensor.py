"""AdamW and norms of many tensors at once, run on the CPU: the reference's results, however the tensors are cut."""

from __future__ import annotations

import pytest
import torch

from graftlm import kernels
from graftlm.kernels import multi_tensor, reference_adamw
from graftlm.kernels.multi_tensor import Step
from graftlm.kernels.self_check import sample

SHAPES = ((7, 13), (1001,), (3, 5), (1,), (40, 9))
CPU = torch.device("cpu")


def steps(number: int, seed: float) -> list[Step]:
    """A step of five parameters, with learning rates and decays of their own."""
    found: list[Step] = []
    for i, shape in enumerate(SHAPES):
        parameter = sample(*shape, step=0.7 + i)
        moments = kernels.zero_moments(parameter.numel(), eight_bit=False, device=CPU)
        moments.mean.copy_(sample(parameter.numel(), step=0.3 + i))
        moments.square.copy_(sample(parameter.numel(), step=0.2 + i).square())
        update = kernels.update_of(
            number, 0.01 * (i + 1), beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1 * i, factor=0.3, key=(seed, i)
        )  # fmt: skip
        found.append((parameter, sample(*shape, step=seed + i), moments, update))
    return found


@pytest.mark.parametrize("together", [1, 200, 1 << 23])
def test_many_parameters_step_as_one_does(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "TOGETHER", together)
    ours, truth = steps(3, 1.1), steps(3, 1.1)
    multi_tensor.adamw_steps(ours)
    for mine, theirs in zip(ours, truth):
        reference_adamw.adamw(*theirs)
        # PyTorch's square root on a CPU is one bit off for some values, and the reference's is not.
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-7)
        assert torch.equal(mine[2].mean, theirs[2].mean)
        assert torch.equal(mine[2].square, theirs[2].square)
        assert torch.equal(mine[1], theirs[1]), "gradients stay"


def test_pieces_hold_every_step_once_in_order_and_few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "TOGETHER", 400)
    all_steps = steps(1, 0.5)
    pieces = list(multi_tensor._pieces(all_steps))  # pyright: ignore[reportPrivateUsage]
    assert [id(step) for piece in pieces for step in piece] == [id(step) for step in all_steps]
    assert all(len(piece) == 1 or sum(step[0].numel() for step in piece) <= 400 for piece in pieces)
    assert len(pieces) == 3


def test_on_a_cpu_each_parameter_is_stepped_by_itself() -> None:
    ours, truth = steps(2, 0.9), steps(2, 0.9)
    kernels.adamw_steps(ours)
    for mine, theirs in zip(ours, truth):
        kernels.adamw_step(*theirs)
        assert torch.equal(mine[0], theirs[0])
    gradients = [step[1] for step in ours]
    assert kernels.sums_of_squares(gradients).tolist() == [float(kernels.sum_of_squares(g)) for g in gradients]
    assert kernels.sums_of_squares([]).tolist() == []


def test_the_check_of_the_norms_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multi_tensor.check_sums_of_squares(CPU)
    real = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors, *given: [n.float() for n in real(tensors, *given)])
    assert not multi_tensor.check_sums_of_squares(CPU)


def test_tensors_of_the_host_come_to_their_device_in_shape() -> None:
    tensors = [torch.arange(6).view(2, 3), torch.tensor(7), torch.empty(0, dtype=torch.long)]
    assert all(torch.equal(a, b) for a, b in zip(kernels.to_device(tensors, CPU), tensors))
