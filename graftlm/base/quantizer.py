"""Read a checkpoint tensor by tensor and convert each to its stored form at once.

It uses transformers' extension point for quantizers, and so its renaming and stacking for each architecture. Checkpoints that
are quantized already are first dequantized by transformers.
"""

# The types of transformers' internals are partial: the checks that only restate that are off.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
# pyright: reportIncompatibleVariableOverride=false, reportCallIssue=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftlm.base.fingerprint import tensors_in, weight_files
from graftlm.base.modules import Stored
from graftlm.base.precision import DTYPES, embedding_precision
from graftlm.base.splitting import shared_weights, stays_whole, weights_on_host
from graftlm.base.surgery import (
    Replacements,
    find_replacements,
    freeze,
    head_and_embedding,
    replace_modules,
    small_dtype,
)
from graftlm.base.transformers_log import LoadReport, first_line, quiet
from graftlm.config import Precision
from graftlm.distributed.group import ALONE, Ranks
from graftlm.errors import ModelError
from graftlm.progress import LONG, sign_of_life


@register_quantization_config("graft")
class StoredFormConfig(QuantizationConfigMixin):
    """Selects our quantizer in transformers' loader; never written to a file."""

    def __init__(
        self,
        precision: Precision = "float32",
        activation_dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        ranks: Ranks = ALONE,
        host_layers: int = 0,
    ) -> None:
        self.quant_method = "graft"  # pyright: ignore[reportIncompatibleVariableOverride]
        self.ranks, self.host_layers = ranks, host_layers
        self.precision: Precision = precision
        self.activation_dtype = activation_dtype
        self.device = device


class _StoreOp(ConversionOps):
    """Stores one finished tensor (renamed, split or stacked for the architecture) in its module, on its device."""

    def __init__(
        self, replacements: dict[str, Stored], device: str, ranks: Ranks, whole: set[str], on_host: set[str]
    ) -> None:
        """Over several ranks each weight is split as soon as it is stored, but for those in `whole`; some wait `on_host`."""
        self.replacements, self.device, self.ranks, self.whole = replacements, device, ranks, whole
        self.on_host = on_host
        self.mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # (name, found, expected)

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            stored, found = self.replacements[name], value[0] if isinstance(value, list) else value
            if tuple(found.shape) == stored.original_shape:
                stored.set_weight(found.to(self.device))
                if self.ranks.size > 1 and name not in self.whole:
                    stored.split(self.ranks, on_host=name in self.on_host)
            else:
                self.mismatched.append((name, tuple(found.shape), stored.original_shape))
            if context.get("missing_keys") is not None:
                context["missing_keys"].discard(name)
            sign_of_life()
        return {}

    def __deepcopy__(self, memo: Any) -> _StoreOp:
        return self


@register_quantizer("graft")
class StoredFormQuantizer(HfQuantizer):
    """Converts each weight to its stored form as soon as it is read, so that only one is in memory in full."""

    requires_calibration = False
    quantization_config: StoredFormConfig
    replacements: Replacements
    store_op: _StoreOp
    shapes: dict[str, tuple[int, ...]]
    """What the config makes of each parameter; before 5.23 transformers lets a quantizer's model have others."""

    @property
    def quantized_element_size(self) -> float | None:
        return {"nf4": 0.52, "int8": 1.0}.get(self.quantization_config.precision)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        precision, activation_dtype = self.quantization_config.precision, self.quantization_config.activation_dtype
        self.replacements = find_replacements(model, precision)
        stored, shared = self.replacements.all(), shared_weights(model)
        whole = {name for name in stored if stays_whole(name, self.replacements, shared)}
        given = self.quantization_config
        on_host = weights_on_host(model, given.host_layers, stored)
        self.store_op = _StoreOp(stored, given.device, given.ranks, whole, on_host)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        keep = DTYPES[embedding_precision(precision)]
        head, embedding = head_and_embedding(model)
        taken = set(self.store_op.replacements)
        for name, parameter in list(model.named_parameters()):
            if name in taken or not parameter.is_floating_point():
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            if owner is head or owner is embedding:
                wanted = keep
            else:
                wanted = small_dtype(model, name.rpartition(".")[0], owner, precision, activation_dtype)
            if parameter.dtype != wanted:  # the loader casts a tensor to the dtype of its parameter
                parameter.data = parameter.data.to(wanted)
        return model

    def misshapen(self, model: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """The parameters that were loaded in a shape that the config does not give them: name, found, asked for."""
        now = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in self.store_op.replacements}
        return [
            (name, shape, self.shapes[name]) for name, shape in now.items() if shape != self.shapes.get(name, shape)
        ]

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
    path: str, precision: Precision, activation_dtype: torch.dtype, device: torch.device, trust_remote_code: bool,
    ranks: Ranks = ALONE, host_layers: int = 0,
) -> tuple[PreTrainedModel, Replacements, list[str]]:  # fmt: skip
    """Load a model folder tensor by tensor into its stored form; also returns the tensors that the architecture does not use.

    Several `ranks` share the stored weights: each keeps its rows of each, those of `host_layers` layers on the host.

    transformers reads on the CPU, where it needs no other package, and each tensor is moved before it is converted. Peak
    memory: the final form plus the largest tensor twice, in the checkpoint's dtype and converted. Raises ModelError for tensors
    that are missing, unreadable or of the wrong shape.
    """
    report = LoadReport()
    try:
        with quiet(), report:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                quantization_config=StoredFormConfig(precision, activation_dtype, str(device), ranks, host_layers),
                dtype=_reading_dtype(path, activation_dtype),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                local_files_only=True,
            )
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: its weights cannot be read ({first_line(error)}); download the model again"
        ) from None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # raised by transformers if parts of a joined or stacked weight do not match
        raise ModelError(
            f"{path}: the tensors do not fit the model's config; {report.fault or first_line(error)}"
        ) from None
    model, info = loaded
    quantizer: StoredFormQuantizer = model.hf_quantizer
    replacements = quantizer.replacements
    info["mismatched_keys"] = {*info["mismatched_keys"], *quantizer.store_op.mismatched, *quantizer.misshapen(model)}
    _share_tied(model, replacements, info["missing_keys"])
    _check_loaded(info, replacements, path)
    unused = sorted(info["unexpected_keys"])
    quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
    if device.type != "cpu":
        model._apply(lambda t: t if t.is_meta else t.to(device))  # what is stored is there already
    replaced = replace_modules(model, replacements, precision, activation_dtype)
    return freeze(model), replaced, unused


def _reading_dtype(path: str, activation_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a checkpoint's tensors come to be stored: the activation dtype where it has room for all their values,
    else float32, so that what is stored does not depend on the compute dtype."""
    found = {info.dtype for file in weight_files(Path(path)) for info in tensors_in(file).values()}
    return activation_dtype if found.isdisjoint({"F64", "F32", "F16"}) else torch.float32


def _share_tied(model: PreTrainedModel, replacements: Replacements, missing: set[str]) -> None:
    """Share one stored form between layers that the class ties, as Zamba's blocks."""
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
        raise ModelError(f"{path}: the checkpoint does not load: {first_line(info['error_msgs'][0])}")


def load_dequantized(path: str, method: str, trust_remote_code: bool) -> PreTrainedModel:
    """Load a checkpoint that is already quantized as a plain 16-bit model, dequantized by transformers.

    Raises ModelError for methods that cannot be dequantized.
    """
    if method in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        extra: dict[str, Any] = {}
    elif method == "fp8":
        extra = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    elif method == "mxfp4":
        extra = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    else:
        raise ModelError(
            f"{path} is already quantized with '{method}', which Graft cannot dequantize; "
            "take the 16-bit original of this model (bitsandbytes, fp8 and mxfp4 checkpoints are supported)"
        )
    try:
        with quiet():
            sign_of_life(LONG)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True, **extra
            )
            model = model.dequantize() if not extra else model
            # Remove the quantization config, so that it is saved as a plain model.
            model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
            model.hf_quantizer = None
            return model
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: its weights cannot be read ({first_line(error)}); download the model again"
        ) from None
    except ImportError as error:
        raise ModelError(f"{path} is quantized with '{method}', and dequantizing it needs a package: {error}") from None
