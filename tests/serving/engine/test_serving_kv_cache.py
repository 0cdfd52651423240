"""Blocks are held, shared, kept and taken back, and never two things at once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import tiny_run

from graftlm.base.kv_cache import bytes_per_token, layer_kv_specs
from graftlm.base.loading import load_base
from graftlm.serving.engine import kv_cache
from graftlm.serving.engine.kv_cache import USUAL_TOKENS, BlockPool, CacheSize, cache_size, hash_block, hash_root


def hashes_of(adapter: str, tokens: list[int], size: int) -> list[bytes]:
    found: list[bytes] = []
    before = hash_root(adapter)
    for at in range(0, len(tokens) - size + 1, size):
        before = hash_block(before, tokens[at : at + size])
        found.append(before)
    return found


def test_a_name_depends_on_the_adapter_and_on_every_token_up_to_the_blocks_end() -> None:
    tokens = list(range(12))
    first = hashes_of("a" * 64, tokens, 4)
    assert hashes_of("a" * 64, [*tokens[:9], 99, 10, 11], 4)[:2] == first[:2]
    assert hashes_of("a" * 64, [*tokens[:9], 99, 10, 11], 4)[2] != first[2]
    assert not set(first) & set(hashes_of("a" * 64, [99, *tokens[1:]], 4))
    assert not set(first) & set(hashes_of("b" * 64, tokens, 4))
    assert not set(first) & set(hashes_of("", tokens, 4))


def test_what_nobody_holds_is_found_again_until_its_memory_is_wanted() -> None:
    blocks = BlockPool(4, 2)
    names = hashes_of("x", [1, 2, 3, 4], 2)
    mine = [blocks.allocate(), blocks.allocate()]
    for block, name in zip(mine, names):
        blocks.register(block, name)  # type: ignore[arg-type]
    blocks.free(mine)  # type: ignore[arg-type]
    assert blocks.available == 4
    assert blocks.find_cached_prefix(names) == mine
    blocks.free(mine)  # type: ignore[arg-type]
    taken = [blocks.allocate() for _ in range(3)]
    assert set(taken) >= {mine[1]}, "the end of a text goes before its beginning"
    assert blocks.find_cached_prefix(names) == mine[:1]
    assert blocks.allocate() is None


def test_random_use_never_gives_one_block_to_two_and_loses_none() -> None:
    pick = random.Random(5)
    blocks = BlockPool(23, 2)
    holders: list[list[int]] = []
    contents: dict[bytes, int] = {}
    for _ in range(4000):
        if holders and pick.random() < 0.45:
            blocks.free(holders.pop(pick.randrange(len(holders))))
        else:
            tokens = [pick.randrange(3) for _ in range(2 * pick.randint(1, 5))]
            names = hashes_of(str(pick.randrange(2)), tokens, 2)
            mine = blocks.find_cached_prefix(names)
            for name, block in zip(names, mine):
                assert contents[name] == block
            for name in names[len(mine) :]:
                block = blocks.allocate()
                if block is None:
                    break
                contents = {n: b for n, b in contents.items() if b != block}
                mine.append(block)
                blocks.register(block, name)
                contents.setdefault(name, block)
            holders.append(mine)
        held = Counter(block for mine in holders for block in mine)
        assert blocks.used == len(held)
    for mine in holders:
        blocks.free(mine)
    assert blocks.available == 23
    blocks.reset_prefix_cache()
    assert sorted(blocks.allocate() or 0 for _ in range(23)) == list(range(23))


# ---- size --------------------------------------------------------------------------------------------------------------


def sized(
    monkeypatch: pytest.MonkeyPatch, longest: int, count: int, *, free: int = 1 << 40, **given: float
) -> CacheSize:
    """The size for a model of so many positions, on a machine of so many free bytes."""
    base = load_base(str(tiny_run.folder()), precision="float32", compute_dtype="float32", device="cpu")
    base.structure.max_positions = longest
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: free)
    return cache_size(base, layer_kv_specs(base), count, usual_tokens=USUAL_TOKENS, **given)


def test_the_default_cache_has_room_for_usual_texts_and_for_one_of_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sized(monkeypatch, 8192, 16)
    assert (found.tokens, found.limit) == (16 * USUAL_TOKENS, "usual")
    assert str(found) == "16,384 tokens, 2 texts of the longest, 8,192; --kv-cache-gb gives it more or less"
    assert sized(monkeypatch, 32768, 16).tokens == 32768
    short = sized(monkeypatch, 256, 16)
    assert (short.tokens, short.limit) == (16 * 256, "longest")
    assert str(short) == "4,096 tokens, all of them at their longest"


def test_the_default_cache_takes_a_quarter_of_the_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny_run.folder()), precision="float32", compute_dtype="float32", device="cpu")
    token = bytes_per_token(layer_kv_specs(base), base.activation_dtype)
    found = sized(monkeypatch, 8192, 16, free=4 * 1000 * token)
    assert (found.tokens, found.limit) == (992, "free")  # whole blocks of 16
    given = sized(monkeypatch, 8192, 16, free=4 * 1000 * token, gigabytes=5000 * token / 1e9)
    assert (given.tokens, given.limit) == (4992, "given")


def test_without_a_usual_length_all_texts_have_room_at_their_longest() -> None:
    base = load_base(str(tiny_run.folder()), precision="float32", compute_dtype="float32", device="cpu")
    assert cache_size(base, {}, 3).tokens == 3 * 256
