"""What a config of PEFT's names is what the file must hold: both read as PEFT does, and no pattern runs for long."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from graftlm.adapters import patterns
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters import targets as reading
from graftlm.adapters.attach import attach, detach
from graftlm.adapters.patterns import Expressions
from graftlm.adapters.targets import Targets
from graftlm.base.loading import Base, load_base
from graftlm.errors import AdapterError

Options = dict[str, Any]
ENDLESS = "(.*)*(.*)*(.*)*x"


def loaded(architecture: str) -> Base:
    return load_base(str(tiny.folder(architecture)), precision="float32", compute_dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def base() -> Base:
    return loaded("llama")


def changed(folder: Path, **options: Any) -> Path:
    """A folder of PEFT's with other entries in its config; None takes one away."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **options}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def everywhere(folder: Path, **options: Any) -> Path:
    """A folder of PEFT's with tensors on all linear layers, whose config says something else."""
    tiny.with_peft(tiny.plain(tiny.folder("llama")), tiny.peft_config(target_modules="all-linear")).save_pretrained(
        folder
    )
    return changed(folder, **options)


def refused(base: Base, folder: Path, *words: str) -> None:
    with pytest.raises(AdapterError) as error:
        adapter_format.load(base, folder)
    for word in words:
        assert word in str(error.value), str(error.value)


# ---- the same layers as PEFT ----------------------------------------------------------------------------------------

ACCEPTED: dict[str, Options] = {
    "ends of names": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "whole names": {"target_modules": ["model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"]},
    "a name that nothing has beside one": {"target_modules": ["q_proj", "query_key_value"]},
    "a regular expression": {"target_modules": r"model\.layers\.(0\.self_attn\.[qk]_proj|1\..*(?:up|down)_proj)"},
    "a lazy one": {"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)"},
    "an excluded end": {"target_modules": ["q_proj", "k_proj", "o_proj"], "exclude_modules": ["k_proj", "0.self_attn.o_proj"]},
    "an excluded expression": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*|.*mlp.*"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]},
    "layers behind a name": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "layers behind an expression": {
        "target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "lay[a-z]+"],
    },
    "a whole name in another layer": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1],
    },
    "a head that is trained whole and named": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "a head by its last letters": {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
    "a parameter": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    "a parameter alone": {"target_modules": [], "target_parameters": ["0.mlp.up_proj.weight"]},
    "ranks of names and expressions": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 5, r"^model\.layers\.1\.mlp.*": 2, "0.*[vo]_proj": 4},
        "alpha_pattern": {"self_attn.(k|v)_proj": 7, "up_proj": 1},
    },
    "ranks of parameters": {
        "target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"],
        "rank_pattern": {"up_proj": 5, r"0\.mlp\.up_proj\.weight": 2}, "alpha_pattern": {"1.mlp.up_proj.weight": 9},
    },
}  # fmt: skip


@pytest.mark.parametrize("which", ACCEPTED)
def test_a_config_that_peft_wrote_is_read_with_pefts_layers_and_logits(base: Base, tmp_path: Path, which: str) -> None:
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(**ACCEPTED[which]))
    peft.save_pretrained(tmp_path)
    adapter = adapter_format.load(base, tmp_path)
    attach(base, adapter)
    try:
        found = tiny.base_logits(base, tiny.ids())
    finally:
        detach(base)
    tiny.close(found, tiny.plain_logits(peft, tiny.ids()))
    kept = {
        re.sub(r"^base_model\.model\.|\.(lora_[AB]|weight).*", "", name)
        for name in load_file(tmp_path / "adapter_model.safetensors") if not name.endswith("base_layer.weight")
    }  # fmt: skip
    assert set(adapter.slots) == kept


REFUSED: dict[str, tuple[Options, str]] = {
    "one of seven kinds": ({"target_modules": ["q_proj"]}, "target_modules ['q_proj'] does not name it"),
    "nothing that is there": ({"target_modules": ["nosuch"]}, "name no layer of this base"),
    "nothing that is there, misspelt": ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'?"),
    "an expression for one layer": ({"target_modules": r".*\.0\..*_proj"}, "does not name it"),
    "an expression for nothing": ({"target_modules": "q_proj"}, "name no layer of this base"),
    "no targets": ({"target_modules": []}, "name no layer of this base"),
    "targets that are missing": ({"target_modules": None}, "target_modules is missing"),
    "an excluded kind": ({"exclude_modules": ["q_proj"]}, "exclude_modules names it"),
    "an excluded layer": ({"exclude_modules": r".*\.1\..*"}, "exclude_modules names it"),
    "one of two layers": ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                           "layers_to_transform": [0]}, "layers_to_transform [0] leaves its layer out"),
    "layers behind a name that is not there": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"}, "name no layer of this base"),
    "layers with an expression": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform needs"),
    "a pattern without layers": ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    "everything trained whole": ({"modules_to_save": ["model"]}, "name no layer of this base"),
    "a layer trained whole": ({"target_modules": ["k_proj"], "modules_to_save": ["0.self_attn.q_proj"]},
                              "neither this base's embedding nor its head"),
    "a norm trained whole": ({"modules_to_save": ["norm"]}, "neither this base's embedding nor its head; it matches"),
    "modules that are a word": ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
    "an embedding as a target": ({"target_modules": ["q_proj", "embed_tokens"]}, "names 'model.embed_tokens' too"),
    "a norm as a target": ({"target_modules": ["q_proj", "norm"]}, "names 'model.norm' too"),
    "all modules": ({"target_modules": ".*"}, "names 'model' too"),
    "a layer in both ways": ({"target_parameters": ["q_proj.weight"]}, "both name 'model.layers.0.self_attn.q_proj'"),
    "all weights as parameters": ({"target_modules": [], "target_parameters": ["weight"]}, "which Graft cannot adapt"),
    "parameters that are a word": ({"target_parameters": "q_proj.weight"}, "target_parameters is 'q_proj.weight'"),
    "a rank that is no whole number": ({"r": 3.5}, "r is 3.5"),
    "a rank by pattern that is no whole number": ({"rank_pattern": {"q_proj": 3.5}}, "r is 3.5"),
    "an alpha beyond every number": ({"lora_alpha": 10**299}, "lora_alpha is 1000"),
    "an alpha that is no number to read": ({"lora_alpha": 10**400}, "a number of 401 digits"),
    "an alpha beyond sense": ({"alpha_pattern": {"q_proj": 1e30}}, "lora_alpha is 1e+30"),
    "a switch in words": ({"use_rslora": "no"}, "use_rslora is 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_what_the_file_holds_and_its_config_leaves_out_is_refused_by_name(
    base: Base, tmp_path: Path, which: str
) -> None:
    options, words = REFUSED[which]
    refused(base, everywhere(tmp_path / "a", **options), words)


def test_an_embedding_that_the_head_would_follow_is_refused(tmp_path: Path) -> None:
    base = loaded("qwen3")
    options: Options = {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(**options))
    peft.save_pretrained(tmp_path)
    refused(base, tmp_path, "ensure_weight_tying = True makes this base's head follow")


LISTS: tuple[Options, ...] = tuple(
    {"target_modules": targets, **rest}
    for targets, rest in itertools.product(
        (["q_proj"], ["self_attn.q_proj", "model.layers.1.mlp.up_proj"], ["proj"], ["model"], r".*q_proj", r".*[02]\..*"),
        ({}, {"exclude_modules": ["0.self_attn.q_proj"]}, {"exclude_modules": r".*\.1\.[^.]*\.q_proj"},
         {"modules_to_save": ["self_attn"]}, {"modules_to_save": ["layers.[0-1]"]}, {"layers_to_transform": [0]},
         {"layers_to_transform": 1, "layers_pattern": ["h", "layers"]}, {"layers_to_transform": [1], "layers_pattern": ".*"}),
    )
    if not (isinstance(targets, str) and "layers_to_transform" in rest)
)  # fmt: skip


@pytest.mark.parametrize("options", LISTS, ids=str)
def test_a_module_is_a_target_where_it_is_one_to_peft(base: Base, options: Options) -> None:
    theirs, ours = tiny.peft_config(**options), Targets(options, "here")
    for name, _ in tiny.plain(base.folder).named_modules():
        wanted = check_target_module_exists(theirs, name) if name else None
        assert name == "" or (ours.left_out(name, True) is None) == bool(wanted), name


KEYS = ("q_proj", "self_attn.q_proj", r"layers\.1\.mlp\.up_proj", "layers.1.mlp.up_proj", "^model.layers.0.*", "[kq]_proj",
        "0|1", r".*up_proj", "", "proj", "model", r"\d", r"mlp\..{2,4}_proj", "(a|b)?_proj", "k_(?P<x>proj)",
        "(?:q|v)_proj$")  # fmt: skip


def test_the_first_pattern_that_fits_a_name_is_pefts(base: Base) -> None:
    names = [name for name, _ in tiny.plain(base.folder).named_modules() if name]
    for keys in [*((key,) for key in KEYS), *itertools.permutations(KEYS, 2)]:
        ours = Expressions("here").values("rank_pattern", {key: key for key in keys})
        for name in names:
            assert ours.of(name, name) == get_pattern_key(keys, name), (keys, name)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_modules_and_parameters_are_those_of_the_model_without_graft(architecture: str) -> None:
    base, plain = loaded(architecture), tiny.plain(tiny.folder(architecture))
    assert {name for name, _ in reading._modules(base)} == {name for name, _ in plain.named_modules() if name}
    wanted = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    assert set(reading._parameters(base)) == wanted


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
@pytest.mark.parametrize("targets", [["q_proj", "gate"], r".*layers\.1\.self_attn\.(q|v)_proj"], ids=str)
def test_names_of_transformers_4_in_a_mixture_are_what_peft_makes_of_them(
    architecture: str, targets: Any, tmp_path: Path
) -> None:
    base = loaded(architecture)
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(target_modules=targets))
    peft.save_pretrained(tmp_path)
    changed(tmp_path, target_modules=targets, target_parameters=[])  # PEFT writes down what it made of them
    expected = tiny.plain_logits(tiny.read_peft(tiny.plain(base.folder), tmp_path), tiny.ids())
    attach(base, adapter_format.load(base, tmp_path))
    tiny.close(tiny.base_logits(base, tiny.ids()), expected)


def test_experts_of_transformers_4_are_refused(tmp_path: Path) -> None:
    base = loaded("qwen3_moe")
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(target_modules="all-linear"))
    peft.save_pretrained(tmp_path)
    assert adapter_format.load(base, tmp_path).slots, "as PEFT saves it, it is read"
    refused(
        base, changed(tmp_path, target_modules="all-linear"), "an expert's matrix of transformers 4", "save it again"
    )


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
@pytest.mark.parametrize("kind", ["gate", "down_proj", "gate_up_proj"])
def test_peft_reads_a_rank_of_its_own_on_what_is_a_parameter_to_it(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    base = loaded(architecture)
    adapter = tiny.adapted(base, ranks={kind: 2}, alphas={kind: 7.0})
    adapter_format.save(base, adapter, tmp_path, {})
    peft = tiny.read_peft(tiny.plain(base.folder), tmp_path)
    tiny.close(tiny.plain_logits(peft, tiny.ids()), tiny.base_logits(base, tiny.ids()))
    again = adapter_format.load(base, tmp_path)
    assert {n: s.rank for n, s in again.slots.items()} == {n: s.rank for n, s in adapter.slots.items()}  # type: ignore[union-attr]


# ---- patterns of a file ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ENDLESS}, {"rank_pattern": {ENDLESS: 4}}, {"alpha_pattern": {ENDLESS: 4}},
        {"exclude_modules": ENDLESS}, {"modules_to_save": [ENDLESS]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]},
        {"rank_pattern": {f"^{ENDLESS}{i}": 3 for i in range(1000)}},
    ],
    ids=lambda options: next(reversed(options)),
)  # fmt: skip
def test_a_pattern_that_backtracks_for_ever_is_done_with_at_once(base: Base, tmp_path: Path, options: Options) -> None:
    folder = everywhere(tmp_path / "a", **options)
    started = time.monotonic()
    with contextlib.suppress(AdapterError):
        adapter_format.load(base, folder)
    assert time.monotonic() - started < 20


ODD = {
    "(?!lm_head).*q_proj": "a lookahead", r"model(?=\.).*q_proj": "a lookahead", "(?<=a)q": "a lookbehind",
    r"(q)_\1": "invalid escape sequence", "(?P<a>q)(?P=a)": "a backreference", "(?>q)_proj": "an atomic group",
    "q++": "bad repetition", "q{,3}": "{0,n}", "[[:alpha:]]_proj": "'[:'", r"q\Z": "invalid escape", "q{2000}": "repetition",
}  # fmt: skip


@pytest.mark.parametrize("pattern", ODD)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_what_the_engine_has_not_is_refused_with_the_pattern_the_feature_and_the_way_out(
    tmp_path: Path, key: str, pattern: str
) -> None:
    folder = everywhere(tmp_path / "a", **{key: {pattern: 3} if key.endswith("_pattern") else pattern})
    with pytest.raises(AdapterError) as error:
        adapter_format.inspect_folder(folder)  # so that it is not published either
    for word in (key, repr(pattern), ODD[pattern], "RE2", "write the names of the layers instead"):
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "pattern", ["*q_proj", "(", "(" * 3000 + ")" * 3000, "a{99999999999}", r"\Qq\E", "x{2,1}", "\ud800"]
)
def test_what_is_no_regular_expression_is_refused(tmp_path: Path, pattern: str) -> None:
    folder = everywhere(tmp_path / "a", target_modules=pattern)
    with pytest.raises(AdapterError, match="is not a regular expression"):
        adapter_format.inspect_folder(folder)


LARGE: dict[str, Callable[[], dict[str, int]]] = {
    "names": lambda: {f"q_proj{i}": 2 for i in range(patterns.MOST_NAMES + 1)},
    "expressions": lambda: {f"q_pro.{i}": 2 for i in range(patterns.MOST_EXPRESSIONS + 1)},
    "characters": lambda: {"q." * (patterns.MOST_CHARACTERS // 2 + 1): 2},
    "instructions": lambda: {f"(.{{0,30}}){{0,30}}{i}": 2 for i in range(20)},
    "memory": lambda: {"((.{1,100}){1,9}){1,1}|" * 200: 2},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", LARGE)
def test_the_patterns_of_a_file_have_a_bound(what: str) -> None:
    with pytest.raises(AdapterError, match=r"at most [\d,]+ are allowed|pattern too large"):
        Targets({"target_modules": ["q_proj"], "rank_pattern": LARGE[what]()}, "here")


@pytest.mark.timeout(60)
def test_a_rank_for_every_layer_of_the_largest_models_is_read() -> None:
    names = [
        f"model.layers.{i}.self_attn.{m}_proj" for i in range(126) for m in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    config = {"target_modules": names, "rank_pattern": {re.escape(name): i for i, name in enumerate(names)},
              "alpha_pattern": {f"^{name}": i for i, name in enumerate(names)}}  # fmt: skip
    found = Targets(config, "here")
    for i in (0, 400, 881):
        assert (found.ranks.of(names[i], -1), found.alphas.of(names[i], -1)) == (i, i)


@pytest.mark.timeout(60)
def test_a_glob_of_our_own_options_is_quick_whatever_it_is() -> None:
    assert not patterns.matches("a" * 200, "*a" * 60 + "*b")
    assert patterns.matches("model.layers.3.self_attn.q_proj", "*.3.*q_proj")


def test_a_value_that_makes_no_finite_logits_is_refused_without_a_manifest_too(base: Base, tmp_path: Path) -> None:
    folder = everywhere(tmp_path / "a")
    named = load_file(folder / "adapter_model.safetensors")
    save_file({n: torch.full_like(t, 1e30) for n, t in named.items()}, folder / "adapter_model.safetensors")
    refused(base, folder, "its logits are not finite")
