"""`graft serve`: one base with all of its adapters over HTTP, by the embedded engine or by vLLM."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftlm.config import ServeConfig
from graftlm.errors import ConfigError, ModelError, nearest
from graftlm.serving.vllm import export_for_vllm

if TYPE_CHECKING:
    from graftlm.serving.http.model_registry import ServedModel
    from graftlm.serving.http.server import BuiltServer

Note = Callable[[str], None]
Ready = Callable[[str, dict[str, Any]], None]
SWITCH_SECONDS = 0.0001
"""How long a thread may keep the interpreter from another; Python's own 5 ms would hold up the engine's thread."""


def serve(
    config: ServeConfig, note: Note = lambda text: None, ready: Ready = lambda url, summary: None
) -> dict[str, Any] | None:
    """Serve until a signal; `ready` is called with the address and a summary once requests are taken.

    With `engine: vllm` the adapters are exported instead, and vLLM's command and what was written is returned. Raises
    GraftError; ConfigError where the extra `serve` is not installed.
    """
    if config.engine == "vllm":
        return export_for_vllm(config, note)
    try:
        from graftlm.serving.http.server import Server, build, listen, url_host
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise ConfigError(f"graft serve needs {error.name}; install it with: pip install 'graftlm[serve]'") from None
    from graftlm.base.loading import default_device

    config = config.on(default_device(config.device).type)
    with _low_latency():
        built = build(config, note)
        if built.base.device.type == "cuda":
            plan_steps(built, config, note)
        # What there is now stays: a garbage collection over all of it would pause every request for a third of a second.
        gc.collect()
        gc.freeze()
        preloaded = [_named(built, name, config) for name in config.adapter]
        server, sock = Server(built, config, note), listen(config)
        url = f"http://{url_host(config.host)}:{sock.getsockname()[1]}"
        built.state.async_engine.start()
        try:
            # The loop is uvloop's where that is installed.
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(_run(server, sock, _preload(built, preloaded, lambda: ready(url, built.summary))))
        finally:
            sock.close()
            built.state.async_engine.close()
    return None


def plan_steps(built: BuiltServer, config: ServeConfig, note: Note) -> None:
    """Say what a step takes on a GPU; by default it has fewer tokens where it would take more than half of what is left."""
    from graftlm.planning.instantiate import instantiate
    from graftlm.serving.engine.graph_decoder import GraphDecoder
    from graftlm.serving.engine.kv_cache import free_memory
    from graftlm.serving.engine.step_memory import fitting, step_memory

    engine, base = built.state.async_engine.engine, built.base
    limits = engine.limits
    given: dict[str, Any] = {
        "tokens": limits.max_num_batched_tokens, "sequences": limits.max_num_seqs,
        "value_bytes": base.activation_dtype.itemsize,
        "graphs": isinstance(getattr(engine.runner, "decoder", None), GraphDecoder),
    }  # fmt: skip
    try:
        shape = instantiate(base.model.config, config.trust_remote_code)
    except ModelError as error:  # the base is loaded, and answers all the same
        note(f"steps      {limits.max_num_batched_tokens:,} tokens at most; their memory is not known: {error}")
        return
    if "max_num_batched_tokens" in config.model_fields_set:
        found = step_memory(shape, **given)
    else:
        found = fitting(shape, max(free_memory(base.device) - limits.adapter_bytes, 0) // 2, **given)
        engine.limit_step(found.tokens)
    graphs = f", CUDA graphs {found.graphs / 1e6:.0f} MB" if given["graphs"] else ""
    note(f"steps      {found.tokens:,} tokens at most, {found.step / 1e6:.0f} MB{graphs} (estimated)")


async def _run(server: Any, sock: Any, preload: Any) -> None:
    """Take requests while the named adapters are loaded; ends with the server, or with what prevents the loading."""
    serving, loading = asyncio.create_task(server.serve(sockets=[sock])), asyncio.create_task(preload)
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():  # a signal came before all was in memory
        loading.cancel()
    elif loading.exception() is not None:
        server.should_exit = True
    await serving
    if loading.done() and not loading.cancelled():
        loading.result()


async def _preload(built: BuiltServer, models: list[ServedModel], ready: Callable[[], None]) -> None:
    from graftlm.serving.http.admin import preload
    from graftlm.serving.http.dependencies import ApiError

    try:
        for served in models:
            await preload(built.state, served)
    except ApiError as error:
        raise ConfigError(str(error)) from None
    built.state.preloading = False
    ready()


@contextmanager
def _low_latency() -> Iterator[None]:
    """Threads switch often meanwhile; afterwards the interpreter is as it was."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()  # libraries report what is not freed at the end


def _named(built: BuiltServer, name: str, config: ServeConfig) -> ServedModel:
    """A version that --adapter names. Raises ConfigError."""
    from graftlm.serving.http.api_keys import Tenant
    from graftlm.serving.http.model_registry import UnknownModel

    try:
        return built.state.model_registry.find(name, Tenant("", admin=True))
    except UnknownModel:
        known = list(built.state.model_registry.names())
        raise ConfigError(f"adapter: {config.store} has no '{name}' for {config.model}{nearest(name, known)}") from None
