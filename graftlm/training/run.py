"""From a config to a finished run: load, check, train, save.

    load the base -> make what is trained -> read the data -> [evaluate, step, log, save] ... -> adapter/ or model/

This is the one place where the parts meet; each part is a call. `prepare.py` makes what is trained, `resume.py` goes on from
a checkpoint, `recorder.py` hears the loop, `result.py` writes what comes out. What a person sees comes from `view.py`.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from graftlm.adapters.attach import coverage
from graftlm.base.chat import Encoder
from graftlm.base.load import Base, load_base
from graftlm.config import TrainConfig
from graftlm.data.sources import named_source
from graftlm.errors import Diverged, ModelError, Stopped
from graftlm.files import clear_left, write_json
from graftlm.planning.measured import PeakMemory
from graftlm.training import checkpoint
from graftlm.training.foresight import Foresight, foresee, rehearse
from graftlm.training.loop import train
from graftlm.training.pages import own_pages
from graftlm.training.prepare import make_adapter, make_trial, peek, read_data, stored_precision
from graftlm.training.recorder import Recorder, signals
from graftlm.training.result import about, finish
from graftlm.training.resume import go_on, identify
from graftlm.training.runfolder import Metrics, check_free, environment, locked, writing
from graftlm.training.trackers import check_trackers, open_trackers
from graftlm.training.trial import Trial
from graftlm.training.view import View


def run(config: TrainConfig, view: View) -> dict[str, Any]:
    """Train as the config says; returns the summary that `--json` prints. Raises GraftError, or Stopped on a signal."""
    check_trackers(config.track)
    sources = [named_source(text, "train") for text in config.data]
    peek([*sources, *([named_source(config.eval_data, "valid")] if config.eval_data else [])])
    device = _probe_device(config)
    apart = own_pages(config.activation_checkpointing and device.type == "cpu")
    with locked(config.out), apart, PeakMemory(device) as memory:
        clear_left(config.out)
        check_free(config.out, config.resume)
        started = time.perf_counter()
        precision = stored_precision(config)
        with view.working("loading the base"):
            base = load_base(
                config.model, precision=precision, compute=config.compute, device=config.device,
                init=config.init, seed=config.seed, trust_remote_code=config.trust_remote_code,
            )  # fmt: skip
        loaded = time.perf_counter()
        view.base(base)
        adapter = make_adapter(base, config)
        encoder = Encoder(base.tokenizer, train_on=config.train_on, date=config.template_date)
        dataset, held_out = read_data(config, sources, encoder, base, view)
        view.data(dataset, held_out, encoder.notes)
        trial = make_trial(base, config, adapter, dataset, held_out)
        if adapter is not None:
            for note in adapter.origin.notes if adapter.origin is not None else ():
                view.note(note)
            view.coverage(coverage(base, adapter), adapter)
        else:
            view.everything(sum(p.numel() for p in trial.parameters.values()))
        _set_checkpointing(config, base)

        ahead = foresee(config, base, adapter, trial)
        resolved = _resolved(config, base, trial, ahead)
        identity = identify(resolved, base, adapter, dataset, held_out)
        resumed = go_on(config, trial, identity, view) if config.resume else False
        rehearsed = None if trial.done else rehearse(base, trial, ahead) - memory.start
        view.ahead(ahead, rehearsed)
        plan = {**ahead.to_json(), "rehearsed_bytes": rehearsed}
        facts = about(config, base, encoder, dataset, held_out)
        with writing(config.out):
            write_json(config.out / "config.json", resolved)
            write_json(config.out / "environment.json", environment())
            write_json(config.out / "data.json", facts["data"])
            write_json(config.out / "plan.json", plan)
            metrics = Metrics(config.out / "metrics.jsonl", trial.step if resumed else None)
            for change in identity.changes if resumed else ():
                if change["step"] == trial.step:
                    metrics.write({"step": trial.step, "kind": "event", "event": "changed", **change})
            trackers = open_trackers(config.track, config.out, resolved)
            recorder = Recorder(config, trial, identity, view, metrics, trackers)
            with signals(recorder):
                try:
                    with view.training(trial):
                        train(base, [trial], ahead.tokens_per_pass, recorder)
                except Diverged as error:
                    raise Diverged(f"{error}; {checkpoint.whereabouts(config.out)}") from None
                finally:
                    metrics.close()
                    for tracker in trackers:
                        tracker.close()
                if recorder.stopped is not None and not trial.done:
                    recorder.save()
                    raise Stopped(
                        recorder.stopped,
                        f"stopped after step {trial.step} of {trial.order.steps}; {checkpoint.whereabouts(config.out)}. "
                        "Go on with the same command and --resume",
                    )
                trained = time.perf_counter()
                result = finish(config, base, adapter, trial, encoder, facts, identity, view)
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
        "tokens": trial.tokens,
        "trained_tokens": trial.trained_tokens,
        "tokens_per_second": recorder.tokens / recorder.seconds if recorder.seconds else None,
        "train_loss": recorder.loss,
        "eval_loss_before": trial.first.loss if trial.first else None,
        "eval_loss_after": trial.best.loss if trial.best else None,
        "seconds_loading": loaded - started,
        "seconds_training": trained - loaded,
    }
    measured = {
        key: summary[key] for key in ("base_bytes", "peak_memory_bytes", "idle_memory_bytes", "tokens_per_second")
    }
    with writing(config.out):
        write_json(config.out / "plan.json", {**plan, "measured": measured})
    view.done(summary)
    return summary


def _probe_device(config: TrainConfig) -> torch.device:
    asked = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda" if asked.startswith("cuda") and torch.cuda.is_available() else "cpu")


def _set_checkpointing(config: TrainConfig, base: Base) -> None:
    if config.activation_checkpointing and base.anatomy.checkpoint_layers(True) == 0:
        raise ModelError(
            f"{type(base.model).__name__} has no layers that Graft could run again, so --activation-checkpointing would "
            "do nothing; leave it out, and use a smaller --tokens-per-pass"
        )


def _resolved(config: TrainConfig, base: Base, trial: Trial, ahead: Foresight) -> dict[str, Any]:
    """Every option with what its default came to; a file of these is the same run again."""
    full = config.method == "full"
    return {
        **config.to_json(),
        "precision": base.precision,
        "compute": base.compute,
        "device": str(base.device),
        "save_precision": (config.save_precision or base.precision) if full else None,
        "max_tokens_per_document": config.max_tokens_per_document or base.anatomy.max_positions or None,
        "alpha": None if full or config.from_adapter is not None else config.scale_numerator,
        "learning_rate": config.peak_learning_rate,
        "epochs": None if config.steps is not None else config.epochs or 1.0,
        "tokens_per_pass": ahead.tokens_per_pass,
        "eval_every": trial.eval_every if trial.held_out else None,
        "resume": False,
        "allow_change": [],
    }
