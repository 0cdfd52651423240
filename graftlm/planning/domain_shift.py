"""Domain shift, measured: the base's loss and entropy on a sample of the examples (see `perplexity.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.data.dataset import Example
from graftlm.planning.perplexity import FEW_PROMPT_TOKENS, SAMPLE_TOKENS, DomainShift
from graftlm.progress import working
from graftlm.segments import Segments


def sample_examples(examples: Sequence[Example], most_tokens: int = SAMPLE_TOKENS) -> list[Example]:
    """Examples spread evenly over the data, of about `most_tokens` tokens together."""
    mean = sum(d.tokens for d in examples) / len(examples)
    count = min(len(examples), max(8, round(most_tokens / mean)))
    chosen: list[Example] = []
    tokens = 0
    for i in np.linspace(0, len(examples) - 1, count).astype(int):
        example = examples[int(i)]
        if chosen and tokens + example.tokens > 2 * most_tokens:
            continue
        chosen.append(example)
        tokens += example.tokens
    return chosen


@torch.no_grad()
def measure_domain_shift(base: Base, examples: Sequence[Example]) -> DomainShift:
    """The base's loss and entropy on examples, each read alone."""
    losses: list[np.ndarray] = []
    entropies: list[np.ndarray] = []
    loss_mask: list[np.ndarray] = []
    with working("measuring the domain shift", sum(d.tokens for d in examples), "tokens") as task:
        for example in examples:
            ids = torch.from_numpy(example.ids.astype(np.int64)).to(base.device)  # (L,)
            segments = Segments(lengths=(len(ids),), slots=(0,), stacked=not base.packs)
            hidden = base.hidden(ids, ForwardContext(segments))[:-1]  # (L - 1, width)
            for part, wanted in zip(hidden.split(512), ids[1:].split(512)):
                context = ForwardContext(Segments(lengths=(len(part),), slots=(0,)))
                p = base.logits(part, context).float().log_softmax(-1)  # (c, V)
                losses.append(-p.gather(1, wanted[:, None])[:, 0].cpu().numpy())
                entropies.append(-(p.exp() * p).sum(-1).cpu().numpy())
            loss_mask.append(example.loss_mask[1:])
            task.to(task.done + example.tokens)
    loss, entropy, answer = np.concatenate(losses), np.concatenate(entropies), np.concatenate(loss_mask)
    prompt = ~answer if np.count_nonzero(~answer) >= FEW_PROMPT_TOKENS else np.ones_like(answer)
    return DomainShift(
        answer_loss=float(loss[answer].mean()),
        prompt_loss=float(loss[prompt].mean()),
        prompt_entropy=float(entropy[prompt].mean()),
        rows=len(examples),
        tokens=int(sum(d.tokens for d in examples)),
    )
