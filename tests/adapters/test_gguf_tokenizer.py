"""A tokenizer written to GGUF gives the same tokens when it is read back, here and in llama.cpp; any other is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from merging import saved
from tiny_gguf import MODELS, TEXTS, changed, folder, merging_tokenizer, sentencepiece_tokenizer

from graftlm.adapters.gguf import check_gguf, write_gguf
from graftlm.adapters.gguf_tokenizer import read_vocab
from graftlm.base.loading import load_base, load_tokenizer, resolve
from graftlm.commands.merge import merge
from graftlm.config import MergeConfig
from graftlm.errors import ModelError
from graftlm.gguf.header import read_gguf

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))


def spm_folder(place: Path, *, prefix: bool, rows: int = 3) -> Path:
    """A tiny Gemma 3, or for a `prefix` a Llama, whose embedding has `rows` more rows than there are tokens."""
    tokenizer = sentencepiece_tokenizer(prefix=prefix)
    architecture = "llama" if prefix else "gemma3"
    size = len(tokenizer) + rows
    return folder(place, architecture, tokenizer, **{**MODELS[architecture], "vocab_size": size})


def tokenizer_values(file: Path) -> dict[str, Any]:
    return {key: value for key, value in read_gguf(file).metadata.items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_tokenizer_is_read_back_with_the_same_tokens(prefix: bool, tmp_path: Path) -> None:
    place = spm_folder(tmp_path / "model", prefix=prefix)
    write_gguf(place, tmp_path / "m.gguf", "f32")
    values = tokenizer_values(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is prefix
    assert values["tokenizer.ggml.token_type"][:7] == [3, 3, 3, 2, 3, 3, 6]
    assert values["tokenizer.ggml.token_type"][-4:] == [4, 5, 5, 5]
    ours: Any = load_tokenizer(place)
    again: Any = load_tokenizer(resolve(str(tmp_path / "m.gguf")))
    for text in TEXTS:
        assert again(text)["input_ids"] == ours(text)["input_ids"], text
        assert again.decode(again(text)["input_ids"]) == ours.decode(ours(text)["input_ids"]), text


@pytest.mark.parametrize("prefix", [False, True])
def test_llama_cpp_finds_the_same_tokens(prefix: bool, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    place = spm_folder(tmp_path / "model", prefix=prefix)
    write_gguf(place, tmp_path / "m.gguf", "f32")
    ours: Any = load_tokenizer(place)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ours(text)["input_ids"], text


def test_a_gguf_base_lends_its_own_tokenizer_to_the_merged_file(tmp_path: Path) -> None:
    write_gguf(spm_folder(tmp_path / "model", prefix=False), tmp_path / "first.gguf", "f32")
    scores = [score / 3 for score in read_gguf(tmp_path / "first.gguf").metadata["tokenizer.ggml.scores"]]
    base = changed(tmp_path / "first.gguf", tmp_path / "base.gguf", {"tokenizer.ggml.scores": scores})
    loaded = load_base(str(base), precision="gguf", compute_dtype="float32", device="cpu")
    adapter = saved(loaded, tmp_path / "a", targets=("q_proj",))
    given = {"model": str(base), "adapter": [str(adapter)], "out": tmp_path / "out", "gguf": tmp_path / "merged.gguf"}
    done = merge(MergeConfig.build({**given, "gguf_type": "f32"}))
    assert tokenizer_values(tmp_path / "merged.gguf") == tokenizer_values(base)
    assert done["gguf"]["architecture"] == "gemma3"
    assert "llama.cpp takes ChatML" in done["notes"][-1]


def test_an_adapters_own_tokenizer_is_the_one_that_is_written(tmp_path: Path) -> None:
    base = str(folder(tmp_path / "model", "llama", vocab_size=264))
    run = tiny_run.train(tmp_path, model=base, trainable_tokens=["<new>"], eval_data=None)
    given = {"model": base, "adapter": [run["adapter_folder"]], "out": tmp_path / "out", "gguf": tmp_path / "m.gguf"}
    merge(MergeConfig.build(given))
    values = tokenizer_values(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.tokens"][259:262] == ["th", "<new>", "[PAD261]"]
    assert values["tokenizer.ggml.token_type"][259:262] == [1, 4, 5]


# ---- refused ---------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def _without_merges(told: dict[str, Any]) -> None:
    told["model"]["merges"] = []


def _spaced_merge(told: dict[str, Any]) -> None:
    told["model"]["vocab"] |= {"t h": 260, "t hh": 261}
    told["model"]["merges"].append(["t h", "h"])


def _merge_twice(told: dict[str, Any]) -> None:
    merges = told["model"]["merges"]
    merges.append(merges.pop(next(i for i, pair in enumerate(merges) if "".join(pair) == "the")))


def _merge_missing(told: dict[str, Any]) -> None:
    told["model"]["merges"] = [pair for pair in told["model"]["merges"] if pair != ["t", "he"]]


def _byte_missing(told: dict[str, Any]) -> None:
    vocabulary = told["model"]["vocab"]
    vocabulary["<byte>"] = vocabulary.pop("<0x41>")


def _set(*path: str, to: Any) -> Change:
    def change(told: dict[str, Any]) -> None:
        for key in path[:-1]:
            told = told[key]
        told[path[-1]] = to

    return change


def _strips(told: dict[str, Any]) -> None:
    told["added_tokens"][-1]["lstrip"] = True


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
REFUSED: dict[str, tuple[str, list[Change], str]] = {
    "no merges": ("bytes", [_without_merges], "has no merges, and llama.cpp refuses byte-level BPE without"),
    "a spaced merge": ("bytes", [_spaced_merge], "divides both tokens by a space"),
    "a strange pattern": ("bytes", [_set("pre_tokenizer", to={"type": "Whitespace"})], "llama.cpp has no name for"),
    "an order without scores": ("spm", [_merge_twice], "it makes 'the' at two places"),
    "a pair that is no merge": ("spm", [_merge_missing], "it makes 'the' of 1 of the 2 pairs of tokens that give it"),
    "a byte without a token": ("spm", [_byte_missing], "has no token <0x41>"),
    "an unknown token for bytes": ("spm", [_set("model", "byte_fallback", to=False)], "takes its unknown token"),
    "whole words first": ("spm", [_set("model", "ignore_merges", to=True)], "does not treat spaces as llama.cpp does"),
    "a space before the first word only": (
        "spm", [_set("normalizer", to=None), _set("pre_tokenizer", to=METASPACE)], "does not treat spaces as llama.cpp"
    ),
    "another normalizer": ("spm", [_set("normalizer", to={"type": "NFKC"})], "does not treat spaces as llama.cpp does"),
    "a token that takes spaces": ("spm", [_strips], "token '<tag>' takes spaces beside it"),
    "a Unigram model": (
        "spm", [_set("model", to={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]})], "is Unigram"
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_a_tokenizer_that_llama_cpp_refuses_or_reads_otherwise_is_refused_by_name(which: str, tmp_path: Path) -> None:
    kind, changes, message = REFUSED[which]
    tokenizer = merging_tokenizer() if kind == "bytes" else sentencepiece_tokenizer(prefix=False)
    place = folder(tmp_path / "model", "llama", tokenizer, vocab_size=len(tokenizer) + 2)
    check_gguf(place)
    told = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
    for change in changes:
        change(told)
    (place / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        check_gguf(place)
    with pytest.raises(ModelError, match=message):
        write_gguf(place, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_values_that_would_give_other_tokens_are_found_by_reading_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = spm_folder(tmp_path / "model", prefix=False)
    monkeypatch.setattr(
        "graftlm.adapters.gguf_tokenizer._scores", lambda _, tokens, *rest: [*map(float, range(len(tokens)))]
    )
    with pytest.raises(ModelError, match=r"as GGUF its tokenizer would split .The quick.* otherwise: token \d+ is"):
        check_gguf(place)


def test_a_token_that_swallows_the_space_before_it_is_refused(tmp_path: Path) -> None:
    """The tokenizers library normalizes the token too: with a space before a text it is looked for with one."""
    tokenizer = sentencepiece_tokenizer(prefix=True)
    tokenizer.add_tokens(["<odd>"])
    with pytest.raises(ModelError, match="would split 'a <odd>b' otherwise"):
        check_gguf(folder(tmp_path / "model", "llama", tokenizer))


def test_rows_without_a_token_get_names_of_their_own(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens(["[PAD262]"])
    place = folder(tmp_path / "model", "llama", tokenizer, vocab_size=264)
    assert read_vocab(place, 264).tokens[259:] == ["th", "[PAD262]", "[PAD261]", "[[PAD262]]", "[PAD263]"]


# ---- what llama.cpp has in its code for an architecture --------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
FIXED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu', and llama.cpp has silu for a llama"),
    "gemma's activation": ("gemma3", {"hidden_activation": "silu"}, "llama.cpp has gelu_pytorch_tanh for a gemma3_text"),
    "rope": ("qwen2", {"rope_parameters": LLAMA3}, "RoPE type is 'llama3', and llama.cpp has default, linear for a qwen2"),
    "caps": ("gemma2", {"final_logit_softcapping": None}, "are 3.0 and None, and llama.cpp caps both for a gemma2"),
    "no caps": ("gemma3", {"final_logit_softcapping": 30.0}, "are None and 30.0, and llama.cpp caps neither"),
    "biases": ("qwen3", {"attention_bias": True}, "does not support a qwen3 with biases in attention"),
    "a head": ("gemma2", {"tie_word_embeddings": False}, "its head is not tied to its embedding"),
}  # fmt: skip


@pytest.mark.parametrize("which", FIXED)
def test_what_llama_cpp_has_in_its_code_and_a_model_has_otherwise_is_refused(which: str, tmp_path: Path) -> None:
    architecture, change, message = FIXED[which]
    place = folder(tmp_path / "model", architecture, **{**MODELS[architecture], **change})
    with pytest.raises(ModelError, match=message):
        check_gguf(place)
    with pytest.raises(ModelError, match=message):
        write_gguf(place, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_loads_a_head_of_its_own(architecture: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    changes: dict[str, Any] = {**MODELS[architecture], "tie_word_embeddings": False}
    place = folder(tmp_path / "model", architecture, **changes)
    write_gguf(place, tmp_path / "m.gguf", "f32")
    assert "output.weight" in read_gguf(tmp_path / "m.gguf").tensors
    llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=32, verbose=False).close()
