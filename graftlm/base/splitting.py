"""Split a model's weights over ranks: which tensors, and which of them are gathered together (`distributed/shard.py` has how).

    layer           a unit of its own: gathered when it is called, again for its backward pass, and freed behind each
    embedding       gathered when it is called; its backward pass needs the ids alone
    head            gathered for the loss, which leaves nothing for the backward pass but gradients
    both, if tied   one unit, gathered from the begin of a pass to its end

Of some layers, evenly spread, the rows may wait in the host's memory, so that one's copies go beside the computing of others.

Split are the stored weights and these two. Norms, biases, routers, offsets of NF4, weights that layers share, and adapters are
whole on every rank: thousandths of the model.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from graftlm.base.embedding import StoredEmbedding
from graftlm.base.modules import Stored, StoredLinear
from graftlm.base.surgery import Replacements, head_and_embedding
from graftlm.distributed.group import Ranks
from graftlm.distributed.shard import Piece, SplitWeights, Unit
from graftlm.errors import ModelError


def split_weights(
    model: Any, replacements: Replacements, ranks: Ranks, device: torch.device, *, trained: bool, host_layers: int = 0
) -> SplitWeights:
    """Split a loaded model; its stored weights may be split already (`Stored.split`), as each was read.

    `trained`: whether the weights are, so that gradients are summed row by row. The rows of `host_layers` layers wait on the
    host. Raises ModelError for a model without layers, or with fewer.
    """
    layers = _layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that could be gathered one after the other; take --layout replicate"
        )
    head, embedding = head_and_embedding(model)
    waiting = modules_on_host(model, host_layers)
    pieces = _stored_pieces(model, replacements, head, ranks, waiting)
    outer = _outer_units(model, head, embedding, ranks)
    units: list[Unit] = []
    taken: set[Piece] = set()
    for layer in reversed(layers):  # the innermost first, should one be within another
        own = [piece for module in layer.modules() for piece in pieces.get(module, ()) if piece not in taken]
        taken.update(own)
        units.append(Unit([layer], own))
    rest = [piece for found in pieces.values() for piece in found if piece not in taken]
    if trained:
        names = {id(module): name for name, module in model.named_modules()}
        for piece in (*taken, *rest, *(piece for unit in outer for piece in unit.pieces)):
            if f"{names[id(piece.modules[0])]}.{piece.name}" not in replacements.fixed:
                piece.train()
    with _handles_aside(model):
        return SplitWeights(model, [*units, *outer], rest, ranks, device)


def _layers(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def modules_on_host(model: Any, count: int) -> set[nn.Module]:
    """The modules of `count` layers, evenly spread, whose rows wait on the host. Raises ModelError where there are fewer."""
    layers = _layers(model)
    if count > len(layers):
        raise ModelError(
            f"--offload-layers {count} is more than {type(model).__name__} has, {len(layers)}; give at most {len(layers)}, or "
            "auto"
        )
    of: dict[nn.Module, int] = {}
    for i, layer in enumerate(layers):  # one within another is found later
        of.update(dict.fromkeys(layer.modules(), i))
    return {module for module, i in of.items() if (i + 1) * count // len(layers) > i * count // len(layers)}


def weights_on_host(model: Any, count: int, names: Collection[str]) -> set[str]:
    """Which of the weights, by their parameters' names, wait on the host with `count` layers. Raises ModelError as above."""
    waiting = modules_on_host(model, count)
    return {name for name in names if model.get_submodule(name.rpartition(".")[0]) in waiting}


def shared_weights(model: Any) -> set[str]:
    """The parameters that several modules of a model have in common by its class: names of the sources and of the others."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}


def stays_whole(name: str, replacements: Replacements, shared: set[str]) -> bool:
    """Whether a stored weight, by its parameter's name, is not split: a router, and what layers share."""
    return name in replacements.routers or name in shared


def _stored_pieces(
    model: Any, replacements: Replacements, head: nn.Module, ranks: Ranks, on_host: set[nn.Module]
) -> dict[nn.Module, list[Piece]]:
    """The pieces of each stored module but the head."""
    shared = shared_weights(model)
    found: dict[nn.Module, list[Piece]] = {}
    for name, module in replacements.all().items():
        if module is head or stays_whole(name, replacements, shared):
            continue
        module.split(ranks, on_host=module in on_host)
        found[module] = module.pieces
    return found


def _outer_units(model: Any, head: nn.Module, embedding: nn.Module, ranks: Ranks) -> list[Unit]:
    """Embedding and head, where they have one dense weight each, or both the same, that no other module has."""
    assert isinstance(embedding, StoredEmbedding)
    rows = embedding._parameters.get("weight")
    own = head.dense if isinstance(head, StoredLinear) else None
    if rows is None or own is None:
        return []
    owners = {id(module) for module in model.modules() for p in module._parameters.values() if p is rows or p is own}
    if owners != {id(head), id(embedding)}:
        return []
    if rows is own:
        both = [embedding, head]
        return [Unit(both, [Piece.of(both, "weight", rows, ranks)], "pass")]
    return [
        Unit([embedding], [Piece.of([embedding], "weight", rows, ranks)], "forward"),
        Unit([head], [Piece.of([head], "weight", own, ranks)], "by hand"),
    ]


@contextmanager
def _handles_aside(model: Any) -> Iterator[None]:
    """Take the handles that stand for weights away, so that FSDP2 finds the parameters behind them."""
    handles = {
        module: module.__dict__.pop("weight")
        for module in model.modules()
        if isinstance(module, Stored) and "weight" in module.__dict__
    }
    try:
        yield
    finally:
        for module, handle in handles.items():
            module.__dict__["weight"] = handle
