"""Other names of options: those of TRL, PEFT, Axolotl, LLaMA-Factory and vLLM, and former names of Graft's own options.

    FORMER    former name -> today's field; `renamed` reads files that were written with former names
    ALIASES   foreign name -> the field it means here, with its value translated
    ANSWERS   (answers.py) foreign name without a field here -> what to write instead

A line copied from one of these programs either works or is refused with what to write instead. A value that asks for what Graft
does anyway, or that does not change the result, is dropped (`harmless`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from graftlm.config.answers import ANSWERS, OptionAnswer

FORMER: dict[str, str] = {
    "precision": "base_precision", "compute": "compute_dtype", "max_tokens_per_document": "max_length",
    "too_long": "overlong", "tokens_per_pass": "micro_batch_tokens", "schedule": "lr_scheduler", "warmup": "warmup_ratio",
    "dropout": "lora_dropout", "b_learning_rate_ratio": "loraplus_lr_ratio", "train_tokens": "trainable_tokens",
    "running": "max_num_seqs", "step_tokens": "max_num_batched_tokens", "adapter_slots": "max_loras",
    "adapter_gb": "adapter_memory_gb", "cache_gb": "kv_cache_gb", "keys": "api_keys", "max_seconds": "request_timeout",
}  # fmt: skip
"""Names that options had in Graft 0.1 before its first release, and today's."""

FORMER_VALUES: dict[str, dict[str, str]] = {
    "compute_dtype": {"mixed": "bf16-mixed"},
    "overlong": {"cut": "truncate"},
    "train_on": {"all": "all-assistant", "last": "last-assistant"},
}
"""Values that were renamed, by today's field."""

FORMER_FIGURES: dict[str, str] = {
    "trained_tokens": "target_tokens", "trained_parameters": "trainable_parameters", "compute": "compute_dtype",
    "tokens": "num_tokens",
}  # fmt: skip
"""Keys of a run's summary that were renamed."""


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a file on disk under today's names and with today's values; other names are left as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        field = FORMER.get(name, name)
        if field == name or field not in values:
            found[field] = former_value(field, value)
    return found


def former_value(field: str, value: Any) -> Any:
    """A value as it is written today; `field` is today's name."""
    return FORMER_VALUES.get(field, {}).get(value, value) if isinstance(value, str) else value


def renamed_summary(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary under today's names."""
    found = {FORMER_FIGURES.get(name, name): value for name, value in values.items()}
    return {name: former_value(name, value) for name, value in found.items()}


# ---- what a foreign name means ---------------------------------------------------------------------------------------


class _LeftOut:
    """Marks a value that means the same as not giving the option."""


LEFT_OUT = _LeftOut()
Translate = Callable[[Any], Any]


@dataclass(frozen=True)
class Alias:
    """A foreign name of one field."""

    field: str
    translate: Translate | None = None
    """Translate the value; LEFT_OUT for the default. Raises ValueError with what to write instead."""
    commands: Collection[str] = ()
    """The commands in which the name means this; all if empty."""
    switch: bool = False
    """Whether the option is boolean, so that its flag takes no value."""


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0", "none", ""):
        return False
    raise ValueError(f"expected true or false, found {value!r}")


def number(value: Any) -> float:
    """A number, from YAML or the command line. Raises ValueError."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number, found {value!r}") from None


def _when(true: Any = LEFT_OUT, false: Any = LEFT_OUT) -> Translate:
    return lambda value: true if _truth(value) else false


def _among(known: Mapping[str, Any], way_out: str) -> Translate:
    """Translate the `known` values; raise ValueError with `way_out` for others."""

    def translate(value: Any) -> Any:
        name = str(value).strip().lower()
        if name not in known:
            raise ValueError(f"'{value}' has no counterpart here; {way_out}")
        return known[name]

    return translate


def _plain_list(value: Any) -> list[str]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else [str(part) for part in value]


def _targets(value: Any) -> Any:
    if isinstance(value, str) and value.strip().lower() in ("all", "all-linear"):
        return ("all-linear",)
    return value


def _save_modules(value: Any) -> Any:
    names = {"embed_tokens": "embeddings", "wte": "embeddings", "lm_head": "head"}
    return tuple(names.get(part, part) for part in _plain_list(value))


def _share(value: Any) -> Any:
    share = number(value)
    if share == 0:
        return LEFT_OUT
    if 0 < share < 1:
        return f"{share * 100:g}%"
    raise ValueError(f"a number of rows ({value}) is not supported; give a share such as --eval-data 5%, or a file")


def _one_file(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    paths = _paths(value)
    if len(paths) != 1:
        raise ValueError(f"expected one eval file, found {len(paths)}; join them")
    return paths[0]


_ROW_TYPES = ("chat_template", "alpaca", "completion", "input_output", "sharegpt", "messages")


def _paths(value: Any) -> Any:
    """Axolotl's list of {path, type, ...}, or names as they are."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        return value
    found: list[str] = []
    for entry in value:
        if not isinstance(entry, dict):
            found.append(str(entry))
            continue
        rest: dict[str, Any] = dict(entry)
        files = rest.pop("data_files", None)
        path = rest.pop("path", None)
        kind = rest.pop("type", None)
        if isinstance(kind, str) and kind.split(".")[0] not in _ROW_TYPES:
            raise ValueError(f"type '{kind}' is not supported; rows have messages, prompt and completion, or text")
        if rest.pop("split", "train") != "train":
            raise ValueError("only the rows of `split: train` are read from a hub id; give the file instead")
        rest.pop("ds_type", None)
        if rest:
            raise ValueError(f"'{next(iter(rest))}' of a dataset has no counterpart; leave it out")
        found += [str(f) for f in ([files] if isinstance(files, str) else files or [path]) if f is not None]
    return tuple(found)


def _at_least_one(way_out: str) -> Translate:
    """A step count that may be transformers' -1 or 0 for none."""

    def translate(value: Any) -> Any:
        steps = number(value)
        if steps <= 0:
            return LEFT_OUT
        if steps < 1 or steps != int(steps):
            raise ValueError(f"{value} is no number of steps; {way_out}")
        return int(steps)

    return translate


def _half(value: Any) -> Any:
    if _truth(value):
        raise ValueError(
            "training in float16 is not supported, since its range is too small; leave it out, or take --compute-dtype bfloat16"
        )
    return LEFT_OUT


def _bytes(value: Any) -> Any:
    text = str(value).strip().upper().removesuffix("B").removesuffix("I")
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    return number(text[:-1]) * units[text[-1]] / 1e9 if text[-1:] in units else number(text) / 1e9


def _trackers(value: Any) -> Any:
    names = [name for name in _plain_list(value) if name.lower() != "none"]
    if "all" in names:
        raise ValueError("name the trackers: tensorboard, wandb, mlflow")
    return tuple(names) or LEFT_OUT


def _resume(value: Any) -> Any:
    try:
        return True if _truth(value) else LEFT_OUT
    except ValueError:
        raise ValueError(
            "--resume continues from the newest checkpoint in --out; give --resume without a path"
        ) from None


def _checkpointing(value: Any) -> Any:
    return True if str(value).strip().lower() in ("unsloth", "offload") else _truth(value)


def _bf16(value: Any) -> Any:
    """true asks for what Graft does anyway: bfloat16 matmuls where they are faster."""
    return LEFT_OUT if str(value).lower() == "auto" or _truth(value) else "float32"


_DTYPES = _among(
    {
        "float32": "float32", "torch.float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16",
        "torch.bfloat16": "bfloat16", "auto": LEFT_OUT,
    },
    "take float32 or bfloat16",
)  # fmt: skip
_BITS = _among({"4": "nf4", "8": "int8"}, "take nf4 or int8 as --base-precision")
SCHEDULERS = _among(
    {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"},
    "take --lr-scheduler cosine, linear or constant",
)
OPTIMIZERS = _among(
    {
        **dict.fromkeys(
            (
                "adamw",
                "adamw_torch",
                "adamw_torch_fused",
                "adamw_hf",
                "adamw_anyprecision",
                "paged_adamw_32bit",
                "paged_adamw",
            ),
            "adamw",
        ),
        **dict.fromkeys(
            ("adamw-8bit", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "adamw-8bit"
        ),
    },
    "take --optimizer adamw or adamw-8bit",
)
STEPS = _at_least_one("give --steps N")
TRAINING = ("train", "compare", "sweep")
_SERVING = ("serve",)

RANKS = ("num_processes", "nproc_per_node")
"""Accelerate's and torchrun's names for the ranks of a run."""

ALIASES: dict[str, tuple[Alias, ...]] = {
    **{name: (Alias(field, lambda value, f=field: former_value(f, value)),) for name, field in FORMER.items()},
    # the base
    **dict.fromkeys(("base_model", "model_name_or_path", "model_name"), (Alias("model"),)),
    "load_in_4bit": (Alias("base_precision", _when("nf4"), switch=True),),
    "load_in_8bit": (Alias("base_precision", _when("int8"), switch=True),),
    "quantization_bit": (Alias("base_precision", _BITS),),
    "quantization": (
        Alias("base_precision", _among({"bitsandbytes": "nf4"}, "take nf4, int8, bfloat16 or float32"), _SERVING),
    ),
    **dict.fromkeys(("dtype", "torch_dtype"), (Alias("base_precision", _DTYPES),)),
    "bnb_4bit_compute_dtype": (Alias("compute_dtype", _DTYPES),),
    **dict.fromkeys(("bf16", "pure_bf16"), (Alias("compute_dtype", _bf16, switch=True),)),
    "fp32": (Alias("compute_dtype", _when("float32"), switch=True),),
    "fp16": (Alias("compute_dtype", _half, switch=True),),
    # data
    **dict.fromkeys(("dataset", "datasets", "train_dataset", "dataset_name"), (Alias("data", _paths),)),
    **dict.fromkeys(("val_set_size", "val_size"), (Alias("eval_data", _share),)),
    **dict.fromkeys(("eval_dataset", "test_datasets"), (Alias("eval_data", _one_file),)),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"), (Alias("max_length"),)),
    "truncation_mode": (
        Alias("overlong", _among({"keep_start": "truncate"}, "the beginning of a row is kept: --overlong truncate")),
    ),
    "excess_length_strategy": (
        Alias(
            "overlong",
            _among(
                {"drop": "drop", "truncate": "truncate", "raise": "error"}, "take --overlong error, drop or truncate"
            ),
        ),
    ),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt"), (Alias("train_on", _when("everything", "all-assistant"), switch=True),)
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "train_on_responses_only"),
        (Alias("train_on", _when("all-assistant", "everything"), switch=True),),
    ),
    "mask_history": (Alias("train_on", _when("last-assistant", "all-assistant"), switch=True),),
    # the adapter
    **dict.fromkeys(RANKS, (Alias("ranks"),)),
    "nproc_per_node": (Alias("ranks"), Alias("gpus")),
    **dict.fromkeys(("nnodes", "num_nodes", "num_machines"), (Alias("nodes"),)),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), (Alias("rank"),)),
    "lora_alpha": (Alias("alpha"),),
    "peft_dropout": (Alias("lora_dropout"),),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target"), (Alias("targets", _targets),)),
    "lora_target_linear": (Alias("targets", _when(("all-linear",)), switch=True),),
    **dict.fromkeys(("lora_modules_to_save", "additional_target"), (Alias("modules_to_save", _save_modules),)),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), (Alias("rank_stabilized", _truth, switch=True),)),
    **dict.fromkeys(("use_dora", "peft_use_dora"), (Alias("dora", _truth, switch=True),)),
    "loraplus_ratio": (Alias("loraplus_lr_ratio"),),
    **dict.fromkeys(("add_tokens", "new_special_tokens"), (Alias("trainable_tokens", _plain_list),)),
    **dict.fromkeys(("lora_model_dir", "adapter_name_or_path"), (Alias("from_adapter"),)),
    "finetuning_type": (
        Alias("method", _among({"full": "full", "lora": "lora"}, "take --method full, lora or qlora")),
    ),
    "adapter": (
        Alias(
            "method",
            _among({"lora": "lora", "qlora": "qlora", "none": "full", "": "full"}, "take --method full, lora or qlora"),
        ),
    ),
    # optimization
    "lr": (Alias("learning_rate"),),
    "max_steps": (Alias("steps", STEPS),),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), (Alias("epochs"),)),
    **dict.fromkeys(("global_batch_size", "train_batch_size"), (Alias("batch_size"),)),
    "lr_scheduler_type": (Alias("lr_scheduler", SCHEDULERS),),
    "optim": (Alias("optimizer", OPTIMIZERS),),
    "adam_beta1": (Alias("beta1"),),
    "adam_beta2": (Alias("beta2"),),
    "adam_epsilon": (Alias("epsilon"),),
    "gradient_clipping": (Alias("max_grad_norm"),),
    **dict.fromkeys(
        ("gradient_checkpointing", "enable_gradient_checkpointing"),
        (Alias("activation_checkpointing", _checkpointing, switch=True),),
    ),
    "activation_offloading": (Alias("offload_activations", _truth, switch=True),),
    "full_determinism": (Alias("deterministic", _truth, switch=True),),
    "disable_gradient_checkpointing": (Alias("activation_checkpointing", _when(False, True), switch=True),),
    **dict.fromkeys(("train_from_scratch", "reinit_weights"), (Alias("init", _when("random"), switch=True),)),
    # the run
    "output_dir": (Alias("out"),),
    "save_total_limit": (Alias("keep_checkpoints"),),
    **dict.fromkeys(("early_stopping_patience", "early_stopping_steps"), (Alias("early_stopping"),)),
    "eval_max_new_tokens": (Alias("score_max_tokens"),),
    "report_to": (Alias("track", _trackers),),
    **{f"use_{name}": (Alias("track", _when((name,)), switch=True),) for name in ("wandb", "tensorboard", "mlflow")},
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), (Alias("resume", _resume),)),
    # adapters
    "gguf": (Alias("for_", _when("gguf"), ("export",), switch=True),),
    # serving
    "kv_cache_memory_bytes": (Alias("kv_cache_gb", _bytes),),
    "shutdown_timeout": (Alias("drain_seconds"),),
}
"""A foreign name -> what it means; the first whose field the command has."""


__all__ = [
    "ALIASES",
    "ANSWERS",
    "FORMER",
    "FORMER_FIGURES",
    "LEFT_OUT",
    "OPTIMIZERS",
    "SCHEDULERS",
    "STEPS",
    "TRAINING",
    "Alias",
    "OptionAnswer",
    "former_value",
    "number",
    "renamed",
    "renamed_summary",
]
