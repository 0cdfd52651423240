"""Options of `graft plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from graftlm.config.fields import TRAIN_ON_HELP, Config, Names, Sources, TrainOn, option, refuse_eval_weight

MOST_GPUS = 4096
Goal = Literal["balanced", "quality", "cost", "inference"]


class PlanConfig(Config):
    """Options of `graft plan`."""

    models: Sources = option(
        (), "models: a directory, a hub id, `demo`, or a built-in shape such as llama-2-70b", argument=True
    )
    model: str | None = option(None, "one model; the same as giving it as an argument")

    # Hardware
    gpu: str | None = option(
        None, "GPU to plan for, such as rtx-4090 or h100; default this machine's", group="hardware"
    )
    memory: str | None = option(None, "plan for a GPU with this memory instead, such as 24GB", group="hardware")
    gpus: int = option(
        1, "GPUs of each node that train together: the layout, the bytes on each and the bytes that it sends in a step",
        group="hardware", ge=1, le=MOST_GPUS,
    )  # fmt: skip
    nodes: int = option(
        1, "nodes that train together, each with --gpus GPUs: bytes sent between them are counted apart",
        group="hardware", ge=1, le=MOST_GPUS,
    )  # fmt: skip
    price_per_hour: float | None = option(None, "price of a GPU hour, in any currency", group="hardware", gt=0)

    # The run
    data: Sources = option(
        (), "training data: rows and tokens are counted, and the base's loss on them is measured", group="run"
    )
    train_on: TrainOn = option("all-assistant", TRAIN_ON_HELP, group="run")
    max_length: int = option(2048, "tokens in the longest example; 0 takes it from --data", group="run", ge=0)
    batch_size: int = option(1, "examples in one optimizer step", group="run", ge=1)
    micro_batch_tokens: int | None = option(None, "most tokens in one micro-batch; default 4096", group="run", ge=1)
    activation_checkpointing: bool = option(False, "plan with activation checkpointing", group="run")
    rank: int = option(16, "rank of the adapters", group="run", ge=1)
    targets: Names = option(("all-linear",), "all-linear, attention, mlp, or layers' names", group="run")
    epochs: float = option(1.0, "epochs", group="run", gt=0)

    # Advice
    goal: Goal = option("balanced", "what to optimize for: quality, cost, or inference speed", group="advice")
    variants: int = option(1, "number of fine-tuned versions that will be served together", group="advice", ge=1)
    ask_base: Literal["auto", "yes", "no"] = option(
        "auto",
        "measure the base's loss on the data; auto does so if its weights are on this machine and it takes seconds",
        group="advice",
    )
    explain: bool = option(False, "below each sentence of the advice, the measurement that supports it", group="advice")
    trust_remote_code: bool = option(False, "run Python code that comes with the model", group="advice")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`--model M` means what `M` alone means; without either there is nothing to plan."""
        model, models = values.get("model"), values.get("models")
        named = (models,) if isinstance(models, (str, Path)) else tuple(models or ())
        if not named and model is None:
            raise ValueError("no model is named; give one or several, such as: graft plan llama-2-7b")
        if named and model is not None and tuple(map(str, named)) != (str(model),):
            raise ValueError(
                f"the models are {', '.join(map(str, named))}, and --model is {model}; name them one way, several without "
                "--model"
            )
        return {**values, "models": named or (model,)}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gpu is not None and self.memory is not None:
            raise ValueError(f"give --gpu or --memory, not both; found {self.gpu} and {self.memory}")
        if self.gpus * self.nodes > MOST_GPUS:
            raise ValueError(
                f"--nodes {self.nodes} with --gpus {self.gpus} on each are {self.gpus * self.nodes:,} GPUs, and a plan takes "
                f"at most {MOST_GPUS:,}; --gpus counts those of one node"
            )
        if self.max_length == 0 and not self.data:
            raise ValueError("max-length 0 takes the data's own longest example; give --data")
        if self.max_length == 1:
            raise ValueError("max-length is 1; an example needs at least 2 tokens, one to predict the other")
        if self.ask_base == "yes" and not self.data:
            raise ValueError("ask-base measures the base's loss on data; give --data")
        if not self.targets:
            raise ValueError("targets is empty; take all-linear, attention, mlp, or names")
        for source in self.data:
            refuse_eval_weight(source)
        return self
