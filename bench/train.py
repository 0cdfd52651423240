"""Training vs transformers + PEFT + TRL + bitsandbytes: the same model, data, batch, rank and optimizer, in one run.

    python bench/train.py                         # 30M Llama on E2E, all three methods
    python bench/train.py --shape 135m --methods lora qlora --packing lora

Each side is a process of its own, and they take turns step by step: one works, the others wait, so a slow moment of the
machine falls on all of them. The median step counts, after those that warm up (Graft watches its first three). Beside them
runs a third process that does only the matmuls of such a step. Nothing else may run meanwhile.

Matmuls have the dtype that each side uses by default on this processor: Graft's default for training, the peer's float32.
With `--types` both also take part with the other one: Graft in float32 where that is not its default, the peer under its
own bfloat16 (`bf16=True`).

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data" / "e2e"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2},
    "30m": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                "num_key_value_heads": 8},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                 "num_attention_heads": 9,
                 "num_key_value_heads": 3},
}  # fmt: skip
RATES = {"full": 5e-4, "lora": 2e-3, "qlora": 2e-3}
BATCH, RANK, ALPHA = 16, 16, 32
EVAL_ROWS = 24
WARM_UP = 3  # steps that do not count: Graft watches its first three


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


def make_data(folder: Path, steps: int, seed: int = 0) -> dict[str, str]:
    """The rows of all sides: `steps` batches of E2E, each row seen once, and EVAL_ROWS others."""
    import random

    found: dict[str, str] = {}
    for name, count in (("train", steps * BATCH), ("valid", EVAL_ROWS)):
        rows = (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = random.Random(seed).sample(rows, count)
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
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
    own: dict[str, Any] = {} if method == "full" else {"rank": RANK, "alpha": ALPHA}
    with tempfile.TemporaryDirectory() as out:
        summary = train(
            TrainConfig(
                model=work["model"], data=(work["train"],), eval_data=work["valid"], method=method,
                base_precision="float32" if method != "qlora" else "nf4", steps=work["steps"], batch_size=BATCH,
                compute_dtype=work.get("compute_dtype"), learning_rate=RATES[method], lr_scheduler="constant", warmup_ratio=0.0,
                eval_every=work["steps"], out=Path(out) / "run", **own,
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
        "examples_per_second": BATCH / turns.counted,
        "trained_tokens_per_second": BATCH * work["trained_per_example"] / turns.counted,
    }


def bare_side(work: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """A step's matmuls alone in float32, by PyTorch: every linear layer and the head, forward and back.

    Shapes are those of the mean step: all tokens through the layers, target tokens through the head. LoRA adds its two narrow
    products and their gradients, full training the gradient of every weight. The data type of the products is float32
    whatever the base is stored in.
    """
    import torch

    shape, method = SHAPES[work["shape"]], work["method"]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = [(width, width)] * 2 + [(narrow, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]  # (out, in)
    linears = [torch.randn(size) for size in sizes]
    factors = [(torch.randn(RANK, i), torch.randn(o, RANK)) for o, i in sizes]
    head = torch.randn(shape["vocab_size"], width)
    tokens, trained = (round(BATCH * work[name]) for name in ("tokens_per_example", "trained_per_example"))
    x = {i: torch.randn(tokens, i) for _, i in sizes}
    dy = {o: torch.randn(tokens, o) for o, _ in sizes}
    hidden, dlogits = torch.randn(trained, width), torch.randn(trained, shape["vocab_size"])
    turns.next()
    for step in range(work["steps"]):
        for _ in range(shape["num_hidden_layers"]):
            for (o, i), w, (A, B) in zip(sizes, linears, factors):
                x[i] @ w.T
                dy[o] @ w
                if method == "full":
                    dy[o].T @ x[i]
                else:
                    h = x[i] @ A.T
                    h @ B.T
                    dh = dy[o] @ B
                    dh @ A
                    dy[o].T @ h
                    dh.T @ x[i]
        hidden @ head.T
        dlogits @ head
        if method == "full":
            dlogits.T @ hidden
        turns.end() if step + 1 == work["steps"] else turns.next()
    return {"seconds_per_step": turns.counted, "seconds": turns.seconds}


def peer_side(work: dict[str, Any], turns: Turns) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from graftlm.planning.peak_memory import PeakMemory

    method, bf16 = work["method"], work.get("bf16", False)
    data = load_dataset("json", data_files={"train": work["train"], "valid": work["valid"]})
    idle = PeakMemory(torch.device("cpu"))

    class InTurns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.next()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.end() if state.global_step >= state.max_steps else turns.next()

    with tempfile.TemporaryDirectory() as out, idle as memory:
        extra: dict[str, Any] = {"dtype": torch.float32}
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
                output_dir=out, num_train_epochs=1, per_device_train_batch_size=1 if work["packing"] else BATCH,
                learning_rate=RATES[method],
                lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0, report_to="none", save_strategy="no",
                logging_steps=1000, use_cpu=True, bf16=bf16, gradient_checkpointing=False, packing=work["packing"],
                max_length=1280, disable_tqdm=True, seed=0,
            ),
            train_dataset=data["train"],
            peft_config=None
            if method == "full"
            else LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[InTurns()],
        )  # fmt: skip
        trainer.train()
    found = rates(turns, work)
    if work["packing"]:  # rows are fewer and longer: the whole pass over the data counts
        seconds, rows = sum(turns.seconds), len(data["train"])
        found = {
            "seconds_per_step": seconds / len(turns.seconds),
            "examples_per_second": rows / seconds,
            "trained_tokens_per_second": rows * work["trained_per_example"] / seconds,
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
    parser.add_argument("--shape", choices=SHAPES, default="30m")
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
        help="methods that both sides also run in the other type of products: see above",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        work = json.loads(options.one)
        print(json.dumps(SIDES[work["side"]](work, Turns(work["pipes"], work["warm_up"]))))
        return
    if not SHARED.is_dir():
        raise SystemExit(f"the E2E set is not there: {SHARED}")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for method, found in measure(
        options.shape, options.methods, options.steps, options.warm_up, packing=options.packing, types=options.types
    ):
        results[method] = found
        print(line(method, found), flush=True)
        if options.json:  # after each: a run that is cut off has what it measured
            options.json.write_text(json.dumps({"shape": options.shape, "results": results}, indent=2) + "\n")


def measure(
    shape: str,
    methods: Sequence[str],
    steps: int,
    warm_up: int,
    *,
    packing: Sequence[str] = (),
    types: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Each method with its figures by side, as soon as they are there."""
    import torch

    from graftlm.base.precision import default_compute_dtype

    own = default_compute_dtype(torch.device("cpu"), training=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / shape
        make_model(shape, model)
        common: dict[str, Any] = {
            "model": str(model),
            "shape": shape,
            "steps": steps,
            "warm_up": warm_up,
            "packing": False,
        }
        common.update(make_data(Path(folder), steps))
        common.update(per_example(common))
        for method in methods:
            work = {**common, "method": method}
            sides = dict.fromkeys(SIDES, work)
            if method in types:
                if own != "float32":
                    sides["graft float32"] = {**work, "compute_dtype": "float32"}
                sides["trl bf16"] = {**work, "bf16": True}
            found = in_turns(sides)
            bare = found.pop("bare")
            found["graft"].update(bare_seconds_per_step=bare["seconds_per_step"], bare_seconds=bare["seconds"])
            if method in packing:
                found.update(in_turns({"trl packed": {**work, "packing": True}}))
            yield method, found


def per_example(work: dict[str, Any]) -> dict[str, float]:
    """Mean tokens and mean target tokens of a row, the same on all sides."""
    from transformers import AutoTokenizer

    from graftlm.base.chat import Encoder
    from graftlm.data.dataset import load
    from graftlm.data.sources import Source

    dataset = load([Source.parse(work["train"])], Encoder(AutoTokenizer.from_pretrained(work["model"])))
    return {
        "tokens_per_example": dataset.tokens / dataset.rows,
        "trained_per_example": dataset.target_tokens / dataset.rows,
    }


def peer(sides: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """(examples a second, peak memory) of the peer, padded as it defaults to: the better of each where it ran in two types."""
    found = [sides[name] for name in ("trl", "trl bf16") if name in sides]
    return max(f["examples_per_second"] for f in found), min(f["peak_memory"] for f in found)


def line(method: str, sides: dict[str, dict[str, Any]]) -> str:
    """One method's figures in one line."""
    ours, (their_speed, their_memory) = sides["graft"], peer(sides)
    said = [f"{method:6}"]
    for side, found in sides.items():
        speed, memory = found["examples_per_second"], found["peak_memory"] / 1e6
        said.append(f"{side} {speed:.2f} examples/s {memory:.0f} MB loss {found['loss']:.4f}")
    faster = ours["examples_per_second"] / their_speed
    said.append(f"{faster:.2f}x speed, {ours['peak_memory'] / their_memory:.2f}x memory")
    said.append(f"bare products {ours['bare_seconds_per_step'] / ours['seconds_per_step']:.0%} of a step")
    return " | ".join(said)


if __name__ == "__main__":
    main()
