"""Asking a base about data: its loss and its entropy on a sample of the documents (see `distance.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graftlm.base.context import ForwardContext
from graftlm.base.load import Base
from graftlm.data.documents import Document
from graftlm.planning.distance import FEW_PROMPT_TOKENS, SAMPLE_TOKENS, Distance
from graftlm.progress import working
from graftlm.segments import Segments


def sample(documents: Sequence[Document], most_tokens: int = SAMPLE_TOKENS) -> list[Document]:
    """Documents spread evenly over the data, of about `most_tokens` tokens together."""
    mean = sum(d.tokens for d in documents) / len(documents)
    count = min(len(documents), max(8, round(most_tokens / mean)))
    chosen: list[Document] = []
    tokens = 0
    for i in np.linspace(0, len(documents) - 1, count).astype(int):
        document = documents[int(i)]
        if chosen and tokens + document.tokens > 2 * most_tokens:
            continue
        chosen.append(document)
        tokens += document.tokens
    return chosen


@torch.no_grad()
def measure(base: Base, documents: Sequence[Document]) -> Distance:
    """The base's loss and entropy on documents, each read alone."""
    losses: list[np.ndarray] = []
    entropies: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    with working("asking the base about the data", sum(d.tokens for d in documents), "tokens") as task:
        for document in documents:
            ids = torch.from_numpy(document.ids.astype(np.int64)).to(base.device)  # (L,)
            segments = Segments(lengths=(len(ids),), slots=(0,), stacked=not base.packs)
            hidden = base.hidden(ids, ForwardContext(segments))[:-1]  # (L - 1, width)
            for part, wanted in zip(hidden.split(512), ids[1:].split(512)):
                context = ForwardContext(Segments(lengths=(len(part),), slots=(0,)))
                p = base.logits(part, context).float().log_softmax(-1)  # (c, V)
                losses.append(-p.gather(1, wanted[:, None])[:, 0].cpu().numpy())
                entropies.append(-(p.exp() * p).sum(-1).cpu().numpy())
            trained.append(document.trained[1:])
            task.to(task.done + document.tokens)
    loss, entropy, answer = np.concatenate(losses), np.concatenate(entropies), np.concatenate(trained)
    prompt = ~answer if np.count_nonzero(~answer) >= FEW_PROMPT_TOKENS else np.ones_like(answer)
    return Distance(
        answer_loss=float(loss[answer].mean()),
        prompt_loss=float(loss[prompt].mean()),
        prompt_entropy=float(entropy[prompt].mean()),
        rows=len(documents),
        tokens=int(sum(d.tokens for d in documents)),
    )
