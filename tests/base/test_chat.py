"""Messages, completions and texts to token ids, and which tokens are trained."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from graftlm.base.chat import Encoded, Encoder
from graftlm.errors import ConfigError, DataError, ModelError

CORPUS = ["the quick brown fox\n\njumps over: the lazy dog", "answer: blue\nanswer: red\n\n", "question: why?"] * 9
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytelevel(*, bos: bool = False, trim: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    elif trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    names = {"bos_token": "<s>"} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", **names)
    fast.chat_template = template
    return fast


def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space becomes ▁, and one is put before every text."""
    alphabet = sorted({character for text in CORPUS for character in text.replace(" ", "▁")} | {"▁"})
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, "▁t", "▁th", "▁the"])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def trained_text(encoder: Encoder, encoded: Encoded) -> str:
    return str(encoder.tokenizer.decode(encoded.ids[encoded.loss_mask].tolist()))


def text_of(encoder: Encoder, encoded: Encoded) -> str:
    return str(encoder.tokenizer.decode(encoded.ids.tolist()))


def test_a_completion_is_trained_with_its_end_token_and_the_prompt_is_not() -> None:
    encoder = Encoder(bytelevel())
    encoded = encoder.completion("question: why?", " blue dog")
    assert encoded.ids.dtype == np.int32
    assert encoded.loss_mask.dtype == np.bool_
    assert text_of(encoder, encoded) == "question: why? blue dog</s>"
    assert trained_text(encoder, encoded) == " blue dog</s>"


def test_an_end_token_that_is_also_the_padding_token_is_trained() -> None:
    tokenizer = bytelevel(template=CHATML.replace("<|im_end|>", "</s>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoder = Encoder(tokenizer)
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "blue"}]
    assert trained_text(encoder, encoder.chat(messages)) == "blue</s>"
    assert trained_text(encoder, encoder.text("blue"))[-4:] == "</s>"


def test_an_end_token_that_is_there_already_is_not_doubled() -> None:
    encoder = Encoder(bytelevel())
    once, written = encoder.completion("why?", " blue"), encoder.completion("why?", " blue</s>")
    np.testing.assert_array_equal(once.ids, written.ids)
    np.testing.assert_array_equal(once.loss_mask, written.loss_mask)


def test_a_text_is_trained_but_for_its_first_token() -> None:
    for tokenizer in (bytelevel(), bytelevel(bos=True)):
        encoded = Encoder(tokenizer).text("the quick brown fox")
        assert not encoded.loss_mask[0]
        assert encoded.loss_mask[1:].all()
        assert encoded.ids[-1] == tokenizer.eos_token_id


def test_the_first_token_is_never_trained_even_with_an_empty_prompt() -> None:
    encoded = Encoder(bytelevel()).completion("", "blue")
    assert not encoded.loss_mask[0]
    assert encoded.loss_mask[1:].all()


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the quick", " brown"),
        ("the quick ", "brown"),  # the space would begin the token of "brown"
        ("the qui", "ck brown"),  # a token reaches over the border
        ("answer: blue\n", "\nanswer: red"),  # "\n\n" is one token
        ("é", "\u0301 ü😀"),
        ("", "the"),
        ("the 😀", "😀 dog"),
    ],
)
@pytest.mark.parametrize("make", [bytelevel, lambda: bytelevel(trim=True), lambda: bytelevel(bos=True), sentencepiece])
def test_training_sees_the_prompt_as_generation_gives_it(make: Any, prompt: str, completion: str) -> None:
    encoder = Encoder(make())
    encoded = encoder.completion(prompt, completion)
    asked = encoder.prompt_text(prompt)
    assert encoded.ids[: len(asked)].tolist() == asked
    expected = np.arange(len(encoded.ids)) >= max(len(asked), 1)
    np.testing.assert_array_equal(encoded.loss_mask, expected)
    assert encoded.ids[-1] == encoder.tokenizer.eos_token_id


def test_a_text_without_a_border_problem_is_tokenized_as_a_whole() -> None:
    for tokenizer in (bytelevel(), bytelevel(trim=True), sentencepiece()):
        encoder = Encoder(tokenizer)
        whole = tokenizer("the quick brown fox")["input_ids"]
        assert encoder.completion("the quick", " brown fox").ids[:-1].tolist() == whole


def test_the_tokenizers_own_first_token_is_added_once() -> None:
    encoder = Encoder(bytelevel(bos=True))
    for encoded in (encoder.completion("why?", "blue"), encoder.text("blue"), encoder.text("<s>blue")):
        assert (encoded.ids == encoder.tokenizer.bos_token_id).sum() == 1
        assert encoded.ids[0] == encoder.tokenizer.bos_token_id
        assert not encoded.loss_mask[0]
    assert encoder.prompt_text("why?")[0] == encoder.tokenizer.bos_token_id


def test_a_plain_chat_begins_with_the_tokenizers_own_first_token_as_completions_do() -> None:
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "blue"}]
    for bos in (True, False):
        encoder = Encoder(bytelevel(bos=bos))
        assert encoder.chat(messages).ids[0] == encoder.completion("###", "x").ids[0] or not bos
        assert (encoder.chat(messages).ids == 0).sum() == (1 if bos else 0)


def test_the_prompt_of_a_chat_is_how_its_training_row_begins() -> None:
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "blue"}]
    for template in (CHATML, None, CHATML.replace("\n", " ")):
        encoder = Encoder(bytelevel(template=template))
        encoded = encoder.chat(messages)
        asked = encoder.prompt(messages[:1])
        assert encoded.ids[: len(asked)].tolist() == asked
        assert encoded.loss_mask.argmax() == len(asked)


def test_all_turns_are_trained_or_the_last_one() -> None:
    messages: list[dict[str, Any]] = []
    for question, answer in (("why?", "blue"), ("and?", "red")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokenizer = bytelevel(template=CHATML)
    encoder = Encoder(tokenizer)
    assert trained_text(encoder, encoder.chat(messages)) == "blue<|im_end|>red<|im_end|>"
    encoder = Encoder(tokenizer, train_on="last-assistant")
    assert trained_text(encoder, encoder.chat(messages)) == "red<|im_end|>"


def test_many_rows_at_once_are_encoded_as_one_by_one() -> None:
    encoder = Encoder(bytelevel(trim=True))
    pairs = [("the quick ", "brown"), ("", "fox"), ("why?\n", "\nblue"), ("the lazy", " dog")]
    rows = encoder.encode([encoder.mark_completion(*pair) for pair in pairs])
    for row, pair in zip(rows, pairs, strict=True):
        np.testing.assert_array_equal(row.ids, encoder.completion(*pair).ids)
        np.testing.assert_array_equal(row.loss_mask, encoder.completion(*pair).loss_mask)


def test_a_tokenizer_that_truncates_and_pads_does_neither_here() -> None:
    tokenizer = bytelevel()
    tokenizer("the quick brown fox", truncation=True, max_length=2, padding="max_length")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert (
        trained_text(Encoder(tokenizer), Encoder(tokenizer).completion("why", " the quick dog")) == " the quick dog</s>"
    )


def test_answers_end_at_the_end_token_and_at_the_templates_marker() -> None:
    tokenizer = bytelevel(template=CHATML)
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert Encoder(tokenizer).stop_ids == expected
    assert Encoder(bytelevel()).stop_ids == {tokenizer.eos_token_id}


def test_the_templates_digest_names_its_text() -> None:
    digests = [Encoder(bytelevel(template=text)).template_digest for text in (CHATML, CHATML + " ", None)]
    assert len(set(digests)) == 3
    assert digests[0] == Encoder(bytelevel(template=CHATML)).template_digest


def test_a_template_for_tools_is_used_where_the_tokenizer_has_one() -> None:
    tokenizer = bytelevel()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    encoder = Encoder(tokenizer)
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "blue"}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert "weather" in text_of(encoder, encoder.chat(messages, tools))
    assert "weather" not in text_of(encoder, encoder.chat(messages))


def test_trained_spans_of_real_tokens_join_to_the_spans_of_text() -> None:
    encoder = Encoder(bytelevel(template=CHATML))
    answers = [" the quick ", "\n\nblue\n", "😀é", "dog dog"]
    messages: list[dict[str, Any]] = []
    for answer in answers:
        messages += [{"role": "user", "content": "why?\n"}, {"role": "assistant", "content": answer}]
    encoded = encoder.chat(messages)
    changes = np.flatnonzero(np.diff(np.concatenate(([0], encoded.loss_mask.astype(int), [0]))))
    runs = [encoded.ids[a:b].tolist() for a, b in list(pairwise(changes))[::2]]
    assert [encoder.tokenizer.decode(run) for run in runs] == [f"{answer}<|im_end|>" for answer in answers]


def test_a_tokenizer_without_offsets_is_refused_with_the_reason() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="no character offsets"):
        Encoder(Slow())  # type: ignore[arg-type]


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = bytelevel()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        Encoder(tokenizer)


def test_options_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="all-assistant"):
        Encoder(bytelevel(), train_on="first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="yesterday"):
        Encoder(bytelevel(), date="yesterday")
    with pytest.raises(DataError, match="at least one message"):
        Encoder(bytelevel()).chat([])
