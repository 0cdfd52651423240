"""Memory: an estimate for the run, and a dry run over its longest batch before the first step.

    estimate(...)           the plan of `graft plan`, for this run: its base, its adapter, its examples, this machine
    dry_run(...)            forward and backward once over the heaviest micro-batch there can be; nothing of it stays

So memory runs out here or not at all, with a message that names the way out, and a run of hours does not end in its
middle. The dry run leaves weights, optimizer and random numbers as they were: gradients are freed, and randomness has
no state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from graftlm.adapters.attach import Adapter
from graftlm.adapters.bank import LowRank
from graftlm.base.loading import Base
from graftlm.base.precision import default_compute_dtype
from graftlm.base.transformers_log import fails_in_the_model
from graftlm.config import ComputeDtype, Precision, TrainConfig
from graftlm.data.sampler import epoch_length
from graftlm.distributed.group import Ranks
from graftlm.errors import GraftError, ModelError, TrainingError
from graftlm.formatting import size
from graftlm.planning.activations import Workload
from graftlm.planning.answers import AnswerLoad
from graftlm.planning.fitting import PlanCase, changes
from graftlm.planning.hardware import Card, local
from graftlm.planning.instantiate import common_name
from graftlm.planning.memory import MemoryParts, MemoryRequirement, requirement
from graftlm.planning.method import NO_ADAPTER, AdapterShape, TrainingSetting, adapter_shape
from graftlm.planning.models import find
from graftlm.planning.peak_memory import PeakMemory
from graftlm.planning.plan import DEFAULT_MICRO_BATCH_TOKENS
from graftlm.planning.rank_memory import WHOLE, Split, of_one_rank
from graftlm.planning.shapes import ModelShape
from graftlm.progress import working
from graftlm.training.micro_batch import BatchItem, backward, collate, count_target_tokens, forward, micro_batches
from graftlm.training.scoring import Scorer
from graftlm.training.trial import Trial

MIN_MICRO_BATCH_TOKENS = 256
TOO_MUCH = 1.15  # a plan this far above what the machine has is refused untried: predictions are right within a tenth


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a run is expected to take."""

    micro_batch_tokens: int
    load: Workload
    """Its heaviest micro-batch."""
    requirement: MemoryRequirement | None
    """None where the model's shape could not be counted."""
    card: Card
    case: PlanCase | None
    items: tuple[BatchItem, ...]
    """The heaviest micro-batch itself."""
    answers: AnswerLoad | None = None
    """Those that are scored at each evaluation."""

    @property
    def dry_run_bytes(self) -> int | None:
        """Bytes that the dry run should take at its peak: the optimizer has no states yet and makes no step; no answers."""
        if self.requirement is None:
            return None
        left_out = ("update", "answers")
        moments = {name: parts for name, parts in self.requirement.moments.items() if name not in left_out}
        return max(replace(parts, optimizer=0).total for parts in moments.values())

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        found: dict[str, Any] = {
            "micro_batch_tokens": self.micro_batch_tokens,
            "heaviest_micro_batch": {
                "tokens": self.load.tokens, "target_tokens": self.load.target_tokens, "longest_example": self.load.longest,
                "examples": self.load.examples, "micro_batches_in_its_step": self.load.micro_batches,
            },
            "machine": {"name": self.card.name, "memory_bytes": self.card.memory, "usable_bytes": self.card.usable},
        }  # fmt: skip
        if self.answers is not None:
            found["answers"] = asdict(self.answers)
        if self.requirement is not None:
            found["predicted"] = {
                "parts": self.requirement.parts.to_json(),
                "highest_at": self.requirement.moment,
                "peak_bytes": self.requirement.training,
                "loading_bytes": self.requirement.loading,
                "dry_run_bytes": self.dry_run_bytes,
            }
        return found


# ---- the plan of this run --------------------------------------------------------------------------------------------


def estimate(
    config: TrainConfig, base: Base, trials: Sequence[Trial], adapters: Sequence[Adapter] = (), *, spare: int = 0,
    ranks: int = 1,
) -> MemoryEstimate:  # fmt: skip
    """The plan of a run, or of trials that are trained together. `config` says how, `adapters` are those of the trials.

    `micro_batch_tokens` is the asked one, else the most that is fast and fits this machine. It follows from the machine's
    whole memory, not from what happens to be free, so the same command on the same machine makes the same
    micro-batches. `spare` are trained values of adapters that may come later; `ranks` share a processor's memory.
    """
    card = local(str(base.device) if base.device.type == "cuda" else "cpu").of_one_rank(config.ranks, ranks)
    shape, setting, adapted = (
        shape_of(config, base),
        setting_of(config, base.precision, base.compute_dtype),
        _adapted(base, adapters),
    )
    longest = max(d.tokens for trial in trials for d in trial.examples)
    sizes = [config.micro_batch_tokens] if config.micro_batch_tokens else _sizes(longest)
    if config.optimizer_in_backward and not config.micro_batch_tokens:
        sizes = sizes[:1]  # its steps are one micro-batch
    fused = base.fused.norms > 0
    answers = next((_answers(base, trial.scorer) for trial in trials if trial.scorer is not None), None)
    found: MemoryEstimate | None = None
    for tokens in sizes:
        items, load = _heaviest(base, trials, tokens)
        load = replace(load, small=tokens < DEFAULT_MICRO_BATCH_TOKENS)
        took = case = None
        if shape is not None:
            beside = spare + max(0, sum(adapter.count for adapter in adapters) - adapted.values(shape))
            took = requirement(
                shape,
                setting,
                adapted,
                load,
                card.kind,
                fused=fused,
                fused_dequant=card.fused_dequant,
                beside=beside,
                answers=answers,
            )
            on_host = 0 if card.kind == "cpu" else config.host_layers
            took = of_one_rank(took, shape, load, split_over(base.structure.sharing, on_host))
            rank = max((adapter.plan.rank for adapter in adapters), default=1)
            case = PlanCase(shape=shape, targets=("all-linear",), rank=rank, load=load, card=card, fused=fused)
        found = MemoryEstimate(
            micro_batch_tokens=tokens,
            load=load,
            requirement=took,
            card=card,
            case=case,
            items=tuple(items),
            answers=answers,
        )
        if took is None or took.training <= card.usable:
            break
    assert found is not None
    return found


def split_over(ranks: Ranks, offloaded: int = 0) -> Split:
    """How a model lies on the ranks that share its weights, with the rows of so many layers on the host."""
    return Split(shards=ranks.parts, copies=ranks.size // ranks.parts, offloaded=offloaded)


def fits(
    config: TrainConfig, precision: Precision, device: torch.device, on_machine: int, split: Split = WHOLE
) -> bool:
    """Whether a rank is expected to have room for its part of the model and of what is trained, by default all, with a small
    micro-batch; of the ranks `on_machine` share a processor's memory. True where nothing is known of the model."""
    card = local(str(device) if device.type == "cuda" else "cpu").of_one_rank(config.ranks, on_machine)
    split = split if card.kind == "cuda" else replace(split, offloaded=0)  # its memory is the host's
    try:
        shape = find(config.model, trust_remote_code=config.trust_remote_code).shape
        adapter = adapter_shape(shape, config.targets, config.rank, dora=config.dora)
    except GraftError:  # it is said, or does without a plan, when the base is loaded
        return True
    setting = setting_of(config, precision, config.compute_dtype or default_compute_dtype(device, training=True))
    small = Workload(
        tokens=MIN_MICRO_BATCH_TOKENS, target_tokens=MIN_MICRO_BATCH_TOKENS, longest=MIN_MICRO_BATCH_TOKENS
    )
    trained = NO_ADAPTER if config.method == "full" else adapter
    took = requirement(shape, setting, trained, small, card.kind, fused=False, fused_dequant=card.fused_dequant)
    return of_one_rank(took, shape, small, split).training <= card.usable


def _answers(base: Base, scorer: Scorer) -> AnswerLoad:
    """The answers that are scored at each evaluation."""
    longest = max(len(prompt.prompt) for prompt in scorer.prompts) + scorer.max_tokens
    return AnswerLoad(prompts=len(scorer.prompts), longest=min(longest, base.structure.max_positions or longest))


def _sizes(longest: int) -> list[int]:
    """Tokens of a micro-batch to try: what is fast, and halves of it down to the longest example."""
    found = [DEFAULT_MICRO_BATCH_TOKENS]
    while found[-1] // 2 >= max(longest, MIN_MICRO_BATCH_TOKENS):
        found.append(found[-1] // 2)
    return found


def shape_of(config: TrainConfig, base: Base) -> ModelShape | None:
    """The sizes that a plan counts with; None for a model that trains and whose config builds no empty one."""
    try:
        shape = find(str(base.folder), trust_remote_code=config.trust_remote_code).shape
    except GraftError:  # it runs without a plan
        return None
    return replace(shape, packs=base.packs, plain_head=base.structure.head_is_plain_matmul)


def setting_of(config: TrainConfig, precision: Precision, compute_dtype: ComputeDtype) -> TrainingSetting:
    """The method and its options as a plan counts them."""
    return TrainingSetting(
        key=config.method, label=config.method, method=config.method, precision=precision,
        compute_dtype="bfloat16" if compute_dtype == "bfloat16" else "float32", optimizer=config.optimizer,
        optimizer_in_backward=config.optimizer_in_backward, offload_optimizer=config.offload_optimizer,
        activation_checkpointing=config.activation_checkpointing, offload_activations=config.offload_activations,
        dora=config.dora, dropout=config.lora_dropout > 0,
        deterministic=config.deterministic,
    )  # fmt: skip


def _adapted(base: Base, adapters: Sequence[Adapter]) -> AdapterShape:
    """What is really there, layer by layer. Of several adapters the larger at each kind: a token uses one of them."""
    found = NO_ADAPTER
    for adapter in adapters:
        one = _counted(base, adapter)
        found = AdapterShape(
            layers={key: max(found.layers.get(key, 0), n) for key, n in {**found.layers, **one.layers}.items()},
            ranks={key: max(found.ranks.get(key, 0), n) for key, n in {**found.ranks, **one.ranks}.items()},
            whole=max(found.whole, one.whole),
        )
    return found


def _counted(base: Base, adapter: Adapter) -> AdapterShape:
    stored = {name.removesuffix(".stored"): module for name, module in base.stored().items()}
    layers: dict[str, int] = {}
    ranks: dict[str, int] = {}
    whole = 0
    for name, part in adapter.layers.items():
        module = stored.get(name)
        if isinstance(part, LowRank) and module is not None:
            key = f"{common_name(name)} {module.shape[-2]}x{module.shape[-1]}"
            layers[key], ranks[key] = layers.get(key, 0) + 1, ranks.get(key, 0) + part.rank
            whole += 0 if part.magnitude is None else part.magnitude.numel()
        else:
            whole += sum(p.numel() for p in part.named().values())
    return AdapterShape(layers=layers, ranks=ranks, whole=whole)


def _heaviest(base: Base, trials: Sequence[Trial], micro_batch_tokens: int) -> tuple[list[BatchItem], Workload]:
    """The heaviest micro-batch that a step can make: of a batch of each trial's longest examples."""
    items = [item for trial in trials for item in _longest_batch(trial)]
    groups = micro_batches(base, items, micro_batch_tokens)
    found = max(groups, key=lambda group: _weight(group, base.packs))
    lengths = [item.example.tokens for item in found]
    return found, Workload(
        tokens=sum(lengths), target_tokens=count_target_tokens(item.example for item in found), longest=max(lengths),
        examples=len(found), micro_batches=len(groups),
    )  # fmt: skip


def _longest_batch(trial: Trial) -> list[BatchItem]:
    """The longest examples that can meet in one batch of a trial."""
    sampler = trial.sampler
    # A batch may reach from one epoch into the next.
    again = sampler.draws > epoch_length(sampler.sizes, sampler.weights)
    chosen: list[int] = []
    at = 0
    for count, weight in zip(sampler.sizes, sampler.weights):
        times = max(1, math.ceil(weight)) + again
        lengths = sorted(range(at, at + count), key=lambda i: -trial.examples[i].tokens)[: sampler.batch_size]
        chosen += [i for i in lengths for _ in range(times)]
        at += count
    chosen = sorted(chosen, key=lambda i: (-trial.examples[i].tokens, -trial.examples[i].target_tokens, i))
    chosen = chosen[: sampler.batch_size]
    weight = 1.0 / count_target_tokens(trial.examples[i] for i in chosen)
    return [BatchItem(trial.examples[i], trial.slot, (trial.seed, draw), weight) for draw, i in enumerate(chosen)]


def _weight(group: Sequence[BatchItem], packs: bool) -> tuple[int, int]:
    """What makes a micro-batch heavy: its tokens, or the squares of its lengths where attention stores its scores; then its
    target tokens."""
    lengths = [item.example.tokens for item in group]
    return sum(lengths) if packs else sum(n * n for n in lengths), sum(item.example.target_tokens for item in group)


# ---- the dry run -----------------------------------------------------------------------------------------------------


def dry_run(base: Base, trials: Sequence[Trial], memory_estimate: MemoryEstimate) -> int:
    """Run the heaviest micro-batch forward and backward; returns the bytes in use at its peak, as `PeakMemory` counts them.

    Raises TrainingError, with what to change, where the plan is far beyond the machine, or memory runs out, and ModelError
    where the model's own code fails: some run forward and cannot run backward.
    """
    refuse(memory_estimate)
    if memory_estimate.load.micro_batches > 1:
        for trial in trials:
            for parameter in () if trial.optimizer.in_backward else trial.parameters.values():
                parameter.grad = torch.zeros_like(parameter)  # what the micro-batches before it have left
    try:
        with (
            PeakMemory(base.device, keep=True) as memory, _freed_at_once(trials), working("trying the longest batch"),
        ):  # fmt: skip
            micro_batch = collate(base, memory_estimate.items)
            loss, _ = forward(base, micro_batch, defer_tied_head_gradient=any(t.optimizer.in_backward for t in trials))
            backward(loss)
    except GraftError:
        raise
    except Exception as error:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", message, re.IGNORECASE)
        )
        if not full and fails_in_the_model(error):
            raise ModelError(
                f"{type(base.model).__name__} cannot be trained as asked: its own code fails in a forward and backward pass "
                f"({type(error).__name__}: {message[:200]}); take another model, or report this architecture"
            ) from error
        if not full:
            raise
        raise TrainingError(
            f"memory runs out in a micro-batch of {memory_estimate.load.tokens:,} tokens, before the first step "
            f"({message[:160]}).{_way_out(memory_estimate)}"
        ) from None
    finally:
        for trial in trials:
            trial.optimizer.zero_grad()
    return memory.bytes


@contextmanager
def _freed_at_once(trials: Sequence[Trial]) -> Iterator[None]:
    """With the optimizer inside the backward pass no gradient stays; here each is freed without a step."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    trained = (p for trial in trials if trial.optimizer.in_backward for p in trial.parameters.values())
    handles = [p.register_post_accumulate_grad_hook(drop) for p in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse(memory_estimate: MemoryEstimate) -> None:
    """Raise TrainingError, with what to change, for a plan that is far beyond this machine."""
    took, card = memory_estimate.requirement, memory_estimate.card
    if took is None or card.kind != "cpu" or took.training <= TOO_MUCH * card.usable:
        return
    raise TrainingError(
        f"this run would take {size(took.training)} ({_largest(took.parts)}), and {card.name} has {size(card.usable)} for it; "
        f"nothing was started.{_way_out(memory_estimate)}"
    )


def _largest(parts: MemoryParts) -> str:
    values = {k: v for k, v in parts.to_json().items() if k != "total"}
    return ", ".join(f"{name} {size(values[name])}" for name in sorted(values, key=lambda n: -values[n])[:3])


def _way_out(memory_estimate: MemoryEstimate) -> str:
    if memory_estimate.case is None or memory_estimate.requirement is None:
        return " Lower --micro-batch-tokens, or take --activation-checkpointing"
    if memory_estimate.requirement.moment == "answers":
        return " The most is taken by answers for --score: lower --score-max-tokens, or --score-prompts below 16"
    found = changes(memory_estimate.case, memory_estimate.requirement.setting)
    listed = "; ".join(f"{change.text} ({size(change.peak)})" for change in found)
    return f" Cheapest first: {listed}" if listed else " Take a smaller model, or a larger machine"
