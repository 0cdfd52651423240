"""A past in blocks gives what no past gives, on every architecture that may use it."""

from __future__ import annotations

import pytest
import tiny
import torch

from graftlm.base.context import ForwardContext
from graftlm.base.kv_cache import PagedAttention, PagedKVCache, bytes_per_token, check_kv_cache, layer_kv_specs
from graftlm.base.loading import load_base
from graftlm.segments import Segments


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_model_that_packs_keeps_its_past_in_blocks(architecture: str) -> None:
    base = load_base(str(tiny.folder(architecture)), precision="float32")
    layers, why = check_kv_cache(base)
    assert bool(layers) == base.packs
    assert bool(why) == (not base.packs)
    assert len(layers) in (0, 2)


def test_a_layer_keeps_its_key_value_heads_only() -> None:
    layers = layer_kv_specs(load_base(str(tiny.folder("llama")), precision="float32"))
    assert {(k.key_heads, k.width, k.value_width) for k in layers.values()} == {(2, 10, 10)}
    assert bytes_per_token(layers, torch.float32) == 2 * 2 * (10 + 10) * 4


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_sequences_at_different_places_share_a_pass(architecture: str) -> None:
    """Random texts grow by random steps over random blocks; each pass gives the logits of the whole text."""
    base = load_base(str(tiny.folder(architecture)), precision="float32")
    generator = torch.Generator().manual_seed(2)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    texts = [tiny.ids(number(5, 40), seed=i) for i in range(5)]
    whole = [tiny.base_logits(base, text, slot=0) for text in texts]
    store = PagedKVCache(
        layer_kv_specs(base), blocks=40, block=8, batch_slots=5, max_blocks=6, dtype=torch.float32, device=base.device
    )
    store.tables[:] = torch.randperm(40, generator=generator)[:30].view(5, 6)
    done = [0] * 5
    while any(done[i] < len(text) for i, text in enumerate(texts)):
        going = [i for i in range(5) if done[i] < len(texts[i]) and number(0, 2)]
        if not going:
            continue
        lengths = tuple(min(number(1, 9) if number(0, 1) else 1, len(texts[i]) - done[i]) for i in going)
        pasts = tuple(done[i] for i in going)
        kv_cache = PagedAttention(store, lengths, pasts, going)
        segments = Segments(lengths=lengths, slots=(0,) * len(going), cached=pasts, kv_cache=kv_cache)
        ids = torch.cat([texts[i][a : a + n] for i, a, n in zip(going, pasts, lengths)])
        context = ForwardContext(segments)
        with torch.no_grad():
            found = base.logits(base.hidden(ids, context), context).split(list(lengths))
        for i, a, n, logits in zip(going, pasts, lengths, found):
            tiny.close(logits, whole[i][a : a + n])
            done[i] += n


def test_training_passes_are_not_touched_by_a_past() -> None:
    base = load_base(str(tiny.folder("llama")), precision="float32")
    segments = tiny.layout([5, 7, 7], [0, 0, 0])
    assert segments.kv_cache is None
    base.hidden(tiny.ids(19), ForwardContext(segments))
