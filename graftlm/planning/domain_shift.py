"""Domain shift, measured: the base's loss and entropy on a sample of the examples (see `perplexity.py`).

    sample = sample_examples(examples, most_tokens=8192, seed=0)
    shift = measure_domain_shift(base, sample, of_rows=len(examples))

A sample is a number of tokens, not of rows: the time that it takes is known beforehand. Its rows are drawn at random, so the
error of a mean over tokens is that of a ratio of two sums over rows (Cochran 1977, section 2.11). Rows are packed into passes,
and of the logits only a piece exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.base.requantizing import requantize
from graftlm.data.dataset import Example, make_example
from graftlm.planning.perplexity import FEW_PROMPT_TOKENS, PAIRED_TOKENS, SAMPLE_TOKENS, DomainShift, Estimate
from graftlm.progress import Task, working
from graftlm.segments import Segments

LONGEST = 2048
"""Tokens of one example that are read: of a longer one the part around its first target token."""
PASS_TOKENS = 2048
_PIECE_LOGITS = 1 << 25  # values of logits that exist at once, and as many exponentials: 134 MB each in float32


@dataclass(frozen=True, eq=False)
class _Reading:
    """What the base says of the tokens of some examples, example after example; the first token of each has no prediction."""

    loss: NDArray[np.float64]
    entropy: NDArray[np.float64]
    target: NDArray[np.bool_]
    example: NDArray[np.int64]
    """Which example each token is of."""


def sample_examples(
    examples: Sequence[Example], most_tokens: int = SAMPLE_TOKENS, *, longest: int = LONGEST, seed: int = 0
) -> list[Example]:
    """Examples in an order drawn by `seed`, of at most `most_tokens` tokens together.

    Of an example of more than `longest` or `most_tokens` tokens the part around its first target token is taken, so there is
    always one.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(examples))
    chosen: list[Example] = []
    tokens = 0
    for i in order:
        example = _window(examples[int(i)], min(longest, most_tokens))
        if tokens + example.tokens > most_tokens:
            break  # to look for shorter ones would favour them
        chosen.append(example)
        tokens += example.tokens
    return chosen


def _window(example: Example, most: int) -> Example:
    """At most `most` tokens of an example, around its first target token."""
    if example.tokens <= most:
        return example
    first_target = int(np.argmax(example.loss_mask))
    first = max(0, min(first_target - most // 2, example.tokens - most))
    return make_example(example.row, example.ids[first : first + most], example.loss_mask[first : first + most])


@torch.no_grad()
def measure_domain_shift(
    base: Base, examples: Sequence[Example], *, of_rows: int | None = None, in_nf4: bool = False
) -> DomainShift:
    """The base's loss and entropy on examples that were drawn from `of_rows`, by default on all there are.

    `in_nf4`: also by how much its loss rises with linear layers in NF4, measured on the first `PAIRED_TOKENS` tokens of the
    sample. The base has NF4 weights afterwards: nothing is loaded a second time.
    """
    again = _first(examples, PAIRED_TOKENS) if in_nf4 else []
    rows = of_rows or len(examples)
    with working("measuring the domain shift", sum(d.tokens for d in (*examples, *again)), "tokens") as task:
        found = _read(base, examples, task)
        damage = None
        if again:
            requantize(base, "nf4")
            damage = _damage(found, _read(base, again, task), rows)
    of_prompts = ~found.target if np.count_nonzero(~found.target) >= FEW_PROMPT_TOKENS else np.ones_like(found.target)

    def mean(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> Estimate:
        return mean_of_sample(values[mask], found.example[mask], len(examples), rows)

    return DomainShift(
        answer_loss=mean(found.loss, found.target),
        prompt_loss=mean(found.loss, of_prompts),
        prompt_entropy=mean(found.entropy, of_prompts),
        excess_loss=mean(found.loss - found.entropy, of_prompts),
        nf4_damage=damage,
        rows=len(examples),
        tokens=int(sum(d.tokens for d in examples)),
        of_rows=rows,
    )


def mean_of_sample(values: NDArray[np.float64], example: NDArray[np.int64], sampled: int, of_rows: int) -> Estimate:
    """The mean of tokens' values with its standard error; `example` says which of the `sampled` examples a token is of.

    R = sum y / sum n over examples, with y an example's sum and n its tokens; var R = (1 - s / N) s / (s - 1)
    sum (y - R n)^2 / (sum n)^2 (Cochran 1977, 2.45). The error is infinite for one example of several.
    """
    n = np.bincount(example, minlength=sampled).astype(np.float64)  # (s,)
    y = np.bincount(example, weights=values, minlength=sampled)  # (s,)
    ratio = float(y.sum() / n.sum())
    unread = 1 - sampled / of_rows
    if unread <= 0:
        return Estimate(value=ratio)
    if sampled < 2:
        return Estimate(value=ratio, error=float("inf"))
    variance = unread * sampled / (sampled - 1) * float(((y - ratio * n) ** 2).sum()) / float(n.sum()) ** 2
    return Estimate(value=ratio, error=variance**0.5)


def _damage(before: _Reading, after: _Reading, of_rows: int) -> Estimate:
    """The rise of the loss on target tokens from one reading to another of the same first examples."""
    count = len(after.loss)
    rise = after.loss - before.loss[:count]
    return mean_of_sample(rise[after.target], after.example[after.target], int(after.example.max()) + 1, of_rows)


def _first(examples: Sequence[Example], most_tokens: int) -> list[Example]:
    """The first examples, of at most so many tokens; one at least."""
    ends = np.cumsum([d.tokens for d in examples])
    return list(examples[: max(1, int(np.searchsorted(ends, most_tokens, side="right")))])


def _read(base: Base, examples: Sequence[Example], task: Task) -> _Reading:
    """Loss and entropy of every predicted token, in the order of the examples."""
    losses: list[NDArray[np.float64]] = [np.empty(0)] * len(examples)
    entropies = list(losses)
    for places in _passes(examples, packs=base.packs):
        lengths = tuple(examples[i].tokens for i in places)
        ids = torch.from_numpy(np.concatenate([examples[i].ids for i in places]).astype(np.int64)).to(
            base.device
        )  # (T,)
        segments = Segments(lengths=lengths, slots=(0,) * len(places), batched=not base.packs)
        hidden = base.hidden(ids, ForwardContext(segments))  # (T, width)
        predicts = torch.ones(len(ids), dtype=torch.bool)
        predicts[np.cumsum(lengths) - 1] = False  # an example's last token predicts nothing
        rows = predicts.nonzero()[:, 0].to(base.device)  # (n,)
        loss, entropy = _of_tokens(base, hidden[rows], ids[rows + 1], lambda done: task.to(task.done + done))
        task.to(task.done + len(places))  # the tokens that predict nothing
        ends = np.cumsum([length - 1 for length in lengths])[:-1]
        for i, own_loss, own_entropy in zip(places, np.split(loss, ends), np.split(entropy, ends)):
            losses[i], entropies[i] = own_loss, own_entropy
    return _Reading(
        loss=np.concatenate(losses),
        entropy=np.concatenate(entropies),
        target=np.concatenate([d.loss_mask[1:] for d in examples]),
        example=np.repeat(np.arange(len(examples)), [d.tokens - 1 for d in examples]),
    )


def _passes(examples: Sequence[Example], *, packs: bool) -> Iterator[list[int]]:
    """Indices of the examples that one forward pass reads; one at a time for a model that does not pack."""
    now: list[int] = []
    tokens = 0
    for i, example in enumerate(examples):
        if now and (not packs or tokens + example.tokens > PASS_TOKENS):
            yield now
            now, tokens = [], 0
        now.append(i)
        tokens += example.tokens
    if now:
        yield now


def _of_tokens(
    base: Base, hidden: Tensor, labels: Tensor, moved: Callable[[int], None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """hidden (n, width), labels (n,) -> loss and entropy of each prediction, (n,); `moved` hears of every piece of tokens.

    With z = logits - max, S = sum exp z: loss = log S - z[label] and H = log S - sum(z exp z) / S.
    """
    losses: list[Tensor] = []
    entropies: list[Tensor] = []
    size = max(16, _PIECE_LOGITS // base.structure.vocabulary)
    for part, wanted in zip(hidden.split(size), labels.split(size)):
        context = ForwardContext(Segments(lengths=(len(part),), slots=(0,)))
        z = base.logits(part, context).float()  # (c, V)
        z.sub_(z.amax(-1, keepdim=True)).clamp_min_(torch.finfo(z.dtype).min)  # a logit of -inf times 0 would be NaN
        p = z.exp()  # (c, V), not yet divided by S
        total = p.sum(-1)  # (c,)
        losses.append(total.log() - z.gather(1, wanted[:, None])[:, 0])
        entropies.append(total.log() - p.mul_(z).sum(-1) / total)
        moved(len(part))
    return torch.cat(losses).double().cpu().numpy(), torch.cat(entropies).double().cpu().numpy()
