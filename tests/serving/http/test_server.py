"""The server speaks OpenAI's protocol, keeps tenants apart, holds its bounds, and lets adapters come and go under load."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import tiny_run
import tiny_server

from graftlm.adapters.store import Store
from graftlm.base.loading import load_base
from graftlm.commands.serve import serve
from graftlm.config import ServeConfig
from graftlm.errors import ConfigError, StoreError
from graftlm.serving.http.api_keys import Tenant
from graftlm.serving.http.server import build

ADMIN, HALF, OTHER = "admin-key-1", "half-key-1234", "other-key-123"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[tiny_server.Loopback]:
    with tiny_server.serving(store=str(tiny_server.new_store(place)), max_num_seqs=8) as one:
        yield one


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_server.Loopback]:
    place = tmp_path_factory.mktemp("guarded")
    admin = {"name": "admin", "key": ADMIN, "admin": True}
    half = {"name": "half", "key": HALF, "adapters": ["alpha"], "base": False}
    other = {"name": "other", "key": OTHER, "adapters": ["be*"]}
    keys = tiny_server.keys_file(place, admin, half, other)
    with tiny_server.serving(store=str(tiny_server.new_store(place)), api_keys=str(keys)) as one:
        yield one


# ---- OpenAI's client ------------------------------------------------------------------------------------------------


def test_openais_client_chats_completes_streams_lists_and_embeds(server: tiny_server.Loopback) -> None:
    client = server.openai()
    names = [model.id for model in client.models.list()]
    assert names == ["base", "alpha", "alpha@1", "beta", "beta@1", "says", "says@2", "says@1", "says@prod"]
    assert client.models.retrieve("says@prod").root == "says@1"
    messages = [{"role": "user", "content": "3: "}]
    whole = client.chat.completions.create(model="says@prod", messages=messages, temperature=0, max_tokens=9)
    assert whole.choices[0].message.content == "ALPHA"
    assert whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 6)
    stream = client.chat.completions.create(
        model="beta",
        messages=messages,
        temperature=0,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "BETA"
    assert chunks[-1].usage.completion_tokens == 5
    done = client.completions.create(model="alpha", prompt=["1: ", "2: "], temperature=0, max_tokens=9)
    assert [choice.text for choice in done.choices] == ["ALPHA", "ALPHA"]
    vectors = client.embeddings.create(model="base", input=["the old mill", "by a river"])  # asks for base 64
    assert [len(one.embedding) for one in vectors.data] == [28, 28]
    assert sum(v * v for v in vectors.data[0].embedding) == pytest.approx(1, abs=1e-5)
    plain = client.embeddings.create(model="base", input="the old mill", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(vectors.data[0].embedding, abs=1e-6)


def test_logprobs_several_answers_and_schemas_come_as_openais_client_reads_them(server: tiny_server.Loopback) -> None:
    client = server.openai()
    messages = [{"role": "user", "content": "3: "}]
    said = client.chat.completions.create(
        model="alpha", messages=messages, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = said.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["A", "L", "P"]
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    many = client.chat.completions.create(model="base", messages=messages, temperature=1.5, max_tokens=6, n=3, seed=4)
    again = client.chat.completions.create(model="base", messages=messages, temperature=1.5, max_tokens=6, n=3, seed=4)
    texts = [choice.message.content for choice in many.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    guided = client.chat.completions.create(
        model="base", messages=messages, temperature=0, max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )  # fmt: skip
    assert guided.choices[0].message.content in ('{"ok":true}', '{"ok":false}')


def test_every_way_of_choosing_tokens_reaches_the_engine(server: tiny_server.Loopback) -> None:
    client = server.openai()

    def said(**given: object) -> str:
        own = {k: given.pop(k) for k in ("top_k", "min_p", "repetition_penalty", "stop_token_ids") if k in given}
        asked = {"model": "base", "prompt": "the old mill", "max_tokens": 24, "seed": 5, **given}
        return client.completions.create(**asked, extra_body=own).choices[0].text

    likeliest, drawn = said(temperature=0), said(temperature=3)
    assert drawn != likeliest
    assert said(temperature=3) == drawn != said(temperature=3, seed=6)
    for narrow in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        assert said(temperature=3, **narrow) == likeliest, narrow
    letters = [letter for letter in said(temperature=0, repetition_penalty=100.0) if letter != "\ufffd"]
    assert len(set(letters)) == len(letters) > 3, "nothing twice"
    assert said(temperature=0, frequency_penalty=2.0) != likeliest
    biased = said(temperature=0, logit_bias={"70": 100}, max_tokens=3)
    assert len(set(biased)) == 1
    assert said(temperature=0, stop=[likeliest[5:8]]) == likeliest[: likeliest.index(likeliest[5:8])]
    letter = next(letter for letter in likeliest[1:] if letter.isascii())
    ids = server.built.base.tokenizer.encode(letter)
    assert len(ids) == 1
    assert said(temperature=0, stop_token_ids=ids) == likeliest[: likeliest.index(letter)]


def test_the_response_names_the_version_that_answered_by_its_digest(server: tiny_server.Loopback) -> None:
    client = server.openai()
    digest = server.built.state.model_registry.find("says@prod", server.built.state.api_keys.tenants[0]).digest
    for stream in (False, True):
        raw = client.completions.with_raw_response.create(model="says@prod", prompt="3: ", stream=stream)
        assert (raw.headers["x-graft-adapter"], raw.headers["x-graft-version"]) == (digest, "says@1")
        raw.parse()
    raw = client.embeddings.with_raw_response.create(model="base", input="x")
    assert (raw.headers["x-graft-adapter"], raw.headers["x-graft-version"]) == ("base", "base")


def test_openais_client_gets_its_own_kinds_of_error(guarded: tiny_server.Loopback) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError, match="wants an API key"):
        guarded.openai("wrong-key-000").models.list()
    with pytest.raises(openai.NotFoundError, match="the model 'nothing' does not exist, or this key may not use it"):
        guarded.openai(OTHER).completions.create(model="nothing", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        guarded.openai(OTHER).completions.create(model="beta", prompt="x", max_tokens=99999)


def test_a_stream_and_a_whole_answer_say_the_same(server: tiny_server.Loopback) -> None:
    body = tiny_server.asked("base", max_tokens=30, n=2, temperature=1.0, seed=9, stop=["q"])
    with server.client() as client:
        whole = client.post("/v1/completions", json=body).json()
        stream = tiny_server.events(client.post("/v1/completions", json={**body, "stream": True}).text)
    for index in (0, 1):
        mine = [e["choices"][0] for e in stream if e["choices"] and e["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == whole["choices"][index]["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [whole["choices"][index]["finish_reason"]]


# ---- who may what ---------------------------------------------------------------------------------------------------


def test_another_tenants_adapter_is_a_404_like_one_that_does_not_exist_cached_or_not(
    guarded: tiny_server.Loopback,
) -> None:
    def answer(model: str, key: str) -> tuple[int, str]:
        with guarded.client(key) as client:
            found = client.post("/v1/completions", json=tiny_server.asked(model))
            listed = client.get(f"/v1/models/{model}")
        assert listed.status_code == (200 if found.status_code == 200 else 404)
        return found.status_code, found.text.replace(model, "NAME")

    missing = answer("gamma", HALF)
    assert missing[0] == 404
    assert answer("beta", HALF) == missing
    assert answer("beta", OTHER)[0] == 200
    assert guarded.engine.adapter_cache.versions(), "beta is in memory now"
    assert answer("beta", HALF) == answer("beta@1", HALF) == answer("beta@prod", HALF) == missing
    assert answer("base", HALF)[0] == 404
    assert answer("alpha", HALF)[0] == 200
    with guarded.client(HALF) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["alpha", "alpha@1"]
        assert [a["name"] for a in client.get("/v1/adapters").json()["adapters"]] == ["alpha"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters", "/v1/models/alpha"])
def test_without_a_key_nothing_is_told(guarded: tiny_server.Loopback, path: str) -> None:
    with guarded.client() as client:
        found = client.get(path)
        assert found.status_code == 401
        assert found.headers["www-authenticate"] == "Bearer"
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_only_an_admin_changes_what_is_served(guarded: tiny_server.Loopback, server: tiny_server.Loopback) -> None:
    bodies = {
        "load": {"adapter": "alpha"}, "unload": {"adapter": "alpha"}, "alias": {"name": "says", "alias": "prod", "version": 2},
        "rollback": {"name": "says", "alias": "prod"},
    }  # fmt: skip
    for path, body in bodies.items():
        with guarded.client(HALF) as client:
            assert client.post(f"/v1/adapters/{path}", json=body).status_code == 403
        with server.client() as client:
            found = client.post(f"/v1/adapters/{path}", json=body)
            assert found.status_code == 403
            assert "start it with --api-keys FILE" in found.json()["error"]["message"]


def test_an_admin_loads_unloads_points_and_rolls_back(guarded: tiny_server.Loopback) -> None:
    with guarded.client(ADMIN) as client:

        def change(path: str, status: int = 200, **body: object) -> dict[str, object]:
            found = client.post(f"/v1/adapters/{path}", json=body)
            assert found.status_code == status, found.text
            return found.json()

        assert change("load", adapter="says@1")["loaded"] is True
        assert guarded.says("says@prod", ADMIN) == "ALPHA"
        assert change("alias", name="says", alias="prod", version=2) == {
            "name": "says",
            "alias": "prod",
            "before": 1,
            "version": 2,
        }
        assert guarded.says("says@prod", ADMIN) == "BETA"
        assert change("rollback", name="says", alias="prod")["version"] == 1
        assert guarded.says("says@prod", ADMIN) == "ALPHA"
        change("rollback", 400, name="says", alias="prod")
        change("alias", 400, name="says", alias="prod", version=7)
        change("unload", adapter="says@1")
        assert client.post("/v1/completions", json=tiny_server.asked("says@prod")).status_code == 404
        assert client.post("/v1/completions", json=tiny_server.asked("alpha")).status_code == 404, (
            "it is the same version"
        )
        change("load", adapter="says@1")
        assert guarded.says("alpha", ADMIN) == "ALPHA"
        change("unload", 400, adapter="base")


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_every_bound_has_its_status_and_says_its_numbers(tmp_path: Path) -> None:
    options = {
        "max_body_mb": 0.002,
        "max_prompt_tokens": 20,
        "max_output_tokens": 30,
        "max_queue": 4,
        "max_num_seqs": 1,
    }
    with tiny_server.serving(**options) as server, server.client() as client:

        def refused(**given: object) -> tuple[int, str]:
            found = client.post("/v1/completions", json=tiny_server.asked("base", **given))
            return found.status_code, found.json()["error"]["message"]

        assert refused(prompt="x" * 21) == (400, "the prompt has 21 tokens, this server takes at most 20")
        assert refused(max_tokens=31) == (400, "max_tokens is 31, this server generates at most 30")
        assert refused(n=5) == (400, "n is 5, and at most 4 completions may be queued")
        assert refused(temperature=-1)[0] == 400
        assert refused(best_of=3)[0] == refused(echo=1)[0] == refused(suffix="x")[0] == refused(surprise=1)[0] == 400
        status, message = refused(prompt="x" * 3000)
        assert status == 413
        assert "this server reads at most 2000" in message
        found = client.post(
            "/v1/completions", content=(b"x" * 500 for _ in range(9)), headers={"content-type": "application/json"}
        )
        assert found.status_code == 413, "no length was said beforehand"
        assert client.post("/v1/chat/completions", json={"model": "base", "messages": []}).status_code == 400


def test_a_body_that_does_not_come_is_408_and_holds_nobody_up() -> None:
    with (
        tiny_server.serving(request_timeout=0.4) as server,
        socket.create_connection(server.address, timeout=10) as slow,
    ):
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        with server.client() as client:
            assert client.post("/v1/completions", json=tiny_server.asked("base", max_tokens=2)).status_code == 200
        answer = b"".join(iter(lambda: slow.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert "the body was not complete within 0.4 seconds" in answer


def test_a_full_queue_is_429_and_what_was_let_in_is_answered() -> None:
    with tiny_server.serving(max_queue=3, max_num_seqs=1, max_num_batched_tokens=16) as server:

        def one(i: int) -> int:
            with server.client() as client:
                found = client.post("/v1/completions", json=tiny_server.asked("base", max_tokens=60, prompt=f"{i}"))
            if found.status_code == 429:
                assert found.headers["retry-after"] == "1"
                assert "the limit is 3" in found.json()["error"]["message"]
            return found.status_code

        with ThreadPoolExecutor(24) as pool:
            statuses = list(pool.map(one, range(24)))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4
        assert server.engine.num_waiting == 0


def test_of_one_tenant_one_request_at_a_time_is_read_and_another_tenants_goes_between(
    guarded: tiny_server.Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_registry = guarded.built.state.model_registry
    find, order = model_registry.find, list[str]()

    def slowly(name: str, tenant: Tenant, **given: Any) -> Any:
        order.append(tenant.name)
        time.sleep(0.05)  # the loop does nothing else meanwhile, as when it reads a long body
        return find(name, tenant, **given)

    monkeypatch.setattr(model_registry, "find", slowly)
    with ThreadPoolExecutor(13) as pool:
        loud = [pool.submit(guarded.says, "alpha", HALF) for _ in range(12)]
        until(lambda: order)
        quiet = pool.submit(guarded.says, "beta", OTHER)
        assert quiet.result() == "BETA"
        place = order.index("other")
        assert {one.result() for one in loud} == {"ALPHA"}
    assert order.count("half") == 12
    assert place < 6, order


def test_a_request_out_of_time_is_504_and_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_server.serving(request_timeout=0.05, max_num_seqs=1) as server, server.client() as client:
        step = server.engine.step

        def slowly() -> Any:  # 200 tokens take 0.2 s on the fastest machine too
            time.sleep(0.001)
            return step()

        monkeypatch.setattr(server.engine, "step", slowly)
        found = client.post("/v1/completions", json=tiny_server.asked("base", max_tokens=200))
        assert found.status_code == 504
        assert found.json()["error"]["message"] == "the answer was not complete within 0.05 seconds"
        stream = client.post("/v1/completions", json=tiny_server.asked("base", max_tokens=200, stream=True))
        assert "not complete within" in stream.text
        assert server.engine.num_running == server.engine.num_waiting == 0


def test_who_hangs_up_frees_his_place(server: tiny_server.Loopback) -> None:
    body = tiny_server.asked("base", max_tokens=200, stream=True)
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    idle(server)
    assert server.engine.counts.finished.get("cancelled", 0) >= 1


def test_who_hangs_up_before_his_answer_is_whole_frees_his_place_too(server: tiny_server.Loopback) -> None:
    before = server.engine.counts.finished.get("cancelled", 0)
    body = json.dumps(tiny_server.asked("base", max_tokens=230)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.address) as impatient:
        impatient.sendall(head.encode() + body)
        until(lambda: server.engine.num_running)
    idle(server)
    assert server.engine.counts.finished["cancelled"] == before + 1


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


def idle(server: tiny_server.Loopback) -> None:
    until(lambda: not server.engine.num_running and not server.engine.num_waiting)


def test_a_server_that_drains_ends_what_it_has_and_takes_nothing_new() -> None:
    with tiny_server.serving(max_num_seqs=2) as server, server.client() as client:
        with client.stream(
            "POST", "/v1/completions", json=tiny_server.asked("base", max_tokens=150, stream=True)
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.built.state.draining = True
            with server.client() as other:
                assert other.post("/v1/completions", json=tiny_server.asked("base")).status_code == 503
                assert (other.get("/readyz").status_code, other.get("/healthz").status_code) == (503, 200)
            rest = list(lines)
        assert [line for line in rest if line][-1] == "data: [DONE]"


def test_sigterm_lets_the_running_answer_end_and_the_process_with_status_0(tmp_path: Path) -> None:
    keys = tiny_server.keys_file(tmp_path, {"name": "a", "key": ADMIN, "admin": True})
    given = [
        "--model",
        tiny_run.folder(),
        "--store",
        tiny_server.new_store(tmp_path),
        "--adapter",
        "says@prod",
        "--api-keys",
        keys,
        "--port",
        0,
        "--format",
        "text",
        "--compute-dtype",
        "float32",
        "--kv-cache-gb",
        "0.008",
        "--json",
    ]
    command = [sys.executable, "-c", "from graftlm.cli import main; main()", "serve", *map(str, given)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["event"] == "ready"
            headers = {"Authorization": f"Bearer {ADMIN}"}
            body = tiny_server.asked("base", max_tokens=240, stream=True)
            with httpx.Client(base_url=ready["url"], headers=headers, timeout=60) as client:
                held = next(a for a in client.get("/v1/adapters").json()["adapters"] if a["name"] == "says")
                assert [v["where"] for v in held["versions"]] == ["disk", "memory"], "--adapter is loaded beforehand"
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    process.terminate()
                    text = [line for line in lines if line]
                assert text[-1] == "data: [DONE]"
                assert json.loads(text[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert process.wait(20) == 0
        finally:
            process.kill()
        assert process.stderr is not None
        assert "draining   no new requests" in process.stderr.read()


# ---- adapters under load --------------------------------------------------------------------------------------------


def test_a_hundred_flips_of_an_alias_under_load_mix_nothing_and_leave_nothing_stale(tmp_path: Path) -> None:
    place = tiny_server.new_store(tmp_path)
    store = Store(place)
    digests = {store.find(f"says@{n}").digest: word for n, word in ((1, "ALPHA"), (2, "BETA"))}
    keys = tiny_server.keys_file(tmp_path, {"name": "admin", "key": ADMIN, "admin": True})
    stop = threading.Event()
    wrong: list[str] = []
    count = [0]
    with tiny_server.serving(store=str(place), api_keys=str(keys), max_num_seqs=8, max_loras=1) as server:

        def load() -> None:
            with server.client(ADMIN) as client:
                while not stop.is_set():
                    found = client.post(
                        "/v1/completions", json=tiny_server.asked("says@prod", prompt=f"{count[0] % 10}: ")
                    )
                    count[0] += 1
                    text = found.json()["choices"][0]["text"] if found.status_code == 200 else found.text
                    if text != digests.get(found.headers.get("x-graft-adapter", "")):
                        wrong.append(f"{found.headers.get('x-graft-version')}: {text}")

        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            with server.client(ADMIN) as client:
                for flip in range(100):
                    number = 2 - flip % 2
                    body = {"name": "says", "alias": "prod", "version": number}
                    assert client.post("/v1/adapters/alias", json=body).status_code == 200
                    if flip % 5 == 0:
                        found = client.post("/v1/completions", json=tiny_server.asked("says@prod"))
                        assert found.status_code == 200, found.text
                        assert found.json()["choices"][0]["text"] == tiny_server.WORDS[number - 1], "a stale answer"
                        assert found.headers["x-graft-version"] == f"says@{number}"
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert not wrong, wrong[:5]
        assert count[0] > 20
        assert server.engine.adapter_cache.counters.evictions > 5


def test_another_process_moves_an_alias_and_the_next_request_sees_it(server: tiny_server.Loopback, place: Path) -> None:
    store = Store(place / "store")
    assert server.says("says@prod") == "ALPHA"
    store.alias("says", "prod", 2)
    try:
        assert server.says("says@prod") == "BETA"
    finally:
        store.rollback("says", "prod")
    assert server.says("says@prod") == "ALPHA"


def test_an_adapter_damaged_on_disk_fails_its_own_requests_only(tmp_path: Path) -> None:
    place = tiny_server.new_store(tmp_path)
    version = Store(place).find("beta")
    file = version.folder / "adapter_model.safetensors"
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with tiny_server.serving(store=str(place)) as server, server.client() as client:
        found = client.post("/v1/completions", json=tiny_server.asked("beta"))
        assert found.status_code == 500
        assert "'beta@1' cannot answer" in found.json()["error"]["message"]
        assert str(place) not in found.text, "a path of the server is nobody's business"
        assert server.says("alpha") == "ALPHA"
        assert client.get("/readyz").status_code == 200


# ---- several servers over one store ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet(guarded: tiny_server.Loopback, place: Path) -> Iterator[tuple[tiny_server.Loopback, tiny_server.Loopback]]:
    """Two servers over one store, as pods share a volume."""
    store = guarded.built.state.model_registry.store
    assert store is not None
    keys = str(tiny_server.keys_file(place, {"name": "admin", "key": ADMIN, "admin": True}))
    with tiny_server.serving(store=str(store.root), api_keys=keys) as other:
        yield guarded, other


def _change(server: tiny_server.Loopback, what: str, **body: object) -> None:
    with server.client(ADMIN) as client:
        client.post(f"/v1/adapters/{what}", json={"name": "says", **body}).raise_for_status()


def _says(server: tiny_server.Loopback, model: str) -> tuple[str, str]:
    """The answer and the version that gave it."""
    found = server.answer(model, ADMIN)
    found.raise_for_status()
    return found.json()["choices"][0]["text"], found.headers["x-graft-version"]


def test_an_alias_that_one_server_moves_or_rolls_back_is_moved_for_the_others_next_request(
    fleet: tuple[tiny_server.Loopback, tiny_server.Loopback],
) -> None:
    for mover, other in (fleet, fleet[::-1]):
        assert [_says(server, "says@prod") for server in fleet] == [("ALPHA", "says@1")] * 2
        _change(mover, "alias", alias="prod", version=2)
        assert _says(other, "says@prod") == _says(mover, "says@prod") == ("BETA", "says@2")
        _change(other, "rollback", alias="prod")
        assert _says(mover, "says@prod") == _says(other, "says@prod") == ("ALPHA", "says@1")


def test_a_version_that_a_command_publishes_is_served_by_all_and_one_it_removes_by_none(
    fleet: tuple[tiny_server.Loopback, tiny_server.Loopback],
) -> None:
    store = fleet[0].built.state.model_registry.store
    assert store is not None
    assert [server.answer("new", ADMIN).status_code for server in fleet] == [404, 404]
    store.publish(tiny_server.trained("BETA"), "new")
    store.alias("new", "prod", 1)
    assert [_says(server, "new@prod") for server in fleet] == [("BETA", "new@1")] * 2
    store.unalias("new", "prod")
    store.remove("new@1")
    assert [server.answer("new@prod", ADMIN).status_code for server in fleet] == [404, 404]


def test_a_request_in_flight_keeps_its_version_when_another_server_moves_the_alias(
    fleet: tuple[tiny_server.Loopback, tiny_server.Loopback],
) -> None:
    one, other = fleet
    body = tiny_server.asked("says@prod", stream=True)
    with one.client(ADMIN) as client, client.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        text = json.loads(next(lines)[6:])["choices"][0]["text"]
        _change(other, "alias", alias="prod", version=2)
        assert _says(one, "says@prod") == ("BETA", "says@2")
        text += "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
    _change(other, "rollback", alias="prod")
    assert (text, stream.headers["x-graft-version"]) == ("ALPHA", "says@1")


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_a_name_is_kept_without_its_past(server: tiny_server.Loopback, place: Path) -> None:
    store, model_registry = Store(place / "store"), server.built.state.model_registry
    for version in (2, 1, 2, 1):
        store.alias("says", "prod", version)
    says = model_registry.names()["says"]
    assert (says.aliases, sorted(says.versions), says.history) == ({"prod": 1}, [1, 2], [])
    assert says.trails == {"prod": [1]}


def test_versions_that_are_asked_alike_share_their_prompts(server: tiny_server.Loopback) -> None:
    book, find = server.built.state.prompt_encoders, server.built.state.model_registry.find
    alpha, beta = (find(name, Tenant("")) for name in ("alpha", "beta"))
    assert book.of(alpha.digest, alpha.folder) is book.of(beta.digest, beta.folder) is book.known(beta.digest)
    assert book.known("0" * 64) is None


def test_metrics_tell_queue_tokens_times_and_each_version(server: tiny_server.Loopback) -> None:
    server.says("alpha")
    with server.client() as client:
        text = client.get("/metrics").text
    for name in (
        "graft_queue_waiting", "graft_running", "graft_generated_tokens_total", "graft_prompt_tokens_total",
        "graft_time_to_first_token_seconds_bucket", "graft_adapter_evictions_total", "graft_cache_occupied_ratio",
    ):  # fmt: skip
        assert name in text, name
    digest = server.built.state.model_registry.find("alpha", server.built.state.api_keys.tenants[0]).digest
    assert f'graft_adapter_resident{{digest="{digest}"}} 1.0' in text
    assert f'graft_adapter_version_hits_total{{digest="{digest}"}}' in text


def test_with_keys_single_versions_are_counted_for_an_admin_only(guarded: tiny_server.Loopback) -> None:
    guarded.says("beta", OTHER)
    digest = guarded.built.state.model_registry.find("beta", Tenant("")).digest

    def page(key: str | None) -> str:
        with guarded.client(key) as client:
            return client.get("/metrics").text

    for key in (None, HALF, "unknown-key"):
        assert "graft_generated_tokens_total" in page(key)
        assert digest not in page(key), "that it is there would be told to all"
    assert f'graft_adapter_resident{{digest="{digest}"}} 1.0' in page(ADMIN)
    assert 'graft_requests_total{path="/v1/completions",status="200"}' in page(None)


def test_a_mistake_of_ours_is_a_500_without_its_insides(
    server: tiny_server.Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret insides")

    monkeypatch.setattr(server.built.state.model_registry, "find", broken)
    with server.client() as client:
        found = client.post("/v1/completions", json=tiny_server.asked("base"))
    assert (found.status_code, found.json()["error"]["message"]) == (500, "the server failed; its log says how")


def test_adapters_are_listed_with_their_lineage_and_no_paths(server: tiny_server.Loopback, place: Path) -> None:
    with server.client() as client:
        found = client.get("/v1/adapters")
    assert str(place) not in found.text
    says = next(a for a in found.json()["adapters"] if a["name"] == "says")
    assert [v["version"] for v in says["versions"]] == ["says@2", "says@1"]
    assert says["versions"][1]["aliases"] == ["prod"]
    assert says["versions"][0]["lineage"]["method"] == "lora"
    assert {"running", "waiting", "cache_occupied", "generated_tokens"} <= found.json()["load"].keys()


def test_the_own_folder_of_a_base_is_not_told(server: tiny_server.Loopback) -> None:
    with server.client() as client:
        for path in ("/v1/models", "/v1/adapters", "/openapi.json", "/"):
            assert str(tiny_run.folder()) not in client.get(path).text


# ---- starting -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_said_before_a_port_is_opened(tmp_path: Path) -> None:
    def config(**given: object) -> ServeConfig:
        return ServeConfig.build({"model": str(tiny_run.folder()), **given})

    with pytest.raises(StoreError, match="no store of adapters"):
        build(config(store=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"adapter: .* has no 'sais@2' for .*did you mean 'says'"):
        serve(config(store=str(tiny_server.new_store(tmp_path / "some")), adapter=["sais@2"]), lambda text: None)
    with pytest.raises(ConfigError, match="give --store"):
        config(adapter=["formal"])
    with pytest.raises(ConfigError, match="too few for a batch of 16"):
        config(max_num_batched_tokens=3)
    with pytest.raises(ConfigError, match="give more with --kv-cache-gb"):
        build(config(kv_cache_gb=1e-6))
    for text, message in (
        ("keys: [", "is not YAML or JSON"), ("keys: []", "keys: List should have at least 1 item"),
        ("keys: [{name: a, key: short}]", r"keys.0.key"), ("keys: [{name: a}]", "give either key or sha256"),
        ("keys: [{name: a, key: same-key-1}, {name: b, key: same-key-1}]", "'a' and 'b' have the same key"),
        ("keys: [{name: a, key: key-number-1}, {name: a, key: key-number-2}]", "two keys named 'a'"),
        ("keys: [{name: a, key: key-number-1, admn: true}]", "admn"),
    ):  # fmt: skip
        (tmp_path / "keys.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            build(config(api_keys=str(tmp_path / "keys.yaml")))
        assert "same-key-1" not in str(caught.value)


def test_the_memory_for_keys_and_values_is_planned_and_kept_to(tmp_path: Path) -> None:
    with tiny_server.serving(kv_cache_gb=0.001, max_num_seqs=4) as server:
        engine = server.engine
        assert 900_000 < engine.runner.bytes <= 1_000_000
        assert engine.runner.bytes == engine.limits.cache_tokens * engine.bytes_per_token
        assert load_base(str(tiny_run.folder())).structure.max_positions == 256
