"""From a name to a base model that can be trained on: found, checked, streamed into its precision, and understood.

    base = load_base("Qwen/Qwen3-0.6B", precision="nf4")
    context = ForwardContext(segments)
    base.hidden(ids, context)          # the layers
    base.logits(hidden, context)       # the head, for a few tokens

Weights are read from safetensors only. Nothing is unpickled, and no code of the model's runs unless it is asked for.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from graftlm import demo, kernels
from graftlm.base.attention import choose_attention, position_dependent_rotary, set_attention
from graftlm.base.context import ForwardContext
from graftlm.base.fingerprint import fingerprint, weight_files
from graftlm.base.fused import FusedCounts, fuse
from graftlm.base.modules import Stored
from graftlm.base.precision import DTYPES, default_compute_dtype, nbytes
from graftlm.base.quantizer import load_dequantized, stream_checkpoint
from graftlm.base.random_init import random_model, random_stored_model
from graftlm.base.structure import ModelStructure
from graftlm.base.surgery import Replacements, convert_model
from graftlm.base.transformers_versions import is_known_type, missing_class, own_attention
from graftlm.config import ComputeDtype, Precision
from graftlm.errors import ModelError
from graftlm.jsonfile import MOST_TOKENIZER_BYTES, read_json, read_json_value
from graftlm.progress import working
from graftlm.segments import Segments

_READ_BY_TRANSFORMERS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "model.safetensors.index.json",
)  # fmt: skip
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass
class Base:
    """A base model in a chosen precision, ready for adapters or for full training."""

    name: str
    """What the user called it; a label."""
    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerBase
    precision: Precision
    compute_dtype: ComputeDtype
    structure: ModelStructure
    not_converted: dict[str, str]
    """Modules that are neither stored in `precision` nor adaptable, with the reason."""
    fixed: frozenset[str] = frozenset()
    """Parameters that the model's class itself never trains."""
    packs: bool = True
    """Whether it runs on packed segments; otherwise on stacks of equally long examples."""
    no_packing_reason: str = ""
    original_attention: str = "sdpa"
    """The attention it came with."""
    random: bool = False
    """Whether its weights are fresh instead of the folder's."""
    notes: list[str] = field(default_factory=list[str])
    keeps_state: bool = False
    """Whether the model's own code writes to its modules in a pass (RecurrentGemma's states, frequencies of longrope)."""
    one_pass: AbstractContextManager[object] = field(default_factory=threading.RLock)
    adapter_changes: int = 0
    """Counts attached and detached adapters: what was read of their slots holds until it is another number."""
    fused: FusedCounts = field(default_factory=FusedCounts)
    """How many of its norms, gated products and rotations run as one pass each."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def activation_dtype(self) -> torch.dtype:
        return DTYPES[self.compute_dtype]

    @cached_property
    def fingerprint(self) -> str:
        """The base's identity by content; `random` for fresh weights, which have no checkpoint."""
        return "random" if self.random else fingerprint(self.folder)

    def hidden(self, ids: Tensor, context: ForwardContext) -> Tensor:
        """ids (T,) laid out as the context's segments -> the states before the head (T, width)."""
        with self.alone():
            return self.structure.hidden(ids, context)

    def alone(self) -> AbstractContextManager[object]:
        """Held while the body runs: one pass at a time, in a model whose own code keeps state of a pass in its modules."""
        return self.one_pass if self.keeps_state else nullcontext()

    def logits(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """(n, width) laid out as the context's segments -> (n, vocabulary), with all that the class does after its layers."""
        return self.structure.logits(hidden, context)

    def train_all(self) -> dict[str, nn.Parameter]:
        """Let every parameter take a gradient, except those that the model's class never trains; returns them by name."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if name not in self.fixed:
                found[name] = parameter.requires_grad_(True)
        return found

    def stored(self) -> dict[str, Stored]:
        """The stored modules by name, the head included."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Stored)}

    def _compressed(self) -> list[Any]:
        """The compressed weights, tied ones once."""
        found = {id(m.compressed): m.compressed for m in self.stored().values() if m.compressed is not None}
        return list(found.values())

    @property
    def bytes(self) -> int:
        """Bytes of all weights as they are stored, tied ones once."""
        compressed = sum(nbytes(value) for value in self._compressed())
        return compressed + sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def parameters(self) -> int:
        """How many values the base has, in whatever form they are stored."""
        compressed = sum(value.numel for value in self._compressed())
        return compressed + sum(p.numel() for p in self.model.parameters())


def resolve(name: str, trust_remote_code: bool = False, *, weights: bool = True) -> Path:
    """The local folder of a model: `demo`, a directory, or a hub id, downloaded without its pickle files.

    Raises ModelError that says what was looked for and what to do.
    """
    folder = Path(demo.resolve_model(name))
    if folder.is_dir():
        return _checked(folder, name, weights)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"no such model: '{name}' is neither a directory nor a hub id (owner/name), nor `demo`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [p for p in _WANTED if weights or "safetensors" not in p] + (["*.py"] if trust_remote_code else [])
    try:
        found = snapshot_download(name, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise ModelError(f"no model '{name}' on the hub; check its spelling, or log in if it is private") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model '{name}' is not a directory here and the hub did not give it: {str(error).splitlines()[0]}"
        ) from None
    return _checked(Path(found), name, weights)


def _checked(folder: Path, name: str, weights: bool) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: {folder} has no config.json, so it is not a Hugging Face model folder")
    for file in _READ_BY_TRANSFORMERS:
        if (folder / file).is_file():
            values = read_json(folder / file, ModelError)
            if file == "config.json":
                _bounded(folder / file, values)
    if weights and not weight_files(folder):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{name} has only pickle weights ({pickles[0]}), which can run code when they are read; convert it once in a "
                "place that you trust: AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_FOLDER)"
            )
        raise ModelError(
            f"{name} has no weights: {folder} holds no *.safetensors file; "
            "download the model completely, or start fresh with --method full --init random"
        )
    return folder


def _bounded(file: Path, values: dict[str, Any]) -> None:
    """Raise ModelError for a whole number that no tensor's size can be; transformers would end in a traceback."""
    level: list[tuple[str, Any]] = list(values.items())
    while level:
        for name, value in level:
            if isinstance(value, int) and abs(value) >= 1 << 63:
                raise ModelError(f"{file}: {name} is {str(value)[:40]}, and no number is above 2^63; repair the file")
        inner = [(name, value) for name, value in level if isinstance(value, dict | list)]
        level = [
            pair
            for name, outer in inner
            for pair in (outer.items() if isinstance(outer, dict) else ((name, value) for value in outer))
        ]


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """The model's config; ModelError for one that transformers cannot read, or that is no causal language model's."""
    values = read_json(folder / "config.json", ModelError)
    own = values.get("auto_map")
    own_code = isinstance(own, dict) and bool({"AutoConfig", "AutoModelForCausalLM"} & own.keys())
    hint = "; if you trust this model's own code, add --trust-remote-code" if own_code and not trust_remote_code else ""
    known = not isinstance(values.get("model_type"), str) or is_known_type(values["model_type"])
    if not known and not (own_code and trust_remote_code):
        raise ModelError(f"{folder}/config.json is not understood: {missing_class(values)}{hint}")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a value of another kind than expected leads to
        raise ModelError(f"{folder}/config.json is not understood: {_one_line(error)}{hint}") from None
    if not hasattr(config.get_text_config(), "to_dict"):
        raise ModelError(f"{folder}/config.json: text_config is {config.get_text_config()!r:.80}, expected an object")
    if not has_causal_model(config, trust_remote_code):
        raise ModelError(f"{folder}: {missing_class({**values, 'model_type': config.model_type})}{hint}")
    return config


def has_causal_model(config: Any, trust_remote_code: bool) -> bool:
    """Whether transformers, or the model's own code where it may run, has a causal language model for this config."""
    own = getattr(config, "auto_map", None) or {}
    return type(config) in AutoModelForCausalLM._model_mapping or (trust_remote_code and "AutoModelForCausalLM" in own)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ModelError when the folder has none."""
    large = [folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()]
    for file in large:
        if file.stat().st_size > MOST_TOKENIZER_BYTES:
            read_json_value(file, ModelError, most=MOST_TOKENIZER_BYTES)  # raises
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        for file in large:
            read_json_value(file, ModelError, most=MOST_TOKENIZER_BYTES)  # says where, if the file is the reason
        raise ModelError(f"{folder} has no tokenizer that can be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def default_device(asked: str | None) -> torch.device:
    """The asked device, else the first GPU, else the CPU."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelError(f"unknown device '{asked}'; take cpu, cuda or cuda:N") from None
    if device.type == "cuda" and torch.cuda.is_available():
        if (device.index or 0) >= torch.cuda.device_count():
            raise ModelError(
                f"device '{asked}' is asked for, and there are {torch.cuda.device_count()}, counted from 0"
            )
        if ":" in str(device):  # set_device refuses a plain `cuda`, which is the current one
            torch.cuda.set_device(device)  # kernels launch on the current device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"device '{asked}' is asked for, and this PyTorch ({torch.__version__}) sees no CUDA device; take cpu"
        )
    return device


@contextlib.contextmanager
def _memory_explained(name: str, precision: Precision, device: torch.device) -> Iterator[None]:
    """Say what to do when a device is too small for a base."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{name} as {precision} does not fit into the memory of {device} ({str(error).splitlines()[0][:160]}); "
            "take --base-precision nf4 or int8, or --device cpu"
        ) from None


def load_base(
    name: str,
    *,
    precision: Precision = "float32",
    compute_dtype: ComputeDtype | None = None,
    device: str | None = None,
    init: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
    trust_remote_code: bool = False,
    training: bool = False,
) -> Base:
    """Find, check and load a base model.

    The storage `precision` is the user's, `compute_dtype` the hardware's for `training` or elsewhere unless given.
    Raises ModelError.
    """
    place = default_device(device)
    folder = resolve(name, trust_remote_code, weights=init == "pretrained")
    with working(f"loading {Path(name).name}"), _memory_explained(name, precision, place):
        config = load_config(folder, trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        chosen = compute_dtype or default_compute_dtype(place, training=training)
        if chosen == "bf16-mixed" and not (place.type == "cpu" and kernels.has_bf16_matmul()):
            raise ModelError(
                "compute-dtype bf16-mixed needs a CPU that multiplies bfloat16 (AVX-512 BF16), found "
                f"{kernels.backend(place)} on "
                f"{place}; take --compute-dtype float32, or bfloat16 on a GPU"
            )
        dtype = DTYPES[chosen]
        quantized = _quantization_of(folder)
        notes: list[str] = []
        if init == "random":
            model, replacements = convert_model(random_model(config, seed, trust_remote_code), precision, dtype)
            model = _moved(model, place)
        elif quantized is not None:
            model, replacements = convert_model(
                load_dequantized(str(folder), quantized, trust_remote_code), precision, dtype
            )
            model = _moved(model, place)
        else:
            model, replacements, unused = stream_checkpoint(str(folder), precision, dtype, place, trust_remote_code)
            if unused:
                notes.append(
                    f"{len(unused)} tensors of the checkpoint have no place in this architecture: {unused[0]}, ..."
                )
        return _understood(name, folder, model, replacements, tokenizer, precision, chosen, init == "random", notes)


def random_base(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: Precision,
    compute_dtype: ComputeDtype | None = None,
    device: str | None = None,
    seed: int = 0,
    training: bool = False,
) -> Base:
    """A base of a config's architecture and size without a checkpoint, for measuring: random weights made on the device.

    Each weight is brought into its stored form as it is made, so 70 billion values in nf4 need 36 GB and no more.
    Raises ModelError.
    """
    place = default_device(device)
    name = f"random {config.model_type}"
    with working(f"making a {name}"), _memory_explained(name, precision, place):
        chosen = compute_dtype or default_compute_dtype(place, training=training)
        model, replacements = random_stored_model(config, precision, DTYPES[chosen], place, seed)
        return _understood(name, Path(), model, replacements, tokenizer, precision, chosen, True, [])


def _understood(
    name: str,
    folder: Path,
    model: Any,
    replacements: Replacements,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    compute_dtype: ComputeDtype,
    random: bool,
    notes: list[str],
) -> Base:
    """A model over stored weights as a base: its parts found, its attention chosen."""
    implementation, note = own_attention(model)
    if note:
        set_attention(model, implementation)
        notes.append(note)
    base = Base(
        name=name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        precision=precision,
        compute_dtype=compute_dtype,
        structure=ModelStructure(model, DTYPES[compute_dtype]),
        not_converted=replacements.not_converted,
        fixed=frozenset(replacements.fixed),
        random=random,
        notes=notes,
    )
    base.fused = fuse(model, DTYPES[compute_dtype])
    choose_attention(base)
    base.keeps_state = _keeps_state(base)
    for module in base.stored().values():
        module.bf16_mixed = compute_dtype == "bf16-mixed"
    return base


def _moved(model: Any, device: torch.device) -> Any:
    return model.to(device)


def _quantization_of(folder: Path) -> str | None:
    """The quantization method that a checkpoint's config names, or None."""
    config = read_json(folder / "config.json", ModelError)
    inner = config.get("text_config")
    found = config.get("quantization_config") or (isinstance(inner, dict) and inner.get("quantization_config"))
    if not found:
        return None
    if not isinstance(found, dict):
        raise ModelError(f"{folder}/config.json: quantization_config is {found!r}, expected an object")
    return str(found.get("quant_method") or "bitsandbytes")


@torch.no_grad()
def _keeps_state(base: Base) -> bool:
    """Whether a pass leaves anything in the model's modules that was not there before, tried on two lengths."""
    if position_dependent_rotary(base.model.config) is not None:
        return True  # only texts longer than the model was first trained on show it
    before: list[list[dict[str, int]]] = []
    for length in (3, 5):
        before.append(_attributes(base.model))
        ids = torch.arange(length, device=base.device) % base.structure.vocabulary
        base.hidden(ids, ForwardContext(Segments(lengths=(length,), slots=(0,), stacked=not base.packs)))
    return before[0] != before[1] or before[1] != _attributes(base.model)


def _attributes(model: nn.Module) -> list[dict[str, int]]:
    """Which object each attribute and buffer of each module is: two of these differ where something was written between."""
    return [
        {name: id(value) for name, value in (*vars(module).items(), *module._buffers.items())}
        for module in model.modules()
    ]
