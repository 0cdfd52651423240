"""`graft demo`: a plan, a comparison of full, LoRA and QLoRA, and three voices as adapters on one base, all for real.

    plan        what each method would take, from the configuration alone
    compare     the three methods on product descriptions in a playful voice, one seed: table, verdict and report
    voices      two more voices as LoRA adapters; one prompt, answered by one base in all of them

Everything is the bundled base and data. Nothing that is shown is a constant: bytes, losses and answers are the runs' own.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from graftlm import demo, terminal
from graftlm.commands.compare import compare
from graftlm.commands.plan import plan
from graftlm.config import CompareConfig, PlanConfig, TrainConfig
from graftlm.errors import RunError
from graftlm.experiments.compare.view import CompareView
from graftlm.experiments.subprocess_run import train_in_subprocess
from graftlm.files import write_json
from graftlm.formatting import duration, size
from graftlm.jsonfile import parse_json, read_json
from graftlm.planning.plan import PlanReport
from graftlm.training.run_files import LOCK
from graftlm.training.run_folder import locked

BATCH, RANK = 16, 16
# Found by `graft compare` on this base and data, without --learning-rate.
RATES = {"full": 2e-3, "lora": 6.3e-3, "qlora": 6.3e-3}
COMPARED = "playful"
VOICES = ("formal", "playful", "terse")
MARK = "demo.json"
"""The file that makes a folder a demonstration's own; without it nothing in a folder is removed."""
_WRITTEN = ("compare", "voices")


@dataclass(frozen=True)
class VoiceAnswer:
    """What one voice, or the bare base, answers to a prompt."""

    voice: str
    text: str


def demonstrate(steps: int, out: Path, console: Console) -> dict[str, Any]:
    """Plan, compare, teach the voices, show all of it on `console`, and return it as plain values.

    Raises RunError when `out` holds something that is not an earlier demonstration, or one that is running.
    """
    with locked(out):
        _clear(out)
        return _demonstrate(steps, out, console)


def _demonstrate(steps: int, out: Path, console: Console) -> dict[str, Any]:
    started = time.perf_counter()
    view = CompareView(console)
    console.rule("plan", align="left")
    report = plan(PlanConfig(models=("demo",), data=("demo",), batch_size=BATCH, rank=RANK, max_length=0))
    for line in plan_lines(report):
        view.say(line)
    console.rule("compare", align="left")
    found = compare(compare_config(steps, out), view)
    view.comparison(found)
    console.rule("three voices on one base", align="left")
    adapters = {COMPARED: out / "compare" / "runs" / "lora" / "seed-0" / "adapter"}
    for voice in (v for v in VOICES if v != COMPARED):
        config = voice_config(voice, steps, out)
        with view.running(f"lora, {voice}", steps) as stepped:
            view.trained(f"lora, {voice}", train_in_subprocess(config, stepped))
        adapters[voice] = config.out / "adapter"
    prompt, answers = answer_all(adapters)
    console.print()
    show_answers(console, prompt, answers)
    seconds = time.perf_counter() - started
    view.say(
        f"Done in {duration(seconds)}. The report, with plots, is {out}/compare/report.html. Ask a voice yourself:\n\n"
        f"  graft generate --model demo --adapter {adapters['terse']} --prompt "
        "$'Describe this product.\\nname: Copper Wren\\nkind: kettle\\ncolour: red\\nprice: $30\\nDescription:'\n\n"
        "and your own model and data:\n\n"
        "  graft plan Qwen/Qwen3-0.6B --data train.jsonl\n"
        "  graft compare --model Qwen/Qwen3-0.6B --data train.jsonl --out runs/which\n"
        "  graft train --model Qwen/Qwen3-0.6B --data train.jsonl --method qlora --out runs/first\n"
    )
    return {
        "plan": report.to_json(), "comparison": found.to_json(), "prompt": prompt,
        "answers": [asdict(answer) for answer in answers], "seconds": seconds,
    }  # fmt: skip


def compare_config(steps: int, out: Path) -> CompareConfig:
    """The comparison: one seed, learning rates as found before."""
    return CompareConfig(
        model="demo", data=("demo",), eval_data="demo", seeds=1, learning_rate=RATES, steps=steps, batch_size=BATCH,
        rank=RANK, out=out / "compare",
    )  # fmt: skip


def voice_config(voice: str, steps: int, out: Path) -> TrainConfig:
    """The training of one more voice."""
    return TrainConfig(
        model="demo", data=(f"demo-{voice}",), eval_data=f"demo-{voice}", method="lora", learning_rate=RATES["lora"],
        steps=steps, batch_size=BATCH, rank=RANK, out=out / "voices" / voice,
    )  # fmt: skip


def _clear(out: Path) -> None:
    """Remove an earlier demonstration, and only that: a folder that this function itself marked."""
    held = sorted(p.name for p in out.iterdir() if p.name != LOCK)
    try:
        earlier = read_json(out / MARK, RunError)["runs"]
    except (RunError, KeyError):
        earlier = []
    names = [
        *_WRITTEN,
        *(name for name in earlier if name in ("full", "lora", "qlora")),
    ]  # as demonstrations once had them
    others = [name for name in held if name not in (*names, MARK)]
    if others or (held and MARK not in held):
        name = (others or held)[0]
        raise RunError(f"--out {out} holds '{name}', which no demonstration wrote; take another folder")
    for name in names:
        if (out / name).exists():
            with locked(out / name):  # somebody may go on with this comparison
                shutil.rmtree(out / name)
    write_json(out / MARK, {"written_by": "graft demo", "runs": list(_WRITTEN)})


def plan_lines(report: PlanReport) -> list[str]:
    """What the plan says of the three methods, and its advice."""
    plan = report.plans[0]
    needs = {row.requirement.setting.key: row.requirement for row in plan.rows}
    lines = [
        f"planned for {report.card.name}, on top of the idle process: "
        + ", ".join(f"{label} {size(needs[label.lower()].peak)}" for label in ("full", "LoRA", "QLoRA"))
    ]  # fmt: skip
    return [*lines, *map(str, plan.advice.reasons)]


def answer_all(adapters: dict[str, Path]) -> tuple[str, list[VoiceAnswer]]:
    """A eval prompt, answered by one base: bare, and through each adapter in a slot of its own."""
    from graftlm.adapters import peft_format as adapter_format
    from graftlm.adapters.attach import attach
    from graftlm.base.chat import Encoder
    from graftlm.base.loading import load_base
    from graftlm.serving.engine.generate import complete

    base = load_base("demo", precision="bfloat16")
    slots = {"base": 0, **{voice: slot for slot, voice in enumerate(VOICES, start=1)}}
    for voice, adapter in adapters.items():
        attach(base, adapter_format.load(base, adapter), slot=slots[voice])
    encoder = Encoder(base.tokenizer)
    first = Path(demo.resolve_data("demo", "valid")).read_text(encoding="utf-8").splitlines()[0]
    prompt = str(parse_json(first)["prompt"])
    ids = encoder.prompt_text(prompt)
    answers = [
        VoiceAnswer(name, complete(base, encoder, ids, slot=slot, max_tokens=90).text.strip())
        for name, slot in slots.items()
    ]
    return prompt.strip(), answers


def show_answers(console: Console, prompt: str, answers: list[VoiceAnswer]) -> None:
    """A prompt with the answers below each other."""
    console.print(Text("one held-out product, one base in memory", style="bold"))
    terminal.facts(console, [("prompt", prompt), *((answer.voice, answer.text) for answer in answers)])
