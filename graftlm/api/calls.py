"""The calls of `import graftlm as graft`: arguments to a config to a command, and values back.

Options are those of the command of the same name, as keywords: every field of its config in `graftlm/config/`, and the names
that TRL, PEFT, Axolotl and LLaMA-Factory have for them. An option that does not exist is a ConfigError with the nearest one.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from graftlm import progress, terminal
from graftlm.api.model import Model, folder_of, method_for
from graftlm.api.run import Run
from graftlm.config import (
    BoardConfig,
    CheckConfig,
    CompareConfig,
    Config,
    MergeConfig,
    PlanConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
)
from graftlm.data.check import DataReport
from graftlm.data.in_memory import names_of, source_of
from graftlm.errors import ConfigError, Stopped
from graftlm.experiments.row_files import row_file
from graftlm.scores import named_after
from graftlm.training.callbacks import Callback

if TYPE_CHECKING:
    from graftlm.experiments.compare.results import Comparison
    from graftlm.experiments.sweep.results import SweepResult
    from graftlm.planning.plan import PlanReport

Built = TypeVar("Built", bound=Config)
SEARCHED = {"learning-rate": "1e-4..1e-2", "rank": "4..32"}
"""What a sweep searches that is not told."""
ROWS, EVAL_ROWS = "rows", "eval_rows"
"""What messages call data that are in memory."""


def train(
    model: Model | str | Path,
    data: Any,
    *,
    eval_data: Any = None,
    out: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Fine-tune a model on rows; returns the run.

    `model` is one of `graft.load`, which is shared, or a name, which is loaded for this run. `data` is a list of dicts, a
    datasets.Dataset, a pandas DataFrame, a file, a hub id, `demo`, or a list of files; `eval_data` the same, or a share of the
    rows such as "5%". `out` is the run folder, default runs/<time>-<model>. Options are those of `graft train`; `score` may be
    a function (answers, references) -> float, too, both lists of texts.

    A loaded model decides on base, precision and device; without `method` it is trained as qlora on nf4, else as lora, and its
    base is unchanged afterwards. With method="full" the loaded model itself is trained and is the tuned one afterwards.

    Ctrl-C ends the run after the current step: the run is returned with `run.stopped` true, its checkpoint written and its
    best step so far saved; the same call with `out=run.folder, resume=True` goes on. A second Ctrl-C ends it at once, as
    KeyboardInterrupt. Raises GraftError, and Stopped on SIGTERM.
    """
    from graftlm.commands.train import Given
    from graftlm.commands.train import train as command
    from graftlm.training.view import View

    sources, eval_source = source_of(data, ROWS), None if eval_data is None else source_of(eval_data, EVAL_ROWS)
    values: dict[str, Any] = {
        "model": _name_of(model),
        "data": names_of(data) if sources is None else (ROWS,),
        "eval_data": EVAL_ROWS if eval_source is not None else None if eval_data is None else _one(eval_data),
        "out": None if out is None else Path(out),
        **options,
    }
    if isinstance(values.get("from_adapter"), Run):
        values["from_adapter"] = folder_of(values["from_adapter"])
    score = values.get("score") if callable(values.get("score")) else None
    if score is not None:
        values["score"] = named_after(score)
    named = TrainConfig.named(values)
    named.setdefault("out", _fresh_folder(str(named["model"])))
    if isinstance(model, Model):
        named = _on_loaded(model, named)
    config = TrainConfig.build(named)
    if config.ranks > 1:
        in_memory = {"model": isinstance(model, Model), "data": sources is not None, "eval_data": eval_source is not None,
                     "score": score is not None, "callbacks": bool(callbacks)}  # fmt: skip
        return _train_over_ranks(config, [name for name, given in in_memory.items() if given])
    given = Given(
        base=model.base if isinstance(model, Model) else None, sources=None if sources is None else [sources],
        eval_source=eval_source, score=score, callbacks=(heard := _Heard(), *callbacks), save_when_stopped=True,
    )  # fmt: skip
    with _run_of(model, config, heard), _drawn(quiet):
        command(config, View(quiet=quiet), given)
    return Run.open(config.out)


def _train_over_ranks(config: TrainConfig, in_memory: Sequence[str]) -> Run:
    """A run in processes of its own. Raises ConfigError for what they cannot be handed."""
    from graftlm.commands.ranks import train_over_ranks

    if in_memory:
        raise ConfigError(
            f"ranks={config.ranks} starts processes of its own, which do not have '{in_memory[0]}' from memory; give names "
            "and files, or leave ranks out"
        )
    try:
        train_over_ranks(config)
    except Stopped as stopped:
        if stopped.signal_number != signal.SIGINT:
            raise
    return Run.open(config.out)


@contextmanager
def _run_of(model: Any, config: TrainConfig, heard: _Heard) -> Iterator[None]:
    """Around a run: one that Ctrl-C ends is a result, and a loaded model that is trained in full is another afterwards."""
    ended = False
    try:
        yield
        ended = True
    except Stopped as stopped:
        ended = True
        if stopped.signal_number != signal.SIGINT:
            raise
    finally:
        with contextlib.suppress(OSError):  # made for a run that did not begin, and empty
            config.out.rmdir()
        if isinstance(model, Model) and config.method == "full":
            if ended:
                model.became(Run.open(config.out))
            elif heard.steps or config.optimizer_in_backward or config.resume:
                model.spoiled(config.out)


class _Heard(Callback):
    """Whether a step was taken: then a model that is trained in full is another than before."""

    steps = 0

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.steps += 1


def _on_loaded(model: Model, named: dict[str, Any]) -> dict[str, Any]:
    """The options of a run on a loaded model. Raises ConfigError for what was chosen when it was loaded."""
    model.check_usable()
    found = {"method": method_for(model), **named}
    loaded: dict[str, Any] = {
        "base_precision": model.base_precision, "device": model.device,
        "trust_remote_code": model.config.trust_remote_code, "init": "pretrained",
    }  # fmt: skip
    for name, value in loaded.items():
        if name in found and str(found[name]) not in (str(value), str(value).split(":")[0]):  # cuda:0 is cuda
            raise ConfigError(
                f"{name} is {found[name]!r}, and the model was loaded with {value!r}; load it so with graft.load, or give its "
                "name instead of the model"
            )
    if found["method"] == "full" and model.base_precision in ("int8", "nf4"):
        raise ConfigError(
            f"method full trains every weight, and this model is stored as {model.base_precision}; load it with "
            "base_precision='float32' or 'bfloat16', or leave method out to train an adapter"
        )
    if found["method"] == "full" and found.get("save_precision", model.base_precision) != model.base_precision:
        raise ConfigError(
            f"save_precision {found['save_precision']} would save another model than the one in memory, which is "
            f"{model.base_precision}; leave it out, or give the model's name instead of the model"
        )
    dtype = found.get("compute_dtype") or model.config.compute_dtype
    return {**found, "base_precision": model.base_precision, "compute_dtype": dtype}


def plan(*models: Model | str | Path, data: Any = None, **options: Any) -> PlanReport:
    """What full, LoRA and QLoRA would take for each model: a PlanReport, which prints as a table.

    `models` are directories, hub ids, `demo`, built-in shapes such as "llama-3.1-8b", or loaded models; `data` as `train` takes
    them; options are those of `graft plan`, as `gpu`, `memory`, `rank`, `max_length` (tokens). No weight is read, except to
    measure how far the data are from a small base. Sizes are in bytes, times in seconds. Raises GraftError.
    """
    from graftlm.commands.plan import plan as command

    rows = None if data is None else source_of(data, ROWS)
    names = () if data is None else names_of(data) if rows is None else (ROWS,)
    values = {"models": tuple(map(_name_of, models)), "data": names, **options}
    return command(PlanConfig.build(values), None if rows is None else [rows])


def check(data: Any, *, model: Model | str | Path, eval_data: Any = None, **options: Any) -> DataReport:
    """Read every row as training would: a DataReport with counts, lengths, faults and examples of what is trained.

    `data` and `eval_data` as `train` takes them. Raises DataError for a source that cannot be read at all; a bad row is no
    error here, it stands in `fault_rows`, and `good` is False.
    """
    from graftlm.commands.check import check_data

    rows, eval_rows = source_of(data, ROWS), None if eval_data is None else source_of(eval_data, EVAL_ROWS)
    values = {
        "model": _name_of(model),
        "data": names_of(data) if rows is None else (ROWS,),
        "eval_data": None if eval_data is None or eval_rows is not None else _one(eval_data),
        **options,
    }
    return check_data(CheckConfig.build(values), None if rows is None else [rows], eval_rows)


def compare(
    model: Model | str | Path, data: Any, *, eval_data: Any = None, quiet: bool = False, **options: Any
) -> Comparison:
    """Train full, LoRA and QLoRA on the same rows, each run in a process of its own: a Comparison with its `verdict`.

    `model` is a name or a loaded model, data as `train` takes them. Options are those of `graft compare`, `out` (default
    runs/compare) its folder, and the same call goes on with what is there. A loaded model gives its name, device and compute
    dtype, and stays as it is: every run loads the base anew, since its peak memory is one of the things compared. Raises
    GraftError, and Stopped on Ctrl-C, after which it can go on.
    """
    from graftlm.commands.compare import compare as command
    from graftlm.experiments.compare.view import CompareView

    named = CompareConfig.named(options)
    if isinstance(model, Model):
        model.check_usable()
        loaded = {"device": model.config.device, "trust_remote_code": model.config.trust_remote_code}
        named = {**loaded, "compute_dtype": model.config.compute_dtype, **named}
    config, files = _on_files(CompareConfig, {"model": _name_of(model), **named}, data, eval_data)
    with _drawn(quiet):
        return command(config, CompareView(terminal.console(stderr=True, quiet=quiet)), files)


def sweep(
    model: Model | str | Path, data: Any, *, eval_data: Any = None, quiet: bool = False, **options: Any
) -> SweepResult:
    """Search settings, many trials at once on one base: a SweepResult with `best`, the trial of the lowest eval loss.

    `model` is a loaded model, whose base the trials share and which is unchanged afterwards, or a name, which is loaded for
    this sweep. Data as `train` takes them; options are those of `graft sweep`, as `search={"rank": "4..32"}` (default
    learning-rate and rank) and `trials`. Needs the extra `sweep`. Raises GraftError, and Stopped on Ctrl-C, after which it can
    go on.
    """
    try:
        from graftlm.commands.sweep import sweep as command
        from graftlm.experiments.sweep.view import SweepView
    except ModuleNotFoundError as error:
        raise ConfigError(f"graft.sweep needs {error.name}; install it with: pip install 'graftlm[sweep]'") from None

    named = SweepConfig.named(options)
    search = {name: space for name, space in SEARCHED.items() if name.replace("-", "_") not in named}
    named = {"search": search, **named}
    if isinstance(model, Model):
        named = _on_loaded(model, named)
    config, files = _on_files(SweepConfig, {"model": _name_of(model), **named}, data, eval_data)
    view = SweepView(terminal.console(stderr=True, quiet=quiet))
    with _drawn(quiet):
        return command(config, view, base=model.base if isinstance(model, Model) else None, rows=files)


def merge(model: Model | str | Path, adapter: Any, out: str | Path, **options: Any) -> Any:
    """Add adapters to their base's weights and write a plain model: a MergeReport, a dict that prints as a table.

    `adapter` is a Run, a folder, a version such as `formal@prod`, or a list of these or of `NAME:0.3` with its weight.
    Options are those of `graft merge`, as `max_drift`, `gguf`. Raises GraftError, and then nothing is written.
    """
    from graftlm.commands.merge import merge as command

    adapters = adapter if isinstance(adapter, list | tuple) else [adapter]
    names = [str(folder_of(one)) if isinstance(one, Run) else str(one) for one in adapters]
    return command(MergeConfig.build({"model": _name_of(model), "adapter": names, "out": Path(out), **options}))


def serve(model: str | Path, **options: Any) -> Any:
    """Serve a base with all of its adapters over HTTP until a signal; options are those of `graft serve`.

    With `engine="vllm"` the adapters are exported instead: a dict with the `vllm serve` command. With `follow` too, a running
    vLLM is kept in step with the store until a signal. Raises GraftError.
    """
    from graftlm.commands.serve import serve as command

    console = terminal.console(stderr=True, soft_wrap=True)

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    if isinstance(model, Model):
        raise ConfigError(f"graft.serve loads the base itself, for answering; give '{model.name}', its name")
    config = ServeConfig.build({"model": str(model), **options})
    return command(config, note, lambda url, summary: note(str(summary.get("command") or f"ready      {url}")))


def board(*folders: str | Path, **options: Any) -> Path | None:
    """Show folders of runs, sweeps and comparisons, default `runs`, on one page until a signal.

    Options are those of `graft board`. With `out="page.html"` the page with its present contents is written instead; returns
    the file. Raises GraftError.
    """
    from graftlm.commands.board import board as command

    console = terminal.console(stderr=True, soft_wrap=True)
    given = {"folder": [str(folder) for folder in folders]} if folders else {}
    config = BoardConfig.build({**given, **options})
    return command(config, lambda url: console.print(f"ready      {url}", highlight=False, markup=False))


# ---- arguments ---------------------------------------------------------------------------------------------------------


def _name_of(model: Model | str | Path) -> str:
    return model.name if isinstance(model, Model) else str(model)


def _one(data: Any) -> str:
    names = names_of(data)
    if len(names) != 1:
        raise ConfigError(f"eval_data is one file, found {len(names)}; join them")
    return names[0]


def _on_files(kind: type[Built], values: dict[str, Any], data: Any, eval_data: Any) -> tuple[Built, dict[Path, str]]:
    """A config whose data are files, and the text of those files that are to be written: rows in memory."""
    out = Path(values.get("out") or kind.model_fields["out"].default)
    files: dict[Path, str] = {}

    def named(given: Any, name: str) -> tuple[str, ...]:
        source = source_of(given, name)
        if source is None:
            return names_of(given)
        file, files[file] = row_file(source, out)
        return (str(file),)

    values = {**values, "data": named(data, ROWS)}
    if eval_data is not None:
        values["eval_data"] = _one(named(eval_data, EVAL_ROWS))
    return kind.build(values), files


def _fresh_folder(model: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name) or "model"
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    place = Path("runs") / stem
    number = 2
    while place.exists():
        place, number = Path("runs") / f"{stem}-{number}", number + 1
    return place


@contextmanager
def _drawn(quiet: bool) -> Iterator[None]:
    """Bars in a terminal and lines elsewhere, as a command draws them; nothing where it should be quiet."""
    if quiet:
        yield
        return
    with progress.shown():
        yield
