"""Options from flags and files: read the same way, checked where they are built, refused with what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from graftlm.config import ChatConfig, CheckConfig, Config, GenerateConfig, ServeConfig, TrainConfig
from graftlm.errors import ConfigError

NEEDED = {"model": "m", "data": "d.jsonl", "out": "o"}


def built(**values: Any) -> TrainConfig:
    return TrainConfig.build({**NEEDED, **values})


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        built(**values)
    return str(error.value)


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig, CheckConfig])
def test_every_option_says_what_it_does(config: type[Config]) -> None:
    for name, field in config.model_fields.items():
        assert field.description, name
        assert not field.description.endswith("."), name


def test_an_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    assert refused(learning_rte=1) == "unknown option 'learning_rte', did you mean 'learning-rate'?"
    assert "did you mean 'batch-size'?" in refused(batchsize=4)
    assert refused(zzzz=1) == "unknown option 'zzzz'"


def test_hyphens_and_underscores_are_the_same_option() -> None:
    assert built(**{"learning-rate": 0.5}).learning_rate == built(learning_rate=0.5).learning_rate == 0.5


def test_an_option_under_both_spellings_is_refused(tmp_path: Path) -> None:
    assert "given twice" in refused(**{"learning-rate": 0.5, "learning_rate": 0.4})
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 1\nlearning_rate: 2\nmodel: m\ndata: d\nout: o\n")
    with pytest.raises(ConfigError, match="given twice"):
        TrainConfig.read(file, {})
    assert TrainConfig.read(file, {"learning_rate": 3.0}).learning_rate == 3


def test_options_that_are_missing_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.build({})
    assert str(error.value).splitlines() == [
        "model: required, give --model", "data: required, give --data", "out: required, give --out",
    ]  # fmt: skip


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError):
        built().rank = 3  # pyright: ignore


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_yaml_file_holds_options_and_flags_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: base\ndata: [a.jsonl, 'b.jsonl:0.5']\nout: runs/x\nmethod: qlora\nlearning-rate: 5e-4\nsteps: 30\n"
        "targets: q_proj, v_proj\nrank_pattern: {q_proj: 4, mlp: 32}\n"
    )
    config = TrainConfig.read(file, {"steps": 7, "rank": None})
    assert config.learning_rate == 5e-4  # YAML itself reads 5e-4 as a text
    assert config.data == ("a.jsonl", "b.jsonl:0.5")
    assert config.targets == ("q_proj", "v_proj")
    assert config.rank_pattern == {"q_proj": 4, "mlp": 32}
    assert (config.method, config.steps, config.rank) == ("qlora", 7, 16)


def test_a_file_and_flags_with_the_same_options_are_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d.jsonl\nout: o\nalpha-pattern: {q_proj: 2.5}\ntrainable-tokens: [<a>, '<b, c> ']\nepochs: 2\n"
    )
    flags = {**NEEDED, "alpha_pattern": ["q_proj=2.5"], "trainable_tokens": ["<a>", "<b, c> "], "epochs": 2.0}
    assert TrainConfig.read(file, {}) == TrainConfig.read(None, flags)


def test_json_is_yaml_and_a_saved_config_reads_back(tmp_path: Path) -> None:
    config = built(rank=5, targets=["attention", "mlp"], rank_pattern="q_proj=2", track="tensorboard", lora_dropout=0.1)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_json()))
    assert TrainConfig.read(file, {}) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "found list"),
        ("a: [1\n", "is not YAML"),
        ("", "found NoneType"),
        ("{rnk: 3}", "unknown option 'rnk'"),
    ],
)
def test_a_file_that_holds_no_options_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainConfig.read(file, {})


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config file: .*gone\.yaml"):
        TrainConfig.read(tmp_path / "gone.yaml", {})
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00\x9c")
    with pytest.raises(ConfigError, match="is not YAML"):
        TrainConfig.read(tmp_path / "model.yaml", {})


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank: must be greater than or equal to 1, found 0"),
        ({"rank": "many"}, "rank: must be a valid integer"),
        ({"alpha": 0}, "alpha: must be greater than 0, found 0"),
        ({"lora_dropout": 1.0}, "lora-dropout: must be less than 1, found 1.0"),
        ({"lora_dropout": -0.1}, "lora-dropout: must be greater than or equal to 0"),
        ({"learning_rate": 0}, "learning-rate: must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning-rate: must be"),
        ({"warmup_ratio": 1}, "warmup-ratio: must be less than 1"),
        ({"batch_size": 0}, "batch-size: must be greater"),
        ({"steps": 0}, "steps: must be greater"),
        ({"epochs": 0}, "epochs: must be greater than 0"),
        ({"seed": -1}, "seed: must be greater"),
        ({"seed": 1 << 31}, "seed: must be less"),
        ({"max_length": 1}, "max-length: must be greater than or equal to 2"),
        ({"keep_checkpoints": 0}, "keep-checkpoints: must be greater"),
        ({"method": "lorra"}, "method: must be 'full', 'lora' or 'qlora', found 'lorra'"),
        ({"base_precision": "fp8"}, "base-precision: must be 'float32', 'bfloat16', 'int8', 'nf4' or 'gguf', found 'fp8'"),
        ({"template_date": "today"}, "template-date: .*found 'today'"),
        ({"rank_pattern": "q_proj"}, "^rank-pattern: expected PATTERN=NUMBER, found 'q_proj'$"),
        ({"rank_pattern": "q_proj=0"}, "rank-pattern 'q_proj' must be at least 1, found 0"),
        ({"rank_pattern": 5}, "rank-pattern: expected PATTERN=NUMBER or a mapping of patterns to numbers, found 5$"),
        ({"alpha_pattern": 2.5}, "alpha-pattern: expected PATTERN=NUMBER or a mapping .* found 2.5$"),
        ({"rank_pattern": [5]}, "rank-pattern: expected PATTERN=NUMBER, found '5'$"),
        ({"trainable_tokens": ["<a>", ""]}, "trainable-tokens holds an empty token"),
        ({"alpha_pattern": "q_proj=-1"}, "alpha-pattern 'q_proj' must be above 0, found -1"),
        ({"targets": ""}, "targets is empty"),
        ({"data": []}, "data is empty"),
        ({"track": "tensorbord"}, "unknown tracker 'tensorbord', did you mean 'tensorboard'"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_what_was_found(values: dict[str, Any], message: str) -> None:
    import re

    assert re.search(message, refused(**values))


def test_all_wrong_values_are_named_at_once() -> None:
    lines = refused(rank=0, lora_dropout=2, steps="x").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["rank", "lora-dropout", "steps"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "qlora", "base_precision": "int8"},
            "qlora is lora on an nf4 base, found base-precision int8; take --method lora",
        ),
        ({"method": "full", "base_precision": "nf4"}, "needs 16 or 32 bits, found base-precision nf4"),
        ({"method": "full", "base_precision": "int8"}, "needs 16 or 32 bits, found base-precision int8"),
        ({"method": "lora", "init": "random"}, "needs --method full, found lora"),
        ({"method": "qlora", "init": "random"}, "needs --method full, found qlora"),
        ({"steps": 5, "epochs": 1}, "give --steps or --epochs, not both; found steps 5 and epochs 1"),
        ({"method": "full", "modules_to_save": "head"}, "leave --modules-to-save out"),
        ({"method": "full", "trainable_tokens": "<a>"}, "leave --trainable-tokens out"),
        ({"method": "full", "lora_dropout": 0.1}, "--lora-dropout is for an adapter and method full has none"),
        ({"method": "full", "dora": True}, "--dora is for an adapter"),
        ({"method": "full", "rank_pattern": "q=2"}, "--rank-pattern is for an adapter"),
        (
            {"method": "full", "rank": 16},
            "--rank is for an adapter and method full has none; leave it out, or take lora",
        ),
        ({"method": "full", "alpha": 4}, "--alpha is for an adapter"),
        ({"method": "full", "targets": "all-linear"}, "--targets is for an adapter"),
        ({"eval_every": 5}, "--eval-every needs eval rows; give --eval-data, such as 5%, or leave it out"),
        ({"eval_data": "v.jsonl:2"}, "'v.jsonl:2' has a weight, and every eval row counts once; give 'v.jsonl'"),
        ({"eval_data": "demo:0.5"}, "has a weight"),
        ({"method": "lora", "save_precision": "bfloat16"}, "--save-precision is for --method full"),
    ],
)
def test_options_that_exclude_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    assert message in refused(**values)


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"seed": 3}, {"top_p": 1.0}])
def test_options_of_sampling_are_refused_where_nothing_is_sampled(option: dict[str, Any]) -> None:
    needed = {"model": "m", "prompt": "p"}
    with pytest.raises(ConfigError, match=f"--{next(iter(option)).replace('_', '-')} is for sampling.*--temperature"):
        GenerateConfig.build({**needed, **option})
    with pytest.raises(ConfigError, match="temperature 1e-06 is greedy decoding"):
        GenerateConfig.build({**needed, **option, "temperature": 1e-6})
    GenerateConfig.build({**needed, **option, "temperature": 0.7})
    GenerateConfig.build(needed)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38, 100.5, -1e-300])
def test_a_temperature_beyond_its_bounds_is_refused(value: float) -> None:
    for config in (GenerateConfig, ChatConfig):
        with pytest.raises(ConfigError, match="temperature: must be"):
            config.build({"model": "m", "temperature": value, **({"prompt": "p"} if config is GenerateConfig else {})})


def test_check_refuses_a_weight_on_eval_data_too() -> None:
    with pytest.raises(ConfigError, match="has a weight"):
        CheckConfig.build({"data": "d.jsonl:2", "model": "m", "eval_data": "v.jsonl:2"})


def test_a_file_whose_name_ends_like_a_weight_may_be_eval_data(tmp_path: Path) -> None:
    (tmp_path / "rows:2").write_text("")
    assert built(eval_data=str(tmp_path / "rows:2")).eval_data == str(tmp_path / "rows:2")


def test_the_options_of_an_adapter_are_null_in_a_full_run_and_read_back() -> None:
    config = built(method="full", steps=3)
    values = config.to_json()
    assert [values[name] for name in ("rank", "alpha", "targets", "lora_dropout", "loraplus_lr_ratio")] == [None] * 5
    assert TrainConfig.build(values) == config
    assert built(method="lora").to_json()["rank"] == 16


def test_defaults_follow_the_method() -> None:
    assert [built(method=m).stored_precision for m in ("full", "lora", "qlora")] == ["float32", "bfloat16", "nf4"]
    assert [built(method=m).peak_learning_rate for m in ("full", "lora", "qlora")] == [2e-5, 2e-4, 2e-4]
    assert built(rank=5).scale_numerator == 10
    assert built(rank=5, alpha=3).scale_numerator == 3
    assert built(method="lora", base_precision="nf4").stored_precision == "nf4"


def test_lists_come_from_commas_repeats_and_lists_and_brackets_hold_together() -> None:
    assert built(targets="q_proj, v_proj").targets == ("q_proj", "v_proj")
    assert built(targets=["q_proj,v_proj", "mlp"]).targets == ("q_proj", "v_proj", "mlp")
    assert built(targets="layers.[0,1].*").targets == ("layers.[0,1].*",)
    assert built(trainable_tokens="<a, b> ").trainable_tokens == ("<a, b> ",)  # a token is what it is
    assert built(data="a,b.jsonl").data == ("a,b.jsonl",)  # a file's name may hold a comma


# ---- defaults of a device ----


def test_a_server_has_its_devices_defaults_where_nothing_was_given() -> None:
    def batch(device: str, **given: int) -> tuple[int, int]:
        config = ServeConfig.build({"model": "m", **given}).on(device)
        assert config.model_fields_set == {"model", *given}
        return config.max_num_seqs, config.max_num_batched_tokens

    assert batch("cpu") == (16, 256)
    assert batch("cuda") == (128, 4096)
    assert batch("cuda", max_num_seqs=300) == (300, 4096)
    assert batch("cuda", max_num_batched_tokens=64) == (64, 64)
    assert batch("cuda", max_num_batched_tokens=64, max_num_seqs=8) == (8, 64)
    assert batch("cpu", max_num_seqs=8) == (8, 256)
    with pytest.raises(ConfigError, match="256 are too few for a batch of 300"):
        batch("cpu", max_num_seqs=300)
    with pytest.raises(ConfigError, match="4 are too few for a batch of 16"):
        batch("cuda", max_num_batched_tokens=4)
