"""Which rank computes which examples of a step. Every rank finds the same answer from the lengths alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The examples of each rank, by their indices in ascending order: about equally many tokens each.

    Longest first, each to the rank with the fewest tokens until then (Graham 1969): no rank has more than 4/3 of the tokens
    that the best possible split would leave the fullest one.
    """
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (tokens + lengths[i], rank))
    return [sorted(share) for share in shares]
