"""Text that streams is the text of the whole answer, cut only between characters."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import tiny_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftlm.base.loading import load_tokenizer
from graftlm.demo import resolve_model
from graftlm.serving.engine.detokenizer import Detokenizer

SENTENCE = "Grüße 接ぎ木 🌱🌱 naïve — done.\n\n\tOk?  two"


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as part of words and drops the first one."""
    words = {"<s>": 0, **{w: i + 1 for i, w in enumerate(["▁a", "▁b", "c", "▁dd", "e"])}}
    backend = Tokenizer(models.BPE(vocab={**words, "▁": 6, "a": 7, "b": 8, "d": 9}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.mark.parametrize("name", ["bytes", "demo", "words"])
def test_pieces_put_together_are_the_whole_text(name: str) -> None:
    made = {"bytes": tiny_run.byte_tokenizer, "words": tiny.tokenizer}
    tokenizer = made[name]() if name in made else load_tokenizer(Path(resolve_model("demo")))
    text = "w5 w7 w30 w5" if name == "words" else SENTENCE
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, hidden=())
    outputs = [detokenizer.push(i) for i in ids]
    assert "".join(outputs) + detokenizer.flush() == tokenizer.decode(ids)
    assert not any("\ufffd" in output for output in outputs)
    assert sum(bool(output) for output in outputs) > len(text.split()) / 2  # it streams


def test_a_first_space_that_the_decoder_drops_is_dropped_once() -> None:
    tokenizer = metaspace()
    ids = [1, 3, 2, 5, 4, 1]
    detokenizer = Detokenizer(tokenizer, hidden=())
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == tokenizer.decode(ids) == "ac be dd a"


def test_half_a_character_waits_and_is_shown_at_the_end_if_nothing_comes() -> None:
    tokenizer = tiny_run.byte_tokenizer()
    ids = tokenizer.encode("a🌱", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, hidden=())
    assert [detokenizer.push(i) for i in ids[:-1]] == ["a", "", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_bytes_that_are_no_text_do_not_wait_for_ever() -> None:
    tokenizer = tiny_run.byte_tokenizer()
    bad = tokenizer.encode("🌱", add_special_tokens=False)[0]
    detokenizer = Detokenizer(tokenizer, hidden=())
    assert any(detokenizer.push(bad) for _ in range(40))


def test_hidden_tokens_are_no_text() -> None:
    tokenizer = tiny_run.byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, hidden={1, 2})
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert "".join(map(detokenizer.push, [1, ids[0], 2, ids[1]])) == "ab"


def test_a_stop_string_is_found_wherever_tokens_cut_it_and_never_shown() -> None:
    tokenizer = tiny_run.byte_tokenizer()
    pick = random.Random(1)
    for _ in range(60):
        text = "".join(pick.choice("ab") for _ in range(30))
        stops = tuple("".join(pick.choice("ab") for _ in range(pick.randint(2, 6))) for _ in range(2))
        detokenizer = Detokenizer(tokenizer, hidden=(), stops=stops)
        shown = ""
        for i in tokenizer.encode(text, add_special_tokens=False):
            shown += detokenizer.push(i)
            assert not any(stop in shown for stop in stops)
            if detokenizer.stopped:
                break
        shown += detokenizer.flush()
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert detokenizer.stopped == bool(ends)
        if not ends:
            assert shown == text
        else:  # the one that is complete first
            known = text[: min(ends)]
            assert shown == known[: min(known.find(s) for s in stops if s in known)]


def test_what_could_begin_a_stop_string_is_held_back_and_nothing_else() -> None:
    tokenizer = tiny_run.byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, hidden=(), stops=("END",))
    ids = tokenizer.encode("xEyEN", add_special_tokens=False)
    assert [detokenizer.push(i) for i in ids] == ["x", "", "Ey", "", ""]
    assert detokenizer.flush() == "EN"
