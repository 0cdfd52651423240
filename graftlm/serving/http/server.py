"""From the options of `graft serve` to a server: base, engine, routes and uvicorn. `commands/serve.py` runs it.

On SIGTERM or SIGINT it refuses new requests (503, also on /readyz), finishes those that it has for at most `drain-seconds`,
and exits. A second signal ends it at once.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter
from graftlm.adapters.store import Store
from graftlm.adapters.store.content import ANY_RUN, open_manifest
from graftlm.base.caches import prove_decoding
from graftlm.base.kv_cache import LayerKVSpec
from graftlm.base.loading import Base, checkpoint_precision, load_base
from graftlm.config import ServeConfig
from graftlm.errors import ConfigError
from graftlm.progress import working
from graftlm.serving.engine.async_engine import AsyncEngine
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.kv_cache import USUAL_TOKENS, CacheSize, cache_size, free_memory
from graftlm.serving.engine.prompts import Parsers, PromptEncoderCache
from graftlm.serving.engine.runner import PagedRunner
from graftlm.serving.engine.scheduler import EngineLimits
from graftlm.serving.http.api_keys import ApiKeys, read_api_keys
from graftlm.serving.http.app import create_app
from graftlm.serving.http.dependencies import RequestLimits, ServerState
from graftlm.serving.http.metrics import Metrics
from graftlm.serving.http.model_registry import ModelRegistry

Note = Callable[[str], None]


@dataclass
class BuiltServer:
    """Everything of a server but its socket."""

    state: ServerState
    app: Any
    base: Base

    @property
    def summary(self) -> dict[str, Any]:
        """What was built, as plain values."""
        engine = self.state.async_engine.engine
        return {
            "model": self.state.model_registry.base_name,
            "precision": self.base.precision,
            "base_bytes": self.base.bytes,
            "fingerprint": self.state.fingerprint,
            "adapters": len(self.state.model_registry.names()),
            "packed": engine.paged,
            "cache_bytes": engine.runner.bytes,
            "cache_tokens": engine.limits.cache_tokens,
            "running": engine.limits.max_num_seqs,
            "max_loras": engine.limits.max_loras,
            "adapter_bytes": engine.limits.adapter_bytes,
        }


def build(config: ServeConfig, note: Note = lambda text: None) -> BuiltServer:
    """Load the base and plan the memory. Raises GraftError."""
    api_keys = read_api_keys(config.api_keys)
    store = Store(config.store) if config.store is not None else None
    if store is not None:
        store.bases()  # a folder that is no store is refused before a base is loaded
    precision = config.base_precision or checkpoint_precision(config.model, config.trust_remote_code)
    base = load_base(
        config.model, precision=precision, compute_dtype=config.compute_dtype, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    note(
        f"base       {config.model}: {base.parameters / 1e6:.1f}M parameters as {precision}, {base.bytes / 1e6:.1f} MB"
    )
    fingerprint = base.fingerprint

    def load(folder: Path) -> Adapter:
        # A server's adapters are versions, whose folders are named by their digests. The digest of what this returns,
        # tensors included, is compared once more before it is served.
        open_manifest(folder, folder.name, fingerprint, ANY_RUN)
        return adapter_format.load(base, folder)

    with working("preparing to answer"):
        decoding = prove_decoding(base)
        cache = _cache_size(config, base, decoding.layers)
        engine = Engine(base, plan(config, base, api_keys, cache.tokens), decoding=decoding, load=load)
    parsers = Parsers(config.tool_call_parser, config.reasoning_parser)
    state = ServerState(
        async_engine=AsyncEngine(engine), model_registry=ModelRegistry(base_label(config.model), fingerprint, store),
        api_keys=api_keys, prompt_encoders=PromptEncoderCache(base, config.format, parsers),
        metrics=None, fingerprint=fingerprint, preloading=bool(config.adapter),  # type: ignore[arg-type]
        request_limits=RequestLimits(
            body_bytes=int(config.max_body_mb * 1e6), body_seconds=min(config.request_timeout, RequestLimits.body_seconds),
            prompt_tokens=config.max_prompt_tokens, output_tokens=config.max_output_tokens, seconds=config.request_timeout,
        ),
    )  # fmt: skip
    state.metrics = Metrics(state.async_engine)
    built = BuiltServer(state, create_app(state), base)
    summary = built.summary
    if engine.paged:
        memory = f"{summary['cache_bytes'] / 1e6:.0f} MB of KV cache"
        note(f"answers    {summary['running']} at once, {memory} for {cache}")
        why = engine.runner.why_no_decoder if isinstance(engine.runner, PagedRunner) else ""
        if why and base.device.type == "cuda":
            note(f"graphs     none, each step is launched kernel by kernel: {why}")
    else:
        note(f"answers    {summary['running']} at once, those of equal length together: {decoding.why_not_blocks}")
        if decoding.cache is None:
            note(f"cache      none, each token costs a forward pass over the whole text: {decoding.why_not_cache}")
    slots = f"{summary['max_loras']} at work at once, {summary['adapter_bytes'] / 1e9:.1f} GB for all in memory"
    note(
        f"adapters   {summary['adapters']} {'name' if summary['adapters'] == 1 else 'names'} in the store; {slots}"
        if store is not None
        else "adapters   none: no --store"
    )
    if not api_keys.required and config.host not in ("127.0.0.1", "localhost", "::1"):
        note(f"open       anybody who reaches {config.host} may send requests; give --api-keys FILE to change that")
    return built


def base_label(model: str) -> str:
    """The base's model name over HTTP: a hub id as it is, of a folder only its last part."""
    return Path(model).name if Path(model).exists() else model


def _cache_size(config: ServeConfig, base: Base, layers: dict[int, LayerKVSpec]) -> CacheSize:
    """The size of the KV cache, from the option or by default; `layers` are empty where the model has a cache of its own.

    A GPU's memory serves nothing else, and it answers long texts at once: there is room for all of them. Raises ConfigError
    for too little.
    """
    if config.kv_cache_gb is not None and not layers:
        raise ConfigError(
            "kv-cache-gb: this model has no paged KV cache, so the bytes of a token are not known beforehand; leave it out, "
            "and limit its memory with --max-num-seqs"
        )
    usual = USUAL_TOKENS if layers and base.device.type == "cpu" else None
    return cache_size(base, layers, config.max_num_seqs, gigabytes=config.kv_cache_gb, usual_tokens=usual)


def plan(config: ServeConfig, base: Base, api_keys: ApiKeys, cache_tokens: int) -> EngineLimits:
    """The engine's limits from the options and the memory that is free now; the KV cache holds `cache_tokens`."""
    free = free_memory(base.device)
    adapters = int(config.adapter_memory_gb * 1e9) if config.adapter_memory_gb is not None else max(free // 4, 1 << 28)
    return EngineLimits(
        max_num_seqs=config.max_num_seqs,
        max_queued_seqs=config.max_queue,
        max_num_batched_tokens=config.max_num_batched_tokens,
        cache_tokens=cache_tokens,
        max_loras=config.max_loras,
        adapter_bytes=adapters,
        multi_tenant=len(api_keys.tenants) > 1,
    )


class Server(uvicorn.Server):
    """uvicorn, which drains before it exits."""

    def __init__(self, built: BuiltServer, config: ServeConfig, note: Note) -> None:
        settings = uvicorn.Config(
            built.app, host=config.host, port=config.port, log_level="warning", access_log=False, lifespan="off",
            timeout_keep_alive=30, timeout_graceful_shutdown=5, server_header=False, proxy_headers=False,
        )  # fmt: skip
        super().__init__(settings)
        self._built, self._drain, self._note = built, config.drain_seconds, note
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, the second one ends at once."""
        self._signals += 1
        if self._signals == 1:
            self._built.state.draining = True
            self._note("draining   no new requests; another signal ends at once")
        else:
            self.should_exit = self.force_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was answered by draining is not raised again at the end."""
        try:
            before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, which alone gets signals
            yield
            return
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._built.state.draining and not self.should_exit:
            engine = self._built.state.async_engine.engine
            now = time.monotonic()
            self._since = getattr(self, "_since", now)
            if not engine.busy or now - self._since > self._drain:
                if engine.busy:
                    left = engine.num_running + engine.num_waiting
                    self._note(f"stopped    {left} answers were not complete after {self._drain:g} s")
                self.should_exit = True
        return await super().on_tick(counter)
