"""Scores while training: at each evaluation the model answers eval prompts, and its answers are held against those of the rows.

    prepare_score(config, ...)   what scores, found and tried on a few references before a model is loaded
    make_scorer(...)             with the prompts, once the eval rows are read
    scorer(base, slot)           greedy answers through what is attached in `slot`, and their score

Generation is the serving engine's, which lies above training: whoever starts a run hands it over as `generate`. It answers on
the base under training, without gradients and dropout, in the dtype in which adapters are served; nothing of the run depends on
it, for a run has no random state to disturb.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.config import TrainConfig
from graftlm.data.dataset import Dataset
from graftlm.data.questions import Question, parsed_rows, questions_of, reference_of, spread_out
from graftlm.data.sources import Source, is_hub_id, share
from graftlm.errors import ConfigError, ScoreError
from graftlm.progress import working
from graftlm.scores import METRICS, Score, ScoreFunction, check_fits, find_score
from graftlm.training.shared_base import computing_in

MOST_PROMPTS = 32  # by default: two batches of the engine
_TRIED = 8  # rows whose references a score is tried on


class Generate(Protocol):
    """Greedy answers to prompts of token ids through the adapter in `slot`, 0 for the base alone, in the prompts' order.

    `answered` hears how many are complete.
    """

    def __call__(
        self, base: Base, encoder: Encoder, prompts: Sequence[Sequence[int]], *, slot: int, max_tokens: int,
        answered: Callable[[int], None],
    ) -> list[str]: ...  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scorer:
    """Asks eval prompts and scores the answers."""

    score: Score
    questions: tuple[Question, ...]
    encoder: Encoder
    max_tokens: int
    """Most tokens of an answer."""
    generate: Generate

    def __call__(self, base: Base, slot: int) -> float:
        """The score of what is in `slot` now. Raises ScoreError."""
        prompts = [question.prompt for question in self.questions]
        with (
            computing_in(base, None, training=False),
            working("answering eval prompts", len(prompts), "prompts") as task,
        ):
            answers = self.generate(
                base, self.encoder, prompts, slot=slot, max_tokens=self.max_tokens, answered=lambda done: task.to(done)
            )
        return self.score(answers, [question.references for question in self.questions])


def prepare_score(
    config: TrainConfig, sources: Sequence[Source], eval_source: Source | None, function: ScoreFunction | None = None
) -> Score | None:
    """The score that the config asks for, or None; a function of one's own is tried on the references of a few rows.

    Raises ConfigError for one that cannot be used, and for eval rows without prompts; nothing is loaded yet.
    """
    if config.score is None:
        return None
    score = find_score(config.score, function)
    apart = eval_source is not None and share(eval_source.path) is None
    source = eval_source if apart and eval_source is not None else sources[0]
    if source.rows is None and is_hub_id(source.path):
        return score  # it is read once, when the base is there
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
    """The scorer of a run over the questions of its eval rows, which `sources` hold; ConfigError where there are none."""
    assert eval_dataset is not None
    rows = {example.row for example in eval_dataset.examples}
    found = questions_of([parsed for parsed in parsed_rows(sources) if parsed.row in rows], encoder)
    limit = base.structure.max_positions
    found = [question for question in found if not limit or len(question.prompt) < limit]
    fits = score.name if score.name in METRICS else "FUNCTION"
    check_fits(fits, [question.references for question in found], eval_dataset.rows, option="score", fewest=1)
    questions = spread_out(found, config.score_prompts or MOST_PROMPTS)
    answers = [reference for question in questions for reference in question.references]
    longest = max(len(ids) for ids in encoder.tokenizer(answers, add_special_tokens=False)["input_ids"])
    return Scorer(score, questions, encoder, config.score_max_tokens or 2 * longest, generate)
