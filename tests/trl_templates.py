"""Every chat template that TRL ships, a tokenizer for each, and conversations of every kind."""

from __future__ import annotations

import datetime
import functools
import re
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graftlm.base.chat import Encoder
from graftlm.base.template import Marked
from graftlm.errors import DataError

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
PAIRS = [name for name in NAMES if f"{name}_training" in NAMES]
# What looks like a token of its own in a template: <|im_start|>, <｜User｜>, <|tool_call>, <turn|>, </think>, [INST].
SPECIALS = re.compile(
    r"<[|｜][^<>\s{}'\"]*>|<[^<>\s{}'\"]*[|｜]>|</?think>|</?tool_call>|<(?:start|end)_of_\w+>|\[/?INST\]"
)


@functools.cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the assistant and the user think of the weather in\n\nParis"] * 9, trainer)
    return tokenizer.to_str()


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()), bos_token="<s>", eos_token="</s>"
    )
    found = sorted(set(SPECIALS.findall(template or "")))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in found])
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def encoder_of(name: str) -> Encoder:
    return Encoder(tokenizer_with((FOLDER / f"{name}.jinja").read_text()), date=datetime.date.today().isoformat())


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
OTHER_CALL = {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
REPLY = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": '{"rain": "no"}'}
OTHER_REPLY = {"role": "tool", "tool_call_id": "call_2", "name": "weather", "content": '{"rain": "yes"}'}

Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
CONVERSATIONS: dict[str, Conversation] = {
    "single": ([user("Hi there"), assistant("Hello you")], None),
    "system": ([{"role": "system", "content": "Be brief"}, user("Hi there"), assistant("Hello you")], None),
    "multi": ([user("Hi there"), assistant(" Hello you "), user("And more?"), assistant("Yes, more\n")], None),
    "thinking": ([user("Hi"), assistant("Hello", reasoning_content="Hmmm")], None),
    "thinking twice": (
        [
            user("Hi"),
            assistant("Hello", reasoning_content="Hmmm"),
            user("So?"),
            assistant("Well", reasoning_content="Ahaa"),
        ],
        None,
    ),
    "thinking inside": ([user("Hi"), assistant("<think>\nHmmm\n</think>\n\nHello")], None),
    "tool": ([user("Rain?"), {"role": "assistant", "tool_calls": [CALL]}, REPLY, assistant("Dry")], TOOLS),
    "tool call last": ([user("Rain?"), {"role": "assistant", "tool_calls": [CALL]}], TOOLS),
    "two tools": (
        [
            user("Rain?"),
            {"role": "assistant", "tool_calls": [CALL, OTHER_CALL]},
            REPLY,
            OTHER_REPLY,
            assistant("Dry"),
            user("Thanks"),
            assistant("Welcome"),
        ],
        TOOLS,
    ),
    "thinking before a tool": (
        [
            user("Rain?"),
            {"role": "assistant", "reasoning_content": "Hmmm", "tool_calls": [CALL]},
            REPLY,
            assistant("Dry", reasoning_content="Ahaa"),
        ],
        TOOLS,
    ),
    "words before a tool": ([user("Rain?"), assistant("Looking", tool_calls=[CALL]), REPLY, assistant("Dry")], TOOLS),
    "question last": ([user("Hi there"), assistant("Hello you"), user("And more?")], None),
    "a quote": ([user('Say "<a>" & \\n'), assistant('"<a>" \\n, said {{ he }} — ü\u2028')], None),
}


def mark(name: str, conversation: Conversation, **options: Any) -> Marked | str:
    """The marked text, or the refusal."""
    try:
        return encoder_of(name)._template.mark(*conversation, **options)
    except DataError as error:
        return str(error)


def spans(marked: Marked) -> list[str]:
    """The trained texts; ranges that touch are one."""
    texts: list[str] = []
    end = -1
    for start, stop in marked.spans:
        if start == end:
            texts[-1] += marked.text[start:stop]
        else:
            texts.append(marked.text[start:stop])
        end = stop
    return texts
