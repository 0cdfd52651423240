"""Scores while training: at each evaluation the model answers eval prompts, and the answers are scored against the references.

    prepare_score(config, ...)   find the score function, and try it on a few references before the model is loaded
    make_scorer(...)             with the prompts, once the eval rows are read
    scorer(base, slot)           greedy answers through what is attached in `slot`, and their score

The serving engine generates the answers. Training cannot import it, so the command passes it in as `generate`. It runs on the
base that is trained, without gradients and dropout, in the dtype that serves adapters. The run does not depend on it: there
is no random state to disturb.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.base.shared_base import computing_in
from graftlm.config import TrainConfig
from graftlm.data.dataset import Dataset
from graftlm.data.eval_prompts import EvalPrompt, collect_eval_prompts, evenly, parsed_rows, reference_of
from graftlm.data.sources import Source, is_hub_id, share
from graftlm.errors import ConfigError, ScoreError
from graftlm.progress import working
from graftlm.scores import METRICS, Score, ScoreFunction, check_fits, find_score

MOST_PROMPTS = 32  # by default: two batches of the engine
SAMPLES_KEPT = 6
"""Answers that an evaluation leaves in samples.jsonl."""
_TRIED = 8  # rows whose references a score is tried on


class Generate(Protocol):
    """Greedy answers to prompts of token ids through the adapter in `slot`, 0 for the base alone, in the prompts' order.

    `on_answers` gets the number of finished answers.
    """

    def __call__(
        self, base: Base, encoder: Encoder, prompts: Sequence[Sequence[int]], *, slot: int, max_tokens: int,
        on_answers: Callable[[int], None],
    ) -> list[str]: ...  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scorer:
    """Answers eval prompts and scores the answers."""

    score: Score
    prompts: tuple[EvalPrompt, ...]
    encoder: Encoder
    max_tokens: int
    """Most tokens of an answer."""
    generate: Generate
    samples: list[dict[str, object]] = field(default_factory=list[dict[str, object]], init=False)
    """A few of the answers that were scored last, for samples.jsonl: row, prompt, references, answer."""

    def __call__(self, base: Base, slot: int) -> float:
        """The score of what is in `slot` now. Raises ScoreError."""
        return self.of(self.answers(base, slot))

    def answers(self, base: Base, slot: int) -> list[str]:
        """Greedy answers to all prompts through what is in `slot` now."""
        prompts = [prompt.prompt for prompt in self.prompts]
        with (
            computing_in(base, None, training=False),
            working("answering eval prompts", len(prompts), "prompts") as task,
        ):
            return self.generate(base, self.encoder, prompts, slot=slot, max_tokens=self.max_tokens, on_answers=task.to)

    def of(self, answers: Sequence[str]) -> float:
        """The score of answers to all prompts. Raises ScoreError."""
        self.samples[:] = [self._sample(prompt, answer) for prompt, answer in zip(self.prompts[:SAMPLES_KEPT], answers)]
        return self.score(answers, [prompt.references for prompt in self.prompts])

    def _sample(self, prompt: EvalPrompt, answer: str) -> dict[str, object]:
        text = self.encoder.tokenizer.decode(list(prompt.prompt), skip_special_tokens=True)
        return {
            "row": prompt.row, "prompt": str(text), "references": list(prompt.references[:3]), "answer": answer,
        }  # fmt: skip


def prepare_score(
    config: TrainConfig, sources: Sequence[Source], eval_source: Source | None, function: ScoreFunction | None = None
) -> Score | None:
    """The score that the config names, or None; a function of the user is tried on the references of a few rows.

    Raises ConfigError for one that cannot be used, and for eval rows without prompts. Loads no model.
    """
    if config.score is None:
        return None
    score = find_score(config.score, function)
    apart = eval_source is not None and share(eval_source.path) is None
    source = eval_source if apart and eval_source is not None else sources[0]
    if source.rows is None and is_hub_id(source.path):
        return score  # read once, after the base is loaded
    rows = list(islice(parsed_rows([source]), _TRIED))
    references = [reference for row in rows if (reference := reference_of(row)) is not None]
    if rows and all(row.kind == "text" for row in rows):
        raise ConfigError(
            f"--score {config.score} answers eval prompts, and the rows of {source.path} are plain texts without any; leave "
            "--score out, or give rows of prompt and completion, or messages"
        )
    if score.function is not None and references:
        try:
            score(references, [(reference,) for reference in references])
        except ScoreError as error:
            raise ConfigError(
                f"{error}. It was tried on references as their own answers; nothing was trained"
            ) from error
    return score


def make_scorer(
    config: TrainConfig, score: Score, sources: Sequence[Source], eval_dataset: Dataset | None, encoder: Encoder, base: Base,
    generate: Generate,
) -> Scorer:  # fmt: skip
    """The scorer of a run, with the prompts of its eval rows, which are in `sources`. Raises ConfigError if there are none."""
    assert eval_dataset is not None
    rows = {example.row for example in eval_dataset.examples}
    found = collect_eval_prompts([parsed for parsed in parsed_rows(sources) if parsed.row in rows], encoder)
    limit = base.structure.max_positions
    found = [prompt for prompt in found if not limit or len(prompt.prompt) < limit]
    fits = score.name if score.name in METRICS else "FUNCTION"
    check_fits(fits, [prompt.references for prompt in found], eval_dataset.rows, option="score", fewest=1)
    prompts = evenly(found, config.score_prompts or MOST_PROMPTS)
    answers = [reference for prompt in prompts for reference in prompt.references]
    longest = max(len(ids) for ids in encoder.tokenizer(answers, add_special_tokens=False)["input_ids"])
    return Scorer(score, prompts, encoder, config.score_max_tokens or 2 * longest, generate)
