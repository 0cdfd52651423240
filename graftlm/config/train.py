"""Options of `graft train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import model_validator

from graftlm.config.fields import (
    ISO_DATE,
    TRAIN_ON_HELP,
    Alphas,
    ComputeDtype,
    Config,
    CountOrAuto,
    Method,
    Metric,
    Names,
    Precision,
    Ranks,
    Sources,
    Tokens,
    TrainOn,
    is_gguf,
    option,
    refuse_eval_weight,
)
from graftlm.errors import nearest


class TrainConfig(Config):
    """Options of `graft train`."""

    takes_file = True

    # The base and the method
    model: str = option(
        ..., "base model: a directory, a GGUF file, a hub id, or `demo` for the bundled one", group="base"
    )
    method: Method = option("lora", "what is trained: full, lora, or qlora (lora on an nf4 base)", group="base")
    base_precision: Precision | None = option(
        None,
        "how the base is stored; default float32 for full, bfloat16 (of a GGUF file its blocks, gguf) for lora, nf4 for qlora",
        group="base",
    )
    compute_dtype: ComputeDtype | None = option(
        None,
        "matmul dtype; bf16-mixed: bfloat16 inputs, float32 accumulation and activations (CPUs with AVX-512 BF16, the default "
        "there); default elsewhere bfloat16 where it is fastest, else float32",
        group="base",
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained",
        "random initializes the weights instead of loading them, for training from scratch with --method full",
        group="base",
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model", group="base")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; default the first GPU, else the CPU", group="base")
    save_precision: Literal["float32", "bfloat16"] | None = option(
        None, "dtype of the model that a full run saves; default the precision it was trained in", group="base"
    )

    # Data
    data: Sources = option(
        ...,
        "training data: FILE[:weight] (jsonl, json, csv, parquet), a hub id, or `demo`; repeat to mix",
        group="data",
    )
    eval_data: str | None = option(
        None, "eval data: a file, `demo`, or a share of the training rows such as 5%", group="data"
    )
    train_on: TrainOn = option("all-assistant", TRAIN_ON_HELP, group="data")
    max_length: int | None = option(
        None, "length limit in tokens; default the model's longest position", group="data", ge=2
    )
    overlong: Literal["error", "drop", "truncate"] = option(
        "error", "what happens to an example over the limit", group="data"
    )
    template_date: str = option(
        "2026-01-01", "date given to the chat template, YYYY-MM-DD", group="data", pattern=ISO_DATE
    )

    # The adapter
    from_adapter: Path | None = option(
        None, "adapter to continue training instead of a new one: a folder, or a version in the store such as formal@prod; "
        "it sets rank, alpha and targets",
        group="adapter",
    )  # fmt: skip
    store: Path | None = option(
        None, "store of named adapters, for --from-adapter NAME; default ./adapters", group="adapter"
    )
    rank: int = option(16, "rank r of A (r, in) and B (out, r)", group="adapter", ge=1)
    alpha: float | None = option(None, "scale numerator: s = alpha / r; default 2 x rank", group="adapter", gt=0)
    rank_stabilized: bool = option(False, "scale s = alpha / sqrt(r) (rsLoRA)", group="adapter")
    lora_dropout: float = option(
        0.0, "share of an adapter's input features dropped in training", group="adapter", ge=0, lt=1
    )
    dora: bool = option(False, "train each output's magnitude beside the direction (DoRA)", group="adapter")
    targets: Names = option(
        ("all-linear",), "all-linear (the head excluded), attention, mlp, or name patterns", group="adapter"
    )
    rank_pattern: Ranks = option({}, "rank of the layers that a pattern names, as PATTERN=RANK", group="adapter")
    alpha_pattern: Alphas = option({}, "alpha of the layers that a pattern names, as PATTERN=ALPHA", group="adapter")
    modules_to_save: Names = option(
        (), "modules trained in full beside the adapter: `embeddings`, `head`, or their names", group="adapter"
    )
    trainable_tokens: Tokens = option(
        (),
        "token whose embedding row is trained, read literally including commas and spaces; repeat for several; "
        "new tokens are added if the matrix has unused rows",
        group="adapter",
    )

    # Optimization
    learning_rate: float | None = option(
        None, "peak learning rate; default 2e-4 for lora and qlora, 2e-5 for full", group="optimization", gt=0
    )
    loraplus_lr_ratio: float = option(1.0, "learning rate of B over that of A (LoRA+)", group="optimization", gt=0)
    lr_scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine", "learning rate after the warmup", group="optimization"
    )
    warmup_ratio: float = option(
        0.03, "share of the steps over which the learning rate rises", group="optimization", ge=0, lt=1
    )
    epochs: float | None = option(None, "epochs; default 1 if --steps is not given", group="optimization", gt=0)
    steps: int | None = option(None, "optimizer steps, instead of epochs", group="optimization", ge=1)
    batch_size: int = option(16, "examples in one optimizer step", group="optimization", ge=1)
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only", group="optimization", ge=0)
    beta1: float = option(0.9, "AdamW's decay of the mean", group="optimization", ge=0, lt=1)
    beta2: float = option(0.999, "AdamW's decay of the mean square", group="optimization", ge=0, lt=1)
    epsilon: float = option(1e-8, "AdamW's epsilon", group="optimization", gt=0)
    optimizer: Literal["adamw", "adamw-8bit"] = option(
        "adamw",
        "adamw-8bit holds AdamW's two states in 8 bits: 2 bytes a trained parameter instead of 8",
        group="optimization",
    )
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0 turns it off", group="optimization", ge=0)
    seed: int = option(
        0, "seed of the order of rows, the initial A and dropout", group="optimization", ge=0, lt=1 << 31
    )

    # Memory and speed: no effect on the result
    micro_batch_tokens: int | None = option(
        None, "most tokens in one micro-batch; changes memory and speed, not the result; default 4096, or less if this machine "
        "has too little memory", group="memory and speed", ge=1,
    )  # fmt: skip
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass instead of storing them", group="memory and speed"
    )

    optimizer_in_backward: bool = option(
        False, "update each tensor as soon as its gradient is computed, and free the gradient; needs --max-grad-norm 0 and one "
        "micro-batch a step", group="memory and speed",
    )  # fmt: skip
    offload_optimizer: bool = option(
        False, "GPU only: keep the optimizer states in host memory", group="memory and speed"
    )
    offload_activations: bool = option(
        False, "GPU only, with --activation-checkpointing: keep what each layer saves, its input, in host memory until the "
        "backward pass", group="memory and speed",
    )  # fmt: skip
    ranks: int = option(
        1, "processes that train together, one on each GPU: each computes its share of a step's examples, and gradients are "
        "added up (data parallel)", group="memory and speed", ge=1,
    )  # fmt: skip
    layout: Literal["auto", "replicate", "hybrid", "shard"] = option(
        "auto", "with --ranks: `replicate` has the whole model on every rank; `shard` splits its weights, and in full training "
        "gradients and optimizer states, over the ranks (FSDP); `hybrid` splits them over the ranks of each node (HSDP); auto "
        "takes the first that has room for the model: replicate, hybrid, shard", group="memory and speed",
    )  # fmt: skip
    offload_layers: CountOrAuto = option(
        "auto", "with --layout shard or hybrid: so many layers' rows, of trained ones also gradients and optimizer states, "
        "wait in host memory, and are copied to the GPU when they are gathered; auto takes as many as it takes to fit, by the "
        "plan of `graft plan --gpus`, and none on a CPU", group="memory and speed",
    )  # fmt: skip
    rank_timeout: int = option(
        45, "seconds after which a rank that shows no progress is ended, and the run with it; more where steps take longer, "
        "and around loading, saving and generating", group="memory and speed", ge=5,
    )  # fmt: skip
    deterministic: bool = option(
        False, "the same bits in every repeat and after --resume on a GPU too, where attention's backward pass then takes more "
        "time and memory; on a CPU they are the same anyway", group="memory and speed",
    )  # fmt: skip

    # The run
    out: Path = option(..., "run folder to write", group="run")
    resume: bool = option(False, "continue from the newest valid checkpoint in --out", group="run")
    allow_change: Names = option(
        (), "with --resume, continue although this option, `data` or `model` has changed; repeat for several",
        group="run",
    )  # fmt: skip
    eval_every: int | None = option(
        None,
        "evaluate every N steps; default at most ten evaluations in at most a quarter of the time",
        group="run",
        ge=1,
    )
    early_stopping: int | None = option(
        None, "stop when the eval loss, or the score (--best-by), has not improved in N evaluations; the best step is saved",
        group="run", ge=1,
    )  # fmt: skip
    score: str | None = option(
        None, "score generated answers to eval prompts at every evaluation: exact-match, rouge-l, bleu (the last two need the "
        "extra `compare`), or a function as FILE.py:FUNCTION or package.module:FUNCTION", group="run",
    )  # fmt: skip
    score_prompts: int | None = option(
        None, "most eval prompts to answer for the score, evenly chosen; default 32", group="run", ge=1
    )
    score_max_tokens: int | None = option(
        None, "most tokens in a scored answer; default twice the longest reference", group="run", ge=1
    )
    best_by: Literal["loss", "score"] = option(
        "loss",
        "how the best step, which is saved, is chosen: lowest eval loss or highest score",
        group="run",
    )
    save_every: int | None = option(
        None, "write a checkpoint every N steps; default only when stopped", group="run", ge=1
    )
    keep_checkpoints: int = option(2, "newest checkpoints to keep besides the best", group="run", ge=1)
    track: Names = option((), "also log to tensorboard, wandb, mlflow", group="run")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "qlora" and self.base_precision not in (None, "nf4"):
            raise ValueError(
                f"method qlora is lora on an nf4 base, found base-precision {self.base_precision}; "
                f"take --method lora --base-precision {self.base_precision}, or leave --base-precision out"
            )
        if self.method == "full" and self.base_precision in ("int8", "nf4", "gguf"):
            raise ValueError(
                f"method full trains every weight and needs 16 or 32 bits, found base-precision {self.base_precision}; "
                "take float32 or bfloat16, or --method qlora"
            )
        if self.method == "full" and self.modules_to_save:
            raise ValueError("method full trains every module already; leave --modules-to-save out")
        if self.method == "full" and self.trainable_tokens:
            raise ValueError("method full trains every token's row already; leave --trainable-tokens out")
        if self.method == "full":
            adapter_only = {
                **{name: name in self.model_fields_set for name in ("rank", "alpha", "targets")},
                "lora-dropout": self.lora_dropout, "dora": self.dora, "rank-stabilized": self.rank_stabilized,
                "rank-pattern": self.rank_pattern, "alpha-pattern": self.alpha_pattern,
                "loraplus-lr-ratio": self.loraplus_lr_ratio != 1,
            }  # fmt: skip
            for name, given in adapter_only.items():
                if given:
                    raise ValueError(f"--{name} is for an adapter and method full has none; leave it out, or take lora")
        if self.from_adapter is not None:
            if self.method == "full":
                raise ValueError("--from-adapter continues training an adapter, found method full; take lora or qlora")
            given = [name for name in _FORMULA if name in self.model_fields_set]
            if given:
                flag = given[0].replace("_", "-")
                raise ValueError(f"--{flag} is that of the adapter which training starts from; leave it out")
        elif self.store is not None:
            raise ValueError("--store is for --from-adapter NAME, such as formal@prod; give both, or leave it out")
        if self.allow_change and not self.resume:
            raise ValueError("--allow-change is for --resume, which is not given; leave it out")
        if self.optimizer_in_backward and self.max_grad_norm > 0:
            raise ValueError(
                "--optimizer-in-backward frees each gradient before the norm of all of them is known, so it cannot clip by it, "
                f"found --max-grad-norm {self.max_grad_norm:g}; give --max-grad-norm 0, or leave --optimizer-in-backward out"
            )
        self._check_ranks()
        if self.offload_optimizer and self.device is not None and self.device.startswith("cpu"):
            raise ValueError(OFFLOAD_ON_CPU)
        if self.offload_activations and not self.activation_checkpointing:
            raise ValueError(
                "--offload-activations brings what --activation-checkpointing saves to host memory, and that is not given; "
                "give both, or leave it out"
            )
        if self.offload_activations and self.device is not None and not self.device.startswith("cuda"):
            raise ValueError(OFFLOAD_ACTIVATIONS_ON_CPU)
        if self.method != "full" and self.init == "random":
            raise ValueError(f"--init random trains every weight and needs --method full, found {self.method}")
        if self.method != "full" and self.save_precision is not None:
            raise ValueError("--save-precision is for --method full; an adapter is saved in float32")
        if self.eval_every is not None and self.eval_data is None:
            raise ValueError("--eval-every needs eval rows; give --eval-data, such as 5%, or leave it out")
        if self.early_stopping is not None and self.eval_data is None:
            raise ValueError("--early-stopping watches the eval loss; give --eval-data, such as 5%, or leave it out")
        self._check_score()
        refuse_eval_weight(self.eval_data)
        if "" in self.trainable_tokens:
            raise ValueError("trainable-tokens holds an empty token; leave it out")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give --steps or --epochs, not both; found steps {self.steps} and epochs {self.epochs}")
        for name, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank-pattern '{name}' must be at least 1, found {rank}")
        for name, alpha in self.alpha_pattern.items():
            if alpha <= 0:
                raise ValueError(f"alpha-pattern '{name}' must be above 0, found {alpha:g}")
        if not self.targets and self.method != "full":
            raise ValueError("targets is empty; take all-linear, attention, mlp, or name patterns")
        if not self.data:
            raise ValueError("data is empty; give at least one file")
        unknown = [name for name in self.track if name not in ("tensorboard", "wandb", "mlflow")]
        if unknown:
            known = ("tensorboard", "wandb", "mlflow")
            raise ValueError(f"unknown tracker '{unknown[0]}'{nearest(unknown[0], known)} known: {', '.join(known)}")
        return self

    def _check_ranks(self) -> None:
        if self.ranks == 1:
            return
        if self.layout == "replicate" and self.asks_for_host_layers:
            raise ValueError(
                f"--offload-layers {self.offload_layers} is for weights that ranks share and gather, and with --layout "
                "replicate each has all of them; take --layout shard or hybrid, or leave it out"
            )
        if self.batch_size < self.ranks:
            raise ValueError(
                f"--batch-size {self.batch_size} leaves some of {self.ranks} ranks without an example; "
                f"give --batch-size {self.ranks} or more, or fewer --ranks"
            )
        if self.optimizer_in_backward and not self.splits_model:
            raise ValueError(
                "--optimizer-in-backward frees each gradient before those of all ranks can be added up, found "
                f"--ranks {self.ranks}; leave one of the two out, or take --layout shard, which adds them up at once"
            )
        if self.device is not None and ":" in self.device:
            raise ValueError(
                f"--device {self.device} is one GPU, found --ranks {self.ranks}, each of which takes its own; "
                f"give --device {self.device.partition(':')[0]}, or leave it out"
            )

    def _check_score(self) -> None:
        if self.score is None:
            if self.best_by == "score":
                raise ValueError(
                    "--best-by score needs a score; give --score, such as exact-match, or leave --best-by out"
                )
            given = [name for name in ("score_prompts", "score_max_tokens") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"--{given[0].replace('_', '-')} is for --score, which is not given; leave it out")
            return
        file, colon, function = self.score.rpartition(":")
        if colon and (not file or not function):
            raise ValueError(
                f"--score '{self.score}' is no FILE.py:FUNCTION; what is {'after' if file else 'before'} the colon?"
            )
        if not colon and self.score.endswith(".py"):
            raise ValueError(f"--score '{self.score}' names no function; give {self.score}:FUNCTION")
        known = get_args(Metric)
        if not colon and self.score not in known:
            raise ValueError(
                f"unknown score '{self.score}'{nearest(self.score, known)} known: {', '.join(known)}, and functions as "
                "FILE.py:FUNCTION or package.module:FUNCTION"
            )
        if self.eval_data is None:
            raise ValueError("--score answers eval prompts; give --eval-data, such as 5%, or leave it out")

    def to_json(self) -> dict[str, Any]:
        """Every option as plain JSON values; those of a new adapter are null if there is none."""
        values = super().to_json()
        if self.method == "full":
            values.update(dict.fromkeys(_ADAPTER_ONLY))
        elif self.from_adapter is not None:
            values.update(dict.fromkeys(_FORMULA))
        return values

    @property
    def splits_model(self) -> bool:
        """Whether ranks share the weights, by the layout that is asked for."""
        return self.layout in ("shard", "hybrid")

    @property
    def asks_for_host_layers(self) -> bool:
        """Whether a number of layers is to wait on the host."""
        return self.offload_layers not in ("auto", 0)

    @property
    def host_layers(self) -> int:
        """How many layers wait on the host; 0 until `auto` is decided."""
        return 0 if self.offload_layers == "auto" else self.offload_layers

    @property
    def stored_precision(self) -> Precision:
        """How the base is stored, with the method's default filled in."""
        if self.base_precision is not None:
            return self.base_precision
        lora: Precision = "gguf" if is_gguf(self.model) else "bfloat16"
        defaults: dict[Method, Precision] = {"full": "float32", "lora": lora, "qlora": "nf4"}
        return defaults[self.method]

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, with the method's default: LoRA's is about ten times full's (Schulman et al. 2025)."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.method == "full" else 2e-4

    @property
    def scale_numerator(self) -> float:
        """Alpha, with its default of twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


OFFLOAD_ON_CPU = (
    "--offload-optimizer moves the optimizer states from a GPU to host memory, and in a run on the CPU they already are there; "
    "leave it out"
)
OFFLOAD_ACTIVATIONS_ON_CPU = (
    "--offload-activations brings activations from a GPU to host memory, and in a run without a GPU they already are there; "
    "leave it out"
)
SCORE_OPTIONS = ("score", "score_prompts", "score_max_tokens", "best_by")
_FORMULA = (
    "rank", "alpha", "rank_stabilized", "lora_dropout", "dora", "targets", "rank_pattern", "alpha_pattern", "modules_to_save",
    "trainable_tokens",
)  # fmt: skip
"""Options that define an adapter."""
_ADAPTER_ONLY = (*_FORMULA, "loraplus_lr_ratio", "from_adapter", "store")
