"""Lines of other programs' configurations are taken or answered, and so are the names that options had before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from graftlm.cli import app
from graftlm.config import (
    CompareConfig,
    Config,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
)
from graftlm.config.aliases import ALIASES, FORMER, renamed, renamed_summary
from graftlm.config.answers import ANSWERS
from graftlm.config.translate import JOINT, foreign_names
from graftlm.errors import ConfigError

NEEDED = {"model": "m", "data": "d.jsonl", "out": "o"}
CONFIGS: tuple[type[Config], ...] = (
    TrainConfig, CompareConfig, SweepConfig, ServeConfig, GenerateConfig, ExportConfig, PlanConfig,
)  # fmt: skip


def built(text: str, **more: Any) -> TrainConfig:
    """`text` holds lines of YAML; what a run needs besides is added."""
    given = yaml.safe_load(text) or {}
    named = TrainConfig.named(given)
    return TrainConfig.build({**{k: v for k, v in NEEDED.items() if k not in named}, **given, **more})


def refused(text: str, config: type[Config] = TrainConfig, **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        built(text, **more) if config is TrainConfig else config.build({"model": "m", **yaml.safe_load(text), **more})
    return str(error.value)


# ---- one configuration of each program -------------------------------------------------------------------------------


def test_a_configuration_of_trl_and_peft_means_the_same_here() -> None:
    config = built("""
        model_name_or_path: Qwen/Qwen3-0.6B
        dataset_name: train.jsonl
        output_dir: runs/trl
        max_length: 1024
        truncation_mode: keep_start
        packing: true
        assistant_only_loss: true
        num_train_epochs: 2
        per_device_train_batch_size: 4
        gradient_accumulation_steps: 8
        gradient_checkpointing: true
        gradient_checkpointing_kwargs: {use_reentrant: false}
        learning_rate: 2.0e-4
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        weight_decay: 0.01
        max_grad_norm: 0.3
        optim: adamw_torch_fused
        adam_beta2: 0.95
        bf16: true
        eval_strategy: steps
        eval_dataset: valid.jsonl
        eval_steps: 50
        save_strategy: steps
        save_steps: 100
        save_total_limit: 3
        logging_steps: 10
        load_best_model_at_end: true
        report_to: tensorboard
        seed: 7
        r: 32
        lora_alpha: 64
        lora_dropout: 0.05
        target_modules: [q_proj, v_proj]
        use_rslora: true
        bias: none
        task_type: CAUSAL_LM
    """)
    assert config == TrainConfig.build({
        "model": "Qwen/Qwen3-0.6B", "data": "train.jsonl", "out": "runs/trl", "max_length": 1024, "overlong": "truncate",
        "train_on": "all-assistant", "epochs": 2, "batch_size": 32, "activation_checkpointing": True, "learning_rate": 2e-4,
        "lr_scheduler": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.01, "max_grad_norm": 0.3, "optimizer": "adamw",
        "beta2": 0.95, "eval_data": "valid.jsonl", "eval_every": 50, "save_every": 100, "keep_checkpoints": 3,
        "track": "tensorboard", "seed": 7, "rank": 32, "alpha": 64, "lora_dropout": 0.05, "targets": ["q_proj", "v_proj"],
        "rank_stabilized": True,
    })  # fmt: skip


def test_a_configuration_of_axolotl_means_the_same_here() -> None:
    config = built("""
        base_model: NousResearch/Llama-3.2-1B
        load_in_4bit: true
        load_in_8bit: false
        strict: false
        datasets:
          - path: teknium/GPT4-LLM-Cleaned
            type: alpaca
        dataset_prepared_path: last_run_prepared
        val_set_size: 0.05
        output_dir: ./outputs/qlora-out
        adapter: qlora
        lora_model_dir:
        sequence_len: 2048
        sample_packing: true
        excess_length_strategy: drop
        train_on_inputs: false
        lora_r: 32
        lora_alpha: 16
        lora_dropout: 0.05
        lora_target_linear: true
        loraplus_lr_ratio: 16
        gradient_accumulation_steps: 4
        micro_batch_size: 2
        num_epochs: 1
        optimizer: adamw_bnb_8bit
        lr_scheduler: cosine
        learning_rate: 0.0002
        bf16: auto
        tf32: false
        gradient_checkpointing: true
        resume_from_checkpoint:
        logging_steps: 1
        flash_attention: true
        use_wandb: true
        weight_decay: 0.0
    """)
    assert config == TrainConfig.build({
        "model": "NousResearch/Llama-3.2-1B", "base_precision": "nf4", "data": ["teknium/GPT4-LLM-Cleaned"],
        "eval_data": "5%", "out": "./outputs/qlora-out", "method": "qlora", "max_length": 2048, "overlong": "drop",
        "train_on": "all-assistant", "rank": 32, "alpha": 16, "lora_dropout": 0.05, "targets": "all-linear",
        "loraplus_lr_ratio": 16, "batch_size": 8, "epochs": 1, "optimizer": "adamw-8bit", "lr_scheduler": "cosine",
        "learning_rate": 2e-4, "activation_checkpointing": True, "track": "wandb", "weight_decay": 0.0,
    })  # fmt: skip


def test_a_configuration_of_llama_factory_means_the_same_here() -> None:
    config = built("""
        model_name_or_path: meta-llama/Llama-3.2-1B-Instruct
        trust_remote_code: true
        quantization_bit: 8
        stage: sft
        do_train: true
        finetuning_type: lora
        lora_rank: 8
        lora_target: all
        additional_target: embed_tokens,lm_head
        dataset: data/rows.jsonl
        cutoff_len: 512
        mask_history: true
        overwrite_cache: true
        preprocessing_num_workers: 16
        output_dir: saves/lora
        plot_loss: true
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        max_steps: 200
        num_train_epochs: 3.0
        warmup_steps: 20
        lr_scheduler_type: constant_with_warmup
        ddp_timeout: 180000000
        report_to: none
    """)
    assert config == TrainConfig.build({
        "model": "meta-llama/Llama-3.2-1B-Instruct", "trust_remote_code": True, "base_precision": "int8", "method": "lora",
        "rank": 8, "targets": "all-linear", "modules_to_save": "embeddings,head", "data": "data/rows.jsonl",
        "max_length": 512, "train_on": "last-assistant", "out": "saves/lora", "batch_size": 8, "steps": 200,
        "warmup_ratio": 0.1, "lr_scheduler": "constant",
    })  # fmt: skip


def test_options_of_vllm_mean_the_same_for_the_server() -> None:
    given = {"model": "m", "max_num_seqs": 4, "max_num_batched_tokens": 512, "max_loras": 3, "dtype": "bfloat16"}
    more = {"kv_cache_memory_bytes": "2G", "enable_lora": True, "enable_prefix_caching": True, "port": 9000}
    config = ServeConfig.build({**given, **more})
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_loras) == (4, 512, 3)
    assert (config.base_precision, config.kv_cache_gb, config.port) == ("bfloat16", 2.0, 9000)
    assert "--adapter-memory-gb" in refused("max_cpu_loras: 4", ServeConfig)
    assert "--max-output-tokens" in refused("max-model-len: 4096", ServeConfig)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("load_in_8bit: true", "base_precision", "int8"),
        ("bf16: false", "compute_dtype", "float32"),
        ("fp16: false", "compute_dtype", None),
        ("bnb_4bit_compute_dtype: torch.bfloat16", "compute_dtype", "bfloat16"),
        ("val_set_size: 0", "eval_data", None),
        ("max_steps: -1", "steps", None),
        ("warmup_steps: 0.2", "warmup_ratio", 0.2),
        ("steps: 40\nwarmup_steps: 10", "warmup_ratio", 0.25),
        ("max_steps: 40\neval_data: 5%\neval_steps: 0.25", "eval_every", 10),
        ("report_to: [wandb, mlflow]", "track", ("wandb", "mlflow")),
        ("report_to: none", "track", ()),
        ("batch_size: 32\nmicro_batch_size: 2", "batch_size", 32),
        ("per_device_train_batch_size: 3", "batch_size", 3),
        ("per_device_train_batch_size: 3\nnum_processes: 4\ngradient_accumulation_steps: 2", "batch_size", 24),
        ("nproc_per_node: 2", "ranks", 2),
        ("gradient_checkpointing: unsloth", "activation_checkpointing", True),
        ("datasets: [{path: a.jsonl, type: chat_template}, b.jsonl]", "data", ("a.jsonl", "b.jsonl")),
        ("target_modules: all-linear", "targets", ("all-linear",)),
        ("max-seq-length: 99", "max_length", 99),
    ],
)
def test_values_are_translated_with_their_names(text: str, field: str, value: Any) -> None:
    assert getattr(built(text), field) == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("fp16: true", "--compute-dtype bfloat16"),
        ("val_set_size: 500", "a share such as --eval-data 5%"),
        ("quantization_bit: 3", "nf4 or int8"),
        ("optim: lion_32bit", "--optimizer adamw or adamw-8bit"),
        ("lr_scheduler_type: polynomial", "--lr-scheduler cosine, linear or constant"),
        ("lr_scheduler: polynomial", "must be 'cosine', 'linear' or 'constant', found 'polynomial'"),
        ("warmup_steps: 10", "--warmup-ratio"),
        ("eval_steps: 0.1", "--steps"),
        ("gradient_accumulation_steps: 4", "--batch-size"),
        ("dataset_text_field: body", "graft check"),
        ("bias: all", "--modules-to-save"),
        ("init_lora_weights: pissa", "A starts random"),
        ("push_to_hub: true", "graft adapters push"),
        ("deepspeed: ds.json", "--ranks N"),
        ("stage: dpo", "supervised"),
        ("trainable_token_indices: [1, 2]", "--trainable-tokens"),
        ("neftune_noise_alpha: 5", "no noise"),
        ("datasets: [{path: a, roles: {}}]", "'roles' of a dataset"),
        ("load_in_4bit: maybe", "expected true or false, found 'maybe'"),
    ],
)
def test_what_has_no_counterpart_is_answered_with_what_to_write(text: str, answer: str) -> None:
    assert answer in refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "rank: 4\nlora_r: 4", "lora_r: 4\nr: 4", "max_length: 9\nmax-seq-len: 9", "precision: nf4\nbase_precision: nf4",
        "warmup_steps: 0\nwarmup_ratio: 0.1", "batch_size: 4\nper_device_train_batch_size: 4",
        "load_in_4bit: true\nload_in_8bit: true",
    ],
)  # fmt: skip
def test_an_option_under_two_names_is_refused(text: str) -> None:
    assert "given twice" in refused(text)


def test_a_flag_under_one_name_wins_over_a_file_under_another(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nout: o\nlora_r: 4\nwarmup_steps: 5\nprecision: int8\n")
    config = TrainConfig.read(file, {"rank": 9, "steps": 20, "base_precision": "bfloat16"})
    assert (config.rank, config.warmup_ratio, config.base_precision) == (9, 0.25, "bfloat16")
    assert TrainConfig.read(file, {"lora_rank": 8, "steps": 20}).rank == 8


def test_names_that_nobody_has_are_refused_with_the_nearest() -> None:
    assert refused("max_lenght: 3") == "unknown option 'max_lenght', did you mean 'max-length'?"
    assert "unknown option 'max_num_seqs'" in refused("max_num_seqs: 3")  # another command's
    assert "--methods" in refused("data: d\nload_in_4bit: true", CompareConfig)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_seq_length", "64", "--lora_r=3", "--load-in-4bit", "--report_to", "wandb"],
        ["--cutoff-len", "64", "--lora-rank", "3", "--load_in_4bit", "--use-wandb"],
        ["--max-length", "64", "--rank", "3", "--base-precision", "nf4", "--track", "wandb"],
    ],
)
def test_the_command_line_takes_them_too(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[TrainConfig] = []
    read = TrainConfig.read

    def keep(path: Any, given: dict[str, Any]) -> TrainConfig:
        heard.append(read(path, given))
        raise ConfigError("enough")

    monkeypatch.setattr(TrainConfig, "read", keep)
    CliRunner().invoke(app, ["train", "--model", "m", "--data", "d", "--out", "o", *flags])
    assert [(c.max_length, c.rank, c.base_precision, c.track) for c in heard] == [(64, 3, "nf4", ("wandb",))]


def test_the_command_line_answers_what_has_no_option_and_hides_what_it_takes() -> None:
    found = CliRunner().invoke(app, ["train", "--model", "m", "--packing"])
    assert found.exit_code == 2
    assert "always packed" in found.output
    shown = CliRunner().invoke(app, ["train", "--help"]).output
    assert "--rank" in shown
    assert "--lora-r" not in shown.replace("--lora-rank", "")


# ---- names of before -------------------------------------------------------------------------------------------------


def test_files_of_before_have_todays_names_and_values() -> None:
    before = {
        "precision": "nf4",
        "compute": "mixed",
        "too_long": "cut",
        "train_on": "last",
        "schedule": "linear",
        "rank": 4,
    }
    now = {"base_precision": "nf4", "compute_dtype": "bf16-mixed", "overlong": "truncate", "train_on": "last-assistant",
           "lr_scheduler": "linear", "rank": 4}  # fmt: skip
    assert renamed(before) == now
    assert renamed(now) == now
    assert renamed_summary({"compute": "mixed", "trained_tokens": 3}) == {
        "compute_dtype": "bf16-mixed",
        "target_tokens": 3,
    }


def test_yaml_of_before_is_read() -> None:
    config = built("precision: nf4\ncompute: mixed\nmax-tokens-per-document: 9\ntoo-long: cut\nschedule: linear\nwarmup: 0.5\n"
                   "dropout: 0.1\nb-learning-rate-ratio: 2\ntrain-tokens: [x]\ntokens-per-pass: 8\ntrain-on: last")  # fmt: skip
    assert config == built("base-precision: nf4\ncompute-dtype: bf16-mixed\nmax-length: 9\noverlong: truncate\n"
                           "lr-scheduler: linear\nwarmup-ratio: 0.5\nlora-dropout: 0.1\nloraplus-lr-ratio: 2\n"
                           "trainable-tokens: [x]\nmicro-batch-tokens: 8\ntrain-on: last-assistant")  # fmt: skip
    served = ServeConfig.build({"model": "m", "running": 3, "cache_gb": 1, "adapter-slots": 3, "max_seconds": 9})
    assert (served.max_num_seqs, served.kv_cache_gb, served.max_loras, served.request_timeout) == (3, 1, 3, 9)


def test_a_sweep_and_a_comparison_take_an_option_by_its_name_of_before() -> None:
    config = SweepConfig.build({"model": "m", "data": "d", "search": {"dropout": "0.1|0.2", "warmup": "0..0.5"}})
    assert set(config.space) == {"lora_dropout", "warmup_ratio"}
    given = {"model": "m", "data": "d", "methods": ["lora:dropout=0.1:schedule=linear"]}
    assert CompareConfig.build(given).variants[0].own == {"lora_dropout": "0.1", "lr_scheduler": "linear"}


def test_the_best_model_is_chosen_by_the_score_that_transformers_names() -> None:
    scored = "eval_dataset: v.jsonl\nload_best_model_at_end: true\n"
    for name, kind in (
        ("exact_match", "exact-match"),
        ("eval_rougeL", "rouge-l"),
        ("bleu", "bleu"),
        ("rouge-l", "rouge-l"),
    ):
        config = built(f"{scored}metric_for_best_model: {name}\ngreater_is_better: true\npredict_with_generate: true")
        assert (config.score, config.best_by) == (kind, "score")
    config = built(f"{scored}metric_for_best_model: eval_score\nscore: my.py:points")
    assert (config.score, config.best_by) == ("my.py:points", "score")
    assert built(f"{scored}metric_for_best_model: eval_points\nscore: my.py:points").best_by == "score"
    for text in ("eval_loss", "loss\ngreater_is_better: false\npredict_with_generate: false"):
        config = built(f"{scored}metric_for_best_model: {text}")
        assert (config.score, config.best_by) == (None, "loss")
    assert built(f"{scored}score: bleu\npredict_with_generate: true\neval_max_new_tokens: 40").score_max_tokens == 40
    assert built("metric_for_best_model:\ngreater_is_better:\npredict_with_generate:").best_by == "loss"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric_for_best_model: eval_f1", "metric_for_best_model 'eval_f1': no such score is taken; give --score"),
        ("metric_for_best_model: bleu\nscore: rouge-l", "is not the score that is taken, --score rouge-l"),
        ("metric_for_best_model: bleu\nbest_by: loss", "given twice; keep one of 'best_by' and 'metric_for_best_model'"),
        ("metric_for_best_model: bleu\ngreater_is_better: false", "greater_is_better False: the lower eval loss or the higher"),
        ("metric_for_best_model: loss\ngreater_is_better: true", "greater_is_better True: the lower eval loss or the higher"),
        ("predict_with_generate: true", "predict_with_generate True: give --score exact-match"),
        ("score: bleu\npredict_with_generate: false", "predict_with_generate False: give --score"),
        ("metric_for_best_model: eval_score", "--best-by score needs a score; give --score"),
        ("do_causal_lm_eval: true", "give --score exact-match"),
    ],
)  # fmt: skip
def test_a_best_model_that_cannot_be_chosen_so_is_answered(text: str, message: str) -> None:
    assert message in refused(f"eval_dataset: v.jsonl\n{text}")


def test_a_sweep_and_a_comparison_answer_how_the_best_model_is_chosen() -> None:
    for config in (SweepConfig, CompareConfig):
        given = {"data": "d", **({"search": {"rank": "2..4"}} if config is SweepConfig else {})}
        assert "is not Graft's" in refused("metric_for_best_model: bleu", config, **given)
        assert "--metric exact-match" in refused("predict_with_generate: true", config, **given)
        config.build({"model": "m", **given, "metric_for_best_model": "eval_loss", "greater_is_better": False})


# ---- the tables ------------------------------------------------------------------------------------------------------


def test_every_alias_leads_to_an_option_and_none_hides_one() -> None:
    fields = {field for config in CONFIGS for field in config.model_fields}
    for name, meanings in ALIASES.items():
        assert {alias.field for alias in meanings} <= fields, name
    assert set(FORMER.values()) <= fields
    assert set(JOINT.values()) <= fields
    for config in CONFIGS:
        assert not set(foreign_names(config.model_fields, config.command())) & set(config.model_fields)


def test_what_is_answered_is_no_option_of_training() -> None:
    assert not set(ANSWERS) & set(TrainConfig.model_fields)
    assert all(answer.text and not answer.text.endswith(".") for answer in ANSWERS.values())
