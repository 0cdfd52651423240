"""Every touch of transformers' internals, and nothing else.

What Graft needs from a `AutoModelForCausalLM` that its public interface does not give:

    stream(...)      load tensor by tensor, each brought into its stored form at once, through transformers' own extension
                     point for quantizers, so that the renaming and stacking it does for each architecture comes along
    install(...)     replace linear layers, routers and stacked experts by stored ones (`modules.py`)
    ModelStructure          where the body ends and the head begins, the repeated layers, what could not be stored and why
    hidden / logits  the body alone over segments; then the model's own code from there on, for a few tokens at a time
    switch           use our attention (`attention.py`) or the model's own
    dense_state_dict      the weights under the names and in the layout that transformers saves

The contract tests in `tests/base/test_hf.py` fail first when transformers changes.
"""

# This file is the border to another library's internals, whose types are partial: the checks that only restate that are off.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
# pyright: reportIncompatibleVariableOverride=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import (
    _MODEL_TO_CONVERSION_PATTERN,  # pyright: ignore[reportPrivateUsage]
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftlm.base import context
from graftlm.base.attention import segment_attention
from graftlm.base.context import ForwardContext
from graftlm.base.embedding import StoredEmbedding
from graftlm.base.modules import Stored, StoredLinear, StoredStack, WeightHandle
from graftlm.base.precision import DTYPES, embedding_precision
from graftlm.config import Precision
from graftlm.errors import ModelError

ATTENTION = "graft_segments"
EXPERTS = "graft_experts"

_LINEAR_CLASSES = {"Linear", "Conv1D", "FalconLinear"}  # y = x W + b and nothing else; a subclass may do more


# ---- which weights are stored ----------------------------------------------------------------------------------------


@dataclass
class Replacements:
    """The stored modules that will replace parts of a model, by the name of the parameter each one takes."""

    linears: dict[str, StoredLinear] = field(default_factory=dict[str, StoredLinear])  # "….q_proj.weight"
    routers: dict[str, StoredLinear] = field(default_factory=dict[str, StoredLinear])  # "….gate.weight"
    stacks: dict[str, StoredStack] = field(default_factory=dict[str, StoredStack])  # "….experts.gate_up_proj"
    not_converted: dict[str, str] = field(default_factory=dict[str, str])  # module name -> why it stays as it is
    fixed: set[str] = field(default_factory=set[str])
    """Parameters that the model's class itself never trains: biases that balance experts, tables of positions."""

    def all(self) -> dict[str, Stored]:
        return {**self.linears, **self.routers, **self.stacks}


def _head_and_embedding(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not isinstance(embedding, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no output head or embedding that Graft can find; it cannot be trained"
        )
    return head, embedding


def find_replacements(model: PreTrainedModel, precision: Precision) -> Replacements:
    """Decide which modules of `model` (on any device, meta included) are stored in `precision`."""
    head, embedding = _head_and_embedding(model)
    dense = precision in DTYPES
    replacements = Replacements(fixed={name for name, p in model.named_parameters() if not p.requires_grad})
    tied = {id(embedding.weight)} if hasattr(embedding, "weight") else set[int]()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if module is head or module is embedding:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight
            if kind not in _LINEAR_CLASSES:
                replacements.not_converted[name] = f"{kind} computes more than a linear layer"
            elif id(weight) in tied:
                replacements.not_converted[name] = "its weight is tied to the embedding"
            else:
                transposed = isinstance(module, Conv1D)
                shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
                replacements.linears[f"{name}.weight"] = StoredLinear(shape, precision, transposed=transposed)
        elif _is_stacked(module):
            transposed = bool(getattr(module, "is_transposed", False))
            for stack_name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 3:
                    e, a, b = parameter.shape
                    shape3 = (e, b, a) if transposed else (e, a, b)
                    replacements.stacks[f"{name}.{stack_name}"] = StoredStack(shape3, precision, transposed=transposed)
            parent = model.get_submodule(name.rpartition(".")[0])
            for child_name, child in parent.named_children():
                weight = child._parameters.get("weight")
                if child is module or isinstance(child, nn.Linear) or weight is None or weight.ndim != 2:
                    continue
                path = f"{name.rpartition('.')[0]}.{child_name}"
                if weight.shape[0] == getattr(module, "num_experts", None):
                    # A router is a thousandth of the model and decides who computes: it keeps 16 or 32 bits.
                    stored: Precision = precision if dense else embedding_precision(precision)
                    replacements.routers[f"{path}.weight"] = StoredLinear((weight.shape[0], weight.shape[1]), stored)
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)):
            replacements.not_converted[name] = (
                f"{kind} holds stacked weights outside of transformers' experts interface"
            )
    if not replacements.linears and not replacements.stacks:
        raise ModelError(f"{type(model).__name__} has no linear layer that Graft can store or adapt")
    return replacements


def _is_stacked(module: nn.Module) -> bool:
    """Whether a module holds an expert mixture's stacked weights behind transformers' experts interface."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")


def replace_modules(
    model: PreTrainedModel, replacements: Replacements, precision: Precision, activation_dtype: torch.dtype
) -> None:
    """Put the stored modules in their places; those without a value yet take it from the module they replace."""
    for name, stored in replacements.all().items():
        if stored.dense is None and stored.compressed is None:
            stored.set_weight(model.get_parameter(name))
    for name, stored in replacements.linears.items():
        path = name.removesuffix(".weight")
        stored.bias = model.get_submodule(path).bias  # loaded into the module that is replaced
        stored.__dict__["weight"] = WeightHandle(stored, activation_dtype)
        _replace(model, path, stored)
    for name, stored in replacements.stacks.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        del module._parameters[attribute]
        module.add_module(attribute, stored)
    for name, stored in list(replacements.routers.items()):
        path = name.removesuffix(".weight")
        router = model.get_submodule(path)
        original = router._parameters.pop("weight")
        router.add_module("stored", stored)
        router.__dict__["weight"] = WeightHandle(stored, activation_dtype)
        fault = _router_fault(router, stored, activation_dtype)
        if fault is not None:
            del router.__dict__["weight"], router._modules["stored"]
            router.register_parameter("weight", original if original is None or not original.is_meta else stored.dense)
            replacements.not_converted[path] = f"its router does not multiply with F.linear{fault}"
            del replacements.routers[name]
    if replacements.stacks:
        _set_experts(model)

    head, original = _head_and_embedding(model)
    keep = DTYPES[embedding_precision(precision)]
    embedding = _replace_embedding(model, original, activation_dtype)
    for name, module in model.named_modules():
        if module is embedding or module is head or isinstance(module, Stored):
            continue
        wanted = _small_type(model, name, module, precision, activation_dtype)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not parameter.is_meta:
                if parameter.dtype != wanted:
                    setattr(module, key, nn.Parameter(parameter.detach().to(wanted), requires_grad=False))
                if wanted != activation_dtype and not _kept_by_class(model, f"{name}.{key}"):
                    _work_in(module, wanted, activation_dtype)
    if type(head) is nn.Linear:
        head_name = next(name for name, module in model.named_modules() if module is head)
        linear = StoredLinear((head.weight.shape[0], head.weight.shape[1]), embedding_precision(precision), head.bias)
        if head.weight.dtype != keep and not head.weight.is_meta:
            shared = embedding.weight is head.weight
            narrowed = nn.Parameter(head.weight.detach().to(keep), requires_grad=False)
            linear.weight = narrowed
            if shared:
                embedding.weight = narrowed
        else:
            linear.weight = head.weight
        _replace(model, head_name, linear)
        embedding.tie(linear)
    if embedding.weight.dtype != keep and isinstance(embedding.weight, nn.Parameter) and not embedding.weight.is_meta:
        embedding.weight = nn.Parameter(embedding.weight.detach().to(keep), requires_grad=False)


def _router_fault(router: nn.Module, stored: StoredLinear, activation_dtype: torch.dtype) -> str | None:
    """None where a router's own forward sends its matmul through the stored layer; else what is known of why it does not."""
    called: list[bool] = []
    hook = stored.register_forward_hook(lambda *_: called.append(True))
    try:
        with torch.no_grad():
            router(torch.zeros(2, stored.in_features, dtype=activation_dtype, device=stored.value.device))
    except (TypeError, AttributeError, RuntimeError) as error:
        return f" ({_first_line(error)})"
    finally:
        hook.remove()
    return None if called else ""


def _kept_by_class(model: PreTrainedModel, parameter: str) -> bool:
    """Whether the model's class wants a parameter in float32 whatever the rest is, and handles that in its own code."""
    names = (*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()))
    return any(part in names for part in parameter.split("."))


def _small_type(
    model: PreTrainedModel, name: str, module: nn.Module, precision: Precision, activation_dtype: torch.dtype
) -> torch.dtype:
    """The type of norms, biases and position tables, thousandths of the model: that of the compute dtype.

    A base stored in float32 keeps them in float32 whatever products run in, since full training would lose every small
    update of a norm's weight near 1; only where a module holds other modules too, its code may mix types, and they follow.
    """
    if any(_kept_by_class(model, f"{name}.{key}") for key, _ in module.named_parameters(recurse=False)):
        return torch.float32
    leaf = next(module.children(), None) is None
    return torch.float32 if precision == "float32" and leaf else activation_dtype


def _work_in(module: nn.Module, inner: torch.dtype, outer: torch.dtype) -> None:
    """Let a small module compute in its own type: what comes in is upcast, what goes out narrowed again."""
    if "graft_types" in module.__dict__:  # it holds two such parameters
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
    """Embeddings leave in the compute dtype, so that the residual stream has it too; wherever the model holds one."""
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
    """A mixture's experts over stored weights: each expert gets its tokens, in order, with whom they belong to.

    hidden (T, in), top_k_index and top_k_weights (T, k) -> (T, in). Registered with transformers' experts interface.
    """
    out = torch.zeros_like(hidden)
    first: StoredStack = module.gate_up_proj if module.has_gate else module.up_proj
    first_bias = getattr(module, "gate_up_proj_bias" if module.has_gate else "up_proj_bias", None)
    last: StoredStack = module.down_proj
    last_bias = getattr(module, "down_proj_bias", None)
    for expert in torch.unique(top_k_index).tolist():
        if expert >= module.num_experts:
            continue
        rows, place = torch.where(top_k_index == expert)  # (t,), (t,)
        h = first.of_expert(expert, hidden[rows], rows)  # (t, 2 inner) or (t, inner)
        if first_bias is not None:
            h = h + first_bias[expert]
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)  # (t, inner)
        y = last.of_expert(expert, h, rows)  # (t, in)
        if last_bias is not None:
            y = y + last_bias[expert]
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        out = out.index_add(0, rows, (y * top_k_weights[rows, place, None]).to(out.dtype))
    return out


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, segment_attention)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


# ---- streaming a checkpoint into its stored form ---------------------------------------------------------------------


@register_quantization_config("graft")
class StoredFormConfig(QuantizationConfigMixin):
    """Tells transformers' loader that our quantizer takes the weights; never written to a file."""

    def __init__(self, precision: Precision = "float32", activation_dtype: torch.dtype = torch.float32) -> None:
        self.quant_method = "graft"  # pyright: ignore[reportIncompatibleVariableOverride]
        self.precision: Precision = precision
        self.activation_dtype = activation_dtype


class _StoreOp(ConversionOps):
    """Takes one finished tensor (renamed, split or stacked as the architecture wants) into its stored module."""

    def __init__(self, replacements: dict[str, Stored]) -> None:
        self.replacements = replacements
        self.mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # (name, found, asked for)

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            stored, found = self.replacements[name], value[0] if isinstance(value, list) else value
            if tuple(found.shape) == stored.original_shape:
                stored.set_weight(found)
            else:
                self.mismatched.append((name, tuple(found.shape), stored.original_shape))
            if context.get("missing_keys") is not None:
                context["missing_keys"].discard(name)
        return {}

    def __deepcopy__(self, memo: Any) -> _StoreOp:
        return self


@register_quantizer("graft")
class StoredFormQuantizer(HfQuantizer):
    """Brings each weight into its stored form as soon as the loader has it, so that only one is ever there in full."""

    requires_calibration = False
    quantization_config: StoredFormConfig
    replacements: Replacements
    store_op: _StoreOp

    @property
    def quantized_element_size(self) -> float | None:
        return {"nf4": 0.52, "int8": 1.0}.get(self.quantization_config.precision)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        precision, activation_dtype = self.quantization_config.precision, self.quantization_config.activation_dtype
        self.replacements = find_replacements(model, precision)
        self.store_op = _StoreOp(self.replacements.all())
        keep = DTYPES[embedding_precision(precision)]
        head, embedding = _head_and_embedding(model)
        taken = set(self.store_op.replacements)
        for name, parameter in list(model.named_parameters()):
            if name in taken or not parameter.is_floating_point():
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            if owner is head or owner is embedding:
                wanted = keep
            else:
                wanted = _small_type(model, name.rpartition(".")[0], owner, precision, activation_dtype)
            if parameter.dtype != wanted:  # the loader casts a tensor to the type that waits for it
                parameter.data = parameter.data.to(wanted)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.store_op.replacements

    def get_quantize_ops(self) -> ConversionOps:
        return self.store_op

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def stream_checkpoint(
    path: str, precision: Precision, activation_dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, Replacements, list[str]]:
    """Load a model folder tensor by tensor into its stored form; also returns the tensors that the architecture has no use for.

    Memory at the peak: the final form, plus the largest tensor in the checkpoint's type and once more while converted.
    Raises ModelError for missing, unexpected-in-shape or unreadable tensors.
    """
    report = _Report()
    try:
        with _quiet(), report:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                quantization_config=StoredFormConfig(precision, activation_dtype),
                dtype=activation_dtype,
                device_map={"": device} if device.type != "cpu" else None,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                local_files_only=True,
            )
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: its weights cannot be read ({_first_line(error)}); download the model again"
        ) from None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # transformers says so when parts of a joined or stacked weight do not fit together
        raise ModelError(
            f"{path}: the tensors do not fit the model's config; {report.fault or _first_line(error)}"
        ) from None
    model, info = loaded
    quantizer: StoredFormQuantizer = model.hf_quantizer
    replacements = quantizer.replacements
    info["mismatched_keys"] = {*info["mismatched_keys"], *quantizer.store_op.mismatched}
    _share_tied(model, replacements, info["missing_keys"])
    _check_loaded(info, replacements, path)
    unused = sorted(info["unexpected_keys"])
    quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
    replace_modules(model, replacements, precision, activation_dtype)
    return _ready(model), replacements, unused


def _share_tied(model: PreTrainedModel, replacements: Replacements, missing: set[str]) -> None:
    """Give layers that share their weights by the class's own ties, as Zamba's blocks do, one stored form."""
    stored = replacements.all()
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in stored and source in stored and stored[name].dense is None and stored[name].compressed is None:
            stored[name].tie(stored[source])
            missing.discard(name)


def _check_loaded(info: Any, replacements: Replacements, path: str) -> None:
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(f"{path}: tensor '{name}' has shape {tuple(found)}, the config asks for {tuple(wanted)}")
    missing = sorted(info["missing_keys"])
    missing += sorted(
        n for n, s in replacements.all().items() if s.dense is None and s.compressed is None and n not in missing
    )
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} tensors are missing from the checkpoint, the first is '{missing[0]}'; "
            "download the model again, or start with --init random"
        )
    if info["error_msgs"]:
        raise ModelError(f"{path}: the checkpoint does not load: {_first_line(info['error_msgs'][0])}")


class _Report(logging.Handler):
    """Keeps what transformers reports about a load, which it says in its log only, off the user's terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        self._logger = logging.getLogger("transformers.modeling_utils")

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    @property
    def fault(self) -> str:
        """What went wrong with the first weight that could not be put together, in transformers' own words."""
        return next((line for line in self.text.splitlines() if line.startswith("Error: ")), "").removeprefix("Error: ")

    def __enter__(self) -> None:
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(logging.WARNING)
        self._logger.propagate = False
        self._logger.addHandler(self)

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)


def fails_in_the_model(error: BaseException) -> bool:
    """Whether an error comes from a model's own code, transformers' or trusted remote code, and not from ours below it."""
    inner = ""
    trace = error.__traceback__
    while trace is not None:
        room = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        inner = room if room in ("graftlm", "transformers", "transformers_modules") else inner
        trace = trace.tb_next
    return inner in ("transformers", "transformers_modules")


def _first_line(error: Any) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def convert_model(
    model: PreTrainedModel, precision: Precision, activation_dtype: torch.dtype
) -> tuple[PreTrainedModel, Replacements]:
    """Bring a model that is already in memory (fresh, or dequantized) into stored form, module by module."""
    replacements = find_replacements(model, precision)
    replace_modules(model, replacements, precision, activation_dtype)
    return _ready(model), replacements


def random_stored_model(
    config: Any, precision: Precision, activation_dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[PreTrainedModel, Replacements]:
    """A model of `config` with random weights that are made on `device`, each brought into its stored form at once.

    It is built without storage first; then one module after another gets weights from its class's own initialization. So
    of a model of any size one weight at a time is there in full (float32).
    """
    with torch.device("meta"):
        model: Any = random_model(config, seed, trust_remote_code=False)
    replacements = find_replacements(model, precision)
    waiting = replacements.all()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for path, module in list(model.named_modules()):
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if not names and next(module.buffers(recurse=False), None) is None:
                continue
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
            for name in names:
                stored = waiting.get(f"{path}.{name}")
                if stored is not None:
                    stored.set_weight(module.get_parameter(name))
                    setattr(module, name, nn.Parameter(torch.empty(stored.original_shape, device="meta"), False))
    model.tie_weights()
    replace_modules(model, replacements, precision, activation_dtype)
    return _ready(model), replacements


def has_causal_model(config: Any, trust_remote_code: bool) -> bool:
    """Whether transformers, or the model's own code where it may run, has a causal language model for this config."""
    own = getattr(config, "auto_map", None) or {}
    return type(config) in AutoModelForCausalLM._model_mapping or (trust_remote_code and "AutoModelForCausalLM" in own)


def random_model(config: Any, seed: int, trust_remote_code: bool) -> PreTrainedModel:
    """A model of `config` with random weights, the same for the same seed."""
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def load_dequantized(path: str, method: str, trust_remote_code: bool) -> PreTrainedModel:
    """Load a checkpoint that is already quantized as a plain 16-bit model, by transformers' own dequantization.

    Raises ModelError, by name, for kinds that cannot be brought back.
    """
    if method in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        extra: dict[str, Any] = {}
    elif method == "fp8":
        extra = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    elif method == "mxfp4":
        extra = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    else:
        raise ModelError(
            f"{path} is already quantized with '{method}', which Graft does not undo; "
            "take the 16-bit original of this model (bitsandbytes, fp8 and mxfp4 checkpoints are read)"
        )
    try:
        with _quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True, **extra
            )
            model = model.dequantize() if not extra else model
            # What it was is forgotten, so that it is saved as a plain model.
            model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
            model.hf_quantizer = None
            return model
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: its weights cannot be read ({_first_line(error)}); download the model again"
        ) from None
    except ImportError as error:
        raise ModelError(f"{path} is quantized with '{method}', and undoing that needs a package: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own bars and load reports stay off the user's terminal; what matters is raised as an error."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Frozen and in evaluation mode: the model's own dropout draws from a generator's state, so it stays off."""
    model.requires_grad_(False)
    model.eval()
    config: Any = model.config
    config.use_cache = False
    if getattr(config, "rescale_every", 0):
        # RWKV would halve its weights in place for float16, and halve its states to match: the same logits.
        model.__dict__["graft_rescale_every"], config.rescale_every = config.rescale_every, 0
    return model


# ---- body, head, layers ----------------------------------------------------------------------------------------------


class _BodyOutput(dict[str, Any]):
    """What a body returns, with nothing in it but the hidden states we give; any other field reads as None."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index in (0, "last_hidden_state") else None

    def to_tuple(self) -> tuple[Any, ...]:
        return (self.last_hidden_state,)


class _Given(nn.Module):
    """Stands in for a model's body and returns hidden states that are already there."""

    def __init__(self, body: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "_body", body)
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> _BodyOutput:
        return _BodyOutput(self._hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_body"), name)


class _ReadHead(nn.Module):
    """A stored head as the model's own code sees it: Mamba casts its input to the type of the head's weight first.

    Our own code needs the head's parameter itself, so unlike other stored layers it has no handle in that place.
    """

    def __init__(self, head: StoredLinear, activation_dtype: torch.dtype) -> None:
        super().__init__()
        object.__setattr__(self, "_head", head)
        self.__dict__["weight"], self.bias = WeightHandle(head, activation_dtype), head.bias

    def forward(self, x: Tensor) -> Tensor:
        return self._head(x)


def _stored(model: nn.Module) -> list[Stored]:
    return [module for module in model.modules() if isinstance(module, Stored)]


def _with(module: nn.Module, path: Sequence[str], other: nn.Module) -> Any:
    """A module that shares everything with `module` but has `other` at `path`.

    The model itself is not changed: another thread may run it, or look for its layers, at the same time.
    """
    own: Any = module
    copy = object.__new__(type(module))
    child = other if len(path) == 1 else _with(own._modules[path[0]], path[1:], other)
    copy.__dict__.update(own.__dict__)
    copy.__dict__["_modules"] = {**own._modules, path[0]: child}
    return copy


def _run_again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward whose inputs alone are kept; the backward pass runs it again. Its randomness is counter-based."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    passing = context.current()  # autograd may run it again in a thread of its own

    def run(*args: Any) -> Any:
        with passing:
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


class ModelStructure:
    """Where the parts of a causal language model are: body, head, embedding, layers."""

    def __init__(self, model: PreTrainedModel, activation_dtype: torch.dtype) -> None:
        """Find the parts and prove that body and head together give the untouched logits; ModelError when not.

        `activation_dtype` is the dtype of the hidden states.
        """
        self.model, self._compute = model, activation_dtype
        names = {id(module): name for name, module in model.named_modules()}
        head, embedding = _head_and_embedding(model)
        self.head_name, self.embedding_name = names[id(head)], names[id(embedding)]
        self.embedding: Any = embedding  # a StoredEmbedding, once the model is installed
        self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        config: Any = model.config.get_text_config()
        self.vocabulary = int(head.weight.shape[0])
        self.max_positions = int(getattr(config, "max_position_embeddings", 0) or 0)
        ids = torch.arange(6, device=model.device)[None] % self.vocabulary
        self.body_name, self.body = self._find_body(head, ids)
        parameters = inspect.signature(self.body.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.plain_head = self._has_plain_head()

    @property
    def head(self) -> nn.Module:
        return self.model.get_submodule(self.head_name)

    def _readable(self) -> Any:
        """The model with a head whose weight its own code may read."""
        head = self.head
        if not isinstance(head, StoredLinear):
            return self.model
        return _with(self.model, self.head_name.split("."), _ReadHead(head, self._compute))

    def tail_modules(self) -> list[nn.Module]:
        """Every module outside the body: what turns its hidden states into logits, the head among them."""
        body, found, waiting = self.body, list[nn.Module](), list[nn.Module]([self.model])
        while waiting:
            module = waiting.pop()
            found.append(module)
            waiting.extend(child for child in module.children() if child is not body)
        return found

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        """Whether logits are the head's product and nothing else: no soft cap, no scale, no bias, no other layer."""
        head = self.head
        if not isinstance(head, StoredLinear) or head.weight is None or head.bias is not None:
            return False
        generator = torch.Generator().manual_seed(0)
        for scale in (1.0, 100.0):  # a soft cap shows itself at large logits
            hidden = torch.randn(1, 2, head.in_features, generator=generator).mul_(scale)
            hidden = hidden.to(device=head.weight.device, dtype=self._kind)
            found, product = self.logits(hidden), head(hidden)[0]
            if found.dtype != product.dtype or not torch.equal(found, product):
                return False
        return True

    @torch.no_grad()
    def _find_body(self, head: nn.Module, ids: Tensor) -> tuple[str, nn.Module]:
        outputs: list[tuple[str, Tensor]] = []
        seen: list[Tensor] = []

        def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
            if isinstance(first, Tensor):
                outputs.append((name, first))

        hooks = [m.register_forward_hook(partial(keep, n)) for n, m in self.model.named_modules() if n]
        hooks.append(head.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
        try:
            expected = self._readable()(input_ids=ids, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever the model's own code raises: in float32 it has the weights that transformers gives it.
            plain = all(s.dense is not None and s.dense.dtype == self._compute for s in _stored(self.model))
            way_out = "please report this architecture"
            raise ModelError(
                f"{type(self.model).__name__} does not run over {'its' if plain else 'stored'} weights "
                f"({type(error).__name__}: {_first_line(error)}); "
                + (
                    way_out
                    if plain
                    else f"--base-precision float32 --compute-dtype float32 changes no type of them; {way_out}"
                )
            ) from None
        finally:
            for hook in hooks:
                hook.remove()
        hidden = seen[0]
        self._kind = hidden.dtype
        same = [n for n, t in outputs if t.shape == hidden.shape and t.data_ptr() == hidden.data_ptr()]
        candidates = sorted(same, key=lambda n: n.count("."))[:1]
        base_name = self.model.base_model_prefix
        if base_name and hasattr(self.model, base_name):
            candidates.append(base_name)
        reached = dict(outputs)
        for name in candidates:
            self.body_name, self.body = name, self.model.get_submodule(name)
            try:
                found = self.logits(reached[name])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # any failure only means that this candidate is not the body
                continue
            if found.shape == expected[0].shape and torch.allclose(found, expected[0], rtol=1e-4, atol=1e-4):
                return name, self.body
        raise ModelError(
            f"{type(self.model).__name__}: the part between its layers and its logits cannot be run on its own, so Graft "
            "cannot compute its loss; please report this architecture"
        )

    def hidden(self, ids: Tensor, passing: ForwardContext) -> Tensor:
        """The body alone: ids (T,) laid out as the context's segments -> hidden states (T, width)."""
        segments = passing.segments
        with passing:
            if segments.stacked:
                count, length = len(segments.lengths), segments.lengths[0]
                output = self.body(input_ids=ids.view(count, length), use_cache=False)
            else:
                positions = segments.positions.to(ids.device)[None]
                output = self.body(input_ids=ids[None], position_ids=positions, use_cache=False)
        hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        return hidden.reshape(-1, hidden.shape[-1])

    def logits(self, hidden: Tensor, passing: ForwardContext | None = None) -> Tensor:
        """From hidden states (n, width) or (1, n, width) to logits (n, vocabulary), by the model's own code.

        The class's forward runs with its body replaced by the states we have, so soft caps and scales come along. The
        context's segments lay out the n rows; a head with adapters needs it.
        """
        states = hidden if hidden.ndim == 3 else hidden[None]
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        stand_in = _with(self._readable(), self.body_name.split("."), _Given(self.body, states))
        with nullcontext() if passing is None else passing:
            return stand_in(input_ids=ids, use_cache=False).logits[0]

    def checkpoint_layers(self, on: bool) -> int:
        """Keep only the inputs of each layer and run it again in the backward pass; returns how many layers do."""
        for layer in self.layers:
            # Not through transformers' switch: that works in training mode only, in which OPT's layers draw dropout.
            layer.__dict__.pop("forward", None)
            if on:
                layer.forward = partial(_run_again, layer.forward)
        return len(self.layers)


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention of a model and of every part of it."""
    with _quiet():
        model.set_attn_implementation(implementation)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) not in (None, implementation):
            config._attn_implementation = implementation


@contextmanager
def short_windows(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Cut every attention window and chunk down to `length` tokens for a while, so that short examples are longer than it.

    A model that applies its window only through the mask, which our attention does not read, shows itself then.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    changed: list[tuple[Any, str, int]] = []
    for owner in (*configs.values(), *model.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > length:
                changed.append((owner, name, value))
                setattr(owner, name, length)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def position_dependent_rotary(config: Any) -> str | None:
    """The rotary type whose frequencies depend on the longest position in the batch, or None."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [parameters] if "rope_type" in parameters or "type" in parameters else list(parameters.values())
    for kind in kinds:
        if isinstance(kind, dict):
            name = kind.get("rope_type", kind.get("type"))
            if name in ("longrope", "dynamic"):
                return str(name)
    return None


def attributes(model: nn.Module) -> list[dict[str, int]]:
    """Which object each attribute and buffer of each module is: two of these differ where something was written between."""
    return [
        {name: id(value) for name, value in (*vars(module).items(), *module._buffers.items())}
        for module in model.modules()
    ]


def dense_state_dict(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight under transformers' own name and in its layout, tied copies left out, as dense `dtype` tensors."""
    state: dict[str, Tensor] = {}
    stored = {name: module for name, module in model.named_modules() if isinstance(module, Stored)}
    seen: set[int] = set()
    for name, module in stored.items():
        value = module.value
        if id(value) in seen:
            continue
        seen.add(id(value))
        key = name if isinstance(module, StoredStack) else f"{name.removesuffix('.stored')}.weight"
        state[key] = module.original(dtype)
        bias = getattr(module, "bias", None)
        if bias is not None:
            state[f"{name}.bias"] = bias.detach().to(dtype)
    owned = {f"{name}.{key}" for name in stored for key in ("weight", "bias")}
    for name, parameter in model.named_parameters():  # tied parameters come once, under their first name
        if name in owned:
            continue
        if id(parameter) in seen:
            # The embedding of a tied head: the embedding's name is the one that is saved.
            for key in [k for k, s in stored.items() if s.dense is parameter]:
                state.pop(f"{key}.weight", None)
        state[name] = parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()
        seen.add(id(parameter))
    persistent = set(model.state_dict().keys())
    for name, buffer in model.named_buffers():
        if name in persistent:
            state[name] = buffer
    return state


def save_model(model: PreTrainedModel, folder: str, dtype: torch.dtype) -> None:
    """Write a plain Hugging Face model folder: sharded safetensors and config.json."""
    config: Any = model.config
    cache, implementation, kind = config.use_cache, config._attn_implementation, config.dtype
    experts = getattr(config, "_experts_implementation", None)
    config.use_cache, config.dtype = True, dtype
    rescale = model.__dict__.get("graft_rescale_every")
    if rescale is not None:
        config.rescale_every = rescale
    try:
        with _quiet():
            model.save_pretrained(folder, state_dict=dense_state_dict(model, dtype), max_shard_size="4GB")
    finally:
        config.use_cache, config.dtype = cache, kind
        if rescale is not None:
            config.rescale_every = 0
        config._attn_implementation = implementation
        if experts is not None:
            config._experts_implementation = experts


def mixture_of_v4(model: PreTrainedModel) -> str | None:
    """The mixture after whose transformers 4 form PEFT rewrites a config for this model: `mixtral`, `qwen2_moe`, or None.

    As `_convert_peft_config_moe` of PEFT 0.21 finds it.
    """
    kind = str(getattr(model.config, "model_type", ""))
    known = {**_MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
    return known.get(kind) if get_checkpoint_conversion_mapping(kind) is not None else None
