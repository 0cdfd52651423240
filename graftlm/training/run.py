"""From a config to a finished run: load, check, train, save.

    load the base -> make what is trained -> read the data -> [evaluate, step, log, save] ... -> adapter/ or model/

This is the one place where the parts meet; each part is a call. `prepare.py` reads the data, `session.py` is what is trained
with its folder, `foresight.py` says what it will take, `loop.py` trains. What a person sees comes from `view.py`.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch

from graftlm.adapters.attach import coverage, notes_for_peft
from graftlm.base.chat import Encoder
from graftlm.base.load import load_base
from graftlm.config import TrainConfig
from graftlm.data.sources import named_source
from graftlm.errors import Diverged, Stopped
from graftlm.files import clear_left
from graftlm.planning.measured import PeakMemory
from graftlm.progress import working
from graftlm.training import checkpoint
from graftlm.training.foresight import foresee, rehearse
from graftlm.training.loop import train
from graftlm.training.pages import give_back, own_pages
from graftlm.training.prepare import make_adapter, peek, read_data, set_checkpointing, stored_precision
from graftlm.training.recorder import signals
from graftlm.training.resume import products_of
from graftlm.training.runfolder import check_free, locked
from graftlm.training.session import Material, Session
from graftlm.training.trackers import check_trackers
from graftlm.training.view import View


def run(config: TrainConfig, view: View) -> dict[str, Any]:
    """Train as the config says; returns the summary that `--json` prints. Raises GraftError, or Stopped on a signal."""
    check_trackers(config.track)
    sources = [named_source(text, "train") for text in config.data]
    peek([*sources, *([named_source(config.eval_data, "valid")] if config.eval_data else [])])
    device = _probe_device(config)
    apart = own_pages(device.type == "cpu" and (config.activation_checkpointing or config.optimizer_in_backward))
    with locked(config.out), apart, PeakMemory(device) as memory:
        clear_left(config.out)
        check_free(config.out, config.resume)
        started = time.perf_counter()
        precision = stored_precision(config)
        base = load_base(
            config.model, precision=precision, compute=products_of(config), device=config.device,
            init=config.init, seed=config.seed, trust_remote_code=config.trust_remote_code, training=True,
        )  # fmt: skip
        give_back()  # what was used for that
        set_checkpointing(config, base)
        view.base(base)
        loaded = time.perf_counter()
        adapter = make_adapter(base, config)
        encoder = Encoder(base.tokenizer, train_on=config.train_on, date=config.template_date)
        material = Material(encoder, *read_data(config, sources, encoder, base))
        view.data(material.dataset, material.held_out, encoder.notes)
        session = Session(config, base, adapter, material, view, slot=0 if adapter is None else 1)
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

        ahead = foresee(config, base, [trial], [] if adapter is None else [adapter])
        with own_pages(device.type == "cpu" and ahead.load.sparing), closing(session):
            session.go_on(ahead.tokens_per_pass)
            rehearsed = None if trial.done else rehearse(base, [trial], ahead) - memory.start
            view.ahead(ahead, rehearsed)
            session.begin({**ahead.to_json(), "rehearsed_bytes": rehearsed})
            recorder = session.recorder
            with signals(recorder, view.note):
                try:
                    with view.training(trial):
                        train(base, [trial], ahead.tokens_per_pass, recorder)
                except Diverged as error:
                    raise Diverged(f"{error}; {checkpoint.whereabouts(config.out)}") from None
                if recorder.stopped is not None and not trial.done:
                    recorder.save()
                    raise Stopped(
                        recorder.stopped,
                        f"stopped after step {trial.step} of {trial.order.steps}; {checkpoint.whereabouts(config.out)}. "
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
