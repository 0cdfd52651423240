"""Options of `graft merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from graftlm.config.fields import ComputeDtype, Config, Names, option, plain_number, refuse_eval_weight

Onto = Literal["original", "dequantized", "requantized"]
Combine = Literal["linear", "ties", "dare-linear", "dare-ties"]


class MergeConfig(Config):
    """Options of `graft merge`."""

    model: str = option(..., "base model: a directory, a hub id, or `demo`")
    adapter: Names = option(
        (), "adapters as A,B:0.3: each a folder or a version in the store, with its weight; default weight 1"
    )
    out: Path = option(..., "folder to write; it must be new or empty")
    store: Path | None = option(None, "store of named adapters; default ./adapters")

    onto: Onto | None = option(
        None,
        "weights to add the adapter to: `original` the checkpoint's; `dequantized` as they were stored in training; "
        "`requantized` the same, written as bitsandbytes NF4; default dequantized for an adapter trained on int8 or nf4, "
        "else original",
        group="target",
    )
    save_precision: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of the written weights; default each tensor's dtype in the checkpoint", group="target"
    )
    gguf: Path | None = option(
        None, "also write the merged model as one GGUF file for llama.cpp and Ollama", group="target"
    )
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = option(
        "bf16", "type of the matrices in the GGUF file", group="target"
    )

    combine: Combine = option(
        "linear",
        "how several adapters are combined: linear (weighted sum), TIES or DARE on their updates",
        group="several adapters",
    )
    density: float | None = option(
        None, "share of each update's values that TIES or DARE keeps", group="several adapters", gt=0, le=1
    )
    seed: int = option(0, "seed of the values that DARE drops", group="several adapters", ge=0, lt=1 << 31)

    eval_data: str | None = option(
        None,
        "eval data to measure the drift on: a file, a hub id, or `demo`; default that of the training run",
        group="drift",
    )
    eval_rows: int = option(32, "most rows to measure", group="drift", ge=1)
    max_drift: float | None = option(
        None,
        "highest relative difference from the logits of base and adapter; above it nothing is written",
        group="drift",
        gt=0,
    )
    unmeasured: bool = option(False, "write without measuring the drift", group="drift")

    compute_dtype: ComputeDtype | None = option(
        None, "matmul dtype while measuring; default by hardware", group="drift"
    )
    device: str | None = option(
        None, "device for measuring: cpu, cuda, ...; default the first GPU, else the CPU", group="drift"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model", group="drift")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pairs = self.weighted()
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError(f"an adapter is given twice: {', '.join(self.adapter)}; give it once, with its weight")
        pruned = self.combine != "linear"
        if pruned and len(pairs) < 2:
            raise ValueError(f"--combine {self.combine} is for several adapters, found {len(pairs)}; leave it out")
        if pruned and self.density is None:
            raise ValueError(f"--combine {self.combine} keeps a share of each update; give --density, such as 0.5")
        if not pruned and self.density is not None:
            raise ValueError("--density is for --combine ties, dare-linear or dare-ties; linear keeps everything")
        if "seed" in self.model_fields_set and not self.combine.startswith("dare"):
            raise ValueError(f"--seed is for DARE, and --combine is {self.combine}; leave it out")
        if self.unmeasured and (self.max_drift is not None or self.eval_data is not None):
            raise ValueError("--unmeasured excludes --max-drift and --eval-data; give one or the other")
        if self.max_drift is not None and not pairs:
            raise ValueError("--max-drift needs an adapter to compare with; give --adapter, or leave it out")
        if self.gguf is None and "gguf_type" in self.model_fields_set:
            raise ValueError("--gguf-type is for --gguf FILE; give the file, or leave it out")
        if self.gguf is None and not pairs:
            raise ValueError("nothing to merge; give --adapter, or --gguf FILE to write the model as it is")
        if self.onto == "requantized" and self.save_precision is not None:
            raise ValueError("--onto requantized stores NF4; leave --save-precision out")
        if self.onto == "requantized" and self.gguf is not None:
            raise ValueError(
                "--onto requantized writes NF4 for bitsandbytes, which GGUF does not hold; take dequantized"
            )
        refuse_eval_weight(self.eval_data)
        return self

    def weighted(self) -> tuple[tuple[str, float], ...]:
        """Each adapter with its weight: `A,B:0.3` -> (("A", 1.0), ("B", 0.3)). Raises ValueError."""
        found: list[tuple[str, float]] = []
        for text in self.adapter:
            name, colon, weight_text = text.rpartition(":")
            try:
                weight = plain_number(weight_text) if colon else 1.0
            except ValueError:
                name, colon, weight = text, "", 1.0  # a path may hold a colon
            if not (name if colon else text) or weight != weight or abs(weight) == float("inf") or weight == 0:
                raise ValueError(f"'{text}' is no adapter with a weight; write NAME:0.3, with a number that is not 0")
            found.append((name if colon else text, weight))
        return tuple(found)
