"""Scores of trained models: loss on general text, and answers compared with references.

One process for each kind of base. It loads the base once, scores it bare, then with one adapter after another; a model
trained in full is a base of its own. Every result is written at once, so that a second call goes on:

    scores.json    {"asked": digest of the request, "general_loss": 4.31, "general_tokens": 5120, "task_score": 38.2}

`experiments/subprocess_run.py` starts that process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftlm.config import ComputeDtype, Precision
from graftlm.config.fields import Metric
from graftlm.data.eval_prompts import EvalPrompt
from graftlm.errors import RunError
from graftlm.files import write_json
from graftlm.jsonfile import read_json
from graftlm.scores import score

SCORES = "scores.json"


@dataclass(frozen=True)
class Target:
    """One thing to measure: the bare base (no adapter), or the base with an adapter on it."""

    out: str
    """File to write."""
    adapter: str | None = None


@dataclass(frozen=True)
class ScoringRequest:
    """Measure these on one base."""

    model: str
    precision: Precision
    compute_dtype: ComputeDtype | None
    device: str | None
    trust_remote_code: bool
    general: str | None
    metric: Metric | None
    prompts: tuple[EvalPrompt, ...]
    max_tokens: int
    template_date: str
    targets: tuple[Target, ...] = ()

    @property
    def digest(self) -> str:
        """Of what is measured, and with what; a result with another digest is measured again."""
        total = hashlib.blake2b(digest_size=16)
        if self.general:
            total.update(Path(self.general).read_bytes())
        facts = [self.metric, self.max_tokens, self.precision, self.template_date, [asdict(q) for q in self.prompts]]
        total.update(json.dumps(facts).encode())
        return total.hexdigest()

    def left(self) -> tuple[Target, ...]:
        """The targets without a result."""
        return tuple(t for t in self.targets if (read_scores(Path(t.out)) or {}).get("asked") != self.digest)


def read_scores(path: Path) -> dict[str, Any] | None:
    """A result, or None where there is none or a broken one."""
    try:
        return read_json(path, RunError)
    except RunError:
        return None


def measure(request: ScoringRequest, on_scored: Callable[[str], None]) -> None:
    """Score every target that has no result yet; `on_scored` gets the file of each. Raises GraftError."""

    from graftlm.adapters import peft_format as adapter_format
    from graftlm.adapters.attach import attach, detach
    from graftlm.base.chat import Encoder
    from graftlm.base.loading import load_base
    from graftlm.data.dataset import load
    from graftlm.data.sources import Source
    from graftlm.planning.plan import DEFAULT_MICRO_BATCH_TOKENS
    from graftlm.serving.engine.generate import complete_all
    from graftlm.training.micro_batch import example_losses

    left = request.left()
    if not left:
        return
    base = load_base(
        request.model, precision=request.precision, compute_dtype=request.compute_dtype, device=request.device,
        trust_remote_code=request.trust_remote_code,
    )  # fmt: skip
    encoder = Encoder(base.tokenizer, date=request.template_date)
    limit = base.structure.max_positions or None
    texts = (
        load([Source(path=request.general)], encoder, max_tokens=limit, overlong="truncate").examples
        if request.general
        else ()
    )
    for target in left:
        slot = 0
        if target.adapter is not None:
            attach(base, adapter_format.load(base, Path(target.adapter)), slot=1)
            slot = 1
        found: dict[str, Any] = {"asked": request.digest}
        if texts:
            rows = example_losses(base, texts, slot, DEFAULT_MICRO_BATCH_TOKENS)
            tokens = sum(row.target_tokens for row in rows)
            found |= {"general_loss": sum(row.loss for row in rows) / tokens, "general_tokens": tokens}
        if request.metric is not None:
            prompts = [q.prompt for q in request.prompts]
            done = complete_all(base, encoder, prompts, slot=slot, max_tokens=request.max_tokens)
            answers: list[dict[str, Any]] = [
                {"row": q.row, "answer": answer.text.strip()} for q, answer in zip(request.prompts, done)
            ]
            references: Sequence[Sequence[str]] = [q.references for q in request.prompts]
            given = [a["answer"] for a in answers]
            found |= {"task_score": score(request.metric, given, references), "answers": answers}
        if slot:
            detach(base, 1)
        Path(target.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(target.out), found)
        on_scored(target.out)


def read_request(values: dict[str, Any]) -> ScoringRequest:
    """A request from its JSON."""
    found: dict[str, Any] = dict(values)
    found["prompts"] = tuple(
        EvalPrompt(q["row"], tuple(q["prompt"]), tuple(q["references"])) for q in values["prompts"]
    )
    found["targets"] = tuple(Target(**target) for target in values["targets"])
    return ScoringRequest(**found)
