"""How the bundled base and data were made, in one command:

    python -m tools.demo.recipe --t0 t0.jsonl.gz --out FOLDER

    prepare    graftlm/demo/data/   the demo's data          (house.py)
               FOLDER/corpus/       the pretraining text     (corpus.py)
               FOLDER/seed/         tokenizer and shape      (tokenizer.py, shape.py)
    train      FOLDER/run/          `graft train --method full --init random` on the corpus: hours on two cores
    publish    graftlm/demo/base/   the trained model in bfloat16, with its model card

`--stage` runs one of the three alone; `train` goes on where it stopped. The base is trained by the command that users
have, as a process of its own: what makes the base is what Graft can do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftlm.demo import BASE, DATA
from graftlm.errors import GraftError, RunError
from tools.demo.corpus import write_corpus
from tools.demo.finetuning_data import write_house
from tools.demo.model_config import parameters, shape, write_shape
from tools.demo.tokenizer import count_tokens, train_tokenizer

# The run. A file's weight is how often an epoch sees each of its rows.
SOURCES = {"t0.jsonl": 1.0, "plain.jsonl": 0.5}
EVAL_FILES = ("heldout-t0.jsonl", "heldout-plain.jsonl")  # in the order of heldout.jsonl
TRAINING = {
    "epochs": 2.25,
    "batch-size": 48,
    "learning-rate": 3e-3,
    "lr-scheduler": "cosine",
    "warmup-ratio": 0.02,
    "weight-decay": 0.1,
    "beta2": 0.95,
    "micro-batch-tokens": 2048,
    "eval-every": 250,
    "save-every": 100,
    "seed": 0,
}

SHIPPED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.recipe", description="Make the bundled base and data.")
    parser.add_argument("--t0", type=Path, help="t0.jsonl.gz, rows with prompt and completion (needed to prepare)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpus, the seed and the run")
    parser.add_argument("--stage", choices=("prepare", "train", "publish"), help="one stage alone")
    options = parser.parse_args(arguments)
    stages = [options.stage] if options.stage else ["prepare", "train", "publish"]
    if "prepare" in stages and options.t0 is None:
        parser.error("--t0 is needed to prepare: the path of t0.jsonl.gz")
    try:
        if "prepare" in stages:
            prepare(options.t0, options.out)
        if "train" in stages:
            train(options.out)
        if "publish" in stages:
            publish(options.out)
    except GraftError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def prepare(t0_gz: Path, out: Path, data: Path = DATA) -> None:
    """Write the demo's data into `data`; corpus, tokenizer and shape into `out`; and the numbers into counts.json."""
    write_house(data)
    corpus = out / "corpus"
    rows = write_corpus(t0_gz, corpus)
    tokenizer = train_tokenizer([corpus / name for name in SOURCES], out / "seed")
    write_shape(out / "seed")
    counts: dict[str, dict[str, int]] = {}
    for name, number in rows.items():
        tokens, longest = count_tokens(tokenizer, corpus / name)
        counts[name] = {"rows": number, "tokens": tokens, "longest": longest}
        print(f"{name:22} {number:7,} rows {tokens:11,} tokens, the longest {longest}")
    (out / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    print(f"{parameters(shape()):,} parameters")


def train_command(out: Path) -> list[str]:
    """Return the command that trains the base."""
    command = ["train", "--model", str(out / "seed"), "--method", "full", "--init", "random"]
    for name, weight in SOURCES.items():
        command += ["--data", f"{out / 'corpus' / name}:{weight:g}"]
    command += ["--eval-data", str(out / "corpus" / "heldout.jsonl")]
    for option, value in TRAINING.items():
        command += [f"--{option}", str(value)]
    command += ["--save-precision", "bfloat16", "--out", str(out / "run")]
    return [sys.executable, "-m", "graftlm.cli", *command]


def train(out: Path) -> None:
    """Run `graft train`, or go on with it where it stopped. Raises RunError when it fails."""
    command = train_command(out)
    if (out / "run" / "checkpoints").is_dir():
        command.append("--resume")
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise RunError(f"graft train ended with {status}. Mend what it says and run `--stage train` again to go on.")


def publish(out: Path, base: Path = BASE) -> None:
    """Write the trained model of `out` into `base` in bfloat16, with its card. Raises RunError when it is missing."""
    model = out / "run" / "model"
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise RunError(f"'{weights}' not found: the run is not finished. Run `--stage train` first.")
    card = model_card(out)
    if base.exists():
        shutil.rmtree(base)
    base.mkdir(parents=True)
    for name in SHIPPED:
        shutil.copyfile(model / name if (model / name).is_file() else out / "seed" / name, base / name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "README.md").write_text(card, encoding="utf-8")
    # What it was trained on decides how a prompt is put to it: as a text, although its tokenizer has a chat template.
    run_manifest = json.loads((model / "graft.json").read_text(encoding="utf-8"))
    manifest = {
        "format": run_manifest["format"],
        "data": {"train": {"formats": run_manifest["data"]["train"]["formats"]}},
    }
    (base / "graft.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in base.iterdir())
    print(f"{base}: {size / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------------------------
# The model card


@dataclass(frozen=True, kw_only=True)
class EvalLoss:
    """The eval loss of one kind of text, in nats per token."""

    rows: int
    tokens: int
    before: float
    after: float


def eval_losses(evaluation: list[dict[str, Any]], rows: list[int]) -> list[EvalLoss]:
    """Return the losses of consecutive parts of an evaluation, of `rows` rows each.

    `evaluation` is a run's evaluation.jsonl: the row as file:line, its target_tokens, and loss_before and loss_after
    summed over them. Raises RunError when the numbers of rows differ.
    """
    evaluation = sorted(evaluation, key=lambda row: int(str(row["row"]).rpartition(":")[2]))
    if len(evaluation) != sum(rows):
        raise RunError(
            f"the run evaluated {len(evaluation)} rows, the corpus holds out {sum(rows)}: not the same corpus."
        )
    parts: list[EvalLoss] = []
    for number in rows:
        part, evaluation = evaluation[:number], evaluation[number:]
        tokens = sum(int(row["target_tokens"]) for row in part)
        before, after = (sum(float(row[key]) for row in part) / tokens for key in ("loss_before", "loss_after"))
        parts.append(EvalLoss(rows=number, tokens=tokens, before=before, after=after))
    return parts


def model_card(out: Path) -> str:
    """Return the model card, filled in from the counts, the run's own options and its evaluation."""
    counts = json.loads((out / "counts.json").read_text(encoding="utf-8"))
    run = json.loads((out / "run" / "config.json").read_text(encoding="utf-8"))
    lines = (out / "run" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [int(counts[name]["rows"]) for name in EVAL_FILES]
    length = f"{run['steps']} steps" if run.get("steps") else f"{run['epochs']:g} epochs"
    config = shape()
    values: dict[str, str] = {
        "parameters": f"{parameters(config):,}",
        "layers": str(config.num_hidden_layers),
        "hidden": str(config.hidden_size),
        "vocabulary": str(config.vocab_size),
        "positions": str(config.max_position_embeddings),
        "training": (
            f"{length} in batches of {run['batch_size']} documents, AdamW with a peak learning rate of "
            f"{run['learning_rate']:g}, {run['lr_scheduler']} schedule, weight decay {run['weight_decay']:g}, "
            f"seed {run['seed']}"
        ),
    }
    for name in SOURCES:
        kind = name.removesuffix(".jsonl")
        values |= {f"{kind}_rows": f"{counts[name]['rows']:,}", f"{kind}_tokens": f"{counts[name]['tokens']:,}"}
    for name, part in zip(EVAL_FILES, eval_losses([json.loads(line) for line in lines], rows), strict=True):
        kind = name.removesuffix(".jsonl").replace("-", "_")
        values |= {
            f"{kind}_rows": f"{part.rows:,}",
            f"{kind}_tokens": f"{part.tokens:,}",
            f"{kind}_before": f"{part.before:.3f}",
            f"{kind}_after": f"{part.after:.3f}",
        }
    template = Path(__file__).with_name("MODEL_CARD.md.in").read_text(encoding="utf-8")
    return string.Template(template).substitute(values)


if __name__ == "__main__":
    main()
