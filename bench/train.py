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
    "30m": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
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


def graft_side(work: dict[str, Any]) -> dict[str, Any]:
    from graftlm.config import TrainConfig
    from graftlm.training.run import run
    from graftlm.training.view import View

    with tempfile.TemporaryDirectory() as out:
        summary = run(
            TrainConfig(
                model=work["model"], data=(work["train"],), eval_data=work["valid"], method=work["method"],
                precision="float32" if work["method"] != "qlora" else "nf4", steps=work["steps"], batch_size=BATCH,
                rank=RANK, alpha=ALPHA, learning_rate=RATES[work["method"]], schedule="constant", warmup=0.0,
                eval_every=work["steps"], out=Path(out) / "run",
            ),
            View(quiet=True),
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][1:]  # the first one warms up
    seconds = sum(line["seconds"] for line in steps)
    return {
        "examples_per_second": BATCH * len(steps) / seconds,
        "trained_tokens_per_second": sum(line["trained_tokens"] for line in steps) / seconds,
        "peak_memory": summary["peak_memory_bytes"] - summary["idle_memory_bytes"],
        "loss": summary["eval_loss_after"],
    }


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
                output_dir=out, max_steps=work["steps"], per_device_train_batch_size=BATCH, learning_rate=RATES[method],
                lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0, report_to="none", save_strategy="no",
                logging_steps=1000, use_cpu=True, bf16=False, gradient_checkpointing=False, packing=work["packing"],
                max_length=1024, disable_tqdm=True, seed=0,
            ),
            train_dataset=data["train"],
            peft_config=None
            if method == "full"
            else LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
        peak = memory
    lengths = work["trained_per_example"]
    return {
        "examples_per_second": BATCH * (len(times) - 1) / (times[-1] - times[0]) * work.get("examples_per_row", 1.0),
        "trained_tokens_per_second": None
        if work["packing"]
        else BATCH * (len(times) - 1) * lengths / (times[-1] - times[0]),
        "peak_memory": peak.bytes - peak.start,
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
        results: dict[str, dict[str, dict[str, Any]]] = {}
        for method in options.methods:
            sides = ["graft", "trl"] + (["trl packed"] if options.packing else [])
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side in sides:
                    work = {
                        "side": side.split()[0], "packing": "packed" in side, "method": method, "model": str(model),
                        "train": str(SHARED / "train.jsonl"), "valid": str(SHARED / "valid.jsonl"),
                        "steps": options.steps, "trained_per_example": 36.9,
                    }  # fmt: skip
                    runs[side].append(alone(work))
            results[method] = {side: median(found) for side, found in runs.items()}
            ours, theirs = results[method]["graft"], results[method]["trl"]
            print(
                f"{method:6} graft {ours['examples_per_second']:6.2f} examples/s, {ours['peak_memory'] / 1e6:6.0f} MB, "
                f"loss {ours['loss']:.4f} | trl {theirs['examples_per_second']:6.2f}, {theirs['peak_memory'] / 1e6:6.0f} MB, "
                f"loss {theirs['loss']:.4f} | {ours['examples_per_second'] / theirs['examples_per_second']:.2f}x speed, "
                f"{ours['peak_memory'] / theirs['peak_memory']:.2f}x memory",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"shape": options.shape, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
