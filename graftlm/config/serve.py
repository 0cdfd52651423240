"""Options of `graft serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import field_validator, model_validator

from graftlm.config.fields import ComputeDtype, Config, Names, Precision, flag_name, option, server_address
from graftlm.errors import ConfigError

GPU_SEQUENCES, GPU_STEP_TOKENS = 128, 4096
"""The defaults of --max-num-seqs and --max-num-batched-tokens on a GPU, where a step over few tokens takes as long as one over
many: it waits for the weights to be read, or for its launches."""

# Options that the printed vllm command can express, or that only affect the export.
_FOR_VLLM = frozenset(
    {
        "model",
        "base_precision",
        "trust_remote_code",
        "store",
        "adapter",
        "max_loras",
        "host",
        "port",
        "max_num_seqs",
        "engine",
        "out",
        "follow",
        "tool_call_parser",
        "reasoning_parser",
    }
)


class ServeConfig(Config):
    """Options of `graft serve`."""

    takes_file = True

    model: str = option(..., "base model: a directory, a hub id, or `demo`", group="base")
    base_precision: Precision | None = option(
        None, "how the base is stored; default the checkpoint's own type", group="base"
    )
    compute_dtype: ComputeDtype | None = option(None, "matmul dtype; default by hardware", group="base")
    device: str | None = option(None, "cpu, cuda, ...; default the first GPU, else the CPU", group="base")
    trust_remote_code: bool = option(False, "run Python code that comes with the model", group="base")

    store: Path | None = option(
        None, "folder of the adapter store; all adapters of this base are served", group="adapters"
    )
    adapter: Names = option((), "versions to load before accepting requests, such as formal@prod", group="adapters")
    max_loras: int = option(16, "most adapters in one batch", group="adapters", ge=1, le=4096)
    adapter_memory_gb: float | None = option(
        None, "memory for loaded adapters, in GB (10^9 bytes); default a quarter of the free memory",
        group="adapters", gt=0, allow_inf_nan=False,
    )  # fmt: skip

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all", group="server")
    port: int = option(8000, "port to listen on; 0 for any free one", group="server", ge=0, le=65535)
    api_keys: Path | None = option(
        None, "file of API keys and their permissions; without it the server accepts every request", group="server"
    )
    format: Literal["auto", "chat", "text"] = option(
        "auto", "chat applies the chat template; auto does what the adapter was trained with", group="server"
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral"] = option(
        "auto", "form of tool calls in answers, by vLLM's name; auto finds it in the chat template", group="server"
    )
    reasoning_parser: Literal["auto", "qwen3", "deepseek_r1", "none"] = option(
        "auto", "how reasoning is told from content, by vLLM's name; auto does where the chat template has it; none never",
        group="server",
    )  # fmt: skip
    drain_seconds: float = option(
        30.0, "seconds that running requests have to finish after SIGTERM", group="server", ge=0, allow_inf_nan=False
    )

    max_prompt_tokens: int | None = option(
        None, "longest prompt, in tokens; default what fits in the context with the output", group="bounds", ge=1
    )
    max_output_tokens: int | None = option(
        None, "longest output, in tokens; default what fits in the context after the prompt", group="bounds", ge=1
    )
    max_body_mb: float = option(4.0, "largest request body, in MB", group="bounds", gt=0, allow_inf_nan=False)
    request_timeout: float = option(
        300.0, "longest time of a request in seconds, including the queue", group="bounds", gt=0, allow_inf_nan=False
    )
    max_queue: int = option(256, "most requests in the queue; beyond it the server returns 429", group="bounds", ge=1)

    max_num_seqs: int = option(
        16, f"most sequences in a batch; on a GPU by default {GPU_SEQUENCES}", group="memory and speed", ge=1, le=4096
    )
    max_num_batched_tokens: int = option(
        256, f"most tokens in one engine step, prefill and decode together; on a GPU by default {GPU_STEP_TOKENS:,}, fewer "
        "where memory is scarce", group="memory and speed", ge=1,
    )  # fmt: skip
    kv_cache_gb: float | None = option(
        None, "memory for the KV cache, in GB; default what --max-num-seqs sequences can need, on a CPU 1,024 tokens for each "
        "and one text of the model's longest at least; at most a quarter of the free memory",
        group="memory and speed", gt=0, allow_inf_nan=False,
    )  # fmt: skip

    engine: Literal["embedded", "vllm"] = option(
        "embedded",
        "embedded serves here; vllm exports the adapters and prints the `vllm serve` command",
        group="engine",
    )
    out: Path = option(Path("vllm-adapters"), "folder of the adapters exported for vLLM", group="engine")
    follow: str | None = option(
        None,
        "address of a running vLLM, such as http://127.0.0.1:8000: keep its adapters in step with the store until a signal; "
        "its API key is read from VLLM_API_KEY",
        group="engine",
    )

    @field_validator("follow")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        """The address without a final `/v1`, as OpenAI's clients are given it. Raises ValueError."""
        return None if value is None else server_address(value, "give vLLM's key in VLLM_API_KEY")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.adapter and self.store is None:
            raise ValueError("adapter: there is no store to take it from; give --store")
        if self.engine == "vllm" and self.store is None:
            raise ValueError("engine: there is nothing to export for vLLM; give --store")
        if self.engine == "vllm":
            self._fits_vllm()
        if self.engine == "embedded" and "out" in self.model_fields_set:
            raise ValueError("out: it is for --engine vllm only; leave it out")
        if self.engine == "embedded" and self.follow is not None:
            raise ValueError("follow: it is for --engine vllm only; graft serve itself follows its store without it")
        if "max_num_batched_tokens" in self.model_fields_set and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(self._few_tokens)
        return self

    @property
    def _few_tokens(self) -> str:
        return (
            f"max-num-batched-tokens: {self.max_num_batched_tokens} are too few for a batch of {self.max_num_seqs}, since each "
            "sequence decodes one token a step"
        )

    def on(self, device: str) -> ServeConfig:
        """The same with the defaults of a kind of device, `cpu` or `cuda`, for what was not given.

        Raises ConfigError for a batch of more sequences than a step has tokens.
        """
        changes: dict[str, int] = {}
        if device == "cuda" and "max_num_batched_tokens" not in self.model_fields_set:
            changes["max_num_batched_tokens"] = GPU_STEP_TOKENS
        if device == "cuda" and "max_num_seqs" not in self.model_fields_set:
            changes["max_num_seqs"] = min(
                GPU_SEQUENCES, changes.get("max_num_batched_tokens", self.max_num_batched_tokens)
            )
        chosen = self.model_copy(update=changes)
        chosen.model_fields_set.difference_update(changes)
        if chosen.max_num_batched_tokens < chosen.max_num_seqs:
            raise ConfigError(chosen._few_tokens)
        return chosen

    def _fits_vllm(self) -> None:
        """Raise ValueError for options that the printed vllm command cannot express."""
        if self.api_keys is not None:
            raise ValueError(
                "api-keys: vLLM has one --api-key for everything and no permissions for each adapter; "
                "leave it out, and put a gateway in front that checks keys"
            )
        if self.base_precision == "int8":
            raise ValueError("base-precision: vLLM does not store a base as int8; take bfloat16, float32 or nf4")
        for name in sorted(self.model_fields_set - _FOR_VLLM):
            raise ValueError(
                f"{flag_name(name)}: it is an option of the embedded engine, without a counterpart in vLLM; leave it out"
            )
