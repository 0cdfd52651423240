"""The tokenizer's recipe and the shape: any text round trips, prompts never run into completions, turns are marked."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from graftlm import demo
from graftlm.base.chat import Encoder
from tools.demo.model_config import parameters, shape, write_shape
from tools.demo.tokenizer import SPECIALS, VOCABULARY, count_tokens, train_tokenizer
from tools.demo.voices import VOICES, example, facts

PRODUCTS = facts(21, 200, "valid")

TEXTS = [
    "",
    " ",
    "\n\n \n",
    "Two  spaces,\ttabs\r\nand lines\n\n",
    "It's £1,234.50 — that’s 20% off!",
    "naïve café 東京 🙂 \x00 \x7f",
    "def f(x):\n    return x[0] + 1\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed")
    with (path / "text.jsonl").open("w", encoding="utf-8") as file:
        for voice in VOICES:
            for product in facts(20, 1000):
                row = example(product, voice)
                file.write(json.dumps({"text": row["prompt"] + row["completion"]}) + "\n")
    train_tokenizer([path / "text.jsonl"], path)
    write_shape(path)
    return path


@pytest.fixture(scope="module", params=["recipe", "bundled"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Any:
    if request.param == "recipe":
        return AutoTokenizer.from_pretrained(folder)
    if not (demo.BASE / "tokenizer.json").is_file():
        pytest.skip("the bundled base is not made yet")
    return AutoTokenizer.from_pretrained(demo.BASE)


def test_special_tokens_have_the_ids_that_the_config_says(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 0, None)
    assert len(tokenizer) <= VOCABULARY
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_byte_is_a_token(tokenizer: Any) -> None:
    assert all(len(tokenizer(chr(code)).input_ids) == 1 for code in range(128))


@pytest.mark.parametrize("voice", VOICES)
def test_prompt_and_completion_tokenize_the_same_apart_and_joined(tokenizer: Any, voice: str) -> None:
    for product in PRODUCTS:
        row = example(product, voice)
        apart = tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids
        assert tokenizer(row["prompt"] + row["completion"]).input_ids == apart


def test_a_task_and_its_answer_on_the_next_line_tokenize_the_same_apart_and_joined(tokenizer: Any) -> None:
    for prompt, completion in (("Is it so?\n", "Yes"), ("Options:\n\n- a\n- b\n", "b"), ("Why?  \n", "42 reasons")):
        apart = tokenizer(prompt).input_ids + tokenizer(completion).input_ids
        assert tokenizer(prompt + completion).input_ids == apart


def test_digits_stay_single(tokenizer: Any) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer("$1234").input_ids] == ["$", "1", "2", "3", "4"]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a tree."},
    {"role": "assistant", "content": "Oak."},
    {"role": "user", "content": "Another."},
    {"role": "assistant", "content": "Elm."},
]


def test_the_template_is_chatml(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a tree.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_the_assistant_says_is_marked_with_its_end(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Oak.<|im_end|>Elm.<|im_end|>"


def test_tools_calls_and_reasoning_are_written(tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "oak"}}}
    chat = [
        *CHAT[:2],
        {"role": "assistant", "content": "", "reasoning_content": "I should look.", "tool_calls": [call]},
        {"role": "tool", "content": "a tree"},
    ]
    text = tokenizer.apply_chat_template(chat, tools=[tool], tokenize=False)
    for part in ("Be brief.", "look_up", "I should look.", '"word": "oak"', "<|im_start|>tool\na tree<|im_end|>"):
        assert text.count(part) >= 1, part
    assert text.count("Be brief.") == 1


def test_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="unknown role 'bot'"):
        tokenizer.apply_chat_template([{"role": "bot", "content": "x"}], tokenize=False)


def test_counting_adds_an_end_token_a_row(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "$1"}\n{"text": "$123"}\n', encoding="utf-8")
    trained = AutoTokenizer.from_pretrained(folder)
    assert isinstance(trained, PreTrainedTokenizerFast)
    assert count_tokens(trained, tmp_path / "t.jsonl") == (3 + 5, 5)


def test_training_the_tokenizer_twice_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    train_tokenizer([folder / "text.jsonl"], tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.to_str() == Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()


def test_the_shape_has_the_parameters_that_it_says(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(shape()) == 3_221_952
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (0, 0, None)
    assert model.generation_config is not None


def test_training_sees_a_row_as_its_prompt_its_completion_and_an_end(tokenizer: Any) -> None:
    row = example(PRODUCTS[0], "playful")
    encoded = Encoder(tokenizer).completion(row["prompt"], row["completion"])
    ids = tokenizer(row["prompt"] + row["completion"]).input_ids
    assert encoded.ids.tolist() == [*ids, 0]
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]) == row["completion"] + "<|endoftext|>"


def test_training_sees_a_chat_as_the_template_marks_it(tokenizer: Any) -> None:
    encoded = Encoder(tokenizer).chat(CHAT)
    assert tokenizer.decode(encoded.ids[encoded.loss_mask]) == "Oak.<|im_end|>Elm.<|im_end|>"
