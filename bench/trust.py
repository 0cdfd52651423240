"""What happens when something is wrong: the same fault given to Graft and to transformers + PEFT + TRL, side by side.

    python bench/trust.py                  # the table
    python bench/trust.py --write          # bench/results/trust.json and the table of docs/trust.md

Each probe breaks one thing about an adapter or a checkpoint of the bundled base and then does what a user would: load it,
or resume. What came out is compared with what it should have been (the good adapter's logits, the tensors of the run that
was never interrupted), and the answer is one word:

    refused    an error before anything was used
    right      went on, and the result is what it should be
    wrong      went on with a result that is another one, or past what was asked, after a warning that a user could have read
    silent     the same without a word
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results" / "trust.json", ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- table: python bench/trust.py --write -->", "<!-- end of table -->"
STEPS, SAVE, RANK, ALPHA, RATE = 6, 2, 4, 8, 5e-3
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Answer:
    """What one side did with one fault."""

    word: str
    said: str
    """The error or the first warning, shortened; empty where there was none."""


@dataclass(frozen=True)
class Row:
    group: str
    fault: str
    graft: Answer
    peers: Answer


# ------------------------------------------------------------------------------------------------------- listening


@contextlib.contextmanager
def hearing() -> Iterator[list[str]]:
    """Every warning, by Python's warnings or a library's logger, as text."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear(logging.WARNING)
    names = ("transformers", "peft", "trl", "accelerate", "datasets")
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in names)]
    for logger in loggers:
        logger.addHandler(ear)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
            for logger in loggers:
                logger.removeHandler(ear)


def told(usual: set[str], expected: Any, act: Callable[[list[str]], Any], same: Callable[[Any, Any], bool]) -> Answer:
    """Do what a user would and name what came of it; `usual` is what is said without any fault too."""
    with hearing() as said:
        try:
            found = act(said)
        except Exception as error:
            return Answer("refused", short(f"{type(error).__name__}: {error}"))
    fresh = [text for text in said if short(text) not in usual]
    note = short(fresh[0]) if fresh else ""
    if same(found, expected):
        return Answer("right", note)
    return Answer("wrong" if fresh else "silent", note)


def short(text: str) -> str:
    """One line of a message, without the folders of this machine."""
    line = " ".join(text.split())
    for place in (str(WORK), str(ROOT), tempfile.gettempdir()):
        line = line.replace(place, "")
    return line if len(line) <= 240 else line[:237] + "..."


WORK = Path(tempfile.mkdtemp(prefix="graft-trust-"))


def close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(torch.isfinite(found).all()) and float((found - expected).norm() / expected.norm()) < 1e-3


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in expected.items()}:
        return False
    return all(torch.allclose(found[n].float(), expected[n].float(), rtol=1e-4, atol=1e-6) for n in found)


def never(found: Any, expected: Any) -> bool:
    """Where something else was asked for than was trained: whatever came out, going on without asking back is not right."""
    return False


# ------------------------------------------------------------------------------------------------------- adapters


def demo_base(place: Path) -> Path:
    """The bundled base as a folder of its own, with a chat template, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from graftlm import demo

    AutoModelForCausalLM.from_pretrained(demo.resolve_model("demo"), dtype=torch.float32).save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(demo.resolve_model("demo"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(place)
    return place


def prompt_ids(base: Path) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Describe this product.\nname: Velmora"}], tokenize=False
    )
    return tokenizer(text, return_tensors="pt").input_ids[0]


def by_graft(base: Path, adapter: Path, said: list[str]) -> Tensor:
    """Logits of a chat through the base and the adapter, as Graft loads them."""
    from graftlm.adapters import peft_format as adapter_format
    from graftlm.adapters.attach import attach
    from graftlm.base.context import ForwardContext
    from graftlm.base.loading import load_base
    from graftlm.segments import Segments

    loaded = load_base(str(base), precision="float32", compute_dtype="float32", device="cpu")
    found = adapter_format.load(loaded, adapter)
    assert found.origin is not None
    said += found.origin.notes
    attach(loaded, found)
    ids = prompt_ids(base)
    segments = Segments(lengths=(len(ids),), slots=(1,))
    context = ForwardContext(segments)
    with torch.no_grad():
        return loaded.logits(loaded.hidden(ids, context), context)


def by_peft(base: Path, adapter: Path, said: list[str]) -> Tensor:
    """The same through transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=prompt_ids(base)[None]).logits[0]


def edit_config(**changes: Any) -> Callable[[Path, Path], None]:
    def act(base: Path, adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps({**config, **changes}, indent=2))

    return act


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path, Path], None]:
    def act(base: Path, adapter: Path) -> None:
        named = load_file(adapter / TENSORS)
        change(named)
        save_file({n: t.contiguous() for n, t in named.items()}, adapter / TENSORS, metadata={"format": "pt"})

    return act


def edit_bytes(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path, Path], None]:
    def act(base: Path, adapter: Path) -> None:
        (adapter / TENSORS).write_bytes(change(bytearray((adapter / TENSORS).read_bytes())))

    return act


def flip(data: bytearray) -> bytearray:
    data[-1] ^= 0x08  # in the exponent of the last value: 65,536 times more or less
    return data


def other_weights(base: Path, adapter: Path) -> None:
    named = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for tensor in named.values():
        tensor += 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(named, base / "model.safetensors", metadata={"format": "pt"})


def other_config(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {**(config.get("rope_parameters") or {"rope_type": "default"}), "rope_theta": 500.0}
    (base / "config.json").write_text(json.dumps(config))


def other_template(base: Path, adapter: Path) -> None:
    for file in base.glob("chat_template.jinja"):
        file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")


def pickled(base: Path, adapter: Path) -> None:
    torch.save(load_file(adapter / TENSORS), adapter / "adapter_model.bin")
    (adapter / TENSORS).unlink()


def nothing(base: Path, adapter: Path) -> None:
    pass


def half_missing(named: dict[str, Tensor]) -> None:
    for name in sorted(named)[: len(named) // 2]:
        del named[name]


def one_missing(named: dict[str, Tensor]) -> None:
    del named[next(n for n in named if "lora_B" in n)]


def one_nan(named: dict[str, Tensor]) -> None:
    next(t for n, t in named.items() if "lora_B" in n)[0, 0] = float("nan")


def zero_b(named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if "lora_B" in name:
            tensor.zero_()


def renamed(named: dict[str, Tensor]) -> None:
    for name in list(named):
        named[name.replace("base_model.model.model.", "base_model.model.")] = named.pop(name)


def extra(named: dict[str, Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        name = next(n for n in named if part in n and "q_proj" in n)
        named[name.replace("q_proj", "k_proj")] = torch.randn_like(named[name])


ADAPTER_FAULTS: dict[str, Callable[[Path, Path], None]] = {
    "nothing is wrong": nothing,
    "another base of the same shape": other_weights,
    "the same weights, another rope_theta in config.json": other_config,
    "another chat template": other_template,
    "half of the tensors missing": edit_tensors(half_missing),
    "one B missing": edit_tensors(one_missing),
    "tensors of a layer that is no target": edit_tensors(extra),
    "every tensor under another prefix": edit_tensors(renamed),
    "one value is NaN": edit_tensors(one_nan),
    "B zero in every tensor": edit_tensors(zero_b),
    "lora_alpha edited from 8 to 64": edit_config(lora_alpha=64),
    "r edited from 4 to 8": edit_config(r=8),
    "use_rslora switched on": edit_config(use_rslora=True),
    "an unknown key that might change the formula": edit_config(use_wonderlora=True),
    "one bit flipped in the tensors": edit_bytes(flip),
    "the tensors' file cut short": edit_bytes(lambda data: data[:-100]),
    "a header that claims 2^60 bytes": edit_bytes(lambda data: (1 << 60).to_bytes(8, "little") + data[8:]),
    "the tensors as a pickle": pickled,
}


def adapter_rows(work: Path) -> list[Row]:
    """Every fault of an adapter, on both sides; the template decides the prompt, so another one changes the logits."""
    base = demo_base(work / "base")
    data = chats(work / "chats.jsonl")
    good = {"graft": train_graft(work / "good", base, data) / "adapter", "peft": work / "peft"}
    train_peers(good["peft"], base, data)
    sides = {"graft": by_graft, "peft": by_peft}
    expected = {name: load(base, good[name], []) for name, load in sides.items()}
    usual = {name: usually(lambda said, n=name: sides[n](base, good[n], said)) for name in sides}
    rows: list[Row] = []
    for fault, act in ADAPTER_FAULTS.items():
        answers: dict[str, Answer] = {}
        for name, load in sides.items():
            place = work / "probe"
            shutil.rmtree(place, ignore_errors=True)
            there, adapter = (
                Path(shutil.copytree(base, place / "base")),
                Path(shutil.copytree(good[name], place / "adapter")),
            )
            act(there, adapter)
            answers[name] = told(
                usual[name], expected[name], lambda said, t=there, a=adapter, f=load: f(t, a, said), close
            )
        rows.append(Row("an adapter is loaded", fault, answers["graft"], answers["peft"]))
        report(rows[-1])
    return rows


def usually(act: Callable[[list[str]], Any]) -> set[str]:
    """What is said when nothing is wrong."""
    with hearing() as said:
        act(said)
    return {short(text) for text in said}


# ------------------------------------------------------------------------------------------------------- runs


def chats(path: Path, other: bool = False) -> Path:
    things = ["kettle", "lamp", "chair", "bowl", "clock", "rug", "mirror", "vase"]
    rows: list[dict[str, Any]] = []
    for i in range(24):
        thing = things[(i * 5 + other) % 8]
        answer = f"A {'quiet' if other else 'bright'} {thing}, {10 + i} cm long."
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"Describe {thing} {i}."},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Interrupted(Exception):
    """Raised in a run to end it as a crash would."""


def train_graft(
    out: Path, base: Path, data: Path, stop_at: int | None = None, said: list[str] | None = None, **changes: Any
) -> Path:
    """A run of 6 steps that saves every 2; ends after `stop_at` as a crash would."""
    from rich.console import Console

    from graftlm.commands.train import train
    from graftlm.config import TrainConfig
    from graftlm.training.logging import Recorder
    from graftlm.training.view import View

    heard = said if said is not None else []

    class Told(View):
        def note(self, text: str) -> None:
            heard.append(text)

    on_iteration_end = Recorder.on_iteration_end

    def crashing(self: Recorder, trials: Any) -> bool:
        going_on = on_iteration_end(self, trials)
        if self.trial.step == stop_at:
            raise Interrupted
        return going_on

    given: dict[str, Any] = {
        "model": str(base), "data": (str(data),), "out": out, "steps": STEPS, "batch_size": 4, "rank": RANK, "alpha": ALPHA,
        "targets": TARGETS, "learning_rate": RATE, "warmup_ratio": 0.0, "lr_scheduler": "linear", "base_precision": "float32",
        "compute_dtype": "float32", "device": "cpu", "save_every": SAVE, "keep_checkpoints": 3, **changes,
    }  # fmt: skip
    Recorder.on_iteration_end = crashing
    try:
        train(TrainConfig(**given), Told(Console(quiet=True)))
    except Interrupted:
        pass
    finally:
        Recorder.on_iteration_end = on_iteration_end
    return out


def train_peers(
    out: Path, base: Path, data: Path, stop_at: int | None = None, resume: bool = False, **changes: Any
) -> Path:
    """The same by TRL's SFTTrainer on PEFT."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Crash(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stop_at is not None and state.global_step == stop_at + 1:
                raise Interrupted

    values = {"rank": RANK, "learning_rate": RATE, "targets": TARGETS, **changes}
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(base),
        args=SFTConfig(
            output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=values["learning_rate"],
            lr_scheduler_type="linear", save_steps=SAVE, save_strategy="steps", report_to="none", logging_steps=1, seed=0,
            gradient_checkpointing=False, bf16=False, fp16=False, use_cpu=True, dataloader_num_workers=0, disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files={"train": str(data)})["train"],
        peft_config=LoraConfig(
            r=values["rank"], lora_alpha=ALPHA, target_modules=values["targets"], task_type="CAUSAL_LM"
        ),
        callbacks=[Crash()],
    )  # fmt: skip
    try:
        trainer.train(resume_from_checkpoint=True if resume else None)
    except Interrupted:
        return out
    trainer.save_model(str(out))
    return out


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@dataclass(frozen=True)
class RunFault:
    name: str
    graft: Callable[[Path, Path], dict[str, Any]]
    peers: Callable[[Path, Path], dict[str, Any]]
    """Both get the run folder and the working folder, break something, and return what the user resumes with."""
    same: Callable[[Any, Any], bool] = same_tensors


def at(file: str, act: Callable[[Path], Any]) -> Callable[[Path, Path], dict[str, Any]]:
    def breaking(run: Path, work: Path) -> dict[str, Any]:
        act(run / file)
        return {}

    return breaking


def asking(**changes: Any) -> Callable[[Path, Path], dict[str, Any]]:
    return lambda run, work: changes


G, P = "checkpoints/000004", "checkpoint-4"
RUN_FAULTS = (
    RunFault("nothing is wrong", asking(), asking()),
    RunFault(
        "the newest checkpoint's tensors are cut short",
        at(f"{G}/trainable.safetensors", cut), at(f"{P}/{TENSORS}", cut),
    ),
    RunFault(
        "the newest checkpoint's tensors have one bit flipped",
        at(f"{G}/trainable.safetensors", lambda f: f.write_bytes(flip(bytearray(f.read_bytes())))),
        at(f"{P}/{TENSORS}", lambda f: f.write_bytes(flip(bytearray(f.read_bytes())))),
    ),
    RunFault(
        "the optimizer's state is gone",
        at(f"{G}/optimizer.safetensors", Path.unlink), at(f"{P}/optimizer.pt", Path.unlink),
    ),
    RunFault("the schedule's state is gone", at(f"{G}/state.json", Path.unlink), at(f"{P}/scheduler.pt", Path.unlink)),
    RunFault("resumed with another learning rate", asking(learning_rate=RATE / 50), asking(learning_rate=RATE / 50), never),
    RunFault("resumed with another rank", asking(rank=8), asking(rank=8), never),
    RunFault("resumed with other data", lambda run, work: {"data": (str(chats(work / "other.jsonl", True)),)},
             lambda run, work: {"data": chats(work / "other.jsonl", True)}, never),
    RunFault("resumed on another base", lambda run, work: {"model": str(perturbed(work))},
             lambda run, work: {"base": perturbed(work)}, never),
)  # fmt: skip


def perturbed(work: Path) -> Path:
    place = work / "base-perturbed"
    if not place.exists():
        shutil.copytree(work / "base", place)
        other_weights(place, place)
    return place


def run_rows(work: Path) -> list[Row]:
    """Every fault of a run that crashed after step 5 of 6 and is resumed, on both sides."""
    base, data = work / "base", work / "chats.jsonl"
    whole = {"graft": load_file(work / "good" / "adapter" / TENSORS), "peft": load_file(work / "peft" / TENSORS)}
    usual: dict[str, set[str]] = {}
    rows: list[Row] = []
    for fault in RUN_FAULTS:
        run = work / "graft-run"
        shutil.rmtree(run, ignore_errors=True)
        train_graft(run, base, data, stop_at=5)
        options = fault.graft(run, work)

        def graft(said: list[str], run: Path = run, options: dict[str, Any] = options) -> Any:
            out = train_graft(run, base, data, said=said, **{"resume": True, **options})
            return load_file(out / "adapter" / TENSORS)

        ours = told(usual.setdefault("graft", {short(f"going on from {run / G}")}), whole["graft"], graft, fault.same)
        run = work / "peers-run"
        shutil.rmtree(run, ignore_errors=True)
        train_peers(run, base, data, stop_at=4)
        options = fault.peers(run, work)
        if "peft" not in usual:
            copy = Path(shutil.copytree(run, work / "usual"))
            usual["peft"] = usually(lambda said, c=copy: train_peers(c, base, data, resume=True))

        def peers(said: list[str], run: Path = run, options: dict[str, Any] = options) -> Any:
            given = {"base": base, "data": data, "resume": True, **options}
            return load_file(train_peers(run, **given) / TENSORS)

        rows.append(Row("a run goes on", fault.name, ours, told(usual["peft"], whole["peft"], peers, fault.same)))
        report(rows[-1])
    return rows


def start_rows(work: Path) -> list[Row]:
    """Faults of a run that begins."""
    data = work / "chats.jsonl"
    whole = {"graft": load_file(work / "good" / "adapter" / TENSORS), "peft": load_file(work / "peft" / TENSORS)}
    bad = Path(shutil.copytree(work / "base", work / "base-nan"))
    named = load_file(bad / "model.safetensors")
    named[next(n for n in named if "layers.1." in n and "down_proj" in n)][0, 0] = float("nan")
    save_file(named, bad / "model.safetensors", metadata={"format": "pt"})
    rows: list[Row] = []
    for fault, options in (
        ("a typo in the list of targets", {"targets": ["q_proj", "v_prj", "down_proj"]}),
        ("one weight of the base is NaN", {"base": bad}),
    ):
        given: dict[str, Any] = {"base": work / "base", "data": data, **options}
        for name in ("g", "p"):
            shutil.rmtree(work / name, ignore_errors=True)
        ours = told(
            set(), whole["graft"],
            lambda said, g=given: load_file(train_graft(work / "g", said=said, **g) / "adapter" / TENSORS), same_tensors,
        )  # fmt: skip
        usual = usually(lambda said: train_peers(work / "p", work / "base", data))
        shutil.rmtree(work / "p", ignore_errors=True)
        theirs = told(
            usual, whole["peft"], lambda said, g=given: load_file(train_peers(work / "p", **g) / TENSORS), same_tensors
        )
        rows.append(Row("a run begins", fault, ours, theirs))
        report(rows[-1])
    return rows


# ------------------------------------------------------------------------------------------------------- the page


def report(row: Row) -> None:
    print(f"{row.group:22} {row.fault:54} graft {row.graft.word:8} peers {row.peers.word:8}", flush=True)


def table(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = ["| what is wrong | Graft | transformers + PEFT + TRL |", "|---|---|---|"]
    group = ""
    for row in results["rows"]:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** | | |")
        lines.append(f"| {row['fault']} | {row['graft']['word']} | {row['peers']['word']} |")
    said = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*lines, "", f"Measured {results['date']} with {said}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="write bench/results/trust.json and the table of docs/trust.md"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        rows = [*adapter_rows(WORK), *run_rows(WORK), *start_rows(WORK)]
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    names = ("graftlm", "peft", "transformers", "trl", "torch")
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in names},
        "rows": [asdict(row) for row in rows],
    }
    if arguments.write:
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        page = PAGE.read_text()
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
    else:
        print(table(results))


if __name__ == "__main__":
    main()
