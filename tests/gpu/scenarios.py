"""What is traced on the fake card, each in a process of its own (`worker.py`): arguments and results are JSON.

Models are Llamas of few layers with a width of 256: what is launched does not depend on sizes, and what is copied or waited for
must not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import fake_card
import numpy as np
import torch
from fake_card import FakeCard, hidden, most_pinned_bytes
from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerBase

from graftlm import demo, kernels
from graftlm.adapters.attach import AdapterPlan, attach, detach, new_adapter, select_layers
from graftlm.adapters.factor_tables import FactorTables
from graftlm.base.attention import causal
from graftlm.base.loading import Base, default_device, load_base, load_tokenizer, random_base
from graftlm.commands.serve import plan_steps
from graftlm.config import ServeConfig, TrainConfig
from graftlm.data.dataset import Dataset, DatasetPart, make_example
from graftlm.errors import TrainingError
from graftlm.kernels import gpu_allocator, reference
from graftlm.planning.instantiate import instantiate
from graftlm.serving.engine.adapter_cache import pack_for_decoding
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.graph_decoder import GraphDecoder
from graftlm.serving.engine.request import Request, SamplingParams
from graftlm.serving.engine.runner import PagedRunner
from graftlm.serving.engine.scheduler import EngineLimits
from graftlm.serving.engine.step_memory import step_memory
from graftlm.serving.http.server import build
from graftlm.training.run import make_adapter, make_trial, set_checkpointing
from graftlm.training.sanity_checks import UpdateCheck
from graftlm.training.trainer import optimizer_step
from graftlm.training.trial import Trial

VOCABULARY = 32000
_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
}  # fmt: skip


def _base(layers: int, *, experts: int = 0, times: int = 1, vocabulary: int = VOCABULARY, **how: Any) -> Base:
    """A base of random weights; `times` widens its layers."""
    kind = MixtralConfig if experts else LlamaConfig
    mixture = {"num_local_experts": experts, "num_experts_per_tok": 2} if experts else {}
    wide = {"hidden_size": 256 * times, "intermediate_size": 512 * times, "vocab_size": vocabulary}
    config = kind(**{**_SIZES, **mixture, **wide, "num_hidden_layers": layers})
    return random_base(config, _tokenizer(), **{"device": "cuda", **how})


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(demo.resolve_model("demo")))


def _examples(lengths: list[int]) -> Dataset:
    rows = tuple(
        make_example(f"random:{i}", np.full(length, 3, dtype=np.int32), np.ones(length, dtype=np.bool_))
        for i, length in enumerate(lengths)
    )
    return Dataset((DatasetPart("random", 1.0, rows),), {})


def _trial(base: Base, method: str, lengths: list[int], options: dict[str, Any]) -> Trial:
    config = TrainConfig.build(
        {
            "model": "random", "data": ["random"], "out": "random", "method": method, "base_precision": base.precision,
            "steps": 9, "batch_size": len(lengths), "lr_scheduler": "constant", "warmup_ratio": 0.0, **options,
        }
    )  # fmt: skip
    adapter = make_adapter(base, config)
    trial = make_trial(base, config, adapter, 0 if adapter is None else 1, _examples(lengths), None)
    set_checkpointing(config, base)
    return trial


def train(
    layers: list[int],
    method: str,
    base_precision: str,
    lengths: tuple[int, ...] = (64, 50),
    experts: int = 0,
    times: int = 1,
    vocabulary: int = VOCABULARY,
    **options: Any,
) -> list[dict[str, Any]]:
    """One optimizer step with each number of layers, the second: in the first the optimizer's states are made."""
    traces: list[dict[str, Any]] = []
    for count in layers:
        with FakeCard(distinct=max(experts, 1)) as card:
            base = _base(
                count, experts=experts, times=times, vocabulary=vocabulary, precision=base_precision, training=True
            )
            assert base.packs, base.no_packing_reason
            trial = _trial(base, method, list(lengths), options)
            optimizer_step(base, [trial], sum(lengths))
            card.reset()
            optimizer_step(base, [trial], sum(lengths))
            traces.append(card.trace.to_json())
    return traces


def memory(
    model: dict[str, Any], method: str, base_precision: str, lengths: list[int], **options: Any
) -> dict[str, int]:
    """The most bytes of a step, the second, for a Llama of any size, or a Mixtral where `model` has experts; `base`: the base
    alone, `host`: pinned memory."""
    reference.SLAB = 1 << 40  # each weight is stored in one piece: sooner traced, and loading is not counted
    with FakeCard() as card:
        config = (MixtralConfig if "num_local_experts" in model else LlamaConfig)(**model)
        base = random_base(config, _tokenizer(), precision=base_precision, device="cuda", training=True)
        held = card.bytes
        trial = _trial(base, method, lengths, options)
        optimizer_step(base, [trial], sum(lengths))
        card.reset()
        optimizer_step(base, [trial], sum(lengths))
        return {"peak": card.trace.peak_bytes, "base": held, "host": most_pinned_bytes()}


def gpu_job(job: str) -> dict[str, Any]:
    """The figures of a job of `bench/gpu.py`, on tiny shapes."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
    jobs = importlib.import_module("gpu_jobs")
    with FakeCard():
        return dict(jobs.figures_of(job, jobs.Where(device="cuda", small=True)))


def check_updates(layers: int, method: str, base_precision: str, experts: int = 0, **options: Any) -> dict[str, Any]:
    """What `UpdateCheck` alone adds: before the first step, to a step that it observes, and at its end."""
    with FakeCard(distinct=max(experts, 1)) as card:
        base = _base(layers, experts=experts, precision=base_precision, training=True)
        trial = _trial(base, method, [64, 50], options)
        card.reset()
        check = UpdateCheck(base, trial.parameters, trial.optimizer.epsilon)
        traces = {"start": card.trace.to_json()}
        for parameter in trial.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for name in ("first step", "second step", "third step"):
            card.reset()
            check.observe_gradients(1e-3, {})
            traces[name] = card.trace.to_json()
            card.reset()
            with contextlib.suppress(TrainingError):  # nothing changes on a fake card
                check.after_step("random")
        return {**traces, "end": card.trace.to_json()}


def load(folder: str, precision: str, compute_dtype: str | None = None) -> dict[str, Any]:
    """A checkpoint, loaded where `accelerate` is not installed: the devices and dtypes that its tensors have then."""
    import transformers.integrations.accelerate as integration

    integration.is_accelerate_available = lambda *given: False  # type: ignore[assignment]
    with FakeCard(), hidden("accelerate"):
        base = load_base(folder, precision=precision, compute_dtype=compute_dtype, device="cuda:1")  # type: ignore[arg-type]
        tensors = {**dict(base.model.named_parameters()), **dict(base.model.named_buffers())}
        for name, module in base.stored().items():
            if module.compressed is not None:
                tensors.update({f"{name}.{part}": value for part, value in module.compressed.tensors().items()})
        return {name: [str(tensor.device), str(tensor.dtype)] for name, tensor in tensors.items()}


def allocator(kernel_of_wsl: str) -> dict[str, str]:
    """The settings of PyTorch's allocator after a GPU was chosen: where something forbids others than there are, and where
    nothing does."""
    found: dict[str, str] = {}

    def choose(name: str, device: str = "cuda:1") -> None:
        default_device(device)
        found[name] = torch._C._accelerator_getAllocatorSettings()

    for variable in gpu_allocator.VARIABLES:
        os.environ.pop(variable, None)
    choose("initialized")
    torch.cuda.is_initialized = lambda: False
    for variable in gpu_allocator.VARIABLES:
        os.environ[variable] = "max_split_size_mb:100"
        choose(variable)
        del os.environ[variable]
    kernel = gpu_allocator._KERNEL  # pyright: ignore[reportPrivateUsage]
    gpu_allocator._KERNEL = Path(kernel_of_wsl)  # pyright: ignore[reportPrivateUsage]
    choose("WSL2")
    gpu_allocator._KERNEL = kernel  # pyright: ignore[reportPrivateUsage]
    choose("cpu", "cpu")
    choose("nothing")
    torch._C._accelerator_setAllocatorSettings("max_split_size_mb:100")
    choose("chosen in Python")
    return found


def _engine(layers: int, adapters: int, *, cache_tokens: int = 4096, how: dict[str, Any]) -> Engine:
    """An engine with adapters in its slots, packed as its loader's thread packs them; requests name them `a0`, `a1`, ..."""
    base = _base(layers, **how)
    engine = Engine(base, EngineLimits(cache_tokens=cache_tokens, max_num_batched_tokens=8192))
    for i in range(adapters):
        adapter = new_adapter(base, select_layers(base, ("all-linear",)), AdapterPlan(rank=16, alpha=32.0), i)
        attach(base, pack_for_decoding(adapter, base.activation_dtype), slot=1 + i)
        engine.adapter_cache.pin(f"a{i}", 1 + i)
    return engine


def serve(layers: list[int], **given: Any) -> list[dict[str, Any]]:
    """Two traces with each number of layers: `prefill`, a step over all prompts; `decode`, a step that adds a token to each."""
    return [_served(count, **given) for count in layers]


def steps_memory(model: dict[str, Any], tokens: int, sequences: int, prompt: int, **sampling: Any) -> dict[str, Any]:
    """Bytes beyond base, KV cache and tables: the most in a step over prompts of `tokens` tokens in all; of the captured steps
    the most, and what they keep. And what is estimated of both."""
    with FakeCard() as card:
        base = random_base(LlamaConfig(**model), _tokenizer(), precision="bfloat16", device="cuda")
        limits = EngineLimits(cache_tokens=2 * tokens, max_num_batched_tokens=tokens, max_num_seqs=sequences)
        engine = Engine(base, limits)
        assert isinstance(engine.runner, PagedRunner)
        assert isinstance(engine.runner.decoder, GraphDecoder)
        held = card.bytes
        card.reset()
        engine.warm_up()
        captured = {"most": card.trace.peak_bytes - held, "kept": card.bytes - held}
        for i in range(tokens // prompt):
            engine.add_request(
                Request(id=f"r{i}", prompt=(3,) * prompt, max_tokens=4, sampling=SamplingParams(**sampling))
            )
        before = card.bytes
        card.reset()
        engine.step()
        found = {"step": card.trace.peak_bytes - before, "captured": captured}
        shape = instantiate(base.model.config)
        planned = step_memory(shape, tokens=tokens, sequences=sequences, value_bytes=2, graphs=True)
        return {**found, "planned_step": planned.step, "planned_graphs": planned.graphs}


def build_server(folder: str, memory: int, **options: Any) -> dict[str, Any]:
    """What `graft serve` says of a server with default options on a card with so many bytes, and its limits."""
    fake_card.PROPERTIES.total_memory = memory
    notes: list[str] = []
    with FakeCard():
        config = ServeConfig.build({"model": folder, **options}).on(default_device(None).type)
        built = build(config, notes.append)
        plan_steps(built, config, notes.append)
        limits = built.state.async_engine.engine.limits
        return {
            "notes": notes,
            "limits": vars(limits),
            "scheduled": vars(built.state.async_engine.engine.scheduler.limits),
        }


_SAMPLING = {field.name for field in fields(SamplingParams)}


def _served(
    layers: int, sequences: int = 4, prompt: int = 20, adapters: int = 0, every_other: bool = False, **given: Any
) -> dict[str, Any]:
    """`given` are a request's sampling, of each or of every other sequence, and how the base is."""
    asked = {name: value for name, value in given.items() if name in _SAMPLING}
    if "bias" in asked:
        asked["bias"] = {int(token): value for token, value in asked["bias"].items()}
    how = {name: value for name, value in given.items() if name not in _SAMPLING}
    with FakeCard() as card:
        tokens = -(-(prompt + 64) // 16) * 16 * sequences
        engine = _engine(layers, adapters, cache_tokens=tokens, how={"precision": "bfloat16", **how})
        for i in range(sequences):
            name = f"a{i % adapters}" if adapters else ""
            engine.add_request(
                Request(
                    id=f"r{i}", prompt=tuple(range(3, 3 + prompt - i)), max_tokens=40, adapter=name,
                    sampling=SamplingParams(**({} if every_other and i % 2 else asked)),
                )
            )  # fmt: skip
        card.reset()
        engine.step()
        traces = {"prefill": card.trace.to_json()}
        for _ in range(3):  # the second of a kind is captured, the third replayed
            card.reset()
            engine.step()
        assert engine.num_running == sequences
        assert engine.paged, engine.decoding
        assert isinstance(engine.runner, PagedRunner)
        assert not getattr(engine.runner.decoder, "why_eager", "")
        return {**traces, "decode": card.trace.to_json()}


def region(layers: int, adapters: int, experts: int = 0, **how: Any) -> dict[str, Any]:
    """What two decoding steps of one kind launch, whose texts, lengths, adapters and numbers of sequences differ: all launches
    of each with their tensors' places and shapes, and the trace of both."""
    with FakeCard(distinct=max(experts, 1)) as card:
        engine = _engine(layers, adapters, how={"precision": "bfloat16", "experts": experts, **how})
        assert isinstance(engine.runner, PagedRunner)
        decoder = engine.runner.decoder
        if not isinstance(decoder, GraphDecoder):
            return {"reason": engine.runner.why_no_decoder}
        runs: list[list[str]] = []
        traces: list[dict[str, Any]] = []

        def capture(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
            def replay() -> None:
                card.reset()
                runs.append(card.record(step))
                traces.append(card.trace.to_json())

            return replay, step()

        decoder.graphs = types.SimpleNamespace(capture=capture)  # type: ignore[assignment]
        steps = (((4, 40, 17), (0, 1, 2)), ((4, 40, 17), (0, 1, 2)), ((300, 2, 99, 1000), (1, 1, 2, 2)))
        with torch.inference_mode():
            for pasts, slots in steps:
                n = len(pasts)
                found = decoder.hidden(
                    torch.arange(n), (1,) * n, pasts, range(n), [min(slot, adapters) for slot in slots]
                )
                assert found is not None
                assert found.shape[0] == n
        return {"runs": runs, "traces": traces}


def tables(layers: int) -> dict[str, Any]:
    """What a step of decoding writes to the adapters' tables: of three slots, of the same again, and after one has changed."""
    with FakeCard() as card:
        engine = _engine(layers, 3, how={"precision": "bfloat16"})
        base = engine.base
        found = FactorTables(base, entries=129)
        written: dict[str, Any] = {}
        for name in ("all", "none", "one"):
            if name == "one":
                detach(base, 2)
                adapter = new_adapter(base, select_layers(base, ("attention",)), AdapterPlan(rank=16, alpha=32.0), 7)
                attach(base, pack_for_decoding(adapter, base.activation_dtype), slot=2)
            card.reset()
            launched = card.record(lambda: found.entries_of({1, 2, 3}))
            written[name] = {"launches": launched, "trace": card.trace.to_json()}
        return written


def attend(lengths: list[int], heads: int = 32, key_heads: int = 8, width: int = 128) -> dict[str, Any]:
    """The attention of one layer for one token of each sequence over a paged KV cache in bfloat16; the cache not counted."""
    with FakeCard() as card:
        blocks = [-(-length // 16) for length in lengths]
        made: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        keys, values = (torch.empty(16 * sum(blocks), key_heads, width, **made) for _ in range(2))
        q, out = (torch.empty(len(lengths), heads, width, **made) for _ in range(2))
        table = torch.zeros(len(lengths), max(blocks), dtype=torch.int64, device="cuda")
        visible, rows = torch.tensor(lengths, device="cuda"), torch.arange(len(lengths), device="cuda")
        of = kernels.DecodeAttention(rows, visible, table, 16, lengths)
        before = card.bytes
        card.reset()
        kernels.attend_rows(q, keys, values, out, of, scale=1.0)
        card.trace.peak_bytes -= before
        return card.trace.to_json()


def chunk(cached: int, length: int, heads: int = 32, key_heads: int = 8, width: int = 128) -> dict[str, Any]:
    """The attention of one layer for a part of a prompt over what is cached, plain and with a soft cap of scores."""
    traces: dict[str, Any] = {}
    for name, softcap in (("plain", None), ("soft cap", 30.0)):
        with FakeCard() as card:
            made: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
            q = torch.empty(1, heads, length, width, **made)
            k, v = (torch.empty(1, key_heads, cached + length, width, **made) for _ in range(2))
            before = card.bytes
            card.reset()
            causal(q, k, v, heads // key_heads, None, None, softcap)
            card.trace.peak_bytes -= before
            traces[name] = card.trace.to_json()
    return traces


def programs_of_a_thread(method: str = "lora") -> dict[str, Any]:
    """A step on the second card from a thread that was told of no card: what it launches, and what lands on the first."""
    found: list[dict[str, Any]] = []

    def run(base: Base, trial: Trial) -> None:
        with FakeCard() as card:
            optimizer_step(base, [trial], 200)
            found.append(card.trace.to_json())

    with FakeCard():
        base = _base(1, precision="nf4", training=True, device="cuda:1")
        trial = _trial(base, method, [12, 9], {})
    thread = threading.Thread(target=run, args=(base, trial))
    thread.start()
    thread.join()
    return found[0]


def warm_up() -> None:
    """Before the forks, what all of them would do again: imports, and fake tensors' answers for each operation."""
    with torch.no_grad():  # a backward pass would start threads, and no fork could have them
        _served(1)
