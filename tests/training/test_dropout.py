"""Dropout from a counter: the right rate, the right scale, and numbers that depend on what they are for alone."""

from __future__ import annotations

import tiny
import torch
from torch import Tensor

from graftlm.base.context import ForwardContext
from graftlm.base.loading import load_base
from graftlm.kernels.counter_rng import dropped, hash_words, keep_mask, uniform
from graftlm.segments import Segments


def keys(*rng_keys: tuple[int, int], lengths: tuple[int, ...]) -> Tensor:
    return Segments(lengths=lengths, slots=(1,) * len(lengths), rng_keys=rng_keys).token_keys


def agreement(a: Tensor, b: Tensor) -> float:
    return (a == b).float().mean().item()


def test_each_feature_is_kept_with_one_minus_the_dropout() -> None:
    tokens = keys((3, 0), lengths=(400,))
    for dropout in (0.05, 0.3, 0.5, 0.9):
        kept = keep_mask(tokens, 12345, 500, dropout).float()
        deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
        assert abs(kept.mean().item() - (1 - dropout)) < 4 * deviation
        rows, columns = kept.mean(1), kept.mean(0)  # no token and no feature is favoured
        assert (rows - (1 - dropout)).abs().max() < 5 * (dropout * (1 - dropout) / 500) ** 0.5
        assert (columns - (1 - dropout)).abs().max() < 5 * (dropout * (1 - dropout) / 400) ** 0.5


def test_other_positions_draws_seeds_and_layers_get_other_numbers() -> None:
    tokens = keys((3, 0), lengths=(300,))
    mask = keep_mask(tokens, hash_words("dropout", "layers.0"), 200, 0.5)
    others = {
        "position": keep_mask(tokens.roll(1), hash_words("dropout", "layers.0"), 200, 0.5),
        "draw": keep_mask(keys((3, 1), lengths=(300,)), hash_words("dropout", "layers.0"), 200, 0.5),
        "seed": keep_mask(keys((4, 0), lengths=(300,)), hash_words("dropout", "layers.0"), 200, 0.5),
        "layer": keep_mask(tokens, hash_words("dropout", "layers.1"), 200, 0.5),
        "feature": mask.roll(1, 1),
    }
    for name, other in others.items():
        assert abs(agreement(mask, other) - 0.5) < 4 * 0.5 / (300 * 200) ** 0.5, name


def test_layers_with_neighbouring_keys_share_no_columns() -> None:
    tokens = keys((3, 0), lengths=(64,))
    here, there = keep_mask(tokens, 1000, 50, 0.5), keep_mask(tokens, 1001, 50, 0.5)
    for shift in range(-3, 4):
        assert abs(agreement(here, there.roll(shift, 1)) - 0.5) < 0.1


def test_a_documents_numbers_do_not_depend_on_what_lies_beside_it() -> None:
    together = keys((3, 0), (3, 7), (5, 0), lengths=(4, 9, 6))
    alone = [keys((3, 0), lengths=(4,)), keys((3, 7), lengths=(9,)), keys((5, 0), lengths=(6,))]
    assert torch.equal(together, torch.cat(alone))
    swapped = keys((5, 0), (3, 7), (3, 0), lengths=(6, 9, 4))
    assert torch.equal(swapped, torch.cat(alone[::-1]))


def test_kept_features_are_scaled_so_that_the_mean_stays() -> None:
    base = load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")
    adapter = tiny.adapted(base, targets=("up_proj",), dropout=0.4)
    layer = base.model.model.layers[0].mlp.up_proj
    x = torch.randn(6, 28, generator=torch.Generator().manual_seed(0))
    slot = adapter.layers["model.layers.0.mlp.up_proj"]
    total = torch.zeros(6, 44)
    count = 1500
    for draw in range(count):
        with ForwardContext(Segments(lengths=(6,), slots=(1,), rng_keys=((9, draw),))):
            total += layer(x).detach()
            if draw == 0:  # the formula itself, once
                key = keep_mask(keys((9, 0), lengths=(6,)), slot.dropout_key, 28, 0.4)  # pyright: ignore
                own = (x * key / 0.6) @ slot.A.T @ slot.B.T * slot.scale  # pyright: ignore
                tiny.close(layer(x), x @ layer.weight.T + own)
    with ForwardContext(Segments(lengths=(6,), slots=(1,))):
        plain = layer(x).detach()
    spread = (plain - x @ layer.weight.detach().T).abs().max()
    assert (total / count - plain).abs().max() < 0.15 * spread


def test_dropping_a_few_tokens_at_a_time_gives_what_the_whole_mask_does() -> None:
    for tokens, features, dtype in ((700, 192, torch.float32), (3, 40_000, torch.bfloat16)):
        x, rows = torch.randn(tokens, features).to(dtype), keys((3, 0), lengths=(tokens,))
        kept = keep_mask(rows, 99, features, 0.25)
        assert torch.equal(dropped(x, rows, 99, 0.25), x * (kept.to(dtype) * (1 / 0.75)))


def test_uniform_numbers_lie_in_the_unit_interval_and_have_its_moments() -> None:
    numbers = uniform((300, 400), 7, "A", "layer")
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 0.004
    assert abs(numbers.var().item() - 1 / 12) < 0.002
    assert torch.equal(numbers, uniform((300, 400), 7, "A", "layer"))
    assert not torch.equal(numbers, uniform((300, 400), 8, "A", "layer"))
