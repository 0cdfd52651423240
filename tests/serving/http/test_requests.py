"""Whatever a request has in whatever field: the answer names the field, the value found, the limit and the way out."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import tempfile
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
import tiny_server
from pydantic import ValidationError

from graftlm.data.rows import ROLES
from graftlm.serving.http import messages as chat_messages
from graftlm.serving.http import middleware, protocol, response_request

ADMIN = "admin-key-1"
CHAT, TEXT, EMBED, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "base", "messages": [{"role": "user", "content": "3: "}], "max_tokens": 2, "temperature": 0},
    TEXT: {"model": "base", "prompt": "3: ", "max_tokens": 2, "temperature": 0},
    EMBED: {"model": "base", "input": "3: "},
    RESPOND: {"model": "base", "input": "3: ", "max_output_tokens": 2, "temperature": 0},
    "/v1/adapters/load": {"adapter": "says@1"},
    "/v1/adapters/unload": {"adapter": "alpha@7"},
    "/v1/adapters/alias": {"name": "says", "alias": "prod", "version": 1},
    "/v1/adapters/rollback": {"name": "says", "alias": "staging"},
}
MODELS = {
    CHAT: protocol.ChatRequest, TEXT: protocol.CompletionRequest, EMBED: protocol.EmbeddingRequest,
    RESPOND: response_request.ResponseRequest,
    "/v1/adapters/load": protocol.AdapterRequest, "/v1/adapters/unload": protocol.AdapterRequest,
    "/v1/adapters/alias": protocol.AliasRequest, "/v1/adapters/rollback": protocol.RollbackRequest,
}  # fmt: skip
NOISE = re.compile(
    r"constrained|pydantic|Input should|function-|valid |literal|union|validat|\[type=|\['|None|True|False"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_server.Loopback]:
    place = tmp_path_factory.mktemp("requests")
    keys = tiny_server.keys_file(place, {"name": "admin", "key": ADMIN, "admin": True})
    with tiny_server.serving(store=str(tiny_server.new_store(place)), api_keys=str(keys)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: tiny_server.Loopback) -> Iterator[Any]:
    with server.client(ADMIN) as one:
        yield one


def refused(client: Any, path: str, given: Any) -> dict[str, Any]:
    """The error of a request that is not answered, which must read as OpenAI's and hold no noise."""
    content = given if isinstance(given, bytes) else json.dumps(given).encode()
    return error_of(client.post(path, content=content, headers={"Content-Type": "application/json"}))


def error_of(found: Any) -> dict[str, Any]:
    assert 400 <= found.status_code < 500, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert not NOISE.search(error["message"].replace("NaN", "")), error["message"]
    assert len(error["message"]) < 600
    assert tempfile.gettempdir() not in error["message"], "a path of the server is nobody's business"
    return error


def messages(content: Any, **given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **given}]}


def schema(given: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": given}}}


NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"], "additionalProperties": False}
IMAGE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
TOOL = {"type": "function", "function": {"name": "f"}}
TABLE: list[tuple[str, dict[str, Any], str | None, str]] = [
    # what is taken for something else elsewhere
    (TEXT, {"max_tokens": True}, "max_tokens", "max_tokens is true, and an integer is expected"),
    (TEXT, {"max_tokens": "5"}, "max_tokens", 'max_tokens is "5", and an integer is expected: write 5 without quotes'),
    (TEXT, {"max_tokens": 5.0}, "max_tokens", "max_tokens is 5, and an integer is expected: write 5"),
    (TEXT, {"max_tokens": 2.5}, "max_tokens", "max_tokens is 2.5, and an integer is expected"),
    (TEXT, {"max_tokens": [5]}, "max_tokens", "max_tokens is a list of 1 item, and an integer is expected"),
    (TEXT, {"temperature": "0.5"}, "temperature", 'temperature is "0.5", and a number is expected: write 0.5 without'),
    (TEXT, {"temperature": True}, "temperature", "temperature is true, and a number is expected"),
    (TEXT, {"n": True}, "n", "n is true, and an integer is expected"),
    (TEXT, {"seed": True}, "seed", "seed is true, and an integer is expected"),
    (TEXT, {"stream": "yes"}, "stream", 'stream is "yes", and true or false is expected'),
    (TEXT, {"stream": 1}, "stream", "stream is 1, and true or false is expected"),
    (TEXT, {"logprobs": True}, "logprobs", "logprobs is true, and an integer is expected"),
    (CHAT, {"logprobs": 3}, "logprobs", "logprobs is 3, and true or false is expected"),
    (TEXT, {"user": 5}, "user", "user is 5, and text is expected"),
    (TEXT, {"metadata": "x"}, "metadata", 'metadata is "x", and an object is expected'),
    (TEXT, {"logit_bias": [1]}, "logit_bias", "logit_bias is a list of 1 item, and an object is expected"),
    (TEXT, {"logit_bias": {"5": True}}, "logit_bias.5", "logit_bias.5 is true, and a number is expected"),
    (TEXT, {"model": None}, "model", "model is null, and text is expected"),
    (CHAT, {"response_format": "json"}, "response_format", 'response_format is "json", and an object is expected'),
    (CHAT, schema(True), "response_format.json_schema.schema", "schema is true, and an object is expected"),
    ("/v1/adapters/alias", {"version": True}, "version", "version is true, and an integer is expected"),
    ("/v1/adapters/alias", {"version": "1"}, "version", 'version is "1", and an integer is expected: write 1'),
    ("/v1/adapters/load", {"adapter": 3}, "adapter", "adapter is 3, and text is expected"),
    # out of bounds
    (TEXT, {"max_tokens": 0}, "max_tokens", "max_tokens is 0, and at least 1 is expected"),
    (TEXT, {"max_tokens": 9999}, "max_tokens", "max_tokens is 9999; together at most 256 fit, so ask for at most 253"),
    (TEXT, {"temperature": -0.1}, "temperature", "temperature is -0.1, and at least 0 is expected"),
    (TEXT, {"temperature": 1e38}, "temperature", "temperature is 1e+38, and at most 100 is allowed"),
    (TEXT, {"top_p": 0}, "top_p", "top_p is 0, and more than 0 is expected"),
    (TEXT, {"top_p": 1.5}, "top_p", "top_p is 1.5, and at most 1 is allowed"),
    (TEXT, {"top_k": -2}, "top_k", "top_k is -2, and at least -1 is expected"),
    (TEXT, {"min_p": 2}, "min_p", "min_p is 2, and at most 1 is allowed"),
    (TEXT, {"repetition_penalty": 1e-38}, "repetition_penalty", "is 1e-38, and at least 0.01 is expected"),
    (TEXT, {"presence_penalty": -3}, "presence_penalty", "presence_penalty is -3, and at least -2 is expected"),
    (TEXT, {"frequency_penalty": 1e38}, "frequency_penalty", "is 1e+38, and at most 2 is allowed"),
    (TEXT, {"logit_bias": {"5": 101}}, "logit_bias.5", "logit_bias.5 is 101, and at most 100 is allowed"),
    (TEXT, {"logit_bias": {"five": 1}}, "logit_bias", "names the token 'five', and the id of a token is expected"),
    (TEXT, {"logit_bias": {"007": 1}}, "logit_bias", "names the token '007'"),
    (TEXT, {"logit_bias": {"99999": 1}}, "logit_bias", "has the token id 99999, and this model's vocabulary has ids from 0"),
    (TEXT, {"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids has the token id -1, and this model's vocabulary"),
    (TEXT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "has 1025 entries, and at most 1024 are allowed"),
    (TEXT, {"seed": 1 << 63}, "seed", "seed is 9223372036854775808, and at most 9223372036854775807 is allowed"),
    (TEXT, {"seed": 10**400}, "seed", "seed is an integer of 401 digits, and at most 9223372036854775807 is allowed"),
    (TEXT, {"temperature": 10**400}, "temperature", "temperature is an integer of 401 digits; at most 1.8e308 can be read"),
    (TEXT, {"n": 129}, "n", "n is 129, and at most 128 is allowed"),
    (TEXT, {"logprobs": 21}, "logprobs", "logprobs is 21, and at most 20 is allowed"),
    (TEXT, {"best_of": 3}, "best_of", "best_of is 3, and n is 1"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs", "top_logprobs is 3, and logprobs is not true; give both"),
    (CHAT, {"max_completion_tokens": 3}, "max_completion_tokens", "is 3, and max_tokens, which means the same, is 2"),
    (TEXT, {"stop": ["x"] * 17}, "stop", "stop has 17 items, and at most 16 are allowed"),
    (TEXT, {"stop": ["x" * 1001]}, "stop[0]", "stop[0] has 1001 characters, and at most 1000 are allowed"),
    (TEXT, {"stop": ""}, "stop", "stop has 0 characters, and at least 1 is needed"),
    (TEXT, {"stop": ["a", None]}, "stop[1]", "stop[1] is null, and text is expected"),
    (TEXT, {"stop": 5}, "stop", "stop is 5, and text, or a list of texts is expected"),
    (TEXT, {"user": "x" * 1001}, "user", "user has 1001 characters, and at most 1000 are allowed"),
    (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", "is given, and stream is not true"),
    ("/v1/adapters/alias", {"version": 0}, "version", "version is 0, and at least 1 is expected"),
    # prompts
    (TEXT, {"prompt": 5}, "prompt", "prompt is 5, and text, a list of texts, a list of token ids, or a list of such lists"),
    (TEXT, {"prompt": None}, "prompt", "prompt is null, and text"),
    (TEXT, {"prompt": ""}, "prompt", "the prompt is empty: 0 tokens"),
    (TEXT, {"prompt": []}, "prompt", "prompt has 0 items, and at least 1 is needed"),
    (TEXT, {"prompt": [[]]}, "prompt[0]", "prompt[0] has 0 items, and at least 1 is needed"),
    (TEXT, {"prompt": [1, "a"]}, "prompt[1]", 'prompt[1] is "a", and an integer is expected'),
    (TEXT, {"prompt": ["a", 1]}, "prompt[1]", "prompt[1] is 1, and text is expected"),
    (TEXT, {"prompt": [[1], ["a"]]}, "prompt[1][0]", 'prompt[1][0] is "a", and an integer is expected'),
    (TEXT, {"prompt": [True]}, "prompt[0]", "prompt[0] is true, and an integer is expected"),
    (TEXT, {"prompt": [1.5]}, "prompt[0]", "prompt[0] is 1.5, and an integer is expected"),
    (TEXT, {"prompt": [5, 999999]}, "prompt", "has the token id 999999, and this model's vocabulary has ids from 0 to 2"),
    (TEXT, {"prompt": [-1]}, "prompt", "prompt has the token id -1"),
    (TEXT, {"prompt": [10**30]}, "prompt", "prompt has the token id an integer of 31 digits"),
    (TEXT, {"prompt": ["x"] * 257}, "prompt", "prompt has 257 items, and at most 256 are allowed"),
    (TEXT, {"prompt": "x" * 300}, "prompt", "the prompt has 300 tokens, and 256 fit with the answer; shorten the prompt"),
    (EMBED, {"input": [999999]}, "input", "the token id 999999"),
    (EMBED, {"input": {"a": 1}}, "input", "input is an object, and text, a list of texts"),
    (EMBED, {"encoding_format": "hex"}, "encoding_format", "encoding_format is \"hex\", and 'float' or 'base64' is expected"),
    (EMBED, {"dimensions": 5}, "dimensions", "dimensions is 5, and vectors are as long as the model is wide; leave it out"),
    # messages
    (CHAT, {"messages": []}, "messages", "messages has 0 items, and at least 1 is needed"),
    (CHAT, {"messages": "hello"}, "messages", 'messages is "hello", and a list is expected'),
    (CHAT, {"messages": ["hello"]}, "messages[0]", 'messages[0] is "hello", and an object is expected'),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "messages[0].role is missing, and this request needs it"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is null or missing, and text"),
    (CHAT, messages(None), "messages[0].content", "messages[0].content is null or missing"),
    (CHAT, messages(5), "messages[0].content", "messages[0].content is 5, and text, or a list of parts is expected"),
    (CHAT, messages("x", role="human"), "messages[0].role", "messages[0].role is \"human\", and 'system', 'developer', 'user'"),
    (CHAT, messages(IMAGE), "messages[0].content[1].type", 'is "image_url", and this server reads and writes text only'),
    (CHAT, messages(["x"]), "messages[0].content[0]", 'messages[0].content[0] is "x", and an object is expected'),
    (CHAT, messages([{"type": "text"}]), "messages[0].content[0].text", "messages[0].content[0].text is missing"),
    (CHAT, messages("x", tool_calls=[{}]), "messages[0].tool_calls[0].id", "messages[0].tool_calls[0].id is missing"),
    (CHAT, messages("x", colour="red"), "messages[0].colour", "messages[0].colour is no field of this request"),
    (CHAT, messages("x", name="n" * 65), "messages[0].name", "messages[0].name has 65 characters, and at most 64"),
    # what is not supported, and what is not known
    (CHAT, {"tools": [TOOL]}, "tools", "this model cannot be given tools: it is asked in plain text, since it has no chat"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", 'is "required", and tools is missing or empty; give tools'),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities", "this server reads and writes text only; leave it out"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", 'reasoning_effort is "high"'),
    (CHAT, {"functions": [{}]}, "functions", "functions is a list of 1 item, and this is the older form of tools"),
    (CHAT, {"echo": True}, "echo", "echo is no field of this request"),
    (TEXT, {"echo": "yes"}, "echo", 'echo is "yes", and true or false is expected'),
    (TEXT, {"suffix": "x"}, "suffix", 'suffix is "x"'),
    (TEXT, {"temprature": 1}, "temprature", "temprature is no field of this request, did you mean 'temperature'?"),
    (TEXT, {"\x00\n": 1}, '"\\u0000\\n"', "is no field of this request"),
    (TEXT, {"k" * 10_000: 1}, None, "is no field of this request"),
    # answers of a form
    (CHAT, {"response_format": {}}, "response_format.type", "response_format.type is missing"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "response_format.type is \"xml\", and 'text'"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing, and type"),
    (
        CHAT, {"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema",
        'is given, and type is "text"',
    ),
    (CHAT, schema({"$ref": "#"}), "response_format", "has no answer that ends: # needs itself again and again"),
    (CHAT, schema(NODE), "response_format", "has no answer that ends: # needs itself"),
    (CHAT, schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1}), "response_format", "no answer that ends"),
    (CHAT, schema({"not": {}}), "response_format", 'these keywords are not supported, leave them out: ["not"]'),
    (CHAT, schema({"type": "string", "pattern": "(?=a)"}), "response_format", "cannot be followed: regex parse error"),
    (CHAT, schema({"type": "integer", "minimum": 5, "maximum": 3}), "response_format", "minimum (5) is greater than"),
    # names
    (TEXT, {"model": ""}, "model", "the model '' does not exist"),
    (TEXT, {"model": "x" * 10_001}, "model", "model has 10001 characters, and at most 10000 are allowed"),
    ("/v1/adapters/load", {"adapter": "nothing"}, "adapter", "the model 'nothing' does not exist"),
    ("/v1/adapters/load", {"adapter": "base"}, "adapter", "'base' is the base"),
    ("/v1/adapters/alias", {"name": "nothing"}, None, "no adapter named 'nothing' in the store"),
    ("/v1/adapters/alias", {"alias": "5"}, None, "alias '5' is a number"),
    ("/v1/adapters/alias", {"name": "x" * 1001}, "name", "name has 1001 characters, and at most 1000 are allowed"),
]  # fmt: skip


def test_an_answer_names_field_value_limit_and_way_out(client: Any) -> None:
    for path, patch, param, text in TABLE:
        error = refused(client, path, GOOD[path] | patch)
        assert text in error["message"], error
        assert param is None or error["param"] == param, error


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the body is empty or null, and an object of JSON is expected"),
        (b"null", "the body is null, and an object is expected"),
        (b"[1]", "the body is a list of 1 item, and an object is expected"),
        (b'{"model": "base"', "the body is not JSON that can be read: EOF while parsing an object, at line 1 column 16"),
        (b'{"model":\n "base",}', "trailing comma, at line 2 column 9"),
        (b'{"model": "\xff"}', "it is not UTF-8, at line 1 column 12"),
        (b'{"temperature": NaN}', "JSON has no NaN and no Infinity), at line 1 column 17"),
        (b'{"temperature": -Infinity}', "JSON has no NaN and no Infinity), at line 1 column 18"),
        (b'{"temperature": 1e400, "model": "base", "prompt": "x"}', "temperature is a number too large to read"),
        (b'{"seed": 1' + b"0" * 50_000 + b"}", "a number has more than 4300 digits, at line 1 column 43"),
        (b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested more than 200 deep, at line 1 column 2"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"model": "base", "temperature": 0, "temperature": 1}', 'the body has the key "temperature" twice in one object'),
        (b'{"metadata": [{"a": {"b\\u0062": 1, "c": 2, "bb": 1}}]}', 'the body has the key "bb" twice in one object'),
    ],
)  # fmt: skip
def test_a_body_that_does_not_read_is_told_what_is_wrong_and_where(client: Any, content: bytes, text: str) -> None:
    for path in GOOD:
        found = refused(client, path, content)["message"]
        assert text in found or (b"prompt" in content and path != TEXT), found


def test_a_body_that_is_not_said_to_be_json_is_told_so(client: Any) -> None:
    for headers, text in (
        ({}, "the header Content-Type is missing"),
        ({"Content-Type": "text/plain"}, "Content-Type is text/plain"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "is compressed (Content-Encoding: gzip)"),
    ):
        found = client.post(TEXT, content=json.dumps(GOOD[TEXT]), headers=headers)
        assert found.status_code == 400
        assert text in found.json()["error"]["message"]


WRONG = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    1e300,
    -0.0,
    5e-324,
    "",
    "x",
    "5",
    "x" * 20_000,
    [],
    [[]],
    ["x"],
    [True],
    [None],
    {},
    {"x": 1},
]


def test_no_value_in_any_field_is_an_error_of_the_server_or_told_in_words_of_its_libraries(client: Any) -> None:
    asked = 0
    for path, model in MODELS.items():
        for name, field in model.model_fields.items():
            for value in WRONG:
                body = GOOD[path] | {(field.alias or name): value}
                found = client.post(path, json=body)
                asked += 1
                if found.status_code != 200:
                    error = error_of(found)
                    assert error["message"].count(name) or error["param"], (body, error)
    assert asked > 1000


def test_what_asks_for_nothing_is_taken(client: Any) -> None:
    """What OpenAI's own client or the many libraries over it send unasked."""
    for path, nothing in (
        (CHAT, {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "none"}),
        (CHAT, {"tools": None, "tool_choice": "auto", "modalities": ["text"], "audio": None, "reasoning_effort": None}),
        (CHAT, {"stop": [], "logit_bias": {}, "response_format": {"type": "text"}, "stream_options": None, "n": None}),
        (CHAT, {"store": False, "service_tier": "auto", "user": "u", "metadata": {"a": "b"}, "prompt_cache_key": "k"}),
        (CHAT, {"max_completion_tokens": 2}),
        (TEXT, {"echo": False, "suffix": None, "best_of": 1, "logprobs": None, "temperature": -0.0, "top_k": -1}),
        (EMBED, {"dimensions": None, "user": "u", "encoding_format": "base64"}),
    ):  # fmt: skip
        found = client.post(path, json=GOOD[path] | nothing)
        assert found.status_code == 200, found.text


def test_the_message_of_an_answer_may_be_sent_back_as_openais_client_has_it(server: tiny_server.Loopback) -> None:
    client = server.openai(ADMIN)
    said: list[Any] = [{"role": "user", "content": "3: "}]
    for _ in range(2):
        answer = client.chat.completions.create(model="says@prod", messages=said, temperature=0, max_tokens=9)
        said += [answer.choices[0].message, {"role": "user", "content": "4: "}]
    whole = [one if isinstance(one, dict) else one.model_dump() for one in said]  # with every null
    assert client.chat.completions.create(model="says@prod", messages=whole, temperature=0, max_tokens=9).choices


def test_every_field_of_openais_client_is_known() -> None:
    from openai.types import completion_create_params as text
    from openai.types import embedding_create_params as embed
    from openai.types.chat import ChatCompletionAssistantMessageParam, ChatCompletionMessage
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as respond

    for theirs, ours in (
        (chat.CompletionCreateParamsStreaming, protocol.ChatRequest),
        (text.CompletionCreateParamsStreaming, protocol.CompletionRequest),
        (embed.EmbeddingCreateParams, protocol.EmbeddingRequest),
        (respond.ResponseCreateParamsStreaming, response_request.ResponseRequest),
        (ChatCompletionAssistantMessageParam, chat_messages.ChatMessage),
    ):
        assert get_type_hints(theirs).keys() <= ours.model_fields.keys(), theirs
    assert ChatCompletionMessage.model_fields.keys() <= chat_messages.ChatMessage.model_fields.keys()


def test_roles_are_those_of_training() -> None:
    assert get_args(chat_messages.ChatMessage.model_fields["role"].annotation) == ROLES


@pytest.mark.parametrize(
    "many",
    [
        {"prompt": [1] + [""] * 5000},
        {"prompt": [[1]] + [[""]] * 200},
        {"stop": [5] * 5000},
        {"logit_bias": {str(i): 1000 for i in range(5000)}},
        {str(i): 1 for i in range(5000)},
    ],
    ids=["ids", "lists of ids", "stops", "biases", "unknown fields"],
)
def test_of_thousands_of_faults_one_is_collected(many: dict[str, Any]) -> None:
    """Collecting and telling a million of them held the server up for twenty seconds."""
    with pytest.raises(ValidationError) as caught:
        protocol.CompletionRequest.model_validate({"model": "base", "prompt": "x"} | many)
    assert len(caught.value.errors()) == 1


# ---- bodies that are too large --------------------------------------------------------------------------------------


def sent_whole(server: tiny_server.Loopback, head: str, parts: Iterator[bytes]) -> str:
    """What is answered to a client that sends all of its body before it reads."""
    with socket.create_connection(server.address, timeout=20) as raw:
        raw.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n{head}\r\n\r\n".encode())
        for part in parts:
            raw.sendall(part)
        return b"".join(iter(lambda: raw.recv(65536), b"")).decode()


@pytest.mark.parametrize("length", ["Content-Length: 5000000", "Transfer-Encoding: chunked"])
def test_who_sends_5_mb_before_he_reads_is_answered_413_and_not_reset(
    server: tiny_server.Loopback, length: str
) -> None:
    chunked = "chunked" in length
    part = b"c350\r\n" + b"x" * 50_000 + b"\r\n" if chunked else b"x" * 50_000
    parts = [part] * 100 + ([b"0\r\n\r\n"] if chunked else [])
    answer = sent_whole(server, f"Content-Type: application/json\r\n{length}", iter(parts))
    assert answer.startswith("HTTP/1.1 413 ")
    found = "5000000 bytes" if not chunked else "more than 4000000 bytes"
    assert f"the body has {found}, and this server reads at most 4000000; send less" in answer
    assert answer.count("HTTP/1.1") == 1


def test_a_body_without_end_is_thrown_away_within_a_bound(
    server: tiny_server.Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "DISCARDED", 1 << 20)
    sent = 0
    with socket.create_connection(server.address, timeout=20) as raw, contextlib.suppress(OSError):
        raw.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n".encode())
        while sent < 999999999:
            raw.sendall(b"x" * 65536)
            sent += 65536
    assert 1 << 20 <= sent < 64 << 20  # what was under way counts too


def test_who_waits_for_leave_to_send_a_large_body_is_refused_at_once(server: tiny_server.Loopback) -> None:
    head = "Content-Type: application/json\r\nContent-Length: 5000000\r\nExpect: 100-continue"
    answer = sent_whole(server, head, iter(()))
    assert answer.startswith("HTTP/1.1 413 ")
    assert "100 Continue" not in answer
