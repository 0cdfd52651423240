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
    random = [i for i, s in enumerate(sequences) if not s.request.sampling.greedy]
    tokens = [0] * len(sequences) if len(random) == len(sequences) else logits.argmax(-1).tolist()
    if random:
        params = [sequences[i].request.sampling for i in random]
        numbers = [uniform(p.seed, sequences[i].index, sequences[i].num_generated) for i, p in zip(random, params)]
        rows = logits if len(random) == len(logits) else logits[torch.tensor(random, device=logits.device)]
        for i, token in zip(random, sample(rows, params, numbers)):
            tokens[i] = token
    wanted = [s.request.logprobs for s in sequences]
    return [
        (token, None if count is None else logprobs_of(row, token, count))
        for token, row, count in zip(tokens, unchanged, wanted)
    ]


def apply_penalties(row: Tensor, sampling: SamplingParams, prompt: Sequences[int], answer: Sequences[int]) -> None:
    """Apply penalties and biases to a row of logits (V,) in place."""
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), device=row.device)
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(answer)
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    apply_logit_bias(row, sampling.bias)


def apply_logit_bias(row: Tensor, bias: Mapping[int, float]) -> None:
    """Add to the logits of single tokens, in place; ids beyond the vocabulary are left out."""
    known = {token: value for token, value in bias.items() if 0 <= token < len(row)}
    if known:
        ids = torch.tensor(list(known), device=row.device)
        row[ids] += torch.tensor(list(known.values()), dtype=row.dtype, device=row.device)


def uniform(seed: int, index: int, position: int) -> float:
    """The number in (0, 1) that decides token `position` of answer `index`."""
    return (hash_words("sample", seed, index, position) + 0.5) / (1 << 31)


def sample(logits: Tensor, samplings: Sequences[SamplingParams], numbers: Sequences[float]) -> list[int]:
    """One token for each row of logits (n, V), none of them greedy."""
    device = logits.device
    (temperature,) = to_device([torch.tensor([s.temperature for s in samplings])], device)
    p = torch.softmax(logits.float() / temperature[:, None], dim=-1)  # (n, V)
    u = to_device([torch.tensor(numbers, dtype=torch.float64)], device)[0][:, None]  # (n, 1)
    found = [0] * len(samplings)
    # How a row is drawn depends on the row alone: from the whole vocabulary in its order, or from the likeliest in theirs.
    whole = [i for i, s in enumerate(samplings) if s.top_k == 0 and s.top_p >= 1 and s.min_p == 0]
    if whole:
        all_whole = len(whole) == len(samplings)
        for i, token in zip(whole, _pick(p, u) if all_whole else _pick(p[whole], u[whole])):
            found[i] = token
    left = [i for i in range(len(samplings)) if i not in set(whole)]
    h = min(p.shape[1], max(_HEAD, *(s.top_k for s in samplings), 0))
    while left:
        kept, ids = _head(p[left], h, [samplings[i] for i in left])
        places = torch.tensor(_pick(kept, u[left]), device=device)
        tokens = ids.gather(1, places[:, None])[:, 0].tolist()
        short = ((kept[:, -1] > 0) & (h < p.shape[1])).tolist()  # the cut may lie beyond what was looked at
        for i, token in zip(left, tokens):
            found[i] = token
        left = [i for i, again in zip(left, short) if again]
        h = p.shape[1]
    return found


def _head(p: Tensor, h: int, samplings: Sequences[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The h likeliest of p (n, V), those that are cut off at 0, and their ids; both (n, h), likeliest first."""
    device = p.device
    values, ids = p.topk(h, dim=-1)  # (n, h)
    values = values.double()
    ks = torch.tensor([min(s.top_k or h, h) - 1 for s in samplings], device=device)[:, None]
    least = values.gather(1, ks)  # the k-th value
    unlimited = torch.tensor([s.top_k == 0 for s in samplings], device=device)[:, None]
    values = torch.where(unlimited | (values >= least), values, 0.0)
    mass = torch.where(unlimited, 1.0, values.sum(1, keepdim=True))
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)[:, None]
    before = (values.cumsum(1) - values) / mass
    inside = (before < top_p) | (top_p >= 1)
    last = torch.where(inside, values, torch.inf).amin(1, keepdim=True)  # equally likely ones stay together
    values = torch.where(values >= last, values, 0.0)
    min_p = torch.tensor([s.min_p for s in samplings], dtype=torch.float64, device=device)[:, None]
    return torch.where(values >= min_p * values[:, :1], values, 0.0), ids


def _pick(p: Tensor, u: Tensor) -> list[int]:
    """The index at which the running sum of each row of p (n, m), not normalized, passes the share u (n, 1) of its total."""
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
    return (part * _PART + torch.minimum(place, last))[:, 0].clamp_max(m - 1).tolist()


def logprobs_of(row: Tensor, token: int, count: int) -> TokenLogprobs:
    """The log probability of `token` in a row of logits (V,), and the `count` likeliest tokens with theirs."""
    logprobs = torch.log_softmax(row.float(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist()))
    return TokenLogprobs(token, float(logprobs[token]), top)
