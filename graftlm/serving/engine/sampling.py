"""From logits to tokens, for all rows of a step at once.

Penalties, biases and grammars change a row's logits first. Then a greedy row takes the likeliest token, and for the others
`sample` cuts the tail off (temperature, top-k, top-p, min-p in transformers' order; tokens that are equally likely stay or go
together) and draws with one uniform number a row. That number is a hash of (seed, answer, position), so a request gives the
same tokens alone or in company, and again after it was preempted.

Letters: n rows, V vocabulary, h the likeliest tokens looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels import to_device
from graftlm.kernels.counter_rng import hash_words
from graftlm.serving.engine.request import SamplingParams, TokenLogprobs
from graftlm.serving.engine.sequence import Sequence

_HEAD = 512  # the likeliest tokens that are looked at first when a tail is cut off
_PART = 256  # tokens summed together while looking for the drawn one


def sample_all(logits: Tensor, sequences: Sequences[Sequence]) -> list[tuple[int, TokenLogprobs | None]]:
    """The next token of each sequence from its row of logits (n, V), and the log probabilities that its request wants."""
    unchanged = logits
    if any(s.request.sampling.changes_logits or s.matcher is not None for s in sequences):
        logits = logits.clone()
        for row, sequence in zip(logits, sequences):
            if sequence.request.sampling.changes_logits:
                apply_penalties(row, sequence.request.sampling, sequence.request.prompt, sequence.generated)
            if sequence.matcher is not None:
                sequence.matcher.restrict(row)
    params = [s.request.sampling for s in sequences]
    numbers = [0.0 if p.greedy else uniform(p.seed, s.index, s.num_generated) for p, s in zip(params, sequences)]
    tokens = sample(logits, params, numbers)
    counts = {i: s.request.logprobs for i, s in enumerate(sequences) if s.request.logprobs is not None}
    if not counts:
        return [(token, None) for token in tokens]
    rows = unchanged if len(counts) == len(sequences) else unchanged[_on(logits.device, list(counts), torch.int64)]
    logprobs = dict(zip(counts, logprobs_of(rows, [tokens[i] for i in counts], list(counts.values()))))
    return [(token, logprobs.get(i)) for i, token in enumerate(tokens)]


def apply_penalties(row: Tensor, sampling: SamplingParams, prompt: Sequences[int], answer: Sequences[int]) -> None:
    """Apply penalties and biases to a row of logits (V,) in place."""
    if sampling.repetition_penalty != 1:
        seen = _on(row.device, sorted({*prompt, *answer}))
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(answer)
        ids, times = _on(row.device, list(counts)), _on(row.device, list(counts.values()), row.dtype)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    apply_logit_bias(row, sampling.bias)


def apply_logit_bias(row: Tensor, bias: Mapping[int, float]) -> None:
    """Add to the logits of single tokens, in place; ids beyond the vocabulary are left out."""
    known = {token: value for token, value in bias.items() if 0 <= token < len(row)}
    if known:
        row[_on(row.device, list(known))] += _on(row.device, list(known.values()), row.dtype)


def _on(device: torch.device, values: Sequences[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Values of the host on a device, without waiting for it."""
    return to_device([torch.tensor(values, dtype=dtype)], device)[0]


def uniform(seed: int, index: int, position: int) -> float:
    """The number in (0, 1) that decides token `position` of answer `index`."""
    return (hash_words("sample", seed, index, position) + 0.5) / (1 << 31)


def sample(logits: Tensor, samplings: Sequences[SamplingParams], numbers: Sequences[float]) -> list[int]:
    """One token for each row of logits (n, V): the likeliest where it is greedy, else drawn with the row's number.

    The host waits for the device once, and a second time where the cut of a tail lies beyond the likeliest that are looked at.
    """
    device = logits.device
    random = [i for i, s in enumerate(samplings) if not s.greedy]
    if not random:
        return logits.argmax(-1).tolist()
    drawn = [samplings[i] for i in random]
    rows = _on(device, random) if len(random) < len(samplings) else None
    temperature = _on(device, [s.temperature for s in drawn])
    p = torch.softmax((logits if rows is None else logits[rows]).float() / temperature[:, None], dim=-1)  # (n, V)
    u = _on(device, [numbers[i] for i in random], torch.float64)[:, None]  # (n, 1)
    h = min(p.shape[1], max(_HEAD, *(s.top_k for s in drawn), 0))
    found, short = _draw(p, u, drawn, h)
    if rows is not None:
        found = logits.argmax(-1).index_copy_(0, rows, found)
    read = (found if short is None else torch.cat([found, short])).tolist()
    tokens, again = read[: len(samplings)], [j for j, is_short in enumerate(read[len(samplings) :]) if is_short]
    if again:
        at = _on(device, again)
        whole, _ = _draw(p[at], u[at], [drawn[j] for j in again], p.shape[1])
        for j, token in zip(again, whole.tolist()):
            tokens[random[j]] = token
    return tokens


def _draw(p: Tensor, u: Tensor, samplings: Sequences[SamplingParams], h: int) -> tuple[Tensor, Tensor | None]:
    """One token for each row of p (n, V) by u (n, 1), and where tails are cut off whether the cut may lie beyond the h
    likeliest; both (n,) int64.

    How a row is drawn depends on the row alone: from the whole vocabulary in its order, or from the likeliest in theirs.
    """
    cut = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1 or s.min_p]
    if not cut:
        return _pick(p, u), None
    rows = _on(p.device, cut) if len(cut) < len(samplings) else None
    own, theirs = (p, u) if rows is None else (p[rows], u[rows])
    kept, ids = _head(own, h, [samplings[i] for i in cut])
    tokens = ids.gather(1, _pick(kept, theirs)[:, None])[:, 0]
    short = ((kept[:, -1] > 0) & (h < p.shape[1])).long()
    if rows is None:
        return tokens, short
    return _pick(p, u).index_copy_(0, rows, tokens), torch.zeros_like(u[:, 0], dtype=torch.int64).index_copy_(
        0, rows, short
    )


def _head(p: Tensor, h: int, samplings: Sequences[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The h likeliest of p (n, V), those that are cut off at 0, and their ids; both (n, h), likeliest first."""
    device = p.device
    values, ids = p.topk(h, dim=-1)  # (n, h)
    values = values.double()
    top_k = _on(device, [s.top_k for s in samplings])[:, None]
    unlimited = top_k == 0
    least = values.gather(1, torch.where(unlimited, h, top_k.clamp_max(h)) - 1)  # the k-th value
    values = torch.where(unlimited | (values >= least), values, 0.0)
    mass = torch.where(unlimited, 1.0, values.sum(1, keepdim=True))
    top_p = _on(device, [s.top_p for s in samplings], torch.float64)[:, None]
    before = (values.cumsum(1) - values) / mass
    inside = (before < top_p) | (top_p >= 1)
    last = torch.where(inside, values, torch.inf).amin(1, keepdim=True)  # equally likely ones stay together
    values = torch.where(values >= last, values, 0.0)
    min_p = _on(device, [s.min_p for s in samplings], torch.float64)[:, None]
    return torch.where(values >= min_p * values[:, :1], values, 0.0), ids


def _pick(p: Tensor, u: Tensor) -> Tensor:
    """(n,) int64: the index at which the running sum of each row of p (n, m), not normalized, passes the share u (n, 1) of its
    total."""
    n, m = p.shape
    parts = (m + _PART - 1) // _PART
    padded = torch.nn.functional.pad(p, (0, parts * _PART - m)).view(n, parts, _PART)
    sums = padded.sum(2, dtype=torch.float64).cumsum(1)  # (n, parts)
    target = u * sums[:, -1:]
    part = torch.searchsorted(sums, target, right=True).clamp_max(parts - 1)  # (n, 1)
    # A part whose sum is all before the target by rounding holds nothing to take: go back to one that does.
    within = padded.gather(1, part[:, :, None].expand(n, 1, _PART))[:, 0].double().cumsum(1)  # (n, _PART)
    start = torch.where(part > 0, sums.gather(1, (part - 1).clamp_min(0)), 0.0)
    place = torch.searchsorted(within, target - start, right=True)
    last = (within < within[:, -1:]).sum(1, keepdim=True)  # the last one that adds something
    return (part * _PART + torch.minimum(place, last))[:, 0].clamp_max(m - 1)


def logprobs_of(logits: Tensor, tokens: Sequences[int], counts: Sequences[int]) -> list[TokenLogprobs]:
    """Of each row of logits (n, V): the log probability of its token, and its `count` likeliest tokens with theirs.

    All are read from the device at once.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)  # (n, V)
    values, ids = logprobs.topk(min(max(counts), logprobs.shape[-1]))  # (n, h)
    own = logprobs.gather(1, _on(logits.device, list(tokens))[:, None])  # (n, 1)
    read = torch.cat([own.double(), values.double(), ids.double()], dim=1).tolist()  # exactly what they were
    h = values.shape[1]
    return [
        TokenLogprobs(token, row[0], tuple(zip(map(int, row[1 + h : 1 + h + count]), row[1 : 1 + h])))
        for token, count, row in zip(tokens, counts, read)
    ]
