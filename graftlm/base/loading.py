"""Load a base model: find it, check it, stream its weights into the stored precision, and find its parts.

    base = load_base("Qwen/Qwen3-0.6B", precision="nf4")
    context = ForwardContext(segments)
    base.hidden(ids, context)          # the layers
    base.logits(hidden, context)       # the head, for a few tokens

Weights are read from safetensors only. Nothing is unpickled, and the model's own code runs only with --trust-remote-code.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from graftlm.base.random_init import random_stored_model
from graftlm.base.reading import Reading, read_model
from graftlm.base.shared_input import find_shared_inputs
from graftlm.base.splitting import split_weights
from graftlm.base.structure import ModelStructure
from graftlm.base.surgery import Replacements
from graftlm.base.transformers_versions import is_known_type, missing_class, own_attention
from graftlm.config import ComputeDtype, Precision
from graftlm.config.fields import is_gguf
from graftlm.distributed.group import ALONE, Ranks
from graftlm.distributed.shard import SplitWeights, gathered_on
from graftlm.errors import ModelError
from graftlm.gguf.folder import folder_of, gguf_of
from graftlm.heap import mmap_allocations, trim_heap
from graftlm.jsonfile import MOST_TOKENIZER_BYTES, read_json, read_json_value
from graftlm.progress import LONG, sign_of_life, working
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
    """The name that the user gave; a label."""
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
    """Whether it runs on packed segments; otherwise on batches of equally long examples."""
    no_packing_reason: str = ""
    original_attention: str = "sdpa"
    """The attention implementation of the loaded model."""
    random: bool = False
    """Whether its weights are random instead of the folder's."""
    notes: list[str] = field(default_factory=list[str])
    keeps_state: bool = False
    """Whether the model's own code writes to its modules in forward (RecurrentGemma's states, frequencies of longrope)."""
    one_pass: AbstractContextManager[object] = field(default_factory=threading.RLock)
    adapter_changes: int = 0
    """Number of times an adapter was attached or detached: data cached from the slots is valid while it stays the same."""
    slot_changes: dict[int, int] = field(default_factory=dict[int, int])
    """What `adapter_changes` was after the last of them in each slot."""
    fused: FusedCounts = field(default_factory=FusedCounts)
    """How many of its norms, gated activations and rotations run as fused operations."""

    @property
    def device(self) -> torch.device:
        return gathered_on(next(self.model.parameters()))

    @property
    def activation_dtype(self) -> torch.dtype:
        return DTYPES[self.compute_dtype]

    @cached_property
    def fingerprint(self) -> str:
        """The base's identity by content; `random` for random weights, which have no checkpoint."""
        return "random" if self.random else fingerprint(self.folder)

    def hidden(self, ids: Tensor, context: ForwardContext) -> Tensor:
        """ids (T,) laid out as the context's segments -> the states before the head (T, width)."""
        with self.alone():
            return self.structure.hidden(ids, context)

    def alone(self) -> AbstractContextManager[object]:
        """A lock around the body for a model whose own code writes to its modules: one forward pass at a time."""
        return self.one_pass if self.keeps_state else nullcontext()

    def logits(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """(n, width) laid out as the context's segments -> (n, vocabulary), by the class's own code after its layers."""
        return self.structure.logits(hidden, context)

    def train_all(self) -> dict[str, nn.Parameter]:
        """Set `requires_grad` on every parameter that the model's class trains; returns them by name."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if name not in self.fixed and parameter.is_floating_point():
                found[name] = parameter.requires_grad_(True)
        return found

    def stored(self) -> dict[str, Stored]:
        """The stored modules by name, the head included."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Stored)}

    def _compressed(self) -> list[Any]:
        """The compressed weights, tied ones once."""
        found: dict[int, Any] = {}
        for module in self.stored().values():
            value = module.compressed
            if value is not None:
                found[id(next(iter(value.tensors().values())))] = value
        return list(found.values())

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters but those that compressed weights consist of, which they are where ranks share them."""
        parts = {id(part) for value in self._compressed() for part in value.tensors().values()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in parts]

    @property
    def bytes(self) -> int:
        """Bytes of all weights as they are stored, tied ones once."""
        compressed = sum(nbytes(value) for value in self._compressed())
        return compressed + sum(p.numel() * p.element_size() for p in self._parameters())

    @property
    def parameters(self) -> int:
        """How many values the base has, in whatever form they are stored."""
        compressed = sum(value.numel for value in self._compressed())
        return compressed + sum(p.numel() for p in self._parameters())


def resolve(name: str, trust_remote_code: bool = False, *, weights: bool = True) -> Path:
    """The local folder of a model: `demo`, a directory, or a hub id, downloaded without its pickle files.

    Raises ModelError that says what was looked for and what to do.
    """
    folder = Path(demo.resolve_model(name))
    if is_gguf(name):
        return _checked(folder_of(name), name, weights=False)
    if folder.is_dir():
        return _checked(folder, name, weights)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"no such model: '{name}' is neither a directory nor a hub id (owner/name), nor `demo`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [p for p in _WANTED if weights or "safetensors" not in p] + (["*.py"] if trust_remote_code else [])
    sign_of_life(LONG)  # of several processes one downloads, and the others wait for its lock
    try:
        found = snapshot_download(name, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise ModelError(f"no model '{name}' on the hub; check its spelling, or log in if it is private") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model '{name}' is not a directory here and the hub did not give it: {str(error).splitlines()[0]}"
        ) from None
    sign_of_life()
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


def checkpoint_precision(model: str, trust_remote_code: bool = False) -> Precision:
    """The 16- or 32-bit type that a checkpoint is stored in, or `gguf`. Raises ModelError."""
    folder = resolve(model, trust_remote_code)
    if gguf_of(folder) is not None:
        return "gguf"
    kind = getattr(load_config(folder, trust_remote_code).get_text_config(), "dtype", None)
    return "bfloat16" if kind in (torch.bfloat16, torch.float16) else "float32"


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
    """The asked device, else the first GPU, else the CPU; a GPU's memory is allocated in segments that grow from then on."""
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelError(f"unknown device '{asked}'; take cpu, cuda or cuda:N") from None
    if device.type == "cuda" and torch.cuda.is_available():
        kernels.expand_segments(device)  # before anything of CUDA is initialized
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
    """Raise ModelError with the way out if a base does not fit into a device's memory."""
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
    ranks: Ranks = ALONE,
    trains_base: bool = False,
    host_layers: int = 0,
) -> Base:
    """Find, check and load a base model.

    `compute_dtype` defaults to the hardware's, for `training` or otherwise. Several `ranks` share its weights, those of
    `host_layers` layers in the host's memory; `trains_base` says whether they are then trained. Raises ModelError.
    """
    place = default_device(device)
    folder = resolve(name, trust_remote_code, weights=init == "pretrained")
    with (
        working(f"loading {Path(name).name}"), _memory_explained(name, precision, place),
        mmap_allocations(place.type == "cpu"),
    ):  # fmt: skip
        config = load_config(folder, trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        trim_heap()  # reading it takes five times what it is
        chosen = compute_dtype or default_compute_dtype(place, training=training)
        if chosen == "bf16-mixed" and not (place.type == "cpu" and kernels.has_bf16_matmul()):
            raise ModelError(
                "compute-dtype bf16-mixed needs a CPU that multiplies bfloat16 (AVX-512 BF16), found "
                f"{kernels.backend(place)} on "
                f"{place}; take --compute-dtype float32, or bfloat16 on a GPU"
            )
        dtype = DTYPES[chosen]
        if precision == "gguf" and (init == "random" or gguf_of(folder) is None):
            raise ModelError(
                f"--base-precision gguf keeps the blocks of a GGUF file, and {name} is "
                f"{'to be random' if init == 'random' else 'none'}; take float32, bfloat16, int8 or nf4"
            )
        how = Reading(str(folder), precision, dtype, place, trust_remote_code, ranks, host_layers)
        model, replacements, notes = read_model(config, how, None if init == "pretrained" else seed)
        understand = partial(
            _understood, name, folder, model, replacements, tokenizer, precision, chosen, init == "random", notes
        )
        if ranks.size == 1:
            return understand(None)
        weights = split_weights(model, replacements, ranks, place, trained=trains_base, host_layers=host_layers)
        with torch.no_grad():
            return weights.run(partial(_with_its_head, understand, weights, model))


def _with_its_head(understand: Callable[[SplitWeights], Base], weights: SplitWeights, model: Any) -> Base:
    with weights.gathered(model.get_output_embeddings()):
        return understand(weights)


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
    """A base with random weights of a config's architecture and size, for measurements; created on the device.

    Each weight is quantized as it is created, so 70 billion values in nf4 need 36 GB. Raises ModelError.
    """
    place = default_device(device)
    name = f"random {config.model_type}"
    with working(f"making a {name}"), _memory_explained(name, precision, place):
        chosen = compute_dtype or default_compute_dtype(place, training=training)
        model, replacements = random_stored_model(config, precision, DTYPES[chosen], place, seed)
        return _understood(name, Path(), model, replacements, tokenizer, precision, chosen, True, [], None)


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
    weights: SplitWeights | None,
) -> Base:
    """Make a base of a model with stored weights: find its parts and choose its attention. `weights`: those are split."""
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
        structure=ModelStructure(model, DTYPES[compute_dtype], weights),
        not_converted=replacements.not_converted,
        fixed=frozenset(replacements.fixed),
        random=random,
        notes=notes,
    )
    base.fused = fuse(model, DTYPES[compute_dtype])
    find_shared_inputs(model)
    choose_attention(base)
    base.keeps_state = _keeps_state(base)
    for module in base.stored().values():
        module.bf16_mixed = compute_dtype == "bf16-mixed"
    return base


@torch.no_grad()
def _keeps_state(base: Base) -> bool:
    """Whether a forward pass changes anything in the model's modules, tested with two lengths."""
    if position_dependent_rotary(base.model.config) is not None:
        return True  # it only happens with texts longer than the original context
    before: list[list[dict[str, int]]] = []
    for length in (3, 5):
        before.append(_attributes(base.model))
        ids = torch.arange(length, device=base.device) % base.structure.vocabulary
        base.hidden(ids, ForwardContext(Segments(lengths=(length,), slots=(0,), batched=not base.packs)))
    return before[0] != before[1] or before[1] != _attributes(base.model)


def _attributes(model: nn.Module) -> list[dict[str, int]]:
    """The id of each attribute and buffer of each module; it differs after something was assigned."""
    return [
        {name: id(value) for name, value in (*vars(module).items(), *module._buffers.items())}
        for module in model.modules()
    ]
