"""What the server tells Prometheus; state is read when it is asked for, so counting costs a step nothing.

What is told of single versions stands apart: with a file of keys it is an admin's, since a digest in it says that somebody
has an adapter which others are not to know of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from graftlm.serving.engine.async_engine import AsyncEngine
from graftlm.serving.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class AdapterState:
    """One adapter version as the engine has it now."""

    digest: str
    resident: bool
    in_memory: bool
    loading: bool
    running: int
    held: int
    bytes: int
    hits: int
    loads: int
    evictions: int


def adapter_states(engine: Engine) -> list[AdapterState]:
    """Every version the engine knows of."""
    return [
        AdapterState(
            cached.digest, bool(cached.slot), cached.adapter is not None, cached.loading, cached.num_running,
            cached.num_requests, cached.bytes, cached.hits, cached.loads, cached.evictions,
        )
        for cached in engine.adapter_cache.versions()
    ]  # fmt: skip


class Metrics:
    """One server's registries: of the whole, and of single versions."""

    def __init__(self, async_engine: AsyncEngine) -> None:
        self.registry, self.versions = CollectorRegistry(), CollectorRegistry()
        self.requests = Counter(
            "graft_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "graft_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "graft_request_seconds", "From arrival to the end of an answer", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_EngineCollector(async_engine))
        self.versions.register(_VersionCollector(async_engine))

    def page(self, *, versions: bool) -> bytes:
        """The text that Prometheus reads, with single `versions` or without."""
        return generate_latest(self.registry) + (generate_latest(self.versions) if versions else b"")


class _EngineCollector(Collector):
    """Reads the engine's counts."""

    def __init__(self, async_engine: AsyncEngine) -> None:
        self._async_engine = async_engine
        self._begun = time.time()

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        engine = self._async_engine.engine
        counts, adapter_cache = engine.counts, engine.adapter_cache.counters
        gauges = (
            ("graft_queue_waiting", "Answers that wait", engine.num_waiting),
            ("graft_queue_limit", "Most answers that may wait", engine.limits.queue),
            ("graft_running", "Answers in the batch", engine.num_running),
            ("graft_running_limit", "Most answers in a batch", engine.limits.max_num_seqs),
            (
                "graft_cache_occupied_ratio",
                "Share of the KV cache that running answers hold",
                engine.runner.kv_cache_usage,
            ),
            ("graft_cache_bytes", "Bytes of the KV cache", engine.runner.bytes),
            ("graft_start_time_seconds", "When the server started", self._begun),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        totals = (
            ("graft_steps", "Steps of the engine", counts.steps),
            ("graft_step_seconds", "Seconds spent in steps", counts.step_seconds),
            ("graft_prompt_tokens", "Prompt tokens computed", counts.prompt_tokens),
            ("graft_reused_prompt_tokens", "Prompt tokens found in the prefix cache", counts.prefix_cached_tokens),
            ("graft_generated_tokens", "Tokens written", counts.generated_tokens),
            ("graft_preemptions", "Answers sent back to wait because memory was short", engine.scheduler.num_preempted),
            ("graft_adapter_hits", "Requests whose adapter was in memory", adapter_cache.hits),
            ("graft_adapter_loads", "Adapters read from disk", adapter_cache.loads),
            ("graft_adapter_load_failures", "Adapters that could not be loaded", adapter_cache.failures),
            ("graft_adapter_evictions", "Adapters that gave their slot to another", adapter_cache.evictions),
        )
        for name, text, value in totals:
            yield CounterMetricFamily(name, text, value=value)
        finished = CounterMetricFamily("graft_answers", "Answers by how they ended", labels=["finish_reason"])
        for finish_reason, count in list(counts.finished.items()):
            finished.add_metric([finish_reason], count)
        yield finished


class _VersionCollector(Collector):
    """Reads where each adapter version is and what was asked of it."""

    def __init__(self, async_engine: AsyncEngine) -> None:
        self._async_engine = async_engine

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        states = adapter_states(self._async_engine.engine)
        label = ["digest"]
        kinds: tuple[tuple[GaugeMetricFamily | CounterMetricFamily, str], ...] = (
            (GaugeMetricFamily("graft_adapter_resident", "Whether a version is in a slot", labels=label), "resident"),
            (GaugeMetricFamily("graft_adapter_in_memory", "Whether a version is in memory", labels=label), "in_memory"),
            (GaugeMetricFamily("graft_adapter_running", "Answers that a version writes", labels=label), "running"),
            (GaugeMetricFamily("graft_adapter_bytes", "Bytes of a version", labels=label), "bytes"),
            (
                CounterMetricFamily("graft_adapter_version_hits", "Requests that found it in memory", labels=label),
                "hits",
            ),
            (CounterMetricFamily("graft_adapter_version_loads", "Times it was read", labels=label), "loads"),
            (
                CounterMetricFamily("graft_adapter_version_evictions", "Times it gave up its slot", labels=label),
                "evictions",
            ),
        )
        for family, field in kinds:
            for state in states:
                family.add_metric([state.digest], float(getattr(state, field)))
            yield family
