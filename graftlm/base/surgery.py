"""Replace modules of a transformers model by stored ones (`modules.py`).

    find_replacements(model, precision)     decide: linear layers, routers, stacked experts; what stays, and why
    replace_modules(model, ...)             replace them; returns what was replaced
    convert_model(model, ...)               both, for a model that is in memory already

`quantizer.py` fills the replacements while it reads a checkpoint, `random_init.py` with random weights. `fused.py` then fuses
norms, gated activations and rotations.
"""

# The types of transformers' internals are partial: the checks that only restate that are off.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from graftlm.base.embedding import StoredEmbedding
from graftlm.base.grouped_experts import grouped_experts
from graftlm.base.modules import Stored, StoredLinear, StoredStack, WeightHandle
from graftlm.base.precision import DTYPES, embedding_dtype, embedding_precision
from graftlm.base.transformers_log import first_line
from graftlm.config import Precision
from graftlm.errors import ModelError

EXPERTS = "graft_experts"

_LINEAR_CLASSES = {"Linear", "Conv1D", "FalconLinear"}  # y = x W + b and nothing else; a subclass may do more


@dataclass
class Replacements:
    """The stored modules that will replace modules of a model, by the name of each one's parameter."""

    linears: dict[str, StoredLinear] = field(default_factory=dict[str, StoredLinear])  # "….q_proj.weight"
    routers: dict[str, StoredLinear] = field(default_factory=dict[str, StoredLinear])  # "….gate.weight"
    stacks: dict[str, StoredStack] = field(default_factory=dict[str, StoredStack])  # "….experts.gate_up_proj"
    not_converted: dict[str, str] = field(default_factory=dict[str, str])  # module name -> why it stays as it is
    fixed: set[str] = field(default_factory=set[str])
    """Parameters that the model's class itself never trains: biases that balance experts, position tables."""

    def all(self) -> dict[str, Stored]:
        return {**self.linears, **self.routers, **self.stacks}


def head_and_embedding(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not isinstance(embedding, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no output head or embedding that Graft can find; it cannot be trained"
        )
    return head, embedding


def find_replacements(model: PreTrainedModel, precision: Precision) -> Replacements:
    """Decide which modules of `model` (on any device, meta included) are stored in `precision`.

    Raises ModelError for a model without a linear layer that can be stored, or without a head or an embedding.
    """
    head, embedding = head_and_embedding(model)
    found = Replacements(fixed={name for name, p in model.named_parameters() if not p.requires_grad})
    tied = embedding.weight if hasattr(embedding, "weight") else None
    for name, module in model.named_modules():
        if module is head or module is embedding:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            _find_linear(found, name, module, tied, precision)
        elif _is_stacked(module):
            _find_stacks(found, name, module, precision)
            _find_routers(found, model.get_submodule(name.rpartition(".")[0]), name, module, precision)
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)):
            found.not_converted[name] = (
                f"{type(module).__name__} has stacked weights outside of transformers' experts interface"
            )
    if not found.linears and not found.stacks:
        raise ModelError(f"{type(model).__name__} has no linear layer that Graft can store or adapt")
    return found


def _find_linear(found: Replacements, name: str, module: Any, tied: Any, precision: Precision) -> None:
    kind, weight = type(module).__name__, module.weight
    if kind not in _LINEAR_CLASSES:
        found.not_converted[name] = f"{kind} computes more than a linear layer"
    elif weight is tied:
        found.not_converted[name] = "its weight is tied to the embedding"
    else:
        transposed = isinstance(module, Conv1D)
        shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        found.linears[f"{name}.weight"] = StoredLinear(shape, precision, transposed=transposed)


def _find_stacks(found: Replacements, name: str, experts: nn.Module, precision: Precision) -> None:
    transposed = bool(getattr(experts, "is_transposed", False))
    for stack_name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.ndim == 3:
            e, a, b = parameter.shape
            shape = (e, b, a) if transposed else (e, a, b)
            found.stacks[f"{name}.{stack_name}"] = StoredStack(shape, precision, transposed=transposed)


def _find_routers(found: Replacements, parent: nn.Module, name: str, experts: nn.Module, precision: Precision) -> None:
    """The routers beside a mixture's experts, in the module that holds both."""
    # A router is a thousandth of the model and selects the experts: it keeps 16 or 32 bits.
    kept: Precision = precision if precision in DTYPES else embedding_precision(precision)
    for child_name, child in parent.named_children():
        weight = child._parameters.get("weight")
        if child is experts or isinstance(child, nn.Linear) or weight is None or weight.ndim != 2:
            continue
        path = f"{name.rpartition('.')[0]}.{child_name}"
        if weight.shape[0] == getattr(experts, "num_experts", None):
            found.routers[f"{path}.weight"] = StoredLinear((weight.shape[0], weight.shape[1]), kept)


def _is_stacked(module: nn.Module) -> bool:
    """Whether a module has a mixture's stacked expert weights behind transformers' experts interface."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")


def convert_model(
    model: PreTrainedModel, precision: Precision, activation_dtype: torch.dtype
) -> tuple[PreTrainedModel, Replacements]:
    """Convert a model that is in memory (random, or dequantized) to stored form, module by module."""
    replaced = replace_modules(model, find_replacements(model, precision), precision, activation_dtype)
    return freeze(model), replaced


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a model in evaluation mode: its own dropout depends on a generator's state, so it stays off."""
    model.requires_grad_(False)
    model.eval()
    config: Any = model.config
    config.use_cache = False
    if getattr(config, "rescale_every", 0):
        # RWKV would halve its weights in place for float16 and its states to match, with the same logits.
        model.__dict__["graft_rescale_every"], config.rescale_every = config.rescale_every, 0
    return model


def replace_modules(
    model: PreTrainedModel, replacements: Replacements, precision: Precision, activation_dtype: torch.dtype
) -> Replacements:
    """Replace modules by the stored ones; a stored module without a value takes it from the module it replaces.

    Returns what was replaced. A router that does not use its stored layer keeps its own weight, and is in `not_converted`.
    """
    for name, stored in replacements.all().items():
        if stored.dense is None and stored.compressed is None:
            stored.set_weight(model.get_parameter(name))
    _replace_linears(model, replacements.linears, activation_dtype)
    _replace_stacks(model, replacements.stacks)
    refused = _replace_routers(model, replacements.routers, activation_dtype)
    head, original = head_and_embedding(model)
    embedding = _replace_embedding(model, original, activation_dtype)
    _cast_small(model, {id(head), id(embedding)}, precision, activation_dtype)
    if type(head) is nn.Linear:
        _replace_head(model, head, embedding, precision)
    keep = embedding_dtype(precision, embedding.weight.dtype)
    if embedding.weight.dtype != keep and isinstance(embedding.weight, nn.Parameter) and not embedding.weight.is_meta:
        embedding.weight = nn.Parameter(embedding.weight.detach().to(keep), requires_grad=False)
    return replace(
        replacements,
        routers={n: s for n, s in replacements.routers.items() if n.removesuffix(".weight") not in refused},
        not_converted={**replacements.not_converted, **refused},
    )


def _replace_linears(model: PreTrainedModel, linears: dict[str, StoredLinear], activation_dtype: torch.dtype) -> None:
    for name, stored in linears.items():
        path = name.removesuffix(".weight")
        stored.bias = model.get_submodule(path).bias  # loaded into the replaced module
        stored.__dict__["weight"] = WeightHandle(stored, activation_dtype)
        _replace(model, path, stored)


def _replace_stacks(model: PreTrainedModel, stacks: dict[str, StoredStack]) -> None:
    for name, stored in stacks.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        del module._parameters[attribute]
        module.add_module(attribute, stored)
    if stacks:
        _set_experts(model)


def _replace_routers(
    model: PreTrainedModel, routers: dict[str, StoredLinear], activation_dtype: torch.dtype
) -> dict[str, str]:
    """Give each router its stored weight; returns those that do not use it, which keep their own, with the reason."""
    refused: dict[str, str] = {}
    for name, stored in routers.items():
        path = name.removesuffix(".weight")
        router = model.get_submodule(path)
        original = router._parameters.pop("weight")
        router.add_module("stored", stored)
        router.__dict__["weight"] = WeightHandle(stored, activation_dtype)
        fault = _router_fault(router, stored, activation_dtype)
        if fault is not None:
            del router.__dict__["weight"], router._modules["stored"]
            router.register_parameter("weight", original if original is None or not original.is_meta else stored.dense)
            refused[path] = f"its router does not multiply with F.linear{fault}"
    return refused


def _cast_small(model: PreTrainedModel, kept: set[int], precision: Precision, activation_dtype: torch.dtype) -> None:
    """Cast norms, biases and position tables; `kept`: the ids of head and embedding, which have dtypes of their own."""
    for name, module in model.named_modules():
        if id(module) in kept or isinstance(module, Stored):
            continue
        wanted = small_dtype(model, name, module, precision, activation_dtype)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not parameter.is_meta:
                if parameter.dtype != wanted:
                    setattr(module, key, nn.Parameter(parameter.detach().to(wanted), requires_grad=False))
                if wanted != activation_dtype and not _kept_by_class(model, f"{name}.{key}"):
                    _work_in(module, wanted, activation_dtype)


def _replace_head(model: PreTrainedModel, head: nn.Linear, embedding: StoredEmbedding, precision: Precision) -> None:
    keep = embedding_dtype(precision, head.weight.dtype)
    head_name = next(name for name, module in model.named_modules() if module is head)
    linear = StoredLinear((head.weight.shape[0], head.weight.shape[1]), embedding_precision(precision), head.bias)
    if head.weight.dtype != keep and not head.weight.is_meta:
        shared = embedding.weight is head.weight
        downcast_weight = nn.Parameter(head.weight.detach().to(keep), requires_grad=False)
        linear.weight = downcast_weight
        if shared:
            embedding.weight = downcast_weight
    else:
        linear.weight = head.weight
    _replace(model, head_name, linear)
    embedding.tie(linear)


def _router_fault(router: nn.Module, stored: StoredLinear, activation_dtype: torch.dtype) -> str | None:
    """None if a router's own forward calls the stored layer; else the reason, as far as it is known."""
    called: list[bool] = []
    hook = stored.register_forward_hook(lambda *_: called.append(True))
    try:
        with torch.no_grad():
            router(torch.zeros(2, stored.in_features, dtype=activation_dtype, device=stored.value.device))
    except (TypeError, AttributeError, RuntimeError) as error:
        return f" ({first_line(error)})"
    finally:
        hook.remove()
    return None if called else ""


def _kept_by_class(model: PreTrainedModel, parameter: str) -> bool:
    """Whether the model's class keeps a parameter in float32 with any dtype, and its code handles that."""
    names = (*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()))
    return any(part in names for part in parameter.split("."))


def small_dtype(
    model: PreTrainedModel, name: str, module: nn.Module, precision: Precision, activation_dtype: torch.dtype
) -> torch.dtype:
    """The dtype of norms, biases and position tables, thousandths of the model: the compute dtype.

    A base stored in float32 keeps them in float32 with any compute dtype, since full training in bfloat16 would lose every
    small update of a norm's weight near 1; so does one of a GGUF file, which has them in float32. In a module that
    has submodules, whose code may mix dtypes, they get the compute dtype.
    """
    if any(_kept_by_class(model, f"{name}.{key}") for key, _ in module.named_parameters(recurse=False)):
        return torch.float32
    leaf = next(module.children(), None) is None
    return torch.float32 if precision in ("float32", "gguf") and leaf else activation_dtype


def _work_in(module: nn.Module, inner: torch.dtype, outer: torch.dtype) -> None:
    """Let a small module compute in its own dtype: its input is upcast, its output downcast."""
    if "graft_types" in module.__dict__:  # it has two such parameters
        return
    module.__dict__["graft_types"] = (inner, outer)

    def upcast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.to(inner) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def downcast(module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(outer) if isinstance(output, Tensor) and output.is_floating_point() else output

    module.register_forward_pre_hook(upcast)
    module.register_forward_hook(downcast)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    model.get_submodule(parent).add_module(attribute, module)


def _replace_embedding(model: PreTrainedModel, embedding: nn.Module, activation_dtype: torch.dtype) -> StoredEmbedding:
    """Replace the embedding wherever the model has it; its output, and so the residual stream, has the activation dtype."""
    stored = StoredEmbedding(embedding, activation_dtype)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is embedding:
                module._modules[name] = stored
    return stored


def _set_experts(model: PreTrainedModel) -> None:
    for module in model.modules():
        if _is_stacked(module):
            config: Any = module.config
            config._experts_implementation = EXPERTS


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A mixture's experts over stored weights: each expert gets its tokens in order, with their indices.

    hidden (T, in), top_k_index and top_k_weights (T, k) -> (T, in). Registered with transformers' experts interface. How many
    tokens each expert gets is read once for all.
    """
    grouped = grouped_experts(module, hidden, top_k_index, top_k_weights)
    if grouped is not None:
        return grouped
    out = torch.zeros_like(hidden)
    first: StoredStack = module.gate_up_proj if module.has_gate else module.up_proj
    first_bias = getattr(module, "gate_up_proj_bias" if module.has_gate else "up_proj_bias", None)
    last: StoredStack = module.down_proj
    last_bias = getattr(module, "down_proj_bias", None)
    chosen, order = top_k_index.flatten().sort(stable=True)  # (T k,): an expert's uses stay in the order of tokens
    k = top_k_index.shape[1]
    all_rows, all_places = order // k, order % k
    experts = torch.arange(module.num_experts + 1, device=chosen.device, dtype=chosen.dtype)
    bounds: list[int] = torch.searchsorted(chosen, experts).tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        rows, place = all_rows[begin:end], all_places[begin:end]  # (t,), (t,)
        h = first.of_expert(expert, hidden[rows], rows)  # (t, 2 inner) or (t, inner)
        if first_bias is not None:
            h = h + first_bias[expert]
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)  # (t, inner)
        y = last.of_expert(expert, h, rows)  # (t, in)
        if last_bias is not None:
            y = y + last_bias[expert]
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        out.index_add_(0, rows, (y * top_k_weights[rows, place, None]).to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
