"""Select the layers that an adapter adapts, and attach it to a base or detach it.

    layers = select_layers(base, ("all-linear",))    # every pattern must match something
    adapter = new_adapter(base, layers, plan, seed)
    attach(base, adapter, slot=1); ...; detach(base, slot=1)

An adapter is a plain object: its trained tensors by name, and the numbers of its formula. Attaching puts its tensors into the
banks of the stored layers under a slot number; the base's own tensors are never changed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from graftlm import kernels
from graftlm.adapters.bank import EmbeddingBank, LayerBank
from graftlm.adapters.factor_copies import FactorCopies
from graftlm.adapters.layer_adapter import LayerAdapter, LowRank, ModulesToSave, TrainableTokens, new_low_rank
from graftlm.adapters.patterns import matches, refused_by_peft
from graftlm.base.embedding import StoredEmbedding
from graftlm.base.loading import Base
from graftlm.base.modules import Stored, StoredLinear, StoredStack
from graftlm.base.precision import dequantize
from graftlm.distributed.shard import whole
from graftlm.errors import ConfigError, nearest

_EXPERTS_OF_V4 = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """The hyperparameters of an adapter; the fields are those of PEFT's LoraConfig."""

    rank: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0
    dora: bool = False
    ranks: dict[str, int] = field(default_factory=dict[str, int])  # pattern -> rank
    alphas: dict[str, float] = field(default_factory=dict[str, float])
    modules_to_save: tuple[str, ...] = ()  # modules trained in full
    trainable_tokens: tuple[int, ...] = ()  # ids whose embedding rows are trained


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Where an adapter was loaded from."""

    folder: Path
    digest: str
    """Identifies it by content, 64 hexadecimal digits."""
    manifest: dict[str, Any] | None
    """`graft.json`; None for PEFT's own."""
    tokenizer: PreTrainedTokenizerBase | None
    """Its own tokenizer, if it was trained with one."""
    notes: tuple[str, ...]
    """For the user: allowed differences from training, and what could not be checked."""


@dataclass(eq=False)
class Adapter:
    """One adapter's tensors by layer name, and the plan they were made from."""

    plan: AdapterPlan
    layers: dict[str, LayerAdapter]
    origin: Origin | None = None
    """Where it was loaded from; None for a new one."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained tensor under `layer.tensor`, in a fixed order."""
        return {
            f"{layer}.{name}": tensor
            for layer in sorted(self.layers)
            for name, tensor in self.layers[layer].named().items()
        }

    @property
    def count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters().values())

    @property
    def bytes(self) -> int:
        """Bytes of the saved tensors."""
        return sum(p.numel() * p.element_size() for p in self.parameters().values())


def adaptable(base: Base) -> dict[str, Stored]:
    """The layers that can have a low-rank adapter, by PEFT's names; the head is excluded."""
    head = base.structure.head
    found: dict[str, Stored] = {}
    for name, module in base.stored().items():
        if module is not head:
            found[name.removesuffix(".stored")] = module
    return found


def as_target_parameters(base: Base, names: Sequence[str]) -> list[str]:
    """The adapted layers that are PEFT's `target_parameters`; these support neither dropout nor DoRA.

    Stacks of experts and router weights are parameters to PEFT. In a mixture PEFT also takes some module names for the
    experts of transformers 4 and rewrites them, even on dense layers (`_convert_peft_config_moe`); as parameters they keep
    their names and their tensors' keys.
    """
    stored = base.stored()
    mixture = any(isinstance(module, StoredStack) for module in stored.values())
    return [
        name for name in names
        if not isinstance(stored.get(name), StoredLinear) or (mixture and name.rpartition(".")[2] in _EXPERTS_OF_V4)
    ]  # fmt: skip


def notes_for_peft(base: Base, layers: Collection[str]) -> list[str]:
    """Notes about layers that PEFT refuses to adapt: they are left out, or PEFT will refuse the adapter."""
    kind = type(base.model).__name__
    names = [name for name in adaptable(base) if refused_by_peft(kind, name)]
    adapted = [name for name in names if name in layers]
    if adapted:
        return [
            f"PEFT refuses adapters on out_proj of a {kind}, such as {adapted[0]}: Graft trains, serves and merges this "
            "one, but PEFT will refuse its files"
        ]
    if names:
        return [
            f"left out: {names[0]} and {len(names) - 1} more out_proj, which PEFT adapts in no {kind}; --targets names them"
        ]
    return []


def select_layers(base: Base, targets: Sequence[str]) -> list[str]:
    """Layer names for `all-linear`, `attention`, `mlp` or patterns; ConfigError for a pattern that matches nothing.

    The three words leave out layers that PEFT refuses to adapt; a pattern that names such a layer includes it.
    """
    layers = list(adaptable(base))
    kind = type(base.model).__name__
    usual = [name for name in layers if not refused_by_peft(kind, name)]
    chosen: set[str] = set()
    for target in targets:
        if target == "all-linear":
            hit = usual
        elif target in ("attention", "mlp"):
            hit = [name for name in usual if in_attention(base.model, name) == (target == "attention")]
        else:
            hit = [name for name in layers if matches(name, target)]
        if not hit:
            ends = {name.rpartition(".")[2] for name in layers} | {"all-linear", "attention", "mlp"}
            head = base.structure.head_name
            if matches(head, target):
                raise ConfigError(f"target '{target}' is the output head; train it in full with --modules-to-save head")
            not_converted = [f"{name} ({why})" for name, why in base.not_converted.items() if matches(name, target)]
            if not_converted:
                raise ConfigError(f"target '{target}' cannot be adapted: {not_converted[0]}")
            raise ConfigError(
                f"target '{target}' matches no layer of this model{nearest(target, ends)} known: {', '.join(sorted(ends))}"
            )
        chosen.update(hit)
    return [name for name in layers if name in chosen]


def in_attention(model: nn.Module, name: str) -> bool:
    """Whether a layer is part of an attention module, by the class names of the modules around it."""
    path = name.split(".")
    for end in range(len(path) - 1, 0, -1):
        kind = type(model.get_submodule(".".join(path[:end]))).__name__.lower()
        if "attention" in kind or "attn" in kind:
            return True
    return False


def resolve_modules_to_save(base: Base, names: Sequence[str]) -> list[str]:
    """Full names of the modules to train in full: `embeddings`, `head`, or patterns over these two."""
    structure = base.structure
    found: list[str] = []
    for name in names:
        known = {"embeddings": structure.embedding_name, "head": structure.head_name}
        hits = [full for short, full in known.items() if name == short or matches(full, name)]
        if not hits:
            options = [*known, *known.values()]
            raise ConfigError(
                f"modules-to-save '{name}' is neither the embeddings nor the head{nearest(name, options)} "
                f"known: {', '.join(options)}"
            )
        if structure.head_name in hits and not isinstance(structure.head, Stored):
            raise ConfigError(
                f"modules-to-save '{name}': the head of this model is a {type(structure.head).__name__}, which computes more "
                "than a linear layer, so an adapter cannot hold a copy of it; leave it out, or take --method full"
            )
        found.extend(h for h in hits if h not in found)
    return found


def new_adapter(base: Base, layers: Sequence[str], plan: AdapterPlan, seed: int) -> Adapter:
    """An untrained adapter; it does not change the base's output.

    Raises ConfigError for a rank or alpha pattern that matches none of the layers, and for dropout or DoRA on a layer that
    PEFT's format has as a parameter.
    """
    stored = adaptable(base)
    for patterns, what in ((plan.ranks, "rank-pattern"), (plan.alphas, "alpha-pattern")):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in layers):
                ends = {name.rpartition(".")[2] for name in layers}
                raise ConfigError(f"{what} '{pattern}' matches no adapted layer{nearest(pattern, ends)}")
    odd = as_target_parameters(base, layers)
    if odd and (plan.dropout or plan.dora):
        what = "dropout" if plan.dropout else "dora"
        raise ConfigError(
            f"{what} does not work on '{odd[0]}': stacked experts, their routers, and layers of a mixture with names "
            f"like experts are parameters to PEFT, without {what} there; leave {what} out, or take --targets attention"
        )
    by_layer: dict[str, LayerAdapter] = {}
    for name in layers:
        rank = _of_pattern(name, plan.ranks, plan.rank)
        alpha = _of_pattern(name, plan.alphas, plan.alpha)
        by_layer[name] = new_low_rank(
            stored[name], name, rank=rank, alpha=alpha, rank_stabilized=plan.rank_stabilized,
            dropout=plan.dropout, dora=plan.dora, seed=seed,
        )  # fmt: skip
    for name in resolve_modules_to_save(base, plan.modules_to_save):
        weight = whole(base.model.get_submodule(name).weight)
        by_layer[name] = ModulesToSave(nn.Parameter(weight.detach().to(torch.float32, copy=True)))
    if plan.trainable_tokens:
        name = base.structure.embedding_name
        if name in by_layer:
            raise ConfigError(
                "trainable-tokens and modules-to-save embeddings exclude each other; the latter trains every row"
            )
        weight = dequantize(whole(base.structure.embedding.weight.detach()), torch.float32)  # pyright: ignore
        values = weight[list(plan.trainable_tokens)].clone()
        by_layer[name] = TrainableTokens(plan.trainable_tokens, nn.Parameter(values), vocabulary=len(weight))
    return Adapter(plan, by_layer)


def _of_pattern(name: str, patterns: dict[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches the layer."""
    return next((value for pattern, value in patterns.items() if matches(name, pattern)), default)


def attach(base: Base, adapter: Adapter, slot: int = 1) -> None:
    """Put an adapter's tensors into the banks under a slot number; slot 0 is the base without an adapter."""
    assert slot > 0
    with _changing:
        _attach(base, adapter, slot)
        _changed(base, slot)


_changing = threading.Lock()
"""Held while banks change: a server may check one adapter in one thread and attach another in a second thread."""


def _attach(base: Base, adapter: Adapter, slot: int) -> None:
    stored = {**adaptable(base), base.structure.head_name: base.structure.head}
    for name, part in adapter.layers.items():
        if name == base.structure.embedding_name:
            _embedding_bank(base.structure.embedding).adapters[slot] = part
            head = base.structure.head
            if (
                isinstance(part, TrainableTokens)
                and isinstance(head, StoredLinear)
                and head.weight is base.structure.embedding.weight
            ):
                _bank(head).adapters[slot] = part
            continue
        module = stored.get(name)
        assert isinstance(module, Stored), f"no stored layer '{name}'"
        _bank(module).adapters[slot] = part
    if kernels.groups_lora(base.device):
        _make_copies(adapter, stored)


def _make_copies(adapter: Adapter, stored: Mapping[str, nn.Module]) -> None:
    """Give the trained A and B copies in the dtype of the matmuls, those of layers with the same input side by side."""
    parts = {
        stored[name]: part
        for name, part in adapter.layers.items()
        if isinstance(part, LowRank) and not part.experts and part.A.requires_grad
    }
    groups: list[list[LowRank]] = []
    grouped: set[nn.Module] = set()
    for module, part in parts.items():
        shared = module.shared_input if isinstance(module, StoredLinear) else None
        together = [] if shared is None else shared.layers
        if not together or not all(layer in parts for layer in together):
            groups.append([part])
        elif module not in grouped:
            grouped.update(together)
            groups.append([parts[layer] for layer in together])
    copies = FactorCopies(groups)
    for part in parts.values():
        part.copies = copies


def detach(base: Base, slot: int = 1) -> None:
    """Remove the adapter in `slot` from every layer."""
    with _changing:
        for module in base.stored().values():
            bank = module.bank
            if isinstance(bank, LayerBank):
                bank.adapters.pop(slot, None)
                if not bank.adapters:
                    module.bank = None
        embedding = base.structure.embedding
        if isinstance(embedding.bank, EmbeddingBank):
            embedding.bank.adapters.pop(slot, None)
            if not embedding.bank.adapters:
                embedding.bank = None
        _changed(base, slot)


def _changed(base: Base, slot: int) -> None:
    base.slot_changes[slot] = base.adapter_changes + 1  # first: who sees the number looks for the slots
    base.adapter_changes += 1


def _bank(module: Stored) -> LayerBank:
    if module.bank is None:
        module.bank = LayerBank()
    assert isinstance(module.bank, LayerBank)
    return module.bank


def _embedding_bank(embedding: StoredEmbedding) -> EmbeddingBank:
    if embedding.bank is None:
        embedding.bank = EmbeddingBank()
    assert isinstance(embedding.bank, EmbeddingBank)
    return embedding.bank


@dataclass(frozen=True)
class CoverageRow:
    """Number of adapted layers of one kind."""

    kind: str
    adapted: int
    total: int
    parameters: int
    rank: str


def coverage(base: Base, adapter: Adapter) -> list[CoverageRow]:
    """Adapted of total for each kind of layer (the last part of its name), with its trained values."""
    totals: Counter[str] = Counter(name.rpartition(".")[2] for name in adaptable(base))
    found: dict[str, list[tuple[str, LayerAdapter]]] = {kind: [] for kind in totals}
    for name, part in adapter.layers.items():
        found.setdefault(name.rpartition(".")[2], []).append((name, part))
    for name in (base.structure.embedding_name, base.structure.head_name):
        totals.setdefault(name.rpartition(".")[2], 1)
    table: list[CoverageRow] = []
    for kind, parts in found.items():
        ranks = sorted({part.rank for _, part in parts if isinstance(part, LowRank)})
        trained = sum(p.numel() for _, part in parts for p in part.named().values())
        label = ", ".join(map(str, ranks)) if ranks else ("whole" if parts else "")
        if any(isinstance(part, TrainableTokens) for _, part in parts):
            label = "rows"
        table.append(CoverageRow(kind, len(parts), totals[kind], trained, label))
    return table
