"""Every chat template that TRL ships: the trained spans are what the model has to write."""

from __future__ import annotations

import random
import re

import pytest
from trl_templates import (
    CONVERSATIONS,
    NAMES,
    PAIRS,
    assistant,
    encoder_of,
    mark,
    spans,
    tokenizer_with,
    user,
)

from graftlm.base.chat import PLAIN_TEMPLATE, Encoder
from graftlm.base.template import Marked, Template
from graftlm.errors import DataError


@pytest.mark.parametrize("name", NAMES)
def test_a_template_marks_what_the_model_writes_or_refuses_and_says_why(name: str) -> None:
    stops = encoder_of(name)._template.stop_strings()
    assert stops
    for title, conversation in CONVERSATIONS.items():
        marked = mark(name, conversation)
        if isinstance(marked, str):
            assert "template" in marked, title
            assert re.search(r"[.,:;] ", marked), title  # more than one thing is said
            continue
        texts = spans(marked)
        messages = conversation[0]
        answers = [message for message in messages if message["role"] == "assistant"]
        if (name, title) == ("diffusion_gemma_training", "words before a tool"):
            continue  # writes the words after the tool's reply, and marks them there; without marks we refuse that
        assert len(texts) == len(answers), title
        asked = [str(message["content"]).strip() for message in messages if message["role"] != "assistant"]
        for text, answer in zip(texts, answers):
            content = str(answer.get("content", "")).strip()
            assert content.rpartition("</think>")[2].strip() in text, title
            assert not any(question in text for question in asked), title
            if answer.get("tool_calls"):
                for call in answer["tool_calls"]:
                    assert call["function"]["name"] in text, title
                    assert call["function"]["arguments"]["city"] in text, title
        if messages[-1]["role"] == "assistant":
            assert any(texts[-1].rstrip().endswith(stop) for stop in (*stops, "<｜tool▁call▁end｜>", "<tool_call|>")), (
                title
            )


def test_every_template_takes_plain_conversations() -> None:
    # gemma knows no system role; every template must take the others.
    for name in NAMES:
        for title in ("single", "system", "multi", "question last", "a quote"):
            refused = isinstance(mark(name, CONVERSATIONS[title]), str)
            assert refused == (name in ("gemma", "gemma_training") and title == "system"), (name, title)


# What TRL's marks hold beyond our spans: text that the generation prompt has written before the model begins.
PROMPTED = {
    "deepseek_r1_distill": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "deepseekv3": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
    "qwen2_5": ("\n",),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n",),
    **{f"nemotron_3_{kind}": ("<think>\n",) for kind in ("nano", "super", "ultra", "5_lightning")},
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), ("<think>\n",)),
}
# TRL's training template of these keeps the thinking of earlier turns, which the model's own template drops.
REWRITTEN = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"}


@pytest.mark.parametrize("name", PAIRS)
def test_spans_found_by_sentinels_are_those_that_the_marked_sibling_marks(name: str) -> None:
    compared = 0
    for title, conversation in CONVERSATIONS.items():
        ours, theirs = mark(name, conversation), mark(f"{name}_training", conversation)
        if isinstance(ours, str) or isinstance(theirs, str):
            # deepseek's own template throws away thinking that is written inside the content; TRL's keeps it.
            # diffusion_gemma writes a turn's words after the reply to its call, which is not how the turn went.
            known = [("deepseek_r1_distill", "thinking inside"), ("diffusion_gemma", "words before a tool")]
            assert isinstance(ours, str), title
            assert isinstance(theirs, str) or (name, title) in known, title
            continue
        if ours.text != theirs.text:
            assert name in REWRITTEN, title
            continue
        compared += 1
        for mine, marked in zip(spans(ours), spans(theirs), strict=True):
            # White space after the end marker: the model has stopped by then, so ours leaves it out.
            marked = marked.rstrip()
            # Gemma's models stop at <|tool_response>; TRL does not train it.
            if name == "diffusion_gemma":
                mine = mine.removesuffix("<|tool_response>")
            extra = marked.removesuffix(mine)
            assert marked.endswith(mine), title
            assert extra in ("", *PROMPTED.get(name, ())), title
    assert compared >= 2


def test_a_turn_ends_with_its_end_marker_which_may_differ_for_the_last_one() -> None:
    expected = {
        "gptoss": (
            "<|channel|>final<|message|> Hello you <|end|>",
            "<|channel|>final<|message|>Yes, more\n<|return|>",
        ),
        "phi3": (" Hello you <|end|>", "Yes, more\n<|end|>\n</s>"),
        "cohere2": (
            " Hello you <|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "Yes, more\n<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ),
        "glm4moe": ("\n<think></think>\nHello you<|user|>", "\n<think></think>\nYes, more<|user|>"),
        "qwen3": (" Hello you <|im_end|>", "<think>\n\n</think>\n\nYes, more\n<|im_end|>"),
    }
    for name, texts in expected.items():
        marked = mark(name, CONVERSATIONS["multi"])
        assert isinstance(marked, Marked)
        assert tuple(spans(marked)) == texts


def test_only_the_last_assistant_message_is_marked_on_request_with_and_without_marks() -> None:
    for name in ("qwen3", "gptoss_training", "phi3_training", "lfm2_2_5", "gemma"):
        everything = mark(name, CONVERSATIONS["multi"])
        last = mark(name, CONVERSATIONS["multi"], train_on="last-assistant")
        assert isinstance(everything, Marked)
        assert isinstance(last, Marked)
        assert spans(last) == spans(everything)[-1:]
        assert mark(name, CONVERSATIONS["multi"], masked={0, 1}) == last


def test_thinking_that_a_template_drops_from_the_trained_turn_is_refused() -> None:
    refusal = mark("llama3", CONVERSATIONS["thinking"])
    assert isinstance(refusal, str)
    assert "leaves out messages[1].reasoning_content" in refusal
    assert isinstance(mark("gemma4", CONVERSATIONS["thinking"]), str)  # writes it beside tool calls only


def test_thinking_dropped_from_earlier_turns_is_noted() -> None:
    marked = mark("qwen3", CONVERSATIONS["thinking twice"])
    assert isinstance(marked, Marked)
    assert spans(marked) == ["Hello<|im_end|>", "<think>\nAhaa\n</think>\n\nWell<|im_end|>"]
    assert any("thinking of earlier turns" in note for note in encoder_of("qwen3").notes)


def test_a_role_that_a_template_leaves_out_is_refused_with_its_place() -> None:
    refusal = mark("phi3", ([user("Hi"), assistant("Hello"), {"role": "tool", "content": "x9"}, assistant("So")], None))
    assert isinstance(refusal, str)
    assert "messages[2].content (role 'tool')" in refusal


def test_tools_that_a_template_leaves_out_are_refused() -> None:
    refusal = mark("qwen2_5_vl", CONVERSATIONS["tool"])
    assert isinstance(refusal, str)
    assert "tools[0] ('weather')" in refusal


def test_a_content_that_a_template_changes_is_refused_with_its_place() -> None:
    template = Template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}<e>{% endfor %}", {}, ["<e>"], "2026-01-01"
    )
    with pytest.raises(DataError, match=r"leaves out messages\[0\]|changes messages\[0\].content"):
        template.mark([user("Hi"), assistant("Hello")])
    shortening = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content[:20] }}<e>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = Template(shortening, {}, ["<e>"], "2026-01-01")
    assert spans(template.mark([user("Hi"), assistant("Hello")])) == ["Hello<e>"]
    with pytest.raises(DataError, match=r"changes messages\[1\].content"):
        template.mark([user("Hi"), assistant("Hello, this is longer than that")])


def test_contents_that_look_like_the_templates_own_text_do_not_move_the_spans() -> None:
    trick = "Hi<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n<|im_start|>user\nHi"
    for name in ("qwen2_5", "qwen3", "lfm2"):
        marked = mark(name, ([user(trick), assistant("Hello"), user(trick), assistant("Hello")], None))
        assert isinstance(marked, Marked)
        assert [text.removeprefix("<think>\n\n</think>\n\n") for text in spans(marked)] == ["Hello<|im_end|>"] * 2


def test_a_template_without_any_end_marker_gets_the_end_token_after_the_last_turn() -> None:
    bare = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    marked = Template(bare, {}, ["</s>"], "2026-01-01").mark(
        [user("Hi"), assistant("Hello"), user("So"), assistant("Well")]
    )
    assert spans(marked) == [" Hello", " Well"]
    assert marked.eos


def test_marks_that_leave_out_the_end_of_the_turn_are_not_used() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<e>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = Template(source, {}, ["<e>"], "2026-01-01")
    assert spans(template.mark([user("Hi"), assistant("Hello")])) == ["Hello<e>"]
    assert any("marks leave out the end" in note for note in template.notes)


def test_the_plain_template_takes_every_conversation() -> None:
    encoder = Encoder(tokenizer_with(None))
    assert encoder.template == PLAIN_TEMPLATE
    assert not encoder.has_own_template
    for title, (messages, tools) in CONVERSATIONS.items():
        marked = encoder.mark_chat(messages, tools)
        answers = [m for m in messages if m["role"] == "assistant"]
        assert len(spans(marked)) == len(answers), title
        assert all(text.endswith("</s>") for text in spans(marked)), title
        if messages[-1]["role"] == "assistant":
            assert marked.text.endswith("</s>")
            asked = encoder._template.render(messages[:-1], tools, prompt=True)
            assert marked.text.startswith(asked), title  # what generation sees is what training saw


def test_a_turn_of_which_nothing_is_left_is_refused() -> None:
    refusal = mark("glm4moe", ([user("Hi"), assistant("</think>"), user("So?"), assistant("Well")], None))
    assert isinstance(refusal, str)
    assert "messages[1]" in refusal


def test_a_refusal_names_the_message_that_the_template_treats_specially() -> None:
    refusal = mark("nemotron_3_nano", ([user("Hi"), assistant("Hello <think> oh")], None))
    assert isinstance(refusal, str)
    assert "changes messages[1].content" in refusal


def test_a_second_call_that_a_template_leaves_out_is_refused() -> None:
    refusal = mark("gptoss", CONVERSATIONS["two tools"])  # renders the first call only
    assert isinstance(refusal, str)
    assert "writes only some of messages[1].tool_calls ('weather')" in refusal


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_2", "gemma3", "gptoss", "glm4moe", "lfm2_2_5", "smolvlm", "phi3"])
def test_whatever_the_contents_say_each_answer_is_trained_to_its_end(name: str) -> None:
    generator = random.Random(7)
    pieces = [
        "a",
        "Hello",
        " ",
        "\n",
        "\n\n",
        "\t",
        "</s>",
        "<|im_end|>",
        "{{",
        "}}",
        "é",
        "😀",
        "\u2028",
        '"',
        "\\",
        "&",
    ]
    encoder = encoder_of(name)
    for _ in range(60):
        said = ["x" + "".join(generator.choices(pieces, k=generator.randint(1, 6))) for _ in range(4)]
        messages = [user(said[0]), assistant(said[1]), user(said[2]), assistant(said[3])]
        marked = encoder.mark_chat(messages)
        texts = spans(marked)
        assert [answer.strip() in text for answer, text in zip(said[1::2], texts, strict=True)] == [True, True]
        encoded = encoder.encode([marked])[0]
        assert encoder.tokenizer.decode(encoded.ids.tolist()) == marked.text
        decoded = encoder.tokenizer.decode(encoded.ids[encoded.loss_mask].tolist())
        assert decoded == "".join(texts)
