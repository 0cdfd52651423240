"""An adapter is used on what it was trained for or not at all: what the manifest holds, and what the one loader refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm import kernels
from graftlm.adapters import canary
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters import peft_tensors as fit
from graftlm.adapters.attach import attach, detach
from graftlm.adapters.manifest import MANIFEST, digest_of, file_entries
from graftlm.adapters.peft_folder import FORMULA
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_base
from graftlm.errors import AdapterError
from graftlm.kernels.counter_rng import uniform

Tensors = dict[str, Tensor]
Manifest = dict[str, Any]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def loaded(place: Path, precision: Any = "float32", compute_dtype: Any = "float32") -> Base:
    return load_base(str(place), precision=precision, compute_dtype=compute_dtype, device="cpu")


@pytest.fixture(scope="module")
def base() -> Base:
    return loaded(tiny_run.folder())


def write(base: Base, folder: Path, about: Manifest | None = None, **plan: Any) -> Path:
    """A good adapter on two kinds of layers, as files."""
    folder.mkdir()
    adapter = tiny.adapted(base, **{"targets": ("q_proj", "down_proj"), "ranks": {"down_proj": 2}, **plan})
    detach(base)
    adapter_format.save(base, adapter, folder, about or {})
    return folder


@pytest.fixture
def saved(base: Base, tmp_path: Path) -> Path:
    return write(base, tmp_path / "adapter")


def refused(base: Base, folder: Path, *words: str) -> None:
    """`words` are regular expressions that the one sentence of the error holds."""
    with pytest.raises(AdapterError) as error:
        adapter_format.load(base, folder)
    for word in words:
        assert re.search(word, str(error.value)), str(error.value)


def rewrite(folder: Path, change: Callable[[Manifest], Any]) -> None:
    """Change a manifest, and make its checksums and digest fit again: an error of whoever wrote it, not of a disk."""
    manifest: Manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["files"] = file_entries([p for p in folder.iterdir() if p.name != MANIFEST])
    manifest["digest"] = digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    named = load_file(folder / "adapter_model.safetensors")
    change(named)
    save_file({n: t.contiguous() for n, t in named.items()}, folder / "adapter_model.safetensors")


# ---- what is written ------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_the_adapter_is_and_on_what_it_was_trained(base: Base, saved: Path) -> None:
    manifest: Manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["format"] == 2
    assert manifest["base"] == {
        "name": base.name, "fingerprint": base.fingerprint, "precision": "float32", "compute_dtype": "float32",
    }  # fmt: skip
    named = load_file(saved / "adapter_model.safetensors")
    assert {n: (t["dtype"], tuple(t["shape"])) for n, t in manifest["tensors"].items()} == {
        n: ("F32", tuple(t.shape)) for n, t in named.items()
    }
    assert manifest["formula"]["r"] == 3
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    encoder = Encoder(base.tokenizer)
    assert manifest["golden"]["chat"] == encoder.prompt(canary.CHAT)
    assert manifest["golden"]["text"] == encoder.prompt_text(canary.TEXT)
    assert manifest["golden"]["stop"] == [2]
    kept = manifest["canary"]
    assert [len(ids) for ids in kept["prompts"]] == [canary.LENGTH] * canary.PROMPTS
    assert len(kept["base"]) == len(kept["adapter"]) == canary.PROMPTS * canary.KEPT
    assert kept["tolerance"]["float32"] < kept["tolerance"]["bfloat16"] < kept["tolerance"]["nf4"]
    assert manifest["lineage"] == {"parents": []}


def test_a_folder_is_named_by_its_content_alone(base: Base, saved: Path, tmp_path: Path) -> None:
    found = adapter_format.inspect_folder(saved)
    moved = Path(shutil.copytree(saved, tmp_path / "elsewhere" / "renamed"))
    (moved / "README.md").write_text("what is not the adapter's says nothing about it")
    assert adapter_format.inspect_folder(moved).digest == found.digest
    assert adapter_format.inspect_folder(write(base, tmp_path / "again")).digest == found.digest
    assert adapter_format.inspect_folder(write(base, tmp_path / "other", seed=8)).digest != found.digest
    other = write(base, tmp_path / "about", {"seed": 1})
    assert adapter_format.inspect_folder(other).digest != found.digest


def test_inspecting_needs_no_base_and_lists_what_belongs_to_the_adapter(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    found = adapter_format.inspect_folder(saved)
    assert found.files == ("adapter_config.json", "adapter_model.safetensors", "graft.json")
    assert found.bytes == sum((saved / name).stat().st_size for name in found.files)
    assert found.config["r"] == 3
    assert found.tensors[KEY].shape == (3, 28)
    assert found.parents == ()
    (saved / MANIFEST).unlink()
    bare = adapter_format.inspect_folder(saved)
    assert bare.manifest is None
    assert bare.files == ("adapter_config.json", "adapter_model.safetensors")
    assert len(bare.digest) == 64
    assert bare.digest != found.digest


def test_loading_says_where_an_adapter_came_from_and_leaves_the_base_as_it_was(base: Base, saved: Path) -> None:
    before = tiny.base_logits(base, tiny.ids(), slot=0)
    adapter = adapter_format.load(base, saved)
    assert adapter.origin is not None
    assert adapter.origin.digest == adapter_format.inspect_folder(saved).digest
    assert adapter.origin.notes == ()
    assert not [m for m in base.stored().values() if m.bank is not None], "the canary takes its slot away again"
    assert torch.equal(tiny.base_logits(base, tiny.ids(), slot=0), before)


def test_what_is_not_finite_is_not_saved(base: Base, tmp_path: Path) -> None:
    adapter = tiny.adapted(base)
    detach(base)
    with torch.no_grad():
        next(iter(adapter.parameters().values()))[0, 0] = float("nan")
    with pytest.raises(
        AdapterError, match=r"lora_A\.weight' holds values that are not finite; the adapter is not saved"
    ):
        adapter_format.save(base, adapter, tmp_path, {})


# ---- files that have changed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "graft.json"])
def test_one_flipped_byte_anywhere_is_found_and_the_file_is_named(base: Base, saved: Path, name: str) -> None:
    file = saved / name
    content = file.read_bytes()
    for at in range(len(content) // 7, len(content), len(content) // 5):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        file.write_bytes(flipped)
        with pytest.raises(AdapterError, match=str(saved)) as error:
            adapter_format.inspect_folder(saved)
        assert name in str(error.value) or "base_model.model." in str(error.value), "the file or the tensor"
        file.write_bytes(content)
    adapter_format.load(base, saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing_cut_short_or_longer_is_refused_by_name(base: Base, saved: Path, name: str) -> None:
    file = saved / name
    content = file.read_bytes()
    for changed in (content[:-9], content + b"\0", b""):
        file.write_bytes(changed)
        refused(base, saved, name)
    file.unlink()
    refused(base, saved, name)


def drop(key: str) -> Callable[[Tensors], Any]:
    return lambda named: named.pop(key)


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (drop(KEY), rf"1 of 8 tensors are missing, the first is '{KEY}'"),
    "half of them missing": (lambda t: [t.pop(k) for k in list(t)[::2]], "4 of 8 tensors are missing"),
    "extra": (lambda t: t.update({KEY.replace("q_proj", "k_proj"): torch.ones(3, 28)}), r"k_proj.* not in the plan"),
    "transposed": (lambda t: t.update({KEY: t[KEY].T}), r"q_proj.* of shape \(28, 3\), expected F32 \(3, 28\)"),
    "in 16 bits": (lambda t: t.update({KEY: t[KEY].bfloat16()}), r"q_proj.* is BF16 .*, expected F32"),
    "integers": (lambda t: t.update({KEY: t[KEY].int()}), r"q_proj.* has dtype I32"),
    "a wrong prefix": (lambda t: t.update({f"base_model.{KEY}": t.pop(KEY)}), "1 of 8 tensors are missing"),
    "other values": (lambda t: t[KEY][1, 5].add_(1e-6), r"adapter_model\.safetensors has (changed|.* bytes)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_are_not_those_of_the_plan_are_refused_by_name(base: Base, saved: Path, damage: str) -> None:
    act, words = DAMAGES[damage]
    change_tensors(saved, act)
    refused(base, saved, words)


def test_a_tensor_that_is_not_finite_is_refused_by_name_whatever_the_checksums_say(base: Base, saved: Path) -> None:
    change_tensors(saved, lambda t: t[KEY][1, 5].fill_(float("nan")))
    rewrite(saved, lambda m: None)
    refused(base, saved, rf"tensor '{KEY}' holds values that are not finite")


FORMULAS: dict[str, tuple[Manifest, str]] = {
    "alpha": ({"lora_alpha": 50.0}, r"lora_alpha is 50, and the adapter was trained with 5;"),
    "rank": ({"r": 6}, "r is 6, and the adapter was trained with 3"),
    "a rank by pattern": ({"rank_pattern": {}}, r'rank_pattern\[".*"\] is null, and the adapter was trained with 2;'),
    "an alpha by pattern": ({"alpha_pattern": {"q_proj": 1}}, r'alpha_pattern\["q_proj"\] is 1, and .* with null;'),
    "scaling": ({"use_rslora": True}, "use_rslora is true, and the adapter was trained with false"),
    "DoRA": ({"use_dora": True}, "use_dora is true, and"),
    "targets": ({"target_modules": ["q_proj"]}, "target_modules is"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "dropout": ({"lora_dropout": 0.5}, r"adapter_config\.json has .* bytes|adapter_config\.json has changed"),
    "a key from the future": ({"use_wonderlora": True}, "unknown key 'use_wonderlora'"),
}


@pytest.mark.parametrize("which", FORMULAS)
def test_a_config_that_means_another_mathematics_than_was_trained_is_refused_with_both_values(
    base: Base, saved: Path, which: str
) -> None:
    change, words = FORMULAS[which]
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, **change}))
    refused(base, saved, words)


@pytest.mark.parametrize("key", FORMULA)
def test_a_formula_of_any_size_is_refused_in_a_few_words(base: Base, saved: Path, key: str) -> None:
    long = "x" * 30_000
    changed: Manifest = {long: 3, **{f"{i}": 4 for i in range(5_000)}} if key.endswith("_pattern") else [long] * 3
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: changed}))
    with pytest.raises(AdapterError, match=key) as error:
        adapter_format.load(base, saved)
    assert len(str(error.value)) < 600 + len(str(saved)), str(error.value)


MANIFESTS: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "from the future": (lambda m: m.update(format=99), "is of format 99, this Graft reads up to 2; update graftlm"),
    "without a base": (lambda m: m.pop("base"), "graft.json: base: Field required"),
    "with a base that is a list": (lambda m: m.update(base=[]), "graft.json: base: "),
    "with a precision nobody knows": (lambda m: m["base"].update(precision="int3"), "base.precision: .*int3"),
    "with a file elsewhere": (lambda m: m["files"].update({"../x": m["files"]["adapter_config.json"]}), r"'\.\./x'"),
    "that lists itself": (lambda m: m["files"].update({MANIFEST: m["files"]["adapter_config.json"]}), "graft.json"),
    "without the tensors' file": (lambda m: m["files"].pop("adapter_model.safetensors"), "does not list adapter_model"),
    "with a negative token": (lambda m: m["golden"].update(stop=[-2]), "golden.stop.0"),
    "with a thousand canaries": (lambda m: m["canary"].update(prompts=[[1]] * 1000), "canary.prompts"),
    "with an endless canary": (lambda m: m["canary"].update(prompts=[[1] * 99999]), "canary.prompts.0"),
    "with a tolerance of everything": (lambda m: m["canary"]["tolerance"].update(nf4=float("inf")), "tolerance.nf4"),
    "with a tolerance below nothing": (lambda m: m["canary"]["tolerance"].update(int8=-1.0), "tolerance.int8"),
    "with logits that are not finite": (lambda m: m["canary"].update(adapter=[float("inf")] * 64), "canary.adapter.0"),
    "with a loss that is none": (
        lambda m: m.update(evaluation={"after": float("nan")}),
        "holds a number that is not finite",
    ),
    "of format zero": (lambda m: m.update(format=0), "graft.json: format: "),
    "with data that is a list": (lambda m: m.update(data=[1]), "graft.json: data: "),
    "with formats that are a list": (lambda m: m.update(data={"train": {"formats": ["text"]}}), "data.train.formats"),
    "with a date that is none": (lambda m: m.update(template={"date": "now"}), "template.date"),
    "with a date that no calendar has": (lambda m: m.update(template={"date": "0000-02-30"}), "template.date"),
    "without a golden text": (lambda m: m["golden"].pop("text"), "golden.text"),
    "with parents that are no digests": (lambda m: m.update(lineage={"parents": ["x"]}), "lineage.parents.0"),
    "changed by hand": (lambda m: m.update(seed=9), r"graft\.json has changed since it was written"),
}


@pytest.mark.parametrize("which", MANIFESTS)
def test_a_manifest_that_is_damaged_is_refused_by_the_entry(base: Base, saved: Path, which: str) -> None:
    change, words = MANIFESTS[which]
    manifest: Manifest = json.loads((saved / MANIFEST).read_text())
    change(manifest)
    (saved / MANIFEST).write_text(json.dumps(manifest))
    refused(base, saved, words)


# ---- the base -------------------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_refused_with_both_fingerprints(
    base: Base, saved: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_run.folder(), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    changed = loaded(other)
    assert changed.fingerprint != base.fingerprint
    refused(changed, saved, base.fingerprint[:12], changed.fingerprint[:12], "was trained on base")


def test_the_same_base_moved_renamed_and_cut_into_other_files_is_the_same(saved: Path, tmp_path: Path) -> None:
    place = tmp_path / "cut"
    tiny.plain(tiny_run.folder()).save_pretrained(place, max_shard_size="30KB")
    tiny_run.byte_tokenizer().save_pretrained(place)
    assert len(list(place.glob("*.safetensors"))) > 2
    adapter = adapter_format.load(loaded(place.rename(tmp_path / "renamed")), saved)
    assert adapter.origin is not None
    assert adapter.origin.notes == ()


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
def test_the_same_base_in_another_precision_is_taken_with_a_note(saved: Path, precision: str) -> None:
    adapter = adapter_format.load(loaded(tiny_run.folder(), precision), saved)
    assert adapter.origin is not None
    (note,) = adapter.origin.notes
    assert f"trained on a base in float32 and runs on {precision}: its logits differ by" in note


def test_a_canary_of_a_bf16_mixed_base_is_computed_in_float32(base: Base, tmp_path: Path) -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    mixed = loaded(tiny_run.folder(), compute_dtype="bf16-mixed")
    exact, rounded = write(base, tmp_path / "exact"), write(mixed, tmp_path / "rounded")
    one, other = (json.loads((folder / MANIFEST).read_text()) for folder in (exact, rounded))
    assert other["base"]["compute_dtype"] == "bf16-mixed"
    assert one["canary"] == other["canary"]
    for place, folder in ((base, rounded), (mixed, exact), (mixed, rounded)):
        found = adapter_format.load(place, folder)
        assert found.origin is not None
        assert found.origin.notes == ()
    rewrite(rounded, lambda m: m["canary"].pop("products"))  # as it was written before that entry
    adapter_format.load(base, rounded)


def test_a_precision_whose_tolerance_is_passed_is_refused(saved: Path) -> None:
    rewrite(saved, lambda m: m["canary"]["tolerance"].update(nf4=1e-3))
    refused(loaded(tiny_run.folder(), "nf4"), saved, "canary failed on the base alone", "allowed in nf4")


# ---- how it answers -------------------------------------------------------------------------------------------------


def test_a_base_with_the_same_weights_and_another_config_is_found_by_the_canary(saved: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_run.folder(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (other / "config.json").write_text(json.dumps(config))
    refused(loaded(other), saved, "canary failed on the base alone", r"compare its config\.json")


@pytest.mark.parametrize("factor", [0.5, 0.95, 2.0])
def test_an_adapter_that_is_applied_with_another_scale_is_found_by_the_canary(
    base: Base, saved: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    scale_of = fit.scale_of
    monkeypatch.setattr(fit, "scale_of", lambda *given: factor * scale_of(*given))
    refused(base, saved, "the canary failed: what the adapter adds to the logits differs by")


def test_an_adapter_on_the_wrong_layers_is_found_by_the_canary(base: Base, saved: Path) -> None:
    def swap(named: Tensors) -> None:
        for part in ("lora_A", "lora_B"):
            one, two = (f"base_model.model.model.layers.{i}.self_attn.q_proj.{part}.weight" for i in (0, 1))
            named[one], named[two] = named[two], named[one]

    change_tensors(saved, swap)
    rewrite(saved, lambda m: None)
    refused(base, saved, "the canary failed: what the adapter adds")


CANARIES: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "prompts of two lengths": (lambda c: c["prompts"][0].pop(), "not of one length of at most 256"),
    "a token too high": (lambda c: c["prompts"][1].__setitem__(2, 259), "has token 259, this base's last one is 258"),
    "too few numbers": (lambda c: c["adapter"].pop(), "keeps 63 numbers, expected 64"),
    "a number that is far off": (lambda c: c["adapter"].__setitem__(3, 1e38), "the canary failed"),
    "numbers whose sum overflows": (lambda c: c.update(adapter=[1e308] * 64), r"graft\.json: canary\.adapter\.0"),
    "one prompt": (lambda c: c.update(prompts=c["prompts"][:1]), "1 different prompts of 12 tokens, expected 4 of 12"),
    "one prompt four times": (lambda c: c.update(prompts=c["prompts"][:1] * 4), "1 different prompts"),
    "prompts of one token": (lambda c: c.update(prompts=[[i] for i in range(4)]), "4 different prompts of 1 tokens"),
    "a tolerance of everything": (
        lambda c: c["tolerance"].update(float32=1e9),
        r"graft\.json: canary\.tolerance\.float32 is 1e\+09, and between float32 and float32 at most 0\.001 is allowed",
    ),
    "the tolerance of another precision": (lambda c: c["tolerance"].update(float32=0.6), r"at most 0\.001 is allowed"),
    "a tolerance that would serve for nf4": (lambda c: c["tolerance"].update(nf4=0.7), r"at most 0\.6 is allowed"),
}  # fmt: skip


@pytest.mark.parametrize("which", CANARIES)
def test_a_canary_that_cannot_be_is_refused(base: Base, saved: Path, which: str) -> None:
    change, words = CANARIES[which]
    rewrite(saved, lambda m: change(m["canary"]))
    refused(base, saved, words)


def test_a_manifest_without_a_tolerance_has_the_canary_that_graft_takes(base: Base, saved: Path) -> None:
    change_tensors(saved, lambda t: t[KEY].mul_(1.3))
    rewrite(saved, lambda m: m["canary"].update(tolerance={}))
    refused(base, saved, "the canary failed: what the adapter adds to the logits differs by")


def test_an_entry_of_the_config_that_the_formula_leaves_out_is_held_against_nothing(base: Base, saved: Path) -> None:
    rewrite(saved, lambda m: m.update(formula={}))
    refused(base, saved, "r is 3, and the adapter was trained with null")


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    base: Base, saved: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_run.folder(), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["f"], words["t"] = words["t"], words["f"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(loaded(other), saved, "another tokenizer: the fixed text was .* tokens", r"at position \d+ token \d+ then")


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def with_template(place: Path, template: str) -> Path:
    """The tiny base with a chat template of its own."""
    shutil.copytree(tiny_run.folder(), place)
    tokenizer = tiny_run.byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(place)
    return place


def test_another_template_is_refused_for_an_adapter_of_chats_and_not_for_one_of_texts(tmp_path: Path) -> None:
    own = loaded(with_template(tmp_path / "own", TEMPLATE))
    other = loaded(with_template(tmp_path / "other", TEMPLATE.replace("assistant:", "assistant: ")))
    formats = {"train": {"formats": {"chat": 3}}}
    chats = write(own, tmp_path / "chats", {"data": formats})
    texts = write(own, tmp_path / "texts", {"data": {"train": {"formats": {"text": 3}}}})
    refused(other, chats, "another chat template: the fixed chat was")
    adapter_format.load(other, texts)
    same = loaded(with_template(tmp_path / "same", TEMPLATE + "{# edited, and means the same #}"))
    adapter_format.load(same, chats)


def test_another_date_is_the_training_date_again(tmp_path: Path) -> None:
    """A template that prints the date gets the one of training, so the golden chat is the same on every day."""
    dated = loaded(with_template(tmp_path / "base", "{{ strftime_now('%d %b %Y') }}" + TEMPLATE))
    about = {"template": {"date": "2024-07-26"}, "data": {"train": {"formats": {"chat": 1}}}}
    folder = write(dated, tmp_path / "adapter", about)
    adapter_format.load(dated, folder)
    rewrite(folder, lambda m: m["template"].update(date="2025-01-01"))
    refused(dated, folder, "another chat template")


def test_other_stop_tokens_are_refused_with_both_lists(base: Base, saved: Path) -> None:
    rewrite(saved, lambda m: m["golden"].update(stop=[2, 7]))
    refused(base, saved, r"with stop tokens \[2, 7\], here they are \[2\]")


def test_a_tokenizer_file_that_changed_and_gives_the_same_tokens_is_a_note(saved: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_run.folder(), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = not tokenizer["added_tokens"][0]["lstrip"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    adapter = adapter_format.load(loaded(other), saved)
    assert adapter.origin is not None
    assert "tokenizer's file differs from training" in adapter.origin.notes[0]


def test_an_adapter_with_tokens_of_its_own_brings_its_tokenizer(tmp_path: Path) -> None:
    place = tmp_path / "base"
    tiny.random_model("llama", vocab_size=tiny_run.VOCABULARY + 3, max_position_embeddings=256).save_pretrained(place)
    tiny_run.byte_tokenizer().save_pretrained(place)
    tiny_run.train(tmp_path, model=str(place), trainable_tokens=["<mill>"], eval_data=None, steps=2)
    folder = tmp_path / "run" / "adapter"
    assert "tokenizer.json" in adapter_format.inspect_folder(folder).files
    adapter = adapter_format.load(loaded(place, "bfloat16"), folder)
    assert adapter.origin is not None
    tokenizer: Any = adapter.origin.tokenizer
    assert "<mill>" in tokenizer.get_vocab()
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["added_tokens"][-1]["content"] = "<hill>"
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    refused(loaded(place), folder, r"tokenizer\.json has (changed|.* bytes)")


# ---- PEFT's own -----------------------------------------------------------------------------------------------------


def test_an_adapter_of_pefts_is_taken_with_a_note_of_what_was_not_checked(base: Base, tmp_path: Path) -> None:
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(target_modules=["q_proj"]))
    peft.save_pretrained(tmp_path)
    adapter = adapter_format.load(base, tmp_path)
    assert adapter.origin is not None
    assert adapter.origin.manifest is None
    (note,) = adapter.origin.notes
    assert "no graft.json (PEFT's own)" in note
    assert "not whether this is the base" in note
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/other"}))
    adapter = adapter_format.load(base, tmp_path)
    assert adapter.origin is not None
    assert "trained on 'some/other'" in adapter.origin.notes[0]


def test_b_may_be_zero_where_something_else_was_trained(base: Base, tmp_path: Path) -> None:
    for number, plan in enumerate(({"dora": True}, {"trainable_tokens": (8, 62)}, {"modules_to_save": ("head",)})):
        adapter = tiny.adapted(base, targets=("q_proj",), **plan)
        detach(base)
        with torch.no_grad():
            for name, parameter in adapter.parameters().items():
                if "lora_B" in name:
                    parameter.zero_()
                elif "lora_A" not in name:
                    parameter.add_(uniform(tuple(parameter.shape), 3, "more", name) * 0.1)
        folder = tmp_path / str(number)
        folder.mkdir()
        adapter_format.save(base, adapter, folder, {})
        attach(base, adapter_format.load(base, folder))
        assert not torch.equal(tiny.base_logits(base, tiny.ids()), tiny.base_logits(base, tiny.ids(), slot=0))
        detach(base)


# ---- the measure of the canary --------------------------------------------------------------------------------------


def test_the_projection_keeps_distances_within_its_promise() -> None:
    """Over many pairs of random logits the ratio of projected to true distance is 1 within a tenth, as N K = 64 gives."""
    generator = torch.Generator().manual_seed(4)
    ratios: list[float] = []
    for _ in range(60):
        x, y = (torch.randn(4, 977, generator=generator) for _ in range(2))
        true = ((x - x.mean(1, keepdim=True)) - (y - y.mean(1, keepdim=True))).norm()
        kept = (canary._project(x) - canary._project(y)).norm()  # pyright: ignore[reportPrivateUsage]
        ratios.append(float(kept / true))
    found = torch.tensor(ratios)
    assert abs(float(found.mean()) - 1) < 0.05
    assert float(found.std()) < 0.12


def test_adding_a_number_to_all_logits_changes_nothing_for_the_canary() -> None:
    x = torch.randn(3, 211, generator=torch.Generator().manual_seed(1))
    one, two = (canary._project(t) for t in (x, x + 7.0))  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_distance_is_infinite_for_what_cannot_be_compared() -> None:
    assert canary.distance([1.0, 2.0], [1.0, 2.0]) == 0
    assert canary.distance([3.0, 4.0], [0.0, 0.0]) > 1e20
    assert canary.distance([1.0], [1.0, 2.0]) == float("inf")
    assert canary.distance([float("nan")], [1.0]) == float("inf")
