"""A run: one trial with its run folder, made from a config and a loaded base, from the first example to the saved result.

    read_data, make_adapter              what is trained on, and the adapter, attached in its slot
    Session(...)                         the trial: its examples, optimizer, schedule and order
    session.resume_from_checkpoint(...)  its identity; the newest checkpoint, where the config asks for it
    session.open_run_folder(...)         write what the run is, open its metrics
    session.finish()                     put the best step back and save it
    session.close()                      close the metrics; the adapter leaves its slot

`graft train` holds one session, a sweep many on one base. Locking the run folder (`locked`) is the caller's task, as is
the loop.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import nn

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter, AdapterPlan, attach, detach, new_adapter, select_layers
from graftlm.adapters.peft_format import AdapterFolder
from graftlm.adapters.store import open_adapter
from graftlm.base.activation_offload import ActivationOffload
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.base.precision import DTYPES
from graftlm.base.saving import send_weights
from graftlm.config import Precision, TrainConfig
from graftlm.config.train import OFFLOAD_ACTIVATIONS_ON_CPU, OFFLOAD_ON_CPU
from graftlm.data.dataset import Dataset, load, split
from graftlm.data.sampler import Sampler, make_sampler
from graftlm.data.sources import Source, is_hub_id, named_source, read, share, token_limit
from graftlm.distributed.group import ALONE, Ranks
from graftlm.errors import ConfigError, ModelError
from graftlm.files import write_json
from graftlm.heap import release_memory
from graftlm.progress import working
from graftlm.training import checkpoint
from graftlm.training.callbacks import Callback
from graftlm.training.checkpoint import Newest, RunIdentity, identify, resume_from_checkpoint
from graftlm.training.logging import Recorder, open_trackers
from graftlm.training.optimizer import AdamW, LRSchedule
from graftlm.training.run_files import METRICS, SAMPLES, SO_FAR, SUMMARY, MetricsFile
from graftlm.training.run_folder import describe_inputs, environment, save_result, writing
from graftlm.training.trial import Trial
from graftlm.training.view import View


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What is trained on, and what the eval loss is measured on."""

    encoder: Encoder
    dataset: Dataset
    eval_dataset: Dataset | None


class Session:
    """One trial and its run folder."""

    identity: RunIdentity
    recorder: Recorder

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        adapter: Adapter | None,
        training_data: TrainingData,
        view: View,
        *,
        slot: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """`adapter` is attached in `slot`; None for full training, in slot 0. Raises ConfigError."""
        assert (adapter is None) == (slot == 0)
        self.config, self.base, self.adapter, self.training_data, self.view = config, base, adapter, training_data, view
        self.callbacks = callbacks
        self.trial: Trial = make_trial(base, config, adapter, slot, training_data.dataset, training_data.eval_dataset)
        self._open = True

    def resume_from_checkpoint(self, micro_batch_tokens: int, known: Newest | None = None) -> None:
        """Identify this run by content, and go on from its newest checkpoint where the config says so; `known` where that was
        looked for already.

        Raises RunError for a checkpoint of another run, or where there are some and none is complete.
        """
        self.resolved = resolve(self.config, self.base, self.trial, micro_batch_tokens)
        training_data = self.training_data
        self.identity = identify(
            self.resolved, self.base, self.adapter, training_data.dataset, training_data.eval_dataset
        )
        self.resumed = self.config.resume and resume_from_checkpoint(
            self.config, self.trial, self.identity, self.view, known
        )

    def open_run_folder(self, plan: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        """Write what this run is, `plan` with it, and open its metrics; of several ranks, the first does. Raises RunError."""
        config, out, step = self.config, self.config.out, self.trial.step
        self.plan = {**plan, "steps": self.trial.sampler.steps}
        self.description = describe_inputs(
            config, self.base, self.training_data.encoder, self.training_data.dataset, self.training_data.eval_dataset
        )
        with writing(out):
            write_json(out / "config.json", self.resolved)
            write_json(out / "environment.json", environment())
            write_json(out / "data.json", self.description["data"])
            write_json(out / "plan.json", self.plan)
            from_step = step if self.resumed else None
            metrics = MetricsFile(out / METRICS, from_step)
            samples = MetricsFile(out / SAMPLES, from_step) if self.trial.scorer is not None else None
            for change in self.identity.changes if self.resumed else ():
                if change["step"] == step:
                    metrics.write({"step": step, "kind": "event", "event": "changed", **change})
            trackers = open_trackers(config.track, out, self.resolved)
        self.recorder = Recorder(
            config, self.trial, self.identity, self.view, metrics, trackers, self.callbacks, ranks, samples=samples
        )

    def finish(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Put the best step back, save it as the result, and remove the checkpoint that stood for it; returns the summary.

        A checkpoint of the last step is written first, so that a run whose result cannot be written is not lost. Raises
        RunError.
        """
        config, trial, out = self.config, self.trial, self.config.out
        with writing(out):
            try:  # one more is kept, for this one goes again once the result is there
                checkpoint.save(out, trial, self.identity.to_json(), config.keep_checkpoints + 1, ranks)
            except (OSError, SafetensorError) as error:  # the result is smaller and may still find room
                self.view.note(f"no checkpoint could be written at the end ({error}); saving the result")
            trial.optimizer.forget()  # writing the result takes memory of its own
            release_memory()
            step = self._restore_best()
            checkpoint.write_best(out, trial)
            saved = self._save(step)
            checkpoint.remove(out, trial.step)
            for kind in ("adapter", "model"):  # what an interruption before had saved
                shutil.rmtree(out / SO_FAR.format(kind), ignore_errors=True)
            summary = self._summary(saved)
            write_json(out / SUMMARY, summary)
        return summary

    def finish_with_the_first(self, ranks: Ranks) -> None:
        """On another rank than the first: what of `finish` takes all ranks, where they share the base's weights."""
        config, base, trial = self.config, self.base, self.trial
        if base.structure.weights is None:
            return
        checkpoint.save(config.out, trial, {}, config.keep_checkpoints + 1, ranks)
        trial.optimizer.forget()
        release_memory()
        checkpoint.restore_best(config.out, trial)
        if self.adapter is not None:
            adapter_format.prove(base, self.adapter, self.training_data.encoder)
        else:
            send_weights(base.model, DTYPES[config.save_precision or base.precision])

    def save_so_far(self) -> dict[str, Any]:
        """Save the best step of a run that is interrupted, beside its checkpoints, which stay; returns the summary until here.

        The trial then holds the best step, so nothing goes on with it. Raises RunError.
        """
        with writing(self.config.out):
            summary = self._summary(self._save(self._restore_best(), SO_FAR))
            write_json(self.config.out / SUMMARY, summary)
        return summary

    def _restore_best(self) -> int:
        """Put the best step's tensors into the trial; returns that step."""
        trouble = checkpoint.restore_best(self.config.out, self.trial)
        if trouble is not None:
            self.view.note(trouble)
        return self.trial.best_evaluation.step if self.trial.best_evaluation is not None else self.trial.step

    def _save(self, step: int, name: str = "{}") -> dict[str, Any]:
        description = {**self.description, "steps": step, "changes": self.identity.changes}
        encoder = self.training_data.encoder
        saved = save_result(self.config, self.base, self.adapter, self.trial, encoder, description, name)
        return {**saved, "saved_step": step}

    def _summary(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        config, base, trial, recorder = self.config, self.base, self.trial, self.recorder
        return {
            "out": str(config.out),
            **saved,
            "method": config.method,
            "model": config.model,
            "trainable_parameters": sum(p.numel() for p in trial.parameters.values()),
            "base_parameters": base.parameters,
            "base_precision": base.precision,
            "base_bytes": base.bytes,
            "compute_dtype": base.compute_dtype,
            "packed": base.packs,
            "steps": trial.step,
            "num_tokens": trial.tokens,
            "target_tokens": trial.target_tokens,
            "tokens_per_second": recorder.tokens / recorder.seconds if recorder.seconds else None,
            "train_loss": recorder.loss,
            "eval_loss_before": trial.first_evaluation.loss if trial.first_evaluation else None,
            "eval_loss_after": trial.best_evaluation.loss if trial.best_evaluation else None,
            "score": config.score,
            "eval_score_before": trial.first_evaluation.score if trial.first_evaluation else None,
            "eval_score_after": trial.best_evaluation.score if trial.best_evaluation else None,
            "stop_reason": trial.stop_reason,
        }

    def write_measured(self, summary: Mapping[str, Any]) -> None:
        """Write the final summary, and what was measured beside what was planned. Raises RunError."""
        keys = ("base_bytes", "peak_memory_bytes", "idle_memory_bytes", "tokens_per_second")
        with writing(self.config.out):
            write_json(self.config.out / SUMMARY, dict(summary))
            write_json(self.config.out / "plan.json", {**self.plan, "measured": {key: summary[key] for key in keys}})

    def close(self) -> None:
        """Close the metrics and free the adapter's slot; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        if hasattr(self, "recorder"):
            self.recorder.close()
        if self.adapter is not None:
            detach(self.base, self.trial.slot)


def resolve(config: TrainConfig, base: Base, trial: Trial, micro_batch_tokens: int) -> dict[str, Any]:
    """Every option with what its default came to; a file of these is the same run again."""
    full = config.method == "full"
    return {
        **config.to_json(),
        "base_precision": base.precision,
        "compute_dtype": base.compute_dtype,
        "device": base.device.type if config.ranks > 1 else str(base.device),  # each rank has its own
        "save_precision": (config.save_precision or base.precision) if full else None,
        "max_length": config.max_length or base.structure.max_positions or None,
        "alpha": None if full or config.from_adapter is not None else config.scale_numerator,
        "learning_rate": config.peak_learning_rate,
        "epochs": None if config.steps is not None else config.epochs or 1.0,
        "micro_batch_tokens": micro_batch_tokens,
        "eval_every": trial.eval_every if trial.eval_examples else None,
        "resume": False,
        "allow_change": [],
    }


# ---- the data ---------------------------------------------------------------------------------------------------------


def check_readable(sources: Sequence[Source]) -> None:
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


# ---- the base and the adapter -----------------------------------------------------------------------------------------


def stored_precision(config: TrainConfig) -> Precision:
    """How the base is stored: as asked, else as the adapter that training starts from had it, else the method's default."""
    if config.from_adapter is not None and config.base_precision is None and config.method == "lora":
        manifest = _parent(config, config.from_adapter).manifest
        if manifest is not None:
            return manifest["base"]["precision"]
    return config.stored_precision


def set_checkpointing(config: TrainConfig, base: Base) -> None:
    """Switch activation checkpointing on where the config asks for it; ModelError for a model without layers to recompute,
    ConfigError for --offload-activations without a GPU."""
    if config.offload_activations and base.device.type != "cuda":
        raise ConfigError(OFFLOAD_ACTIVATIONS_ON_CPU)
    offload = ActivationOffload() if config.offload_activations else None
    if config.activation_checkpointing and base.structure.checkpoint_layers(True, offload) == 0:
        raise ModelError(
            f"{type(base.model).__name__} has no layers that Graft could recompute, so --activation-checkpointing would "
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
        adapter = new_adapter_for(base, config)
    attach(base, adapter, slot)
    return adapter


def _parent(config: TrainConfig, name: Path) -> AdapterFolder:
    """The adapter that training starts from."""
    return open_adapter(name, config.store, model=config.model)


def new_adapter_for(base: Base, config: TrainConfig) -> Adapter:
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


# ---- the trial --------------------------------------------------------------------------------------------------------


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
    optimizer = make_optimizer(config, parameters, base.device)
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


def make_optimizer(config: TrainConfig, parameters: dict[str, nn.Parameter], device: torch.device) -> AdamW:
    """AdamW as the config describes it; LoRA+ gives every B matrix a learning rate of its own. Raises ConfigError."""
    if config.offload_optimizer and device.type == "cpu":
        raise ConfigError(OFFLOAD_ON_CPU)
    ratio = config.loraplus_lr_ratio
    return AdamW(
        parameters, beta1=config.beta1, beta2=config.beta2, epsilon=config.epsilon, weight_decay=config.weight_decay,
        seed=config.seed, lr_multipliers={n: ratio for n in parameters if n.endswith(".lora_B.weight")} if ratio != 1 else None,
        eight_bit=config.optimizer == "adamw-8bit", in_backward=config.optimizer_in_backward,
        state_device=torch.device("cpu") if config.offload_optimizer else None,
    )  # fmt: skip


def default_eval_every(dataset: Dataset, eval_dataset: Dataset | None, sampler: Sampler) -> int:
    """Steps between evaluations: at most ten in a run, and no more than cost about a quarter of the training.

    A forward pass costs a third of a forward and backward pass.
    """
    if eval_dataset is None:
        return sampler.steps
    training = 3.0 * sampler.draws * dataset.tokens / dataset.rows
    affordable = int(0.25 * training / eval_dataset.tokens)
    return math.ceil(sampler.steps / min(10, max(1, affordable)))
