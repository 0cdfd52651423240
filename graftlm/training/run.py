"""From a config to a finished run: load, check, train, save.

    load the base -> read the data -> choose what is trained -> [evaluate, step, log, save] ... -> adapter/ or model/

This is the one place where the parts meet; each part is a call. What a person sees comes from `view.py`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import nn

from graftlm.adapters import format as adapter_format
from graftlm.adapters.attach import Adapter, Plan, attach, choose, coverage, new_adapter
from graftlm.base import hf
from graftlm.base.chat import Encoder
from graftlm.base.load import Base, load_base
from graftlm.base.precision import DTYPES
from graftlm.config import TrainConfig
from graftlm.data.documents import Dataset, load, split
from graftlm.data.order import Order, make_order
from graftlm.data.sources import Source, is_hub_id, named_source, read, share, token_limit
from graftlm.errors import ConfigError, ModelError, RunError, Stopped
from graftlm.files import whole_folder, write_json
from graftlm.planning.measured import PeakMemory
from graftlm.training import checkpoint
from graftlm.training.loop import StepResult, train
from graftlm.training.optimizer import AdamW, Schedule
from graftlm.training.runfolder import Metrics, check_free, environment, locked, write_lines
from graftlm.training.trackers import Tracker, check_trackers, open_trackers
from graftlm.training.trial import Evaluation, Trial
from graftlm.training.view import View

DEFAULT_TOKENS_PER_PASS = 4096
# Options that change neither what is trained nor the numbers, so a run may go on with others.
_FREE_ON_RESUME = {
    "activation_checkpointing", "device", "keep_checkpoints", "out", "resume", "save_every", "tokens_per_pass", "track",
    "trust_remote_code", "model", "data", "eval_data", "save_precision",
}  # fmt: skip


def run(config: TrainConfig, view: View) -> dict[str, Any]:
    """Train as the config says; returns the summary that `--json` prints. Raises GraftError, or Stopped on a signal."""
    check_trackers(config.track)
    sources = [named_source(text, "train") for text in config.data]
    _peek([*sources, *([named_source(config.eval_data, "valid")] if config.eval_data else [])])
    with locked(config.out), PeakMemory(_probe_device(config)) as memory:
        check_free(config.out, config.resume)
        started = time.perf_counter()
        with view.working("loading the base"):
            base = load_base(
                config.model, precision=config.stored_precision, compute=config.compute, device=config.device,
                init=config.init, seed=config.seed, trust_remote_code=config.trust_remote_code,
            )  # fmt: skip
        loaded = time.perf_counter()
        view.base(base)
        tokens = _train_tokens(base, config.train_tokens)
        encoder = Encoder(base.tokenizer, train_on=config.train_on, date=config.template_date)
        dataset, held_out = read_data(config, sources, encoder, base, view)
        view.data(dataset, held_out, encoder.notes)
        adapter = make_adapter(base, config, tokens)
        trial = make_trial(base, config, adapter, dataset, held_out)
        if adapter is not None:
            view.coverage(coverage(base, adapter), adapter)
        else:
            view.everything(sum(p.numel() for p in trial.parameters.values()))
        if config.activation_checkpointing and base.anatomy.checkpoint_layers(True) == 0:
            raise ModelError(
                f"{type(base.model).__name__} has no layers that Graft could run again, so --activation-checkpointing would "
                "do nothing; leave it out, and use a smaller --tokens-per-pass"
            )

        resolved = _resolved(config, base, trial)
        identity = _identity(resolved, base, dataset, held_out)
        found = _go_on(config, trial, identity, view) if config.resume else None
        about = _about(config, base, encoder, dataset, held_out)
        write_json(config.out / "config.json", resolved)
        write_json(config.out / "environment.json", environment())
        write_json(config.out / "data.json", about["data"])
        trackers = open_trackers(config.track, config.out, resolved)
        metrics = Metrics(config.out / "metrics.jsonl", None if found is None else trial.step)
        recorder = Recorder(config, trial, identity, view, metrics, trackers)
        with _signals(recorder):
            try:
                with view.training(trial):
                    train(base, [trial], config.tokens_per_pass or DEFAULT_TOKENS_PER_PASS, recorder)
            finally:
                metrics.close()
                for tracker in trackers:
                    tracker.close()
            if recorder.stopped is not None and not trial.done:
                place = checkpoint.save(config.out, trial, identity, config.keep_checkpoints)
                raise Stopped(
                    recorder.stopped,
                    f"stopped after step {trial.step} of {trial.order.steps}; checkpoint {place}. "
                    "Go on with the same command and --resume",
                )
            trained = time.perf_counter()
            _checkpoint_end(config, trial, identity, view)
            trouble = checkpoint.take_best(config.out, trial)
            if trouble is not None:
                view.note(trouble)
            saved_step = trial.best.step if trial.best is not None else trial.step
            try:
                checkpoint.name_best(config.out, trial)
                result = save_result(config, base, adapter, trial, encoder, about, saved_step)
            except (OSError, SafetensorError) as error:
                raise RunError(_not_saved(config, error)) from None
            checkpoint.remove(config.out, trial.order.steps)  # the result is there instead
    summary = {
        "out": str(config.out),
        **result,
        "method": config.method,
        "model": config.model,
        "trained_parameters": sum(p.numel() for p in trial.parameters.values()),
        "base_parameters": base.parameters,
        "base_precision": base.precision,
        "base_bytes": base.bytes,
        "compute": base.compute,
        "packed": base.packs,
        "peak_memory_bytes": memory.bytes,
        "idle_memory_bytes": memory.start,
        "steps": trial.step,
        "saved_step": saved_step,
        "tokens": trial.tokens,
        "trained_tokens": trial.trained_tokens,
        "tokens_per_second": recorder.tokens / recorder.seconds if recorder.seconds else None,
        "train_loss": recorder.loss,
        "eval_loss_before": trial.first.loss if trial.first else None,
        "eval_loss_after": trial.best.loss if trial.best else None,
        "seconds_loading": loaded - started,
        "seconds_training": trained - loaded,
    }
    write_json(
        config.out / "plan.json",
        {"measured": {key: summary[key] for key in ("base_bytes", "peak_memory_bytes", "tokens_per_second")}},
    )
    view.done(summary)
    return summary


def _probe_device(config: TrainConfig) -> torch.device:
    asked = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda" if asked.startswith("cuda") and torch.cuda.is_available() else "cpu")


def _peek(sources: Sequence[Source]) -> None:
    """Raise DataError for a file that is missing or empty before the base is loaded, which may take minutes."""
    for source in sources:
        if share(source.path) is None and not is_hub_id(source.path):
            next(read(source), None)


def read_data(
    config: TrainConfig, sources: Sequence[Source], encoder: Encoder, base: Base, view: View
) -> tuple[Dataset, Dataset | None]:
    """The training data, and the held-out data where there are any. Raises DataError."""
    limit = token_limit(config.max_tokens_per_document, base.anatomy.max_positions)
    with view.reading() as progress:
        dataset = load(sources, encoder, max_tokens=limit, too_long=config.too_long, progress=progress)
        if config.eval_data is None:
            return dataset, None
        fraction = share(config.eval_data)
        if fraction is not None:
            return split(dataset, fraction)
        apart = [named_source(config.eval_data, "valid")]
        return dataset, load(apart, encoder, max_tokens=limit, too_long=config.too_long, progress=progress)


def _train_tokens(base: Base, names: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens whose rows are trained; unknown ones are added where the embedding matrix has spare rows."""
    tokenizer: Any = base.tokenizer
    rows = base.anatomy.vocabulary
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


def _checkpoint_end(config: TrainConfig, trial: Trial, identity: dict[str, Any], view: View) -> None:
    """A checkpoint of the last step, so that a run whose result cannot be written is not lost."""
    try:
        # One more is kept, for this one goes again once the result is there.
        checkpoint.save(config.out, trial, identity, config.keep_checkpoints + 1)
    except (OSError, SafetensorError) as error:  # the result is smaller and may still find room
        view.note(f"no checkpoint could be written at the end ({error}); saving the result")


def _not_saved(config: TrainConfig, error: Exception) -> str:
    """What happened to a finished run whose result could not be written, and what is left of it."""
    found, _ = checkpoint.newest(config.out)
    left = (
        "and no checkpoint was written. Make room and train again"
        if found is None
        else f"the newest checkpoint is {found}. Make room, and go on with the same command and --resume"
    )
    return f"training is done and its result could not be written to {config.out} ({error}); {left}"


def make_adapter(base: Base, config: TrainConfig, tokens: tuple[int, ...] = ()) -> Adapter | None:
    """The untrained adapter that the config describes, attached in slot 1; None for full training."""
    if config.method == "full":
        return None
    plan = Plan(
        rank=config.rank, alpha=config.scale_numerator, rank_stabilized=config.rank_stabilized, dropout=config.dropout,
        dora=config.dora, ranks=config.rank_pattern, alphas=config.alpha_pattern, whole=config.modules_to_save,
        tokens=tokens,
    )  # fmt: skip
    adapter = new_adapter(base, choose(base, config.targets), plan, config.seed)
    attach(base, adapter, slot=1)
    return adapter


def make_trial(
    base: Base, config: TrainConfig, adapter: Adapter | None, dataset: Dataset, held_out: Dataset | None
) -> Trial:
    """What is trained, with its optimizer, schedule and order of documents."""
    parameters: dict[str, nn.Parameter]
    if adapter is None:
        base.model.requires_grad_(True)
        parameters = dict(base.model.named_parameters())
    else:
        parameters = adapter.parameters()
    if not parameters:
        raise ConfigError("nothing is trained; choose targets or modules")
    order = make_order(
        [len(part.documents) for part in dataset.parts], [part.weight for part in dataset.parts],
        seed=config.seed, batch_size=config.batch_size, epochs=config.epochs, steps=config.steps,
    )  # fmt: skip
    ratio = config.b_learning_rate_ratio
    optimizer = AdamW(
        parameters, beta1=config.beta1, beta2=config.beta2, epsilon=config.epsilon, weight_decay=config.weight_decay,
        seed=config.seed, ratios={n: ratio for n in parameters if n.endswith(".lora_B.weight")} if ratio != 1 else None,
    )  # fmt: skip
    schedule = Schedule(
        peak=config.peak_learning_rate, kind=config.schedule, warmup_steps=round(config.warmup * order.steps),
        steps=order.steps,
    )  # fmt: skip
    return Trial(
        name=config.out.name, slot=0 if adapter is None else 1, seed=config.seed, parameters=parameters,
        optimizer=optimizer, schedule=schedule, documents=dataset.documents, order=order,
        held_out=() if held_out is None else held_out.documents, max_grad_norm=config.max_grad_norm,
        eval_every=config.eval_every or default_eval_every(dataset, held_out, order),
    )  # fmt: skip


def default_eval_every(dataset: Dataset, held_out: Dataset | None, order: Order) -> int:
    """Steps between evaluations: at most ten in a run, and no more than cost about a quarter of the training.

    A pass forward costs a third of one forward and back.
    """
    if held_out is None:
        return order.steps
    training = 3.0 * order.draws * dataset.tokens / dataset.rows
    affordable = int(0.25 * training / held_out.tokens)
    return math.ceil(order.steps / min(10, max(1, affordable)))


def _resolved(config: TrainConfig, base: Base, trial: Trial) -> dict[str, Any]:
    """Every option with what its default came to; a file of these is the same run again."""
    full = config.method == "full"
    held_out = bool(trial.held_out)
    return {
        **config.to_json(),
        "precision": base.precision,
        "compute": base.compute,
        "device": str(base.device),
        "save_precision": (config.save_precision or base.precision) if full else None,
        "max_tokens_per_document": config.max_tokens_per_document or base.anatomy.max_positions or None,
        "alpha": None if full else config.scale_numerator,
        "learning_rate": config.peak_learning_rate,
        "epochs": None if config.steps is not None else config.epochs or 1.0,
        "tokens_per_pass": config.tokens_per_pass or DEFAULT_TOKENS_PER_PASS,
        "eval_every": trial.eval_every if held_out else None,
        "resume": False,
    }


def _identity(resolved: dict[str, Any], base: Base, dataset: Dataset, held_out: Dataset | None) -> dict[str, Any]:
    """What must be the same for a run to go on: options by value, data and base by content."""
    return {
        **{name: value for name, value in resolved.items() if name not in _FREE_ON_RESUME},
        "data_digest": dataset.digest,
        "eval_data_digest": held_out.digest if held_out else None,
        "base_fingerprint": base.fingerprint,
    }


def _go_on(config: TrainConfig, trial: Trial, identity: dict[str, Any], view: View) -> Path | None:
    """Put the newest whole checkpoint into `trial`; None where none was ever written. Raises RunError."""
    found, damaged = checkpoint.newest(config.out)
    for problem in damaged:
        view.note(f"passed over the damaged checkpoint {problem}")
    if found is None:
        view.note("no checkpoint was written yet; starting from the beginning")
    else:
        checkpoint.load(found, trial, identity)
        view.note(f"going on from {found}")
    return found


def _about(
    config: TrainConfig, base: Base, encoder: Encoder, dataset: Dataset, held_out: Dataset | None
) -> dict[str, Any]:
    """What the run folder and the adapter's manifest say about data and base."""

    def counted(data: Dataset) -> dict[str, Any]:
        return {
            "sources": [{"name": p.name, "weight": p.weight, "rows": len(p.documents)} for p in data.parts],
            "rows": data.rows, "tokens": data.tokens, "trained_tokens": data.trained_tokens, "longest": data.longest,
            "dropped": data.dropped, "cut": data.cut, "formats": dict(data.kinds), "digest": data.digest,
        }  # fmt: skip

    return {
        "data": {
            "train": counted(dataset),
            "eval": None if held_out is None else counted(held_out),
            "template_date": config.template_date,
            "template_digest": encoder.template_digest,
            "train_on": config.train_on,
        },
        "base": {
            "name": config.model,
            "fingerprint": base.fingerprint,
            "precision": base.precision,
            "architecture": type(base.model).__name__,
            "parameters": base.parameters,
        },
    }


def save_result(
    config: TrainConfig, base: Base, adapter: Adapter | None, trial: Trial, encoder: Encoder, about: dict[str, Any],
    saved_step: int,
) -> dict[str, Any]:  # fmt: skip
    """Write adapter/ or model/ and evaluation.jsonl; returns their places and sizes."""
    if trial.first is not None and trial.best is not None:
        after = {r.row: r for r in trial.best.rows}
        write_lines(
            config.out / "evaluation.jsonl",
            (
                {
                    "row": r.row,
                    "trained_tokens": r.trained_tokens,
                    "loss_before": r.loss,
                    "loss_after": after[r.row].loss,
                }
                for r in trial.first.rows
            ),
        )
    manifest = {
        "format": 1,
        **about,
        "method": config.method,
        "seed": config.seed,
        "steps": saved_step,
        "template": {"digest": encoder.template_digest, "own": encoder.has_own_template, "date": config.template_date},
        "tokenizer_digest": encoder.tokenizer_digest,
        "evaluation": {
            "before": trial.first.loss if trial.first else None,
            "after": trial.best.loss if trial.best else None,
        },
        "versions": environment()["versions"],
    }
    if adapter is None:
        with whole_folder(config.out / "model") as folder:
            dtype = DTYPES[config.save_precision or base.precision]
            hf.save(base.model, str(folder), dtype)
            base.tokenizer.save_pretrained(str(folder))
            write_json(folder / "graft.json", manifest)
        files = list((config.out / "model").glob("*.safetensors"))
        return {"model_folder": str(config.out / "model"), "saved_bytes": sum(f.stat().st_size for f in files)}
    with whole_folder(config.out / "adapter") as folder:
        adapter_format.save(base, adapter, folder, manifest)
        if config.train_tokens:
            base.tokenizer.save_pretrained(str(folder))
    size = (config.out / "adapter" / adapter_format.TENSORS).stat().st_size
    return {"adapter_folder": str(config.out / "adapter"), "saved_bytes": size}


class Recorder:
    """Hears the loop and writes: metrics, trackers, checkpoints, the progress bar."""

    def __init__(
        self, config: TrainConfig, trial: Trial, identity: dict[str, Any], view: View, metrics: Metrics,
        trackers: Sequence[Tracker],
    ) -> None:  # fmt: skip
        self.config, self.trial, self.identity = config, trial, identity
        self.view, self.metrics, self.trackers = view, metrics, trackers
        self.stopped: int | None = None
        self.tokens, self.seconds = 0, 0.0
        self.loss: float | None = None
        self._improved = False

    def stepped(self, trial: Trial, result: StepResult) -> None:
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.loss = result.loss
        values = {
            "loss": result.loss, "learning_rate": result.learning_rate, "grad_norm": result.grad_norm,
            "tokens": result.tokens, "trained_tokens": result.trained_tokens, "seconds": result.seconds,
        }  # fmt: skip
        self.metrics.write({"step": result.step, "kind": "train", **values})
        for tracker in self.trackers:
            tracker.log(result.step, {f"train/{name}": float(value) for name, value in values.items()})
        self.view.stepped(trial, result)

    def evaluated(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        self.metrics.write(
            {"step": evaluation.step, "kind": "eval", "loss": evaluation.loss, "rows": len(evaluation.rows)}
        )
        for tracker in self.trackers:
            tracker.log(evaluation.step, {"eval/loss": evaluation.loss})
        self._improved = best and evaluation.step > 0
        self.view.evaluated(trial, evaluation, best)

    def settled(self, trials: Sequence[Trial]) -> bool:
        """Save what is due; a best step in the middle needs a checkpoint, one at the end becomes the result."""
        trial = self.trial
        due = self.config.save_every is not None and trial.step % self.config.save_every == 0
        if (due or self._improved) and not trial.done:
            checkpoint.save(self.config.out, trial, self.identity, self.config.keep_checkpoints)
        self._improved = False
        if self.stopped is not None and not trial.done:
            self.metrics.write({"step": trial.step, "kind": "event", "event": "stopped", "signal": self.stopped})
            return False
        self.stopped = None
        return True


@contextmanager
def _signals(recorder: Recorder) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the current step, or once its result is saved; a second Ctrl-C at once."""

    def ask(number: int, frame: Any) -> None:
        if recorder.stopped is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        recorder.stopped = number
        again = "; once more to stop at once" if number == signal.SIGINT else ""
        saving = recorder.trial.done
        recorder.view.note(("saving the result first" if saving else "stopping after this step") + again)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:
        pass  # not the main thread: signals are somebody else's
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
