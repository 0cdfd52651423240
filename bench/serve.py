"""Serving vs transformers + PEFT + bitsandbytes: many adapters in one batch, on a 32-bit and on a 4-bit base, in one run.

    python bench/serve.py --json bench/results/serve.json    # the 135M Llama of the table; writes serve.md beside it
    python bench/serve.py --quick                            # the same in small, to see that it works

Every side is a process of its own that keeps its model, and they take turns: round by round each answers the same fresh
prompts, greedily and to the full length, and the median of the rounds counts. Seconds are those of whole answers, prompts
included. The peer is set up as its documentation says: `generate(adapter_names=[...])` of a PeftModel,
BitsAndBytesConfig nf4 with double quantization and float32 matmuls, the cache on. Nothing else may run.

Weights are random, so the text means nothing; the adapters are strong enough to change it, and how many answers of both
sides agree token for token is reported with the speeds. Ours go through the engine as a server's do, HTTP left out.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import report_serve
from machine import described
from train import make_model

RANK, ALPHA, BATCH, PROMPT = 16, 32, 8, 32
SLOTS = 16
TURN_SECONDS = 300  # a side that takes longer for one turn is given up


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    shape: str = "135m"
    new: int = 32
    rounds: int = 3
    store: int = 200
    """Adapters in the store of the Zipf traffic."""
    requests: int = 32
    """Requests of that traffic in one round; as many warm up."""
    resident: tuple[int, ...] = (2, 16, 100, 500)
    """How many resident adapters one is chosen among."""
    further: int = 24
    """Adapters made resident to see what one takes."""


QUICK = Size(shape="30m", new=6, rounds=1, store=12, requests=10, resident=(2, 8), further=4)


def make_adapters(model: Path, folder: Path, count: int) -> list[Path]:
    """PEFT adapters of rank 16 on every linear layer but the head, A and B random, in float32 as PEFT saves them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(plain, config).save_pretrained(folder / "0")
    known = load_file(folder / "0" / "adapter_model.safetensors")
    described = {p.name: p.read_bytes() for p in (folder / "0").glob("*.json")}
    found: list[Path] = []
    for i in range(count):
        place = folder / str(i)
        place.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(i)
        values = {
            name: torch.randn(tensor.shape, generator=generator) * (0.02 if "lora_B" in name else 0.04)
            for name, tensor in known.items()
        }
        save_file(values, place / "adapter_model.safetensors", metadata={"format": "pt"})
        for name, content in described.items():
            (place / name).write_bytes(content)
        found.append(place)
    return found


def prompts(seed: int, count: int, vocabulary: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(seed).integers(0, vocabulary, (count, PROMPT)).tolist()


# ---- the sides: each is built once in its own process, then asked for turns -----------------------------------------------


class Graft:
    """Our engine over one base."""

    def __init__(self, work: dict[str, Any]) -> None:
        from graftlm.adapters import peft_format as adapter_format
        from graftlm.base.loading import load_base

        self.base = load_base(work["model"], precision=work["precision"], compute_dtype="float32", device="cpu")
        self.folders = [Path(p) for p in work["adapters"]]
        self.digests: dict[int, str] = {}
        self.inspect = adapter_format.inspect_folder
        self.number = 0
        self.small: dict[str, Any] = {}
        self.engine = self._engine(slots=SLOTS)

    def _engine(self, **limits: Any) -> Any:
        from graftlm.serving.engine.engine import Engine
        from graftlm.serving.engine.scheduler import EngineLimits

        given = {"max_loras": limits.pop("slots"), "adapter_bytes": 16 << 30, "max_num_seqs": SLOTS, **limits}
        return Engine(self.base, EngineLimits(**given))

    def _digest(self, adapter: int) -> str:
        if adapter not in self.digests:
            self.digests[adapter] = self.inspect(self.folders[adapter]).digest
        return self.digests[adapter]

    def _request(self, prompt: Sequence[int], new: int, adapter: int | None) -> tuple[Any, Path | None]:
        from graftlm.serving.engine.request import Request

        self.number += 1
        digest = "" if adapter is None else self._digest(adapter)
        one = Request(id=str(self.number), prompt=tuple(prompt), max_tokens=new, adapter=digest)
        return one, None if adapter is None else self.folders[adapter]

    def _answer(self, engine: Any, asked: list[tuple[Any, Path | None]]) -> list[list[int]]:
        found: dict[str, list[int]] = {one.id: [] for one, _ in asked}
        for output in engine.generate(asked):
            assert output.finish_reason in (None, "length"), output
            found[output.id] += output.tokens
        return list(found.values())

    def turn(self, seed: int, batch: int, new: int, adapters: list[int] | None) -> dict[str, Any]:
        """Seconds and tokens of `batch` answers, each with its own adapter or all of the bare base."""
        asks = prompts(seed, batch, self.base.structure.vocabulary)
        asked = [self._request(ask, new, adapters[i] if adapters else None) for i, ask in enumerate(asks)]
        counts = self.engine.counts
        began = time.perf_counter()
        news = self.engine.generate(asked)
        first = next(news)
        steps, step_seconds = counts.steps, counts.step_seconds  # after the prompts
        found: dict[str, list[int]] = {one.id: [] for one, _ in asked}
        for output in (first, *news):
            found[output.id] += output.tokens
        seconds = time.perf_counter() - began
        step = (counts.step_seconds - step_seconds) / (counts.steps - steps)
        return {"seconds": seconds, "tokens": list(found.values()), "decoding_step_seconds": step}

    def traffic(self, seed: int, count: int, new: int, slots: int, times: int) -> dict[str, Any]:
        """Requests for adapters by Zipf's law: with all adapters resident, and with few slots, in turns.

        The first turn of each warms up. Adapters beyond the slots are host copies once they were asked for; the first time
        they come from disk, in the timed turns too.
        """
        import numpy as np

        count_of_all = len(self.folders)
        engines = {"all": self._engine(slots=count_of_all), "few": self._engine(slots=slots)}
        for adapter in range(count_of_all):  # all resident: nothing has to be loaded later
            self._answer(engines["all"], [self._request([1, 2], 1, adapter)])
        ranks = np.arange(1, count_of_all + 1)
        share = (1 / ranks) / (1 / ranks).sum()
        found: dict[str, Any] = {name: {"seconds": []} for name in engines}
        before: dict[str, tuple[int, int]] = {}
        for time_ in range(-1, times):
            random = np.random.default_rng([seed, time_ + 1])
            chosen = random.choice(count_of_all, count, p=share)
            asks = prompts(int(random.integers(1 << 30)), count, self.base.structure.vocabulary)
            for name in ("all", "few") if time_ % 2 == 0 else ("few", "all"):
                engine = engines[name]
                asked = [self._request(ask, new, int(a)) for ask, a in zip(asks, chosen)]
                began = time.perf_counter()
                self._answer(engine, asked)
                if time_ >= 0:
                    found[name]["seconds"].append(time.perf_counter() - began)
                else:
                    before[name] = (engine.adapter_cache.counters.swaps, engine.adapter_cache.counters.loads)
        for name, engine in engines.items():
            counters, (swaps, loads) = engine.adapter_cache.counters, before[name]
            found[name] |= {"swaps": counters.swaps - swaps, "loads": counters.loads - loads}
            found[name]["tokens_per_second"] = count * new / statistics.median(found[name]["seconds"])
            engine.close()
        return {**found, "slots": slots, "store": count_of_all, "requests": count * times}

    def choosing(self, resident: int, most: int, tries: int = 300) -> dict[str, Any]:
        """Seconds to choose one of many resident adapters for a request, and those that a step takes longer for a change."""
        engine = self._engine(slots=resident, max_num_seqs=2)
        self.small = self.small or _small_adapters(self.base, most)
        small = dict(list(self.small.items())[:resident])
        engine.adapter_cache._load = lambda folder: small[folder.name]
        for name in small:
            engine.adapter_cache.acquire(name, Path(name))
        while engine.adapter_cache.loading:
            engine.adapter_cache.collect_loaded()
            time.sleep(0.001)
        names = list(small)
        for name in names:
            engine.adapter_cache.acquire_slot(name)
            engine.adapter_cache.release_slot(name)
            engine.adapter_cache.release(name)
        taken: list[float] = []
        for i in range(tries):
            name = names[i * 7 % len(names)]
            began = time.perf_counter()
            engine.adapter_cache.acquire(name, Path(name))
            engine.adapter_cache.acquire_slot(name)
            taken.append(time.perf_counter() - began)
            engine.adapter_cache.release_slot(name)
            engine.adapter_cache.release(name)
        changing = self._changing(engine, names, 30)
        engine.close()
        return {"seconds": statistics.median(taken), "change_seconds": changing}

    def _changing(self, engine: Any, names: list[str], tries: int) -> float:
        """How much longer a step takes that runs under another adapter than the step before: medians, one token a step."""
        from graftlm.serving.engine.sequence import Sequence as Answer

        made: list[Answer] = []
        for name in names[:: max(len(names) - 1, 1)][:2]:
            request, _ = self._request([1, 2, 3], 1000, None)
            one = Answer(request, 0, self.base.tokenizer, None)
            engine.adapter_cache.acquire(name, Path(name))
            one.slot = engine.adapter_cache.acquire_slot(name)
            assert engine.runner.admit(one)
            assert engine.runner.reserve(one, 3 + 3 * tries)
            engine.runner.execute_model([(one, 3)])
            made.append(one)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        last = None
        for i in range(4 * tries):
            one = made[i // 2 % 2]  # a, a, b, b, ...
            one.tokens.append(1)
            began = time.perf_counter()
            engine.runner.execute_model([(one, 1)])
            seconds[one is not last].append(time.perf_counter() - began)
            last = one
        for one, name in zip(made, names[:: max(len(names) - 1, 1)][:2]):
            engine.runner.release(one)
            engine.adapter_cache.release_slot(name)
            engine.adapter_cache.release(name)
        return statistics.median(seconds[True]) - statistics.median(seconds[False])

    def memory(self, count: int) -> dict[str, Any]:
        """Bytes that the process grows by for each further adapter, and the adapter's own."""
        import gc

        engine = self._engine(slots=count + 2)
        own = (self.folders[0] / "adapter_model.safetensors").stat().st_size

        def make_resident(adapter: int) -> None:
            self._answer(engine, [self._request([1, 2], 1, adapter)])
            gc.collect()

        for adapter in range(2):
            make_resident(adapter)
        before = _resident_bytes()
        for adapter in range(2, 2 + count):
            make_resident(adapter)
        each = (_resident_bytes() - before) / count
        engine.close()
        return {"own_bytes": own, "bytes": each, "ratio": each / own}


class Peer:
    """transformers, with PEFT where there are adapters and bitsandbytes where the base is in 4 bits."""

    def __init__(self, work: dict[str, Any]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        extra: dict[str, Any] = {"dtype": torch.float32}
        if work["precision"] == "nf4":
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
        self.bare = AutoModelForCausalLM.from_pretrained(work["model"], **extra).eval()
        self.vocabulary = self.bare.config.vocab_size
        self.bare.generation_config.eos_token_id = None  # every answer has its full length
        self.model: Any = self.bare
        if work["adapters"]:
            self.model = PeftModel.from_pretrained(self.bare, work["adapters"][0], adapter_name="0")
            for i, place in enumerate(work["adapters"][1:BATCH], 1):
                self.model.load_adapter(place, adapter_name=str(i))
            self.model.eval()

    def turn(self, seed: int, batch: int, new: int, adapters: list[int] | None) -> dict[str, Any]:
        import torch

        ids = torch.tensor(prompts(seed, batch, self.vocabulary))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
        if adapters:
            given["adapter_names"] = [str(a) for a in adapters]
        began = time.perf_counter()
        found = self.model.generate(**given, pad_token_id=0)
        return {"seconds": time.perf_counter() - began, "tokens": found[:, PROMPT:].tolist()}


def _small_adapters(base: Any, count: int) -> dict[str, Any]:
    """Adapters of rank 1 on every layer, made in memory, by name."""
    import torch

    from graftlm.adapters.attach import AdapterPlan, new_adapter, select_layers

    layers, found = select_layers(base, ("all-linear",)), dict[str, Any]()
    with torch.inference_mode():
        for i in range(count):
            found[f"small-{i}"] = new_adapter(base, layers, AdapterPlan(rank=1, alpha=2.0), seed=i)
    return found


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say how much memory a process holds (/proc/self/status)")


def serve_turns(work: dict[str, Any]) -> None:
    """The process of one side: build it, then answer one JSON line with one JSON line until the input ends."""
    side: Any = Graft(work) if work["side"] == "graft" else Peer(work)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(side, asked.pop("do"))(**asked)), flush=True)


class Side:
    """The other end of `serve_turns`."""

    def __init__(self, name: str, precision: str, model: Path, adapters: Sequence[Path]) -> None:
        work = {"side": name, "precision": precision, "model": str(model), "adapters": [str(p) for p in adapters]}
        self.name = f"{name} {precision}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the side)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", json.dumps(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=os.environ,
        )  # fmt: skip

    def _next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        raise SystemExit(f"{self.name} failed:\n{self.errors.read()[-3000:]}")

    def ready(self) -> None:
        self._next()

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        return self._next()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()


# ---- the measurements -----------------------------------------------------------------------------------------------------


def measure(size: Size, folder: Path, said: Callable[[str], None], found: dict[str, Any]) -> None:
    """Fill `found`, part by part."""
    model, stored = folder / size.shape, folder / "adapters"
    make_model(size.shape, model)
    adapters = make_adapters(model, stored, size.store)
    first = adapters[:BATCH]
    said(f"made the model and {len(adapters)} adapters")
    # One after another: what a process has loaded does not grow while another one is measured.
    sides = {
        "graft float32": Side("graft", "float32", model, adapters),
        "graft bfloat16": Side("graft", "bfloat16", model, adapters),
        "graft nf4": Side("graft", "nf4", model, adapters),
        "peer float32": Side("peer", "float32", model, first),
        "peer nf4": Side("peer", "nf4", model, first),
        "peer nf4 bare": Side("peer", "nf4", model, []),
    }
    try:
        for side in sides.values():
            side.ready()
        said("every side is ready")
        found["turns"] = _turns(sides, size, said)
        said("turns")
        nf4 = sides["graft nf4"]
        found["choosing"] = {str(n): nf4.ask("choosing", resident=n, most=max(size.resident)) for n in size.resident}
        said("choosing")
        found["memory"] = nf4.ask("memory", count=size.further)
        said("memory")
        if size.requests:
            slots, times = min(SLOTS, size.store // 2), min(size.rounds, 2)
            found["traffic"] = sides["graft float32"].ask(
                "traffic", seed=1, count=size.requests, new=size.new, slots=slots, times=times
            )
    finally:
        for side in sides.values():
            side.close()


MIXED = list(range(BATCH))
# What each side answers in a round: name of the turn, batch, adapters
TURNS: dict[str, list[tuple[str, int, list[int] | None]]] = {
    "graft float32": [("mixed", BATCH, MIXED), ("base", BATCH, None), ("one", 1, None)],
    "graft bfloat16": [("mixed", BATCH, MIXED), ("base", BATCH, None), ("one", 1, None)],
    "graft nf4": [("mixed", BATCH, MIXED), ("base", BATCH, None), ("one", 1, None)],
    "peer float32": [("mixed", BATCH, MIXED)],
    "peer nf4": [("mixed", BATCH, MIXED)],
    "peer nf4 bare": [("one", 1, None)],
}


def _turns(sides: dict[str, Side], size: Size, said: Callable[[str], None]) -> dict[str, Any]:
    """Rounds in which every side takes its turns on the same prompts; one before them, shorter, warms up."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for round in range(-1, size.rounds):
        new = 4 if round < 0 else size.new
        for turn in ("mixed", "base", "one"):
            for name, turns in TURNS.items():
                for known, batch, adapters in turns:
                    if known == turn:
                        run = sides[name].ask("turn", seed=1000 + round, batch=batch, new=new, adapters=adapters)
                        if round >= 0:
                            runs.setdefault(f"{name} {turn}", []).append(run)
        said(f"round {round + 1} of {size.rounds}")
    found: dict[str, Any] = {}
    for name, kept in runs.items():
        seconds = [run["seconds"] for run in kept]
        answers = sum(len(run["tokens"]) for run in kept)
        tokens = sum(len(t) for run in kept for t in run["tokens"]) / len(kept)
        found[name] = {"seconds": statistics.median(seconds), "every": seconds, "tokens": tokens, "answers": answers}
        found[name]["tokens_per_second"] = tokens / found[name]["seconds"]
        if "decoding_step_seconds" in kept[0]:
            found[name]["milliseconds_a_step"] = 1e3 * statistics.median(run["decoding_step_seconds"] for run in kept)
        other = runs.get(name.replace("graft", "peer")) or runs.get(
            name.replace("graft", "peer").replace("one", "bare one")
        )
        if name.startswith("graft") and other:
            pairs = [pair for a, b in zip(kept, other) for pair in zip(a["tokens"], b["tokens"])]
            found[name]["same_as_peer"] = sum(a == b for a, b in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few requests, to see that it works")
    parser.add_argument("--rounds", type=int, help="rounds of turns")
    parser.add_argument(
        "--without-traffic", action="store_true", help="leave out the 200 adapters, which take half of the time"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, and the table beside it as .md")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve_turns(json.loads(options.side))
        return
    size = QUICK if options.quick else Size()
    size = replace(size, rounds=options.rounds or size.rounds)
    if options.without_traffic:
        size = replace(size, requests=0, store=BATCH + 2 + size.further)
    began = time.perf_counter()

    found: dict[str, Any] = {"machine": described(), "size": size.__dict__}

    def said(text: str) -> None:
        found["seconds"] = time.perf_counter() - began
        print(f"{found['seconds']:6.1f} s  {text}", file=sys.stderr, flush=True)
        if options.json and "turns" in found:  # what is measured stays, should a later part fail
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            options.json.with_suffix(".md").write_text(report_serve.table(found) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        measure(size, Path(folder), said, found)
    said("done")
    print(report_serve.table(found))


if __name__ == "__main__":
    main()
