"""A base that was trained to call tools is asked as it was trained, and OpenAI's client gets its calls, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import tiny_run
import tiny_server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graftlm.adapters.store import Store
from graftlm.base.chat import Encoder
from graftlm.serving.engine.prompts import PromptEncoder

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome", "Bonn"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(name: str, arguments: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls), **more}


OSLO, ROME = call("weather", {"city": "Oslo"}), call("weather", {"city": "Rome"}, 1)
REPLY = {"role": "tool", "tool_call_id": OSLO["id"], "content": "rain"}
ROWS: list[list[dict[str, Any]]] = [
    [user("Oslo?"), calling(OSLO)],
    [user("Both?"), calling(OSLO, ROME)],
    [user("Hour?"), calling(call("now", {}), content="Let me see.")],
    [user("Oslo?"), calling(OSLO), REPLY, {"role": "assistant", "content": "It rains."}],
    [user("Hm?"), {"role": "assistant", "reasoning_content": "Who asks?", "content": "Yes."}],
]


def tokenizer_of_rows() -> PreTrainedTokenizerFast:
    """Bytes and the pieces that the rows have often: what has 400 bytes, most of it tools, has a few tokens."""
    plain = Encoder(tiny_run.byte_tokenizer())
    texts = [text for row in ROWS for length in range(len(row)) if (text := plain.attempt(row[: length + 1], TOOLS))]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(tiny_run.SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False, max_token_length=24
    )
    backend.train_from_iterator([text.replace("</s>", "\n") for text in texts] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_server.Loopback]:
    place = tmp_path_factory.mktemp("tools")
    tokenizer = tokenizer_of_rows()
    tiny.random_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    tiny_run.write_rows(place / "train.jsonl", [{"messages": row, "tools": TOOLS} for row in ROWS])
    tiny_run.write_rows(place / "valid.jsonl", [])
    tiny_run.train(
        place, model=str(place / "base"), data=[str(place / "train.jsonl")], eval_data=None, eval_every=None, steps=90,
        batch_size=len(ROWS), learning_rate=0.03, rank=16, alpha=32,
    )  # fmt: skip
    store = Store(place / "store")
    store.publish(place / "run" / "adapter", "agent")
    with tiny_server.serving(
        model=str(place / "base"), store=str(store.root), format="auto", max_num_batched_tokens=256
    ) as one:
        yield one


def ask(server: tiny_server.Loopback, messages: Any, **given: Any) -> Any:
    asked = {"model": "agent", "temperature": 0, "max_tokens": 80, "tools": TOOLS, **given}
    return server.openai().chat.completions.create(messages=messages, **asked)


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls or ()]


def streamed(server: tiny_server.Loopback, messages: Any, **given: Any) -> tuple[str, str, list[tuple[str, Any]], str]:
    """Reasoning, content, calls and the reason of the end, put together as a client does."""
    calls: dict[int, list[str]] = {}
    reasoning = content = reason = ""
    ids: set[str] = set()
    for chunk in ask(server, messages, stream=True, **given):
        (choice,) = chunk.choices
        assert not reason, "nothing follows the end"
        reason = choice.finish_reason or ""
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for delta in choice.delta.tool_calls or ():
            if delta.index not in calls:
                assert (delta.type, delta.function.arguments) == ("function", "")
                assert delta.id not in ids
                ids.add(delta.id)
                calls[delta.index] = [delta.function.name, ""]
            else:
                assert delta.id is delta.function.name is None
                calls[delta.index][1] += delta.function.arguments
    return reasoning, content, [(name, json.loads(arguments)) for name, arguments in calls.values()], reason


ANSWERS: list[tuple[list[dict[str, Any]], str | None, list[tuple[str, Any]]]] = [
    (ROWS[0][:1], None, [("weather", {"city": "Oslo"})]),
    (ROWS[1][:1], None, [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]),
    (ROWS[2][:1], "Let me see.", [("now", {})]),
    (ROWS[3][:3], "It rains.", []),
]


def as_json(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as OpenAI has them: arguments are text."""
    said: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for one in [one for message in said for one in message.get("tool_calls", ())]:
        one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    return said


def test_what_was_trained_is_what_openais_client_gets_whole_and_streamed(server: tiny_server.Loopback) -> None:
    for messages, content, calls in ANSWERS:
        (choice,) = ask(server, as_json(messages)).choices
        assert (choice.message.content, calls_of(choice.message)) == (content, calls)
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        assert len({one.id for one in choice.message.tool_calls or ()}) == len(calls)
        reason = "tool_calls" if calls else "stop"
        assert streamed(server, as_json(messages)) == ("", content or "", calls, reason)


def test_a_conversation_goes_on_with_the_messages_that_the_client_got(server: tiny_server.Loopback) -> None:
    said: list[Any] = [user("Oslo?")]
    message = ask(server, said).choices[0].message
    said += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    assert ask(server, said).choices[0].message.content == "It rains."
    whole = [one if isinstance(one, dict) else one.model_dump() for one in said]  # with every null
    assert ask(server, whole).choices[0].message.content == "It rains."


def test_a_prompt_with_tools_has_the_tokens_of_training(server: tiny_server.Loopback) -> None:
    encoder = server.built.state.prompt_encoders.base.encoder
    for row in ROWS:
        whole = encoder.chat(row, TOOLS)
        first = int(whole.loss_mask.argmax())
        if sum(message["role"] == "assistant" for message in row) == 1:
            assert list(whole.ids[:first]) == encoder.prompt(row[:-1], TOOLS)
    used = ask(server, as_json(ROWS[3][:3])).usage
    assert used.prompt_tokens == len(encoder.prompt(ROWS[3][:3], TOOLS))


def test_reasoning_comes_beside_the_content_and_may_be_sent_back(server: tiny_server.Loopback) -> None:
    message = ask(server, [user("Hm?")]).choices[0].message
    assert (message.reasoning_content, message.content) == ("Who asks?", "Yes.")
    assert streamed(server, [user("Hm?")]) == ("Who asks?", "Yes.", [], "stop")
    assert ask(server, [user("Hm?"), message.model_dump(), user("Oslo?")]).choices
    encoder = server.built.state.prompt_encoders.base.encoder
    with server.client() as client:
        body = {"model": "agent", "messages": ROWS[4] + [user("Oslo?")], "max_tokens": 1, "tools": TOOLS}
        used = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert used["prompt_tokens"] == len(encoder.prompt([*ROWS[4], user("Oslo?")], TOOLS))


def test_a_choice_of_tools_is_kept_whatever_the_model_would_say(server: tiny_server.Loopback) -> None:
    hm, given = [user("Hm?")], {"reasoning_effort": "none", "parallel_tool_calls": False}
    assert ask(server, hm).choices[0].message.tool_calls is None
    for choice, names in (
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
    ):
        (one,) = ask(server, hm, tool_choice=choice, **given).choices
        (called,) = calls_of(one.message)
        assert (one.message.content, one.finish_reason) == (None, "tool_calls")
        assert called[0] in names
        assert called[1] == {} if called[0] == "now" else called[1]["city"] in ("Oslo", "Rome", "Bonn")
        assert streamed(server, hm, tool_choice=choice, **given) == ("", "", [called], "tool_calls")
    assert ask(server, ROWS[0][:1], tool_choice="none").choices[0].message.tool_calls is None


def test_one_call_is_returned_where_the_request_wants_one(server: tiny_server.Loopback) -> None:
    both, one = ROWS[1][:1], {"parallel_tool_calls": False}
    message = ask(server, both, **one).choices[0].message
    assert (calls_of(message), message.content) == ([("weather", {"city": "Oslo"})], None)
    assert streamed(server, both, **one)[1:3] == ("", [("weather", {"city": "Oslo"})])
    assert len(calls_of(ask(server, both, tool_choice="required").choices[0].message)) == 2
    assert len(calls_of(ask(server, both, tool_choice="required", **one).choices[0].message)) == 1


def test_strict_arguments_are_those_of_the_schema_and_text_stays_free(server: tiny_server.Loopback) -> None:
    function = {**WEATHER["function"], "strict": True}  # type: ignore[dict-item]
    function["parameters"] = {**function["parameters"], "properties": {"city": {"enum": ["Bonn"]}}}
    strict = [{"type": "function", "function": function}, NOW]
    message = ask(server, ROWS[0][:1], tools=strict).choices[0].message
    assert {name for name, _ in calls_of(message)} <= {"weather", "now"}
    assert all(arguments in ({"city": "Bonn"}, {}) for _, arguments in calls_of(message))
    assert ask(server, [user("Hm?")], tools=strict).choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_a_call_that_is_cut_off_is_content(server: tiny_server.Loopback) -> None:
    whole = ask(server, ROWS[0][:1], max_tokens=3).choices[0]
    assert whole.finish_reason == "length"
    assert whole.message.tool_calls is None
    assert whole.message.content == '<tool_call>{"name": "weather", "arguments": {"city": "'
    chunks = list(ask(server, ROWS[0][:1], max_tokens=3, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"tools": {"a": 1}}, "tools", "tools is an object, and a list is expected"),
    ({"tools": ["weather"]}, "tools[0]", 'tools[0] is "weather", and an object is expected'),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "tools[0].type is \"custom\", and 'function'"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "tools[0].function is missing"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", 'is "a b", and 1 to 128'),
    ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0].function.name", "is 5, and text is expected"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters.type", 'is "array", and arguments are an object',
    ),
    ({"tools": [WEATHER, NOW, WEATHER]}, "tools[2].function.name", 'is "weather", and another function of this request has'),
    ({"tools": [NOW] * 257}, "tools", "tools has 257 items, and at most 256 are allowed"),
    ({"tool_choice": "sometimes"}, "tool_choice", "tool_choice is \"sometimes\", and 'none', 'auto' or 'required'"),
    ({"tool_choice": 5}, "tool_choice", 'tool_choice is 5, and "none", "auto", "required" or an object'),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "tool_choice.function is missing"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "is \"allowed_tools\", and 'function' is expected"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "delete"}}}, "tool_choice.function.name",
        'is "delete", and tools has now, weather',
    ),
    ({"tool_choice": "required", "tools": []}, "tool_choice", 'is "required", and tools is missing or empty'),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", 'is "no", and true or false is expected'),
    (
        {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]},
        "tools", 'tools: function "f": the schema cannot be followed: these keywords are not supported',
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"$ref": "#"}}}]},
        "tools", 'tools: function "f": the schema has no answer that ends',
    ),
    ({"messages": [user("x"), {"role": "tool", "content": "y"}]}, "messages[1].tool_call_id", "is missing, and a message of"),
    (
        {"messages": [user("x"), {"role": "tool", "content": "y", "tool_call_id": "z"}]}, "messages[1].tool_call_id",
        'is "z", and no assistant\'s message before it has a call of this id',
    ),
    ({"messages": [user("x") | {"tool_call_id": "z"}]}, "messages[0].tool_call_id", "and only tools answer a call"),
    ({"messages": [user("x") | {"reasoning_content": "z"}]}, "messages[0].reasoning_content", "only assistants have it"),
    ({"messages": [calling({"id": "a", "function": {"name": "f"}})]}, "messages[0].tool_calls[0].function.arguments", "is m"),
    (
        {"messages": [calling({"id": "a", "function": {"name": "f", "arguments": "[1]"}})]},
        "messages[0].tool_calls[0].function.arguments", 'is "[1]", and an object as JSON text is expected',
    ),
    ({"functions": [{"name": "f"}]}, "functions", "this is the older form of tools"),
]  # fmt: skip


def test_what_is_wrong_with_tools_is_told_by_its_field(server: tiny_server.Loopback) -> None:
    good = {"model": "agent", "messages": [user("Hm?")], "max_tokens": 2, "tools": TOOLS}
    with server.client() as client:
        for patch, param, text in BAD:
            found = client.post("/v1/chat/completions", json=good | patch)
            assert found.status_code == 400, (patch, found.text)
            error = found.json()["error"]
            assert error["param"] == param, error
            assert text in error["message"], error


def test_a_template_decides_on_tools_and_on_reasoning(server: tiny_server.Loopback) -> None:
    encoders = server.built.state.prompt_encoders
    good = {"model": "base", "messages": [user("Hm?")], "max_tokens": 2, "tools": TOOLS}
    kept, template = encoders.base, encoders.base.tokenizer.chat_template
    try:
        for source, text in (
            ("{% for m in messages %}{{ m.content }}{% endfor %}", "its chat template has no place for tools"),
            ("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}", "in a form that this"),
        ):  # fmt: skip
            encoders.base.tokenizer.chat_template = source
            encoders.base = type(kept)(kept.tokenizer, None)
            with server.client() as client:
                found = client.post("/v1/chat/completions", json=good)
            assert (found.status_code, found.json()["error"]["param"]) == (400, "tools")
            assert text in found.json()["error"]["message"]
        encoders.base.tokenizer.chat_template = (
            "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"
        )
        encoders.base = type(kept)(kept.tokenizer, None)
        for stream in (False, True):
            given = {"model": "base", "max_tokens": 5, "tools": [], "stream": stream}
            chunks = ask(server, [user("Hm?")], **given)
            said = [c.choices[0].delta for c in chunks] if stream else [chunks.choices[0].message]
            assert "".join(getattr(one, "reasoning_content", None) or "" for one in said)
            assert not "".join(one.content or "" for one in said), "the answer begins within reasoning"
    finally:
        encoders.base, kept.tokenizer.chat_template = kept, template


# ---- /v1/responses ---------------------------------------------------------------------------------------------------

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]


def respond(server: tiny_server.Loopback, given: Any, **more: Any) -> Any:
    asked = {"model": "agent", "temperature": 0, "max_output_tokens": 80, "tools": FLAT, **more}
    return server.openai().responses.create(input=given, **asked)


def items_of(response: Any) -> list[tuple[Any, ...]]:
    """Its items: calls with their arguments, texts."""
    return [
        (item.name, json.loads(item.arguments))
        if item.type == "function_call"
        else (item.type, "".join(part.text for part in item.content))
        for item in response.output
    ]


def test_responses_are_the_answers_of_chats_as_items(server: tiny_server.Loopback) -> None:
    for messages, content, calls in ANSWERS[:3]:
        response = respond(server, messages[0]["content"])
        assert items_of(response) == ([("message", content)] if content else []) + calls
        assert (response.status, response.output_text) == ("completed", content or "")
        chat = ask(server, messages).usage
        assert (response.usage.input_tokens, response.usage.output_tokens) == (
            chat.prompt_tokens,
            chat.completion_tokens,
        )
    response = respond(server, [{"role": "user", "content": [{"type": "input_text", "text": "Hm?"}]}])
    assert items_of(response) == [("reasoning", "Who asks?"), ("message", "Yes.")]
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    short = respond(server, "Hour?", max_output_tokens=1)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_response_goes_on_with_the_items_that_the_client_got(server: tiny_server.Loopback) -> None:
    said: list[Any] = [{"role": "user", "content": "Oslo?"}]
    said += respond(server, said).output
    said.append({"type": "function_call_output", "call_id": said[-1].call_id, "output": "rain"})
    response = respond(server, said)
    assert response.output_text == "It rains."
    encoder = server.built.state.prompt_encoders.base.encoder
    assert response.usage.input_tokens == len(encoder.prompt(ROWS[3][:3], TOOLS))
    thought = respond(server, "Hm?").output
    given = [{"role": "user", "content": "Hm?"}, *thought, {"role": "user", "content": "Oslo?"}]
    used = respond(server, given, instructions="Be brief", max_output_tokens=1).usage
    system = {"role": "system", "content": "Be brief"}
    assert used.input_tokens == len(encoder.prompt([system, *ROWS[4], user("Oslo?")], TOOLS))


@pytest.mark.parametrize("text", ["Oslo?", "Both?", "Hour?", "Hm?"])
def test_the_events_of_a_response_put_together_are_the_response(server: tiny_server.Loopback, text: str) -> None:
    events = list(respond(server, text, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert events[0].response.status == "in_progress"
    last = events[-1].response
    assert items_of(last) == items_of(respond(server, text))
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in done] == list(range(len(last.output)))
    assert [event.item for event in done] == last.output
    for index, item in enumerate(last.output):
        own = [event for event in events if getattr(event, "item_id", None) == item.id]
        assert {event.output_index for event in own} == {index}
        told = "".join(event.delta for event in own if event.type.endswith(".delta"))
        (whole,) = [event for event in own if event.type.endswith((".arguments.done", "_text.done", "arguments.done"))]
        assert told == (item.arguments if item.type == "function_call" else item.content[0].text)
        assert told == (whole.arguments if item.type == "function_call" else whole.text)
    with server.openai().responses.stream(
        model="agent", input=text, temperature=0, max_output_tokens=80, tools=FLAT
    ) as stream:
        assert items_of(stream.get_final_response()) == items_of(last)


def test_a_call_is_complete_where_the_answer_ends_behind_it(server: tiny_server.Loopback) -> None:
    needed = ask(server, [user("Oslo?")]).usage.completion_tokens
    for most in range(1, needed):
        response = respond(server, "Oslo?", max_output_tokens=most)
        for item in response.output:
            assert item.type != "function_call" or (item.status, json.loads(item.arguments)) == (
                "completed", {"city": "Oslo"},
            )  # fmt: skip
    assert (response.status, response.output[0].type) == ("incomplete", "function_call")


def test_a_long_conversation_is_encoded_beside_the_event_loop(
    server: tiny_server.Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop: list[bool] = []
    encode = PromptEncoder.chat

    def watched(self: PromptEncoder, *given: Any) -> list[int]:
        try:
            on_loop.append(asyncio.get_running_loop() is not None)
        except RuntimeError:
            on_loop.append(False)
        return encode(self, *given)

    monkeypatch.setattr(PromptEncoder, "chat", watched)
    long = "x" * 5000
    called = {"id": "call00000", "type": "function", "function": {"name": "now", "arguments": json.dumps({"a": long})}}
    for said in ({"reasoning_content": long, "content": "Yes."}, {"tool_calls": [called]}, {"content": "Yes."}):
        body = {"model": "agent", "messages": [user("Hm?"), {"role": "assistant", **said}], "max_tokens": 1}
        with server.client() as client:
            client.post("/v1/chat/completions", json=body)
    assert on_loop == [False, False, True]


def test_a_responses_choice_of_tools_and_schema_are_kept(server: tiny_server.Loopback) -> None:
    (item,) = respond(
        server, "Oslo?", tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False
    ).output
    assert (item.type, item.name) == ("function_call", "weather")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    given = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert json.loads(respond(server, "Hm?", tools=[], text=given).output_text)["ok"] in (True, False)


BAD_RESPONSES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"store": True}, "store", "store is true, and this server stores no answers"),
    ({"previous_response_id": "resp-1"}, "previous_response_id", "and this server stores no answers; send the whole"),
    ({"background": True}, "background", "background is true"),
    ({"input": []}, "input", "input has 0 items"),
    ({"input": 5}, "input", "input is 5, and text, or a list of items is expected"),
    ({"input": [{"type": "web_search_call"}]}, "input[0]", "input[0] is an object, and an item of type message, function"),
    ({"input": [{"role": "human", "content": "x"}]}, "input[0].role", 'is "human", and'),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type",
        'is "input_image", and this server reads and writes text only',
    ),
    (
        {"input": [{"type": "function_call_output", "call_id": "z", "output": "x"}]}, "input[0].call_id",
        'is "z", and no function_call before it has this id',
    ),
    (
        {"input": [{"type": "function_call", "call_id": "z", "name": "f", "arguments": "{}"}] * 1001}, "input[1000]",
        "is function_call 1,001 in a row, and at most 1,000 are read",
    ),
    ({"input": "x" * 3000}, "input", "the prompt has"),
    ({"max_output_tokens": 9999}, "max_output_tokens", "together at most 256 fit"),
    ({"tools": [WEATHER]}, "tools[0].name", "tools[0].name is missing"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", 'is "web_search", and this server has no tools of its own'),
    ({"tools": [FLAT[0], FLAT[0]]}, "tools[1].name", 'is "weather", and another function'),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name", 'is "f", and tools has now, weather'),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", 'is missing, and type "json_schema"'),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}, "tools": []}, "text", "not supported"),
    ({"reasoning": {"effort": "high"}}, "reasoning", "how much is reasoned is up to the model"),
    ({"truncation": "auto"}, "truncation", "this server cuts no input"),
]  # fmt: skip


def test_what_is_wrong_with_a_response_is_told_by_its_field(server: tiny_server.Loopback) -> None:
    good = {"model": "agent", "input": "Hm?", "max_output_tokens": 2, "tools": FLAT}
    with server.client() as client:
        for patch, param, text in BAD_RESPONSES:
            found = client.post("/v1/responses", json=good | patch)
            assert found.status_code == 400, (patch, found.text)
            error = found.json()["error"]
            assert error["param"] == param, error
            assert text in error["message"], error
