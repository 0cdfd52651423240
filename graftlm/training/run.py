"""From a config to a finished run: load, check, train, save.

    load the base -> make what is trained -> read the data -> [evaluate, step, log, save] ... -> adapter/ or model/

This is the one place where the parts meet; each part is a call. `prepare.py` reads the data, `session.py` is what is trained
with its folder, `memory.py` says what it will take, `trainer.py` trains. What a person sees comes from `view.py`.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch

from graftlm.adapters.attach import coverage, notes_for_peft
from graftlm.base.chat import Encoder
from graftlm.base.loading import load_base
from graftlm.config import TrainConfig
from graftlm.data.sources import named_source
from graftlm.errors import Diverged, Stopped
from graftlm.files import remove_leftovers
from graftlm.planning.peak_memory import PeakMemory
from graftlm.progress import working
from graftlm.training import checkpoint
from graftlm.training.logging import signals
from graftlm.training.memory import dry_run, estimate
from graftlm.training.pages import mmap_allocations, release_memory
from graftlm.training.prepare import make_adapter, peek, read_data, set_checkpointing, stored_precision
from graftlm.training.resume import compute_dtype_of
from graftlm.training.run_folder import check_free, locked
from graftlm.training.session import Session, TrainingData
from graftlm.training.trackers import check_trackers
from graftlm.training.trainer import train
from graftlm.training.view import View


def run(config: TrainConfig, view: View) -> dict[str, Any]:
    """Train as the config says; returns the summary that `--json` prints. Raises GraftError, or Stopped on a signal."""
    check_trackers(config.track)
    sources = [named_source(text, "train") for text in config.data]
    peek([*sources, *([named_source(config.eval_data, "valid")] if config.eval_data else [])])
    device = _probe_device(config)
    apart = mmap_allocations(device.type == "cpu" and (config.activation_checkpointing or config.optimizer_in_backward))
    with locked(config.out), apart, PeakMemory(device) as memory:
        remove_leftovers(config.out)
        check_free(config.out, config.resume)
        started = time.perf_counter()
        precision = stored_precision(config)
        base = load_base(
            config.model, precision=precision, compute_dtype=compute_dtype_of(config), device=config.device,
            init=config.init, seed=config.seed, trust_remote_code=config.trust_remote_code, training=True,
        )  # fmt: skip
        release_memory()  # what was used for that
        set_checkpointing(config, base)
        view.base(base)
        loaded = time.perf_counter()
        adapter = make_adapter(base, config)
        encoder = Encoder(base.tokenizer, train_on=config.train_on, date=config.template_date)
        training_data = TrainingData(encoder, *read_data(config, sources, encoder, base))
        view.data(training_data.dataset, training_data.eval_dataset, encoder.notes)
        session = Session(config, base, adapter, training_data, view, slot=0 if adapter is None else 1)
        trial = session.trial
        if adapter is not None:
            for note in adapter.origin.notes if adapter.origin is not None else ():
                view.note(note)
            view.coverage(coverage(base, adapter), adapter, notes_for_peft(base, adapter.slots))
        else:
            view.everything(sum(p.numel() for p in trial.parameters.values()))
            if base.fixed:
                view.note(
                    f"its class never trains {len(base.fixed)} of its parameters: '{min(base.fixed)}' stays as it is"
                )

        ahead = estimate(config, base, [trial], [] if adapter is None else [adapter])
        with mmap_allocations(device.type == "cpu" and ahead.load.mmap_allocations), closing(session):
            session.resume_from_checkpoint(ahead.micro_batch_tokens)
            dry_run_bytes = None if trial.done else dry_run(base, [trial], ahead) - memory.start
            view.ahead(ahead, dry_run_bytes)
            session.begin({**ahead.to_json(), "dry_run_bytes": dry_run_bytes})
            recorder = session.recorder
            with signals(recorder, view.note):
                try:
                    with view.training(trial):
                        train(base, [trial], ahead.micro_batch_tokens, recorder)
                except Diverged as error:
                    raise Diverged(f"{error}; {checkpoint.whereabouts(config.out)}") from None
                if recorder.stopped is not None and not trial.done:
                    recorder.save()
                    raise Stopped(
                        recorder.stopped,
                        f"stopped after step {trial.step} of {trial.sampler.steps}; {checkpoint.whereabouts(config.out)}. "
                        "Go on with the same command and --resume",
                    )
                trained = time.perf_counter()
                with working("saving"):
                    result = session.finish()
    summary = {
        **result,
        "peak_memory_bytes": memory.bytes,
        "idle_memory_bytes": memory.start,
        "seconds_loading": loaded - started,
        "seconds_training": trained - loaded,
    }
    session.measured(summary)
    view.done(summary)
    return summary


def _probe_device(config: TrainConfig) -> torch.device:
    asked = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda" if asked.startswith("cuda") and torch.cuda.is_available() else "cpu")
