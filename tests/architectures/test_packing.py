"""Examples laid end to end: which models may, why others may not, and that it changes nothing but the speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers.models.mistral import modeling_mistral

from graftlm.base.attention import ATTENTION
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, load_base
from graftlm.segments import Segments
from graftlm.training.micro_batch import BatchItem, example_losses, micro_batches
from graftlm.training.trainer import train

PACK = tuple(a for a in tiny.ARCHITECTURES if a not in ("falcon", "bloom"))


def loaded(place: Path) -> Base:
    return load_base(str(place), precision="float32", compute_dtype="float32", device="cpu")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_model_packs_unless_its_attention_cannot_be_replaced(architecture: str) -> None:
    base = loaded(tiny.folder(architecture))
    assert base.packs == (architecture in PACK)
    assert bool(base.no_packing_reason) == (not base.packs)


@pytest.mark.parametrize("architecture", PACK)
def test_a_token_sees_its_own_document_up_to_itself_and_nothing_else(architecture: str) -> None:
    base = loaded(tiny.folder(architecture))
    plain = tiny.plain(base.folder)
    lengths = (3, 7, 7, 12, 1)
    parts = [tiny.ids(n, seed=n + i) for i, n in enumerate(lengths)]
    segments = tiny.layout(lengths, [0] * len(lengths))
    context = ForwardContext(segments)
    with torch.no_grad():
        found = base.logits(base.hidden(torch.cat(parts), context), context)
    for part, logits in zip(parts, found.split(lengths), strict=True):
        tiny.close(logits, tiny.plain_logits(plain, part))


@pytest.mark.parametrize("architecture", PACK)
def test_training_on_stacks_gives_the_numbers_of_training_packed(architecture: str) -> None:
    rows = tiny.examples((9, 4, 9, 9, 4, 6))
    found: list[tuple[list[float], list[torch.Tensor]]] = []
    for stacked in (False, True):
        base = loaded(tiny.folder(architecture))
        adapter = tiny.adapted(base)
        heard = tiny.Heard()
        if stacked:
            with tiny.original_attention(base):
                train(base, [tiny.trial(base, adapter, rows, steps=2)], 20, heard)
        else:
            train(base, [tiny.trial(base, adapter, rows, steps=2)], 20, heard)
        found.append((heard.losses, [p.detach() for p in adapter.parameters().values()]))
    (packed_losses, packed), (stacked_losses, stacks) = found
    assert packed_losses == pytest.approx(stacked_losses, rel=1e-4)
    for a, b in zip(packed, stacks, strict=True):
        tiny.close(a, b, rtol=2e-3)  # AdamW divides by the size of a gradient, small ones are the noisiest


def test_a_model_that_does_not_pack_gets_stacks_of_one_length() -> None:
    base = loaded(tiny.folder("bloom"))
    rows = tiny.examples((9, 4, 9, 9, 4, 6))
    groups = micro_batches(base, [BatchItem(row, 1, (0, i), 1.0) for i, row in enumerate(rows)], 20)
    assert sorted(sorted(len(w.example.ids) for w in group) for group in groups) == [[4, 4], [6], [9], [9, 9]]


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_a_window_longer_than_the_check_and_shorter_than_a_document_is_kept(architecture: str, tmp_path: Path) -> None:
    base = loaded(tiny.write(tmp_path, tiny.random_model(architecture, sliding_window=29)))
    assert base.packs
    plain = tiny.plain(tmp_path)
    ids = tiny.ids(47)
    expected = tiny.plain_logits(plain, ids)
    tiny.close(tiny.base_logits(base, ids, slot=0), expected)
    without = tiny.plain(tiny.write(tmp_path / "wide", tiny.random_model(architecture, sliding_window=64)))
    assert (tiny.plain_logits(without, ids) - expected).abs().max() > 0.01  # the window matters at this length


def test_a_window_that_only_the_mask_knows_keeps_the_models_own_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tiny.write(tmp_path, tiny.random_model("mistral", sliding_window=29))
    own = modeling_mistral.MistralAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Mistral's attention, which no longer tells the attention function of its window."""
        kept, self.config = self.config, _Hidden(self.config)
        try:
            return own(self, *args, **kwargs)
        finally:
            self.config = kept

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", forward)
    base = loaded(place)
    assert not base.packs
    assert base.model.config.sliding_window == 29
    tiny.close(tiny.base_logits(base, tiny.ids(47), slot=0), tiny.plain_logits(tiny.plain(place), tiny.ids(47)))


class _Hidden:
    """A config whose window cannot be read."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return None if name == "sliding_window" else getattr(self._config, name)


ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 10000.0}}),
    "longrope": ("phi3", {"rope_parameters": {
        "rope_type": "longrope", "short_factor": [1.0, 1.3, 1.1], "long_factor": [1.7, 2.0, 3.0], "rope_theta": 10000.0,
        "original_max_position_embeddings": 12, "factor": 4.0, "partial_rotary_factor": 1.0},
        "original_max_position_embeddings": 12}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_frequencies_that_depend_on_the_longest_document_run_on_stacks(kind: str, tmp_path: Path) -> None:
    architecture, changes = ROPE[kind]
    base = loaded(tiny.write(tmp_path, tiny.random_model(architecture, **changes)))
    assert not base.packs
    assert kind in base.no_packing_reason
    rows = tiny.examples((9, 16, 4, 16))
    losses = example_losses(base, rows, 0, 64)
    for row, found in zip(rows, losses, strict=True):
        expected = tiny.mean_loss(tiny.plain(tmp_path), [row]) * found.target_tokens
        assert found.loss == pytest.approx(expected.item(), rel=1e-4)


def test_our_attention_refuses_what_it_does_not_compute() -> None:
    from graftlm.base.attention import UnsupportedAttention, segment_attention

    q, k = torch.randn(1, 4, 5, 6), torch.randn(1, 2, 5, 6)
    with ForwardContext(tiny.layout((3, 2))):
        for keyword in ({"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"position_bias": torch.zeros(1)}):
            with pytest.raises(UnsupportedAttention):
                segment_attention(None, q, k, k, None, **keyword)
        segment_attention(None, q, k, k, None, s_aux=None)
    with ForwardContext(Segments(lengths=(5,), slots=(0,), stacked=True)), pytest.raises(UnsupportedAttention):
        segment_attention(None, q, k, k, None)
    with ForwardContext(tiny.layout((3, 3))), pytest.raises(UnsupportedAttention):
        segment_attention(None, q, k, k, None)


def test_switching_attention_reaches_every_part_and_back() -> None:
    base = loaded(tiny.folder("gemma3"))
    ids = tiny.ids(9)
    expected = tiny.base_logits(base, ids, slot=0)
    with tiny.original_attention(base):
        tiny.close(tiny.base_logits(base, ids, slot=0), expected)
        assert base.model.config._attn_implementation == base.original_attention
    assert base.model.config._attn_implementation == ATTENTION
