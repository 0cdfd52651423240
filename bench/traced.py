"""Peak memory of 7B, 13B and 70B on a GPU, traced on a fake card, beside what `graft plan` says: python bench/traced.py

Each row is a real step of training, run through all of its Python code on tensors that have a shape, a dtype and a device and
no values (`tests/gpu/fake_card.py`), on PyTorch's CPU build. So a step of 70B takes a minute and 3 GB here, and what it would
hold on a card is counted as the caching allocator rounds it. Not in the trace: CUDA's context, cuBLAS's workspace, the
allocator's gaps. The plan is made from the model's config alone.

    python bench/traced.py                    every row that bench/results/traced.json lacks, and docs/planning.md's table
    python bench/traced.py --only "70B"       rows whose name holds this text
    python bench/traced.py --again            rows that are there are traced anew too
    python bench/traced.py --plan             nothing is traced: only planned again, and the table written

It needs a C++ compiler and half an hour. Figures are written after every row: run it again to go on where it stopped. Nothing
is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "gpu"))

from fixtures import NoCard, Worker, compile_guard  # noqa: E402
from traced_memory import TracedRun, plan, trace  # noqa: E402

from graftlm.files import write_json, write_text  # noqa: E402
from graftlm.planning.models import built_in  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "traced.json"
PAGE = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- traced: written by `python bench/traced.py` -->", "<!-- /traced -->"
GIB = 1 << 30
WITHIN = 0.03
CHECKPOINTED = {"activation_checkpointing": True}
BF16, INT8 = ({"base_precision": name} for name in ("bfloat16", "int8"))
EIGHT = {"optimizer": "adamw-8bit"}
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
OFFLOAD, OFFLOAD_ACTIVATIONS = {"offload_optimizer": True}, {"offload_activations": True}
Options = dict[str, Any]


def values_of(size: str) -> dict[str, Any]:
    """The config's values of Llama 2 in one of its sizes, of Mixtral for 8x7b."""
    name = f"mixtral-{size}" if "x" in size else f"llama-2-{size}"
    known = {**built_in()[name], "max_position_embeddings": 4096}
    given = {name: None if value == "none" else value for name, value in known.items()}
    return {name: value for name, value in given.items() if name not in ("hub", "model_type")}


def run(size: str, method: Any, words: str, tokens: int, batch: int = 1, options: Options | None = None) -> TracedRun:
    label = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[method]
    name = f"{size.upper()} {label}{words}, {tokens:,}{f' x {batch}' if batch > 1 else ''}"
    return TracedRun(name=name, model=values_of(size), method=method, tokens=tokens, batch=batch, options=options or {})


def field_rows() -> list[TracedRun]:
    """Each method at each size: one example of 2,048 tokens, activation checkpointing."""
    rows: list[TracedRun] = []
    for size in ("7b", "13b", "70b"):
        rows.append(run(size, "full", " in bfloat16", 2048, options={**BF16, **CHECKPOINTED}))
        rows.append(run(size, "lora", "", 2048, options=CHECKPOINTED))
        if size == "70b":
            rows.append(run(size, "lora", " on int8", 2048, options={**INT8, **CHECKPOINTED}))
        rows.append(run(size, "qlora", "", 2048, options=CHECKPOINTED))
    return rows


def other_rows() -> list[TracedRun]:
    """What the other rows have not: activations saved, several examples, float32, adapters of other kinds, a mixture."""
    return [
        run("7b", "full", " in float32", 2048, 2),
        run("7b", "lora", "", 512),
        run("7b", "lora", "", 2048, 4),
        run("7b", "lora", ", dropout", 2048, options={"lora_dropout": 0.1}),
        run("7b", "lora", ", DoRA", 2048, options={"dora": True}),
        run("7b", "qlora", "", 512),
        run("13b", "qlora", "", 512),
        run("8x7b", "lora", ", checkpointed", 2048, options=CHECKPOINTED),
    ]


def ladder(size: str, method: Any, tokens: int, rungs: Sequence[tuple[str, Options]]) -> list[TracedRun]:
    """A row for each rung, with all of those above it."""
    rows: list[TracedRun] = []
    given: Options = {}
    for words, options in rungs:
        given = {**given, **options}
        rows.append(run(size, method, words, tokens, options=dict(given)))
    return rows


def ladders() -> dict[str, list[TracedRun]]:
    """What brings full training of 7B and QLoRA of 70B down."""
    full = [
        (": float32 weights", {}), (" + bfloat16 weights", BF16), (" + activation checkpointing", CHECKPOINTED),
        (" + 8-bit states", EIGHT), (" + steps in the backward pass", IN_BACKWARD),
        (" + activations on the host", OFFLOAD_ACTIVATIONS), (" + states on the host", OFFLOAD),
    ]  # fmt: skip
    return {
        "The ladder of full training at 7B, one example of 512 tokens": ladder("7b", "full", 512, full),
        "The ladder at 70B, one example of 512 tokens": [
            run("70b", "lora", ": bfloat16 base", 512),
            run("70b", "lora", ": int8 base", 512, options=INT8),
            *ladder(
                "70b",
                "qlora",
                512,
                [
                    (": nf4 base", {}),
                    (" + activation checkpointing", CHECKPOINTED),
                    (" + activations on the host", OFFLOAD_ACTIVATIONS),
                ],
            ),
        ],
    }


def sections() -> dict[str, list[TracedRun]]:
    """The tables and their rows."""
    return {
        "One example of 2,048 tokens, activation checkpointing": field_rows(),
        "Other settings, activations saved": other_rows(),
        **ladders(),
    }


# ---- figures ---------------------------------------------------------------------------------------------------------


def planned(row: TracedRun, traced: dict[str, Any]) -> dict[str, Any]:
    """A row's figures: what was traced, and the plan beside it."""
    found = plan(row)
    return {
        **traced, "planned": found.training, "planned_host": found.host, "highest_at": found.moment,
        "parts": found.parts.to_json(), "error": found.training / traced["peak"] - 1,
    }  # fmt: skip


def said(name: str, figures: dict[str, Any]) -> str:
    """A row's figures in a line."""
    return (
        f"{name}: traced {figures['peak'] / GIB:.2f} GiB, planned {figures['planned'] / GIB:.2f} GiB at "
        f"{figures['highest_at']}, {figures['error']:+.1%}"
    )


def measure(rows: Sequence[TracedRun], result: dict[str, Any], place: Path) -> None:
    """Trace rows, each in a process of its own, and write the file after each."""
    if not rows:
        return
    worker = Worker(compile_guard())
    try:
        for number, row in enumerate(rows, 1):
            began = time.monotonic()
            found = {**trace(worker, row), "date": time.strftime("%Y-%m-%d")}
            figures = result["rows"][row.name] = planned(row, found)
            write_json(place, result)
            print(f"[{number}/{len(rows)}] {said(row.name, figures)}, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        worker.close()


# ---- the page --------------------------------------------------------------------------------------------------------


def tables(rows: dict[str, Any]) -> str:
    """The tables of docs/planning.md."""
    lines: list[str] = []
    for title, runs in sections().items():
        known = [row.name for row in runs if row.name in rows]
        if not known:
            continue
        lines += [f"| {title} | traced GiB | plan GiB | | highest at |", "|---|---:|---:|---:|---|"]
        for name in known:
            found = rows[name]
            host = f", {found['host'] / GIB:.1f} GiB on the host" if found["host"] > GIB / 10 else ""
            lines.append(
                f"| {name}{host} | {found['peak'] / GIB:.2f} | {found['planned'] / GIB:.2f} | {found['error']:+.1%} | "
                f"{found['highest_at']} |"
            )
        lines.append("")
    every = [row.name for runs in sections().values() for row in runs]
    errors = [abs(rows[name]["error"]) for name in every if name in rows]
    if errors:
        within = sum(error <= WITHIN for error in errors)
        lines.append(
            f"{within} of {len(errors)} plans are within 3 % of the trace; the largest error is {max(errors):.1%}."
        )
    if len(errors) < len(every):
        lines.append(f"{len(every) - len(errors)} of {len(every)} rows have not been traced yet.")
    return "\n".join(lines)


def with_tables(page: str, rows: dict[str, Any]) -> str:
    """A page with the tables between its marks. Raises ValueError if they are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {BEGIN} and {END}")
    return f"{before}{begin}\n{tables(rows)}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--again", action="store_true", help="trace rows anew that the file has")
    parser.add_argument("--plan", action="store_true", help="trace nothing; plan again what was traced")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the file of figures")
    options = parser.parse_args(arguments)
    runs = {row.name: row for rows in sections().values() for row in rows}
    before = json.loads(options.json.read_text(encoding="utf-8"))["rows"] if options.json.is_file() else {}
    kept = {name: planned(runs[name], found) for name, found in before.items() if name in runs}
    result = {"torch": version("torch"), "transformers": version("transformers"), "rows": kept}
    chosen = [row for row in runs.values() if options.only in row.name and (options.again or row.name not in kept)]
    try:
        measure([] if options.plan else chosen, result, options.json)
    except NoCard as reason:
        parser.error(str(reason))
    write_json(options.json, result)
    outside = [name for name, found in kept.items() if abs(found["error"]) > WITHIN]
    for name in outside:
        print(f"outside of 3 %: {said(name, kept[name])}")
    if options.json == RESULTS:
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), kept))
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
