"""Options of `graft check`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from graftlm.config.fields import ISO_DATE, TRAIN_ON_HELP, Config, Sources, TrainOn, option, refuse_eval_weight


class CheckConfig(Config):
    """Options of `graft check`."""

    data: Sources = option(..., "data to check: FILE[:weight], a hub id, or `demo`", argument=True)
    model: str = option(..., "base model whose tokenizer and template are used")
    eval_data: str | None = option(None, "eval data, checked for overlap with the training data")
    train_on: TrainOn = option("all-assistant", TRAIN_ON_HELP)
    max_length: int | None = option(None, "length limit in tokens; default the model's longest position", ge=2)
    overlong: Literal["error", "drop", "truncate"] = option(
        "error", "what training will do with an example over the limit"
    )
    template_date: str = option("2026-01-01", "date given to the chat template, YYYY-MM-DD", pattern=ISO_DATE)
    trust_remote_code: bool = option(False, "run Python code that comes with the model")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse_eval_weight(self.eval_data)
        return self
