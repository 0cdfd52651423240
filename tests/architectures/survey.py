"""Which families work, and how: a tiny random model of each, loaded, trained, saved, read back and decoded in every precision.

    PYTHONPATH=tests python tests/architectures/survey.py                     # all: the table of docs/models.md
    PYTHONPATH=tests python tests/architectures/survey.py --only jamba mamba  # their rows, and what each check said

Each family runs in a process of its own. A check ends well, in a GraftError (refused), or in anything else, which is a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import families
import tiny
import torch
import transformers

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.base.loading import Base, load_base
from graftlm.base.saving import dense_state_dict, save_model
from graftlm.base.transformers_log import fails_in_the_model
from graftlm.config import Precision
from graftlm.errors import GraftError, ModelError, TrainingError
from graftlm.files import write_text
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.request import Request
from graftlm.serving.engine.scheduler import EngineLimits
from graftlm.training.trainer import train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PROMPTS = [tiny.ids(7, seed=1), tiny.ids(7, seed=2), tiny.ids(3, seed=3), tiny.ids(7, seed=4)]
LENGTHS = (5, 2, 6, 5)
SECONDS = 300


@dataclass
class Found:
    """What the checks of one family said."""

    family: str
    kind: str = ""
    passes: str = ""
    decoding: str = ""
    checks: dict[str, str] = field(default_factory=dict[str, str])
    """Name -> empty where it is well, `refused: ...`, or `fault: ...`."""
    targets: str = "all-linear"
    """What LoRA was trained on."""
    generate: str = ""
    """What is to be said of transformers' own decoding with its cache."""
    aside: str = ""
    """A tensor of another linear layer, which gets no gradient."""

    def check(self, name: str, run: Callable[[], None]) -> bool:
        try:
            run()
        except GraftError as error:
            self.checks[name] = f"refused: {str(error).splitlines()[0]}"
        except Exception as error:
            if name.startswith(("full", "lora")) and fails_in_the_model(error):
                # The dry run of `graft train` says this before the first step.
                self.checks[name] = f"refused: its own code fails: {error}"
            else:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = str(error).strip().splitlines()
                self.checks[name] = (
                    f"fault: {type(error).__name__} {said[0] if said else ''} ({Path(where.filename).name}:{where.lineno})"
                )
        else:
            self.checks[name] = ""
        return not self.checks[name]


class Family:
    """One family's tiny model in a folder, and the checks on it."""

    def __init__(self, name: str, place: Path) -> None:
        self.place, self.found = place, Found(name)

    def run(self) -> Found:
        found = self.found
        if not found.check("build", self.build):
            return found
        for precision in PRECISIONS:
            if not found.check(f"load {precision}", lambda p=precision: self.load(p)):
                continue
            found.check(f"logits {precision}", lambda p=precision: self.logits(p))
            found.check(f"answers {precision}", lambda p=precision: self.answers(p))
            found.check(f"lora {precision}", lambda p=precision: self.lora(p))
            if precision in ("float32", "bfloat16"):
                found.check(f"full {precision}", lambda p=precision: self.full(p))
        return found

    def build(self) -> None:
        model = families.random_model(self.found.family)
        self.found.kind = type(model).__name__
        tiny.write(self.place / "base", model)

    def base(self, precision: Precision) -> Base:
        return load_base(str(self.place / "base"), precision=precision, compute_dtype="float32", device="cpu")

    def load(self, precision: Precision) -> None:
        base = self.base(precision)
        self.found.passes = "packed" if base.packs else "stacks"

    def reference(self, base: Base) -> Any:
        """Plain transformers with the very weights that the base holds."""
        model = tiny.plain(self.place / "base")
        state = {name: value.clone() for name, value in dense_state_dict(base.model, torch.float32).items()}
        _, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected, f"unexpected {unexpected[0]}"
        model.tie_weights()
        return model

    def logits(self, precision: Precision) -> None:
        base = self.base(precision)
        tiny.close(tiny.base_logits(base, tiny.ids(), slot=0), tiny.plain_logits(self.reference(base), tiny.ids()))

    def answers(self, precision: Precision) -> None:
        """Greedy answers of the engine are those of the whole text in plain transformers."""
        base = self.base(precision)
        plain = self.reference(base)
        found = self.asked(base, adapter=False)
        expected = [greedy(lambda ids: tiny.plain_logits(plain, ids), p, n) for p, n in zip(PROMPTS, LENGTHS)]
        assert found == expected, f"answers {found}, expected {expected}"
        if precision == "float32" and not same_as_generate(plain, expected):
            self.found.generate = "transformers' own `generate` writes something else"

    def asked(self, base: Base, *, adapter: bool) -> list[list[int]]:
        engine = Engine(base, EngineLimits(max_num_seqs=4, cache_tokens=256, max_loras=1))
        way = engine.decoding
        how = "blocks" if way.paged else "own cache" if way.cache else "whole text"
        self.found.decoding = self.found.decoding or how  # of the float32 base, without an adapter
        if adapter:
            engine.adapter_cache.pin("it", 1)
        for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS)):
            ids = tuple(prompt.tolist())
            engine.add_request(Request(id=str(i), prompt=ids, max_tokens=length, adapter="it" if adapter else ""))
        found: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
        while engine.busy:
            for piece in engine.step():
                assert not piece.error, piece.error
                found[piece.id] += piece.tokens
        engine.close()
        return list(found.values())

    def lora(self, precision: Precision) -> None:
        """Two steps on every linear layer, or on those of the MLPs where others get no gradient; saved, read back, asked."""
        try:
            base = self.trained(precision)
        except TrainingError as error:
            if "got no gradient" not in str(error):
                raise
            self.found.aside = without_gradient(str(error))
            self.found.targets = "mlp"
            base = self.trained(precision)
        folder = self.place / f"adapter-{precision}"
        again = self.base(precision)
        attach(again, adapter_format.load(again, folder), slot=1)
        tiny.close(tiny.base_logits(again, tiny.ids()), tiny.base_logits(base, tiny.ids()))
        found = self.asked(again, adapter=True)
        expected = [greedy(lambda ids: tiny.base_logits(base, ids), p, n) for p, n in zip(PROMPTS, LENGTHS)]
        assert found == expected, f"answers with the adapter {found}, expected {expected}"

    def trained(self, precision: Precision) -> Base:
        """A base with an adapter that was trained for two steps, and saved."""
        base = self.base(precision)
        adapter = tiny.adapted(base, targets=(self.found.targets,))
        before = {name: p.detach().clone() for name, p in adapter.parameters().items()}
        train(base, [tiny.trial(base, adapter, tiny.examples(), steps=2)], 23, tiny.Heard())
        same = [name for name, p in adapter.parameters().items() if torch.equal(p, before[name])]
        assert not same, f"{len(same)} tensors are as they were: {same[0]}"
        folder = self.place / f"adapter-{precision}"
        folder.mkdir()
        adapter_format.save(base, adapter, folder, {})
        return base

    def full(self, precision: Precision) -> None:
        """Two steps of every weight; saved, and read by plain transformers."""
        base = self.base(precision)
        before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
        heard = tiny.Heard()
        train(base, [tiny.trial(base, None, tiny.examples(), steps=2)], 23, heard)
        same = {name for name, p in base.model.named_parameters() if torch.equal(p, before[name])} - base.fixed
        assert len(same) < len(before) / 2, f"{len(same)} weights are as they were: {min(same)}"
        assert heard.losses[1] < heard.losses[0]
        folder = self.place / f"full-{precision}"
        save_model(base.model, str(folder), torch.float32)
        found = tiny.plain_logits(tiny.plain(folder), tiny.ids())
        tiny.close(found, tiny.base_logits(base, tiny.ids(), slot=0), rtol=1e-3)


def greedy(logits: Callable[[torch.Tensor], torch.Tensor], prompt: torch.Tensor, length: int) -> list[int]:
    """The likeliest token after token, by the whole text."""
    text = prompt.tolist()
    for _ in range(length):
        text.append(int(logits(torch.tensor(text))[-1].argmax()))
    return text[len(prompt) :]


@torch.no_grad()
def same_as_generate(plain: Any, expected: Sequence[Sequence[int]]) -> bool:
    """Whether transformers' own greedy `generate`, with its cache, writes the same."""
    try:
        for prompt, length, answer in zip(PROMPTS, LENGTHS, expected):
            ids = prompt[None]
            out = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            if out[0, ids.shape[1] :].tolist() != list(answer):
                return False
    except Exception:  # some cannot generate at all
        return False
    return True


def in_a_process(name: str) -> Found:
    """A family's checks in a process of its own, with a limit on its time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(SECONDS)
        place = Path(tempfile.mkdtemp(prefix="graft-survey-"))
        try:
            found = Family(name, place).run()
        finally:
            shutil.rmtree(place, ignore_errors=True)
        with os.fdopen(writer, "w") as pipe:
            json.dump(vars(found), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        return Found(name, checks={"build": f"fault: no result in {SECONDS} s"})
    return Found(**cast("dict[str, Any]", json.loads(said)))


def without_gradient(message: str) -> str:
    """The tensor that a refusal names."""
    return message.split("'")[1].removesuffix(".weight").removesuffix(".lora_A")


def cell(found: Found, kind: str, precisions: Sequence[str]) -> str:
    """Whether a method works: `yes`, with what else it needs; `no`; or `refused` where the base itself is."""
    if any(found.checks.get(f"load {p}", "refused") for p in PRECISIONS):
        return "refused"
    well = [p for p in precisions if not found.checks.get(f"{kind} {p}", "missing")]
    works = "yes" if len(well) == len(precisions) else ", ".join(well) or "no"
    return f"{works}, `--targets {found.targets}`" if well and kind == "lora" and found.aside else works


def remark(found: Found) -> str:
    """The first thing that any check said, short."""
    said = next((text for text in found.checks.values() if text), "")
    if found.aside:
        return f"`{found.aside}` gets no gradient"
    if "got no gradient" in said:
        return f"`{without_gradient(said)}` gets no gradient"
    return said.removeprefix("refused: ").removeprefix(f"{found.kind} ").partition(". ")[0]


def row(found: Found) -> str:
    full = cell(found, "full", ("float32", "bfloat16"))
    lora, qlora = cell(found, "lora", ("float32", "bfloat16")), cell(found, "lora", ("int8", "nf4"))
    said = "; ".join(part for part in (remark(found), found.generate) if part).replace("|", "/")
    return f"| {found.family} | {full} | {lora} | {qlora} | {found.passes or '-'} | {found.decoding or '-'} | {said} |"


def written(page: str, all_found: Sequence[Found]) -> str:
    """The page with new rows for these families; the others' stay."""
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    rows |= {found.family: row(found) for found in all_found}
    lines = [
        f"transformers {transformers.__version__}; {len(rows.keys() & set(families.FAMILIES))} families.",
        "",
        "| family | full | LoRA | QLoRA (int8, nf4) | training | decoding | remark |",
        "|---|---|---|---|---|---|---|",
        *(rows[name] for name in families.FAMILIES if name in rows),
        "",
    ]
    return before + BEGIN + "\n".join(lines) + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="these families; the rows of others stay")
    only = parser.parse_args().only
    unknown = sorted(set(only or ()) - set(families.FAMILIES))
    if unknown:
        raise ModelError(f"no family '{unknown[0]}'; known: {', '.join(families.FAMILIES)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    all_found: list[Found] = []
    for name in only or families.FAMILIES:
        found = in_a_process(name)
        all_found.append(found)
        print(row(found), file=sys.stderr, flush=True)
        for check, said in found.checks.items():
            if only or said.startswith("fault"):
                print(f"    {check}: {said or 'ok'}", file=sys.stderr, flush=True)
    write_text(PAGE, written(PAGE.read_text(encoding="utf-8"), all_found))
    return any(said.startswith("fault") for found in all_found for said in found.checks.values())


if __name__ == "__main__":
    raise SystemExit(main())
