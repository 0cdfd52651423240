"""Training beside transformers + PEFT + TRL + bitsandbytes: the same model, data, batch, rank and optimizer, in one run.

    python bench/train.py                         # 30M Llama on E2E, all three methods
    python bench/train.py --shape 135m --methods lora qlora --rounds 3

Each run is a process of its own; the two sides take turns, and the median of the rounds counts. Nothing else may run. The
peer is set up as its documentation says: SFTTrainer, PEFT on all linear layers, BitsAndBytesConfig nf4 with double
quantization; padded as it defaults to, and once more with its own packing. Losses on held-out rows after the same steps
stand beside the speeds: speed that changes the training does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data" / "e2e"
SHAPES: dict[str, dict[str, int]] = {
    "30m": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                "num_key_value_heads": 8},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                 "num_attention_heads": 9,
                 "num_key_value_heads": 3},
}  # fmt: skip
RATES = {"full": 5e-4, "lora": 2e-3, "qlora": 2e-3}
BATCH, RANK, ALPHA = 16, 16, 32


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
    """The rows of all sides: `steps` batches of E2E, each row seen once, and 96 held-out rows."""
    import random

    found: dict[str, str] = {}
    for name, count in (("train", steps * BATCH), ("valid", 96)):
        rows = (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = random.Random(seed).sample(rows, count)
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        found[name] = str(folder / f"{name}.jsonl")
    return found


def graft_side(work: dict[str, Any]) -> dict[str, Any]:
    from graftlm.config import TrainConfig
    from graftlm.training.run import run
    from graftlm.training.view import View

    method = work["method"]
    own: dict[str, Any] = {} if method == "full" else {"rank": RANK, "alpha": ALPHA}
    with tempfile.TemporaryDirectory() as out:
        summary = run(
            TrainConfig(
                model=work["model"], data=(work["train"],), eval_data=work["valid"], method=method,
                precision="float32" if method != "qlora" else "nf4", steps=work["steps"], batch_size=BATCH,
                compute=work.get("compute"), learning_rate=RATES[method], schedule="constant", warmup=0.0,
                eval_every=work["steps"], out=Path(out) / "run", **own,
            ),
            View(quiet=True),
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][1:]  # the first one warms up
    seconds = sum(line["seconds"] for line in steps)
    return {
        "examples_per_second": BATCH * len(steps) / seconds,
        "trained_tokens_per_second": sum(line["trained_tokens"] for line in steps) / seconds,
        "tokens_per_second": sum(line["tokens"] for line in steps) / seconds,
        "seconds_per_step": seconds / len(steps),
        "bare_seconds_per_step": bare_products(work, [(line["tokens"], line["trained_tokens"]) for line in steps]),
        "peak_memory": summary["peak_memory_bytes"] - summary["idle_memory_bytes"],
        "loss": summary["eval_loss_after"],
    }


def bare_products(work: dict[str, Any], steps: list[tuple[int, int]]) -> float:
    """Seconds that a step's matrix products alone take in float32: every linear layer and the head, forward and back.

    Shapes are those of the steps that were run: all tokens through the layers, trained tokens through the head. LoRA
    adds its two narrow products and their gradients, full training the gradient of every weight. The data type of the
    products is float32 whatever the base is stored in.
    """
    import torch

    shape, method = SHAPES[work["shape"]], work["method"]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = [(width, width)] * 2 + [(narrow, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]  # (out, in)
    linears = [torch.randn(size) for size in sizes]
    factors = [(torch.randn(RANK, i), torch.randn(o, RANK)) for o, i in sizes]
    head = torch.randn(shape["vocab_size"], width)
    seconds: list[float] = []
    for tokens, trained in steps:
        x = {i: torch.randn(tokens, i) for _, i in sizes}
        dy = {o: torch.randn(tokens, o) for o, _ in sizes}
        hidden, dlogits = torch.randn(trained, width), torch.randn(trained, shape["vocab_size"])
        start = time.perf_counter()
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
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peer_side(work: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from graftlm.planning.measured import PeakMemory

    method = work["method"]
    data = load_dataset("json", data_files={"train": work["train"], "valid": work["valid"]})
    idle = PeakMemory(torch.device("cpu"))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out, idle as memory:
        extra: dict[str, Any] = {"dtype": torch.float32}
        if method == "qlora":
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(work["model"], **extra)
        trainer = SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(work["model"]),
            args=SFTConfig(
                output_dir=out, num_train_epochs=1, per_device_train_batch_size=1 if work["packing"] else BATCH,
                learning_rate=RATES[method],
                lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0, report_to="none", save_strategy="no",
                logging_steps=1000, use_cpu=True, bf16=False, gradient_checkpointing=False, packing=work["packing"],
                max_length=1280, disable_tqdm=True, seed=0,
            ),
            train_dataset=data["train"],
            peft_config=None
            if method == "full"
            else LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
    # Padded: the first step warms up. Packed: the rows are fewer and longer, so the whole pass over the data counts.
    rows = len(data["train"])
    examples, seconds = (rows, times[-1] - began) if work["packing"] else (rows - BATCH, times[-1] - times[0])
    return {
        "examples_per_second": examples / seconds,
        "trained_tokens_per_second": examples * work["trained_per_example"] / seconds,
        "seconds_per_step": seconds / max(1, len(times) - (not work["packing"])),
        "optimizer_steps": len(times),
        "peak_memory": memory.bytes - memory.start,
        "loss": held_out_loss(trainer.model, work),
    }


def held_out_loss(model: Any, work: dict[str, Any]) -> float:
    """Mean loss of a trained token over the held-out rows, one document at a time through the peer's model."""
    import torch
    from transformers import AutoTokenizer

    from graftlm.base.chat import Encoder
    from graftlm.data.documents import load
    from graftlm.data.sources import Source

    documents = load([Source.parse(work["valid"])], Encoder(AutoTokenizer.from_pretrained(work["model"]))).documents
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for document in documents:
            ids = torch.from_numpy(document.ids.astype("int64"))[None]
            logits = model(input_ids=ids).logits[0, :-1].float()
            wanted = torch.from_numpy(document.trained[1:])
            total += float(torch.nn.functional.cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum"))
            count += int(wanted.sum())
    return total / count


def alone(work: dict[str, Any]) -> dict[str, Any]:
    """One side's run in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(work)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{work['side']} {work['method']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    keys = runs[0].keys()
    return {k: None if runs[0][k] is None else statistics.median(run[k] for run in runs) for k in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "qlora"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packing", action="store_true", help="also run the peer with its own packing")
    parser.add_argument(
        "--mixed", action="store_true", help="also run ours with products in bfloat16 (AVX-512 BF16 only)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = json.loads(options.one)
        print(json.dumps(graft_side(work) if work["side"] == "graft" else peer_side(work)))
        return
    if not SHARED.is_dir():
        raise SystemExit(f"the E2E set is not there: {SHARED}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / options.shape
        make_model(options.shape, model)
        data = make_data(Path(folder), options.steps)
        common = {"model": str(model), "shape": options.shape, "steps": options.steps, **data}
        common["trained_per_example"] = trained_per_example(common)
        results: dict[str, dict[str, dict[str, Any]]] = {}
        for method in options.methods:
            sides = ["graft", "trl"] + (["trl packed"] if options.packing else [])
            if options.mixed:
                sides.append("graft mixed")
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side in sides:
                    work = {**common, "side": side.split()[0], "packing": "packed" in side, "method": method}
                    runs[side].append(alone({**work, "compute": "mixed" if "mixed" in side else None}))
            results[method] = {side: median(found) for side, found in runs.items()}
            print(line(method, results[method]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"shape": options.shape, "results": results}, indent=2) + "\n")


def trained_per_example(work: dict[str, Any]) -> float:
    """Mean trained tokens of a row, the same on all sides."""
    from transformers import AutoTokenizer

    from graftlm.base.chat import Encoder
    from graftlm.data.documents import load
    from graftlm.data.sources import Source

    dataset = load([Source.parse(work["train"])], Encoder(AutoTokenizer.from_pretrained(work["model"])))
    return dataset.trained_tokens / dataset.rows


def line(method: str, sides: dict[str, dict[str, Any]]) -> str:
    """One method's figures in one line."""
    ours, theirs = sides["graft"], sides["trl"]
    said = [f"{method:6}"]
    for side, found in sides.items():
        speed, memory = found["examples_per_second"], found["peak_memory"] / 1e6
        said.append(f"{side} {speed:.2f} examples/s {memory:.0f} MB loss {found['loss']:.4f}")
    faster = ours["examples_per_second"] / theirs["examples_per_second"]
    said.append(f"{faster:.2f}x speed, {ours['peak_memory'] / theirs['peak_memory']:.2f}x memory")
    said.append(f"bare products {ours['bare_seconds_per_step'] / ours['seconds_per_step']:.0%} of a step")
    return " | ".join(said)


if __name__ == "__main__":
    main()
