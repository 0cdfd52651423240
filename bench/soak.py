"""One server under everything at once, for five minutes: does it stay up, right, flat in memory, within its queue, and fair?

    python bench/soak.py --json bench/results/soak.json     # 64 clients, 5 minutes, then fairness; writes soak.md beside it
    python bench/soak.py --only fairness --quick            # one part, and soon over

`graft serve` runs in a process of its own over the bundled base in float32, with fewer adapter slots than adapters and a
queue that is shorter than its clients. Meanwhile

    clients       ask prompts of random lengths of random versions, aliases and the base, whole and streamed; a fifth hang up
    an admin      moves aliases and rolls them back, unloads versions and loads them again, tries to load hostile ones
    a publisher   puts hostile versions into the store (`hostile.py`), replaces good ones on disk by hostile ones, mends them

Every answer that is complete must equal its reference: the same request alone in an engine of this process, before all
this began. Everything talks to 127.0.0.1 only and ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import hostile
import report_soak
import torch
import yaml
from loopback import Answer, Connection
from machine import described
from train import make_model

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import AdapterPlan, new_adapter, select_layers
from graftlm.adapters.manifest import TENSORS
from graftlm.adapters.store import Store
from graftlm.base.loading import Base, load_base
from graftlm.config import Precision
from graftlm.errors import AdapterError, StoreError
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.prompts import PromptEncoderCache
from graftlm.serving.engine.request import Request, SamplingParams
from graftlm.serving.engine.scheduler import EngineLimits

MODEL, ADMIN = "demo", "soak-admin-key"
KEYS = ("soak-key-one", "soak-key-two", "soak-key-three")
RANKS = (1, 3, 8, 16, 33)
STEADY, COMING, PREY = "steady", "coming", "prey"  # always there; unloaded and loaded; replaced on disk
SEED = 20261125


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much, how long."""

    clients: int = 64
    seconds: float = 300.0
    prompts: int = 10
    longest: int = 48
    """Most new tokens of an answer."""
    running: int = 8
    queue: int = 24
    slots: int = 4
    settle: float = 120.0
    """Seconds after which memory must be flat."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two tenants of one server: what it serves, and how much the quiet one asks. The loud one asks a hundred times that."""

    shape: str = ""
    """A shape of `train.py`, of random weights; the bundled base where it is left out."""
    precision: Precision = "float32"
    rate: float = 4.0
    """Requests a second of the quiet tenant."""
    seconds: float = 13.0
    """Of each of the six turns."""


QUICK = Size(seconds=20.0, prompts=4, longest=24, settle=10.0)
PAIRS = {"fairness": Pair(), "fairness-135m": Pair(shape="135m", precision="nf4", rate=0.5, seconds=30.0)}


# ---- what is served, and what each answer must be ------------------------------------------------------------------------


def make_adapters(base: Base, folder: Path) -> dict[str, Path]:
    """Good adapters by the label that they will have: three steady names with two versions each, and the others'."""
    labels = [f"{STEADY}-{i}@{n}" for i in range(3) for n in (1, 2)]
    labels += [f"{kind}@{n}" for kind in (COMING, PREY) for n in (1, 2)]
    made: dict[str, Path] = {}
    for i, label in enumerate(labels):
        rank = RANKS[i % len(RANKS)]
        adapter = new_adapter(
            base, select_layers(base, ("all-linear",)), AdapterPlan(rank=rank, alpha=rank * 1.5), seed=i
        )
        generator = torch.Generator().manual_seed(SEED + i)
        for name, parameter in adapter.parameters().items():
            if name.endswith("lora_B.weight"):
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        place = made[label] = folder / label
        place.mkdir(parents=True)
        adapter_format.save(base, adapter, place, {"method": "lora", "seed": i, "steps": 1})
    return made


def load(model: str = MODEL, precision: Precision = "float32") -> Base:
    return load_base(model, precision=precision, compute_dtype="float32", device="cpu")


def make_store(base: Base, place: Path) -> tuple[Store, dict[str, Path]]:
    """A store of good adapters, and each one's own folder by its label."""
    folders = make_adapters(base, place / "good")
    store = Store(place / "store")
    for label, folder in folders.items():
        store.publish(folder, label.partition("@")[0])
    for i in range(3):
        store.alias(f"{STEADY}-{i}", "prod", 1)
    return store, folders


@dataclass(frozen=True)
class Question:
    """What a client may ask; `reference` has what each version must answer."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int

    def body(self, model: str, *, chat: bool, stream: bool) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": self.prompt}]} if chat else {"prompt": self.prompt}
        return {"model": model, **asked, "max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed,
                "stream": stream}  # fmt: skip


def questions(pick: random.Random, size: Size) -> list[Question]:
    """Half of them take the likeliest token, half draw by a seed; lengths are random."""
    words = [
        "kettle",
        "lamp",
        "river",
        "formal",
        "garden",
        "copper",
        "quiet",
        "blue",
        "Velmora",
        "old",
        "mill",
        "seven",
    ]
    return [
        Question(
            "Describe this product.\nname: " + " ".join(pick.choices(words, k=pick.randint(1, 60))) + "\nDescription:",
            pick.randint(2, size.longest), 0.0 if i % 2 else 0.8, i,
        )
        for i in range(size.prompts)
    ]  # fmt: skip


def references(base: Base, folders: dict[str, Path], asked: Sequence[Question]) -> dict[tuple[str, int], str]:
    """By version and question: the text of the same request alone in an engine, without a server."""
    book, found = PromptEncoderCache(base), {}
    engine = Engine(base, EngineLimits(max_num_seqs=1, cache_tokens=4096, max_loras=1))
    for label, folder in [(MODEL, None), *folders.items()]:
        digest = "" if folder is None else adapter_format.inspect_folder(folder).digest
        prompts = book.of(digest, folder)
        for i, question in enumerate(asked):
            sampling = SamplingParams(temperature=question.temperature, seed=question.seed)
            request = Request(
                id=f"{label} {i}", prompt=tuple(prompts.text(question.prompt)), max_tokens=question.max_tokens, adapter=digest,
                sampling=sampling, stop_ids=prompts.stop_ids, hidden_ids=prompts.hidden_ids, tokenizer=prompts.tokenizer,
            )  # fmt: skip
            found[label, i] = "".join(output.text for output in engine.generate([(request, folder)]))
    engine.close()
    return found


# ---- the server ------------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """`graft serve` in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def memory(self) -> int:
        """Bytes that are its own."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def serving(place: Path, name: str, model: str = MODEL, **options: Any) -> Iterator[Server]:
    """A server until the end of the block, which ends it by SIGTERM; its process is never left behind."""
    log = place / f"{name}.log"
    given = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    command = [sys.executable, "-c", "from graftlm.cli import main; main()", "serve", "--port", "0", "--json"]
    command += ["--model", model]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, *given], stdout=subprocess.PIPE, stderr=stream, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        yield Server(process, int(json.loads(said)["url"].rpartition(":")[2]), log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def keys_file(place: Path, *entries: dict[str, Any]) -> Path:
    path = place / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return path


# ---- the soak --------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened. `faults` must stay empty."""

    answers: Counter[str] = field(default_factory=Counter[str])
    refusals: Counter[str] = field(default_factory=Counter[str])
    deeds: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])
    memory: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    waiting: int = 0
    """Most answers that waited, as the server told it."""
    slowest_health: float = 0.0
    first_tokens: list[float] = field(default_factory=list[float])
    tokens: int = 0

    def fault(self, text: str) -> None:
        if len(self.faults) < 50:
            self.faults.append(text[:400])


class Soak:
    """The clients, the admin, the publisher and the watcher of one run."""

    def __init__(self, size: Size, server: Server, store: Store, folders: dict[str, Path], place: Path,
                 asked: Sequence[Question], expected: dict[tuple[str, int], str]) -> None:  # fmt: skip
        self.size, self.server, self.store, self.folders, self.place = size, server, store, folders, place
        self.asked, self.expected = asked, expected
        self.tally = Tally()
        self.end = time.monotonic() + size.seconds
        self.hostile: list[str] = []
        """Labels of hostile versions that are in the store."""

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    async def run(self) -> None:
        """Everything at once; whatever hangs for a minute after the end is given up and told."""
        tasks = [asyncio.create_task(self.client(i)) for i in range(self.size.clients)]
        tasks += [asyncio.create_task(work) for work in (self.admin(), self.publisher(), self.watch())]
        done, left = await asyncio.wait(tasks, timeout=self.size.seconds + 60)
        for task in left:
            task.cancel()
            self.tally.fault("a task hung for a minute after the end")
        for task in done:
            if task.exception() is not None:
                self.tally.fault(f"{type(task.exception()).__name__}: {task.exception()}")

    # ---- clients

    async def client(self, number: int) -> None:
        pick = random.Random(SEED + number)
        connection = Connection(self.server.port, KEYS[number % len(KEYS)])
        while not self.over:
            i = pick.randrange(len(self.asked))
            model = self.a_model(pick)
            chat, stream = pick.random() < 0.3, pick.random() < 0.6
            leave = pick.choice([0, 1, 2, 5]) if pick.random() < 0.2 else None
            stream = stream or leave is not None
            path = "/v1/chat/completions" if chat else "/v1/completions"
            body = self.asked[i].body(model, chat=chat, stream=stream)
            try:
                async with asyncio.timeout(60):
                    answer = await connection.ask("POST", path, body, leave_after=leave)
            except (OSError, EOFError, TimeoutError) as error:
                self.tally.fault(f"{model}: the connection broke off or hung: {type(error).__name__} {error}")
                connection.cut()
                continue
            self.judge(model, i, answer)
            if answer.status == 429:
                await asyncio.sleep(pick.uniform(0.05, 0.3))
        connection.cut()

    def a_model(self, pick: random.Random) -> str:
        if self.hostile and pick.random() < 0.03:
            return pick.choice(self.hostile)
        names = [
            MODEL,
            *self.folders,
            *(f"{STEADY}-{i}" for i in range(3)),
            *[f"{STEADY}-{i}@prod" for i in range(3)] * 2,
        ]
        return pick.choice(names)

    def judge(self, model: str, i: int, answer: Answer) -> None:
        tally = self.tally
        if answer.cut:
            tally.answers["hung up"] += 1
            return
        bad = model.partition("@")[0] == "hostile"
        if answer.status == 429:
            tally.refusals["429 the queue is full"] += 1
        elif answer.error:
            known = "adapter_invalid" in answer.error or "model_not_found" in answer.error
            if bad and known:
                tally.refusals[f"{answer.status} a hostile version"] += 1
            elif model.startswith(PREY) and known:
                tally.refusals[f"{answer.status} a version replaced on disk"] += 1
            elif model.startswith(COMING) and answer.status == 404:
                tally.refusals["404 an unloaded version"] += 1
            else:
                tally.fault(f"{model}: {answer.status} {answer.error}")
        elif bad:
            tally.fault(f"{model}: a hostile version was served: {answer.text[:100]!r}")
        else:
            version = answer.headers["x-graft-version"]
            expected = self.expected[version, i]
            if answer.text == expected:
                tally.answers["equal to its reference"] += 1
                tally.first_tokens.append(answer.first)
            else:
                tally.answers["other than its reference"] += 1
                tally.fault(f"{model} = {version}, question {i}: {answer.text!r} instead of {expected!r}")

    # ---- the admin

    async def admin(self) -> None:
        pick = random.Random(SEED - 1)
        connection = Connection(self.server.port, ADMIN)

        async def do(path: str, good: tuple[int, ...], **body: Any) -> Answer:
            answer = await connection.ask("POST", f"/v1/adapters/{path}", body)
            self.tally.deeds[f"{path}: {answer.status}"] += 1
            if answer.status not in good:
                self.tally.fault(f"{path} {body}: {answer.status} {answer.error}")
            return answer

        while not self.over:
            await asyncio.sleep(pick.uniform(0.1, 0.6))
            name, coming = f"{STEADY}-{pick.randrange(3)}", f"{COMING}@{pick.choice((1, 2))}"
            match pick.randrange(5):
                case 0:
                    await do("alias", (200,), name=name, alias="prod", version=pick.choice((1, 2)))
                case 1:
                    await do("rollback", (200, 400), name=name, alias="prod")
                case 2:
                    await do("unload", (200, 404), adapter=coming)
                    await asyncio.sleep(pick.uniform(0, 0.5))
                    await do("load", (200,), adapter=coming)
                case 3 if self.hostile:
                    await do("load", (400, 404), adapter=pick.choice(self.hostile))
                case _:
                    await do("load", (200, 400, 404), adapter=f"{PREY}@{pick.choice((1, 2))}")
        connection.cut()

    # ---- the publisher

    async def publisher(self) -> None:
        pick = random.Random(SEED - 2)
        for number, kind in enumerate(itertools.cycle(hostile.KINDS)):
            if self.over:
                return
            await asyncio.sleep(pick.uniform(0.3, 1.0))
            await asyncio.to_thread(self.publish_hostile, number, kind)
            await asyncio.sleep(pick.uniform(0.3, 1.0))
            label = f"{PREY}@{1 + number % 2}"
            version = self.store.find(label)
            await asyncio.to_thread(hostile.spoil, kind, version.folder / TENSORS)
            self.tally.deeds[f"replaced on disk: {kind}"] += 1
            await asyncio.sleep(pick.uniform(0.3, 1.0))
            await asyncio.to_thread(self.store.publish, self.folders[label], PREY)

    def publish_hostile(self, number: int, kind: str) -> None:
        place = self.place / f"hostile-{number}"
        good = self.folders[f"{STEADY}-0@1"]
        hostile.forge(kind, good, place, number)
        try:
            version, _ = self.store.publish(place, "hostile")
        except (AdapterError, StoreError):
            self.tally.deeds[f"refused at publishing: {kind}"] += 1
        else:
            self.hostile.append(version.label)
            self.tally.deeds[f"published behind its back: {kind}"] += 1
            while len(self.hostile) > 6:
                self.store.remove(self.hostile.pop(0))
        shutil.rmtree(place)

    # ---- the watcher

    async def watch(self) -> None:
        connection, begun = Connection(self.server.port), time.monotonic()
        while not self.over:
            health = await connection.ask("GET", "/healthz")
            self.tally.slowest_health = max(self.tally.slowest_health, health.seconds)
            if health.status != 200:
                self.tally.fault(f"/healthz: {health.status}")
            page = (await connection.ask("GET", "/metrics")).body.decode()
            self.tally.waiting = max(self.tally.waiting, int(metric(page, "graft_queue_waiting")))
            self.tally.tokens = int(metric(page, "graft_generated_tokens_total"))
            self.tally.memory.append((time.monotonic() - begun, self.server.memory))
            await asyncio.sleep(max(0.0, 1.0 - health.seconds))
        connection.cut()


def metric(page: str, name: str) -> float:
    """One figure of a page for Prometheus."""
    return next(float(line.split()[1]) for line in page.splitlines() if line.startswith(f"{name} "))


async def settled(server: Server, tally: Tally) -> None:
    """After the end nothing runs, nothing waits and no memory of answers is held."""
    connection, end = Connection(server.port), time.monotonic() + 30
    held = ("graft_running", "graft_queue_waiting", "graft_cache_occupied_ratio")
    while True:
        page = (await connection.ask("GET", "/metrics")).body.decode()
        found = {name: metric(page, name) for name in held}
        if not any(found.values()):
            break
        if time.monotonic() > end:
            tally.fault(f"30 s after the last request: {found}")
            break
        await asyncio.sleep(0.1)
    connection.cut()


def soak(size: Size, place: Path) -> dict[str, Any]:
    """The run under everything at once; returns its figures, `faults` among them."""
    base = load()
    store, folders = make_store(base, place)
    asked = questions(random.Random(SEED), size)
    expected = references(base, folders, asked)
    keys = keys_file(
        place, {"name": "admin", "key": ADMIN, "admin": True}, *({"name": key, "key": key} for key in KEYS)
    )
    options: dict[str, Any] = {
        "base_precision": "float32",
        "compute_dtype": "float32",
        "device": "cpu",
        "store": store.root,
        "api_keys": keys,
        "format": "text",
        "max_num_seqs": size.running,
        "max_queue": size.queue,
        "max_loras": size.slots,
        "adapter_memory_gb": 0.02,
        "kv_cache_gb": 0.05,
        "request_timeout": 30,
    }
    with serving(place, "soak", **options) as server:
        run = Soak(size, server, store, folders, place, asked, expected)
        asyncio.run(run.run())
        tally = run.tally
        asyncio.run(settled(server, tally))
        server.process.send_signal(signal.SIGTERM)
        try:
            status = server.process.wait(40)
        except subprocess.TimeoutExpired:
            status = None
        if status != 0:
            tally.fault(f"after SIGTERM the server ended with {status}")
        log = server.log.read_text()
    if "Traceback" in log:
        tally.fault(f"the server's log: ...{log[log.index('Traceback') :][:1500]}")
    if tally.waiting > size.queue:
        tally.fault(f"{tally.waiting} answers waited, the bound is {size.queue}")
    if not tally.refusals["429 the queue is full"]:
        tally.fault("the queue was never full: nothing is shown of its bound")
    return {
        "size": asdict(size), "answers": dict(tally.answers), "refusals": dict(tally.refusals), "deeds": dict(tally.deeds),
        "faults": tally.faults, "most_waiting": tally.waiting, "slowest_health_seconds": tally.slowest_health,
        "first_token_seconds": report_soak.quantiles(tally.first_tokens), "tokens": tally.tokens,
        "memory_mb_every_5_seconds": [round(own / 1e6, 1) for _, own in tally.memory[::5]],
        "flat": report_soak.slope([(t, b) for t, b in tally.memory if t > size.settle]), "references": len(expected),
    }  # fmt: skip


# ---- fairness --------------------------------------------------------------------------------------------------------------

QUIET, LOUD = "fair-quiet-key", "fair-loud-key"


async def at_rate(rate: float, seconds: float, ask: Callable[[int], Awaitable[None]]) -> None:
    """Ask `rate` times a second whatever the answers take, for some seconds, and wait for all of them."""
    begun, tasks = time.monotonic(), set[asyncio.Task[None]]()
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + i / rate - time.monotonic()))
        task = asyncio.ensure_future(ask(i))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


class Pool:
    """Connections of one key, as many as are needed at once."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self._free: list[Connection] = []

    async def ask(self, body: Any) -> Answer:
        connection = self._free.pop() if self._free else Connection(self._port, self._key)
        answer = await connection.ask("POST", "/v1/completions", body)
        self._free.append(connection)
        return answer


@contextmanager
def refusing() -> Iterator[int]:
    """The port of a process that refuses everything."""
    command = [sys.executable, str(Path(__file__).with_name("loopback.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def turn(port: int, pair: Pair, loud_port: int | None) -> dict[str, Any]:
    """The quiet tenant's answers at its rate, and at `loud_port` a loud one that asks at a hundred times that."""
    whole: list[float] = []
    first: list[float] = []
    statuses: Counter[str] = Counter()
    quiet_pool, loud_pool = Pool(port, QUIET), Pool(loud_port or port, LOUD)
    asked = {"max_tokens": 24, "temperature": 0, "stream": True}

    async def quiet(i: int) -> None:
        answer = await quiet_pool.ask({"model": f"{STEADY}-{i % 3}", "prompt": f"Describe product {i}", **asked})
        statuses[f"quiet {answer.status}"] += 1
        if answer.status == 200:
            whole.append(answer.seconds)
            first.append(answer.first)

    async def noise(i: int) -> None:
        answer = await loud_pool.ask({"model": f"{STEADY}-{i % 3}@1", "prompt": f"Noise, number {i}", **asked})
        statuses[f"loud {answer.status}"] += 1

    both = [at_rate(pair.rate, pair.seconds, quiet)]
    both += [at_rate(100 * pair.rate, pair.seconds, noise)] if loud_port else []
    await asyncio.gather(*both)
    return {"seconds": whole, "first": first, "statuses": dict(statuses)}


def fairness(pair: Pair, place: Path) -> dict[str, Any]:
    """The quiet tenant alone and beside the loud one, in turns on one server.

    The loud one's client works on the same cores as the server, where a real one is elsewhere. So there are turns also in
    which it asks a process that refuses everything: what they are longer than those alone is the client's doing.
    """
    model = MODEL
    if pair.shape:
        make_model(pair.shape, place / "model")
        model = str(place / "model")
    store, _ = make_store(load(model, pair.precision), place)
    keys = keys_file(place, *({"name": key, "key": key} for key in (QUIET, LOUD)))
    options: dict[str, Any] = {
        "store": store.root,
        "api_keys": keys,
        "format": "text",
        "base_precision": pair.precision,
        "compute_dtype": "float32",
        "device": "cpu",
    }
    with serving(place, "fairness", model, **options) as server, refusing() as elsewhere:
        loud_ports = {"alone": None, "elsewhere": elsewhere, "beside": server.port}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in loud_ports}
        asyncio.run(turn(server.port, replace(pair, rate=max(pair.rate, 2.0), seconds=3.0), None))  # every adapter once
        for _ in range(2):
            for name, loud_port in loud_ports.items():
                part = asyncio.run(turn(server.port, pair, loud_port))
                turns[name].append(part)
                print(
                    f"{name}: {report_soak.quantiles(part['seconds'])} {part['statuses']}", file=sys.stderr, flush=True
                )
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(40)
    found: dict[str, Any] = {**asdict(pair)}
    for name, parts in turns.items():
        statuses = sum((Counter(part["statuses"]) for part in parts), Counter())
        joined = {kind: [s for part in parts for s in part[kind]] for kind in ("seconds", "first")}
        found[name] = {kind: report_soak.quantiles(values) for kind, values in joined.items()} | {
            "statuses": dict(statuses)
        }
    for kind in ("seconds", "first"):
        found[f"{kind}_p99_ratio"] = found["beside"][kind]["p99"] / found["alone"][kind]["p99"]
    found["elsewhere_p99_ratio"] = found["beside"]["seconds"]["p99"] / found["elsewhere"]["seconds"]["p99"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="the soak in 20 seconds, the others' turns in 3")
    parser.add_argument("--seconds", type=float, help="how long the clients ask; memory must be flat after two fifths")
    parser.add_argument("--only", choices=("soak", *PAIRS), help="one part; the file's figures of the others stay")
    parser.add_argument("--json", type=Path, help="where to write the figures; a page goes beside it")
    given = parser.parse_args(arguments)
    size = QUICK if given.quick else Size()
    if given.seconds:
        size = replace(size, seconds=given.seconds, settle=0.4 * given.seconds)
    pairs = {name: replace(pair, seconds=3.0) if given.quick else pair for name, pair in PAIRS.items()}
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {"soak": partial(soak, size)}
    parts |= {name: partial(fairness, pair) for name, pair in pairs.items()}
    found: dict[str, Any] = (
        json.loads(given.json.read_text()) if given.only and given.json and given.json.is_file() else {}
    )
    with tempfile.TemporaryDirectory(prefix="graft-soak-") as folder:
        os.environ.setdefault("GRAFT_CACHE", f"{folder}/cache")
        for name in parts if given.only is None else [given.only]:
            begun = time.monotonic()
            figures = parts[name](Path(folder) / name)
            found[name] = {**figures, "total_seconds": time.monotonic() - begun, "machine": described(),
                           "cores": len(os.sched_getaffinity(0))}  # fmt: skip
            if given.json:  # what was found so far is kept, whatever becomes of the rest
                given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = report_soak.page(found)
    print(page)
    if given.json:
        given.json.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    return 1 if found.get("soak", {}).get("faults") else 0


if __name__ == "__main__":
    raise SystemExit(main())
