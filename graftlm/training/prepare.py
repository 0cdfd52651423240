"""From a config and a loaded base to what is trained: the data, the adapter or the base's own weights, and the trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter, AdapterPlan, attach, new_adapter, select_layers
from graftlm.adapters.peft_format import AdapterFolder
from graftlm.adapters.store import open_adapter
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.config import Precision, TrainConfig
from graftlm.config.train import OFFLOAD_ON_CPU
from graftlm.data.dataset import Dataset, load, split
from graftlm.data.sampler import Sampler, make_sampler
from graftlm.data.sources import Source, is_hub_id, named_source, read, share, token_limit
from graftlm.errors import ConfigError, ModelError
from graftlm.progress import working
from graftlm.training.optimizer import AdamW, LRSchedule
from graftlm.training.trial import Trial


def peek(sources: Sequence[Source]) -> None:
    """Raise DataError for a file that is missing or empty before the base is loaded, which may take minutes."""
    for source in sources:
        if source.rows is not None or (share(source.path) is None and not is_hub_id(source.path)):
            with working("looking at the data"):  # a .json file is read as a whole for its first row
                next(read(source), None)


def read_data(
    config: TrainConfig, sources: Sequence[Source], encoder: Encoder, base: Base, eval_source: Source | None = None
) -> tuple[Dataset, Dataset | None]:
    """The training data, and the eval data where there are any: those of the config, or `eval_source`. Raises DataError."""
    limit = token_limit(config.max_length, base.structure.max_positions)
    dataset = load(sources, encoder, max_tokens=limit, overlong=config.overlong)
    if eval_source is not None:
        return dataset, load([eval_source], encoder, max_tokens=limit, overlong=config.overlong)
    if config.eval_data is None:
        return dataset, None
    fraction = share(config.eval_data)
    if fraction is not None:
        return split(dataset, fraction)
    apart = [named_source(config.eval_data, "valid")]
    return dataset, load(apart, encoder, max_tokens=limit, overlong=config.overlong)


def stored_precision(config: TrainConfig) -> Precision:
    """How the base is stored: as asked, else as the adapter that training starts from had it, else the method's default."""
    if config.from_adapter is not None and config.base_precision is None and config.method == "lora":
        manifest = _parent(config, config.from_adapter).manifest
        if manifest is not None:
            return manifest["base"]["precision"]
    return config.stored_precision


def set_checkpointing(config: TrainConfig, base: Base) -> None:
    """Let activation checkpointing where the config asks for it; ModelError where none can."""
    if config.activation_checkpointing and base.structure.checkpoint_layers(True) == 0:
        raise ModelError(
            f"{type(base.model).__name__} has no layers that Graft could run again, so --activation-checkpointing would "
            "do nothing; leave it out, and use a smaller --micro-batch-tokens"
        )


def make_adapter(base: Base, config: TrainConfig, slot: int = 1) -> Adapter | None:
    """The adapter that the config describes or names, attached in `slot`; None for full training.

    A new one is untrained. One that training goes on with comes through the one loader, and with its own tokenizer where it
    has one; new tokens are added to the base's. Raises ConfigError and AdapterError.
    """
    if config.method == "full":
        return None
    if config.from_adapter is not None:
        adapter = adapter_format.load(base, _parent(config, config.from_adapter))
        assert adapter.origin is not None
        base.tokenizer = adapter.origin.tokenizer or base.tokenizer
    else:
        adapter = untrained(base, config)
    attach(base, adapter, slot)
    return adapter


def _parent(config: TrainConfig, name: Path) -> AdapterFolder:
    """The adapter that training starts from."""
    return open_adapter(name, config.store, model=config.model)


def untrained(base: Base, config: TrainConfig) -> Adapter:
    """The new adapter that the config describes, attached to nothing; new tokens are added to the base's tokenizer."""
    plan = AdapterPlan(
        rank=config.rank, alpha=config.scale_numerator, rank_stabilized=config.rank_stabilized, dropout=config.lora_dropout,
        dora=config.dora, ranks=config.rank_pattern, alphas=config.alpha_pattern, modules_to_save=config.modules_to_save,
        trainable_tokens=_trainable_token_ids(base, config.trainable_tokens),
    )  # fmt: skip
    return new_adapter(base, select_layers(base, config.targets), plan, config.seed)


def _trainable_token_ids(base: Base, names: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens whose rows are trained; unknown ones are added where the embedding matrix has spare rows."""
    tokenizer: Any = base.tokenizer
    rows = base.structure.vocabulary
    known = tokenizer.get_vocab()
    ids: list[int] = []
    for name in names:
        if name not in known:
            if len(tokenizer) >= rows:
                raise ConfigError(
                    f"token '{name}' is new, and the model's {rows} embedding rows are all taken; resize the model "
                    "first (model.resize_token_embeddings) and train on the resized copy"
                )
            # Not special, so that what is generated shows it; not normalized, so that it is found as it is written.
            tokenizer.add_tokens([AddedToken(name, normalized=False)], special_tokens=False)
            known = tokenizer.get_vocab()
        ids.append(int(known[name]))
    return tuple(dict.fromkeys(ids))


def make_trial(
    base: Base, config: TrainConfig, adapter: Adapter | None, slot: int, dataset: Dataset, eval_dataset: Dataset | None
) -> Trial:
    """What is trained in `slot` (0: the base itself), with its optimizer, schedule and order of examples."""
    parameters: dict[str, nn.Parameter] = base.train_all() if adapter is None else adapter.parameters()
    if not parameters:
        raise ConfigError("nothing is trained; choose targets or modules")
    sampler = make_sampler(
        [len(part.examples) for part in dataset.parts], [part.weight for part in dataset.parts],
        seed=config.seed, batch_size=config.batch_size, epochs=config.epochs, steps=config.steps,
    )  # fmt: skip
    ratio = config.loraplus_lr_ratio
    if config.offload_optimizer and base.device.type == "cpu":
        raise ConfigError(OFFLOAD_ON_CPU)
    optimizer = AdamW(
        parameters, beta1=config.beta1, beta2=config.beta2, epsilon=config.epsilon, weight_decay=config.weight_decay,
        seed=config.seed, ratios={n: ratio for n in parameters if n.endswith(".lora_B.weight")} if ratio != 1 else None,
        eight_bit=config.optimizer == "adamw-8bit", in_backward=config.optimizer_in_backward,
        state_device=torch.device("cpu") if config.offload_optimizer else None,
    )  # fmt: skip
    schedule = LRSchedule(
        peak=config.peak_learning_rate, kind=config.lr_scheduler, warmup_steps=round(config.warmup_ratio * sampler.steps),
        steps=sampler.steps,
    )  # fmt: skip
    return Trial(
        name=config.out.name, slot=slot, seed=config.seed, parameters=parameters,
        optimizer=optimizer, schedule=schedule, examples=dataset.examples, sampler=sampler,
        eval_examples=() if eval_dataset is None else eval_dataset.examples, max_grad_norm=config.max_grad_norm,
        eval_every=config.eval_every or default_eval_every(dataset, eval_dataset, sampler), best_by=config.best_by,
    )  # fmt: skip


def default_eval_every(dataset: Dataset, eval_dataset: Dataset | None, sampler: Sampler) -> int:
    """Steps between evaluations: at most ten in a run, and no more than cost about a quarter of the training.

    A pass forward costs a third of one forward and back.
    """
    if eval_dataset is None:
        return sampler.steps
    training = 3.0 * sampler.draws * dataset.tokens / dataset.rows
    affordable = int(0.25 * training / eval_dataset.tokens)
    return math.ceil(sampler.steps / min(10, max(1, affordable)))
