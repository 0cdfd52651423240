"""A base without its weights: every name and shape, and the values of embedding and head alone, memory-mapped.

A model's `config.json` and the headers of its files are enough to match an adapter's tensors with its layers. So merging and
exporting with a 70B model takes no memory for the model. A meta base cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from graftlm.base.checkpoint_layout import Checkpoint, RowSpan, WeightLayout, names_of, spans_of
from graftlm.base.loading import Base, load_config, load_tokenizer, resolve
from graftlm.base.modules import Stored
from graftlm.base.structure import ModelStructure
from graftlm.base.surgery import find_replacements, replace_modules
from graftlm.config import Precision
from graftlm.errors import ModelError


class MetaStructure(ModelStructure):
    """Head and embedding of a model, found without running it."""

    def __init__(self, model: Any) -> None:
        """Raises ModelError if head or embedding cannot be found."""
        names = {id(module): name for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or embedding is None:
            raise ModelError(f"{type(model).__name__} has no output head or embedding that Graft can find")
        self.model, self.embedding = model, embedding
        self.head_name, self.embedding_name = names[id(head)], names[id(embedding)]
        self.layers = []
        self.vocabulary = int(head.weight.shape[0])
        self.max_positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)


@dataclass
class MetaBase(Base):
    """A base on the meta device, and where its weights are in the checkpoint."""

    checkpoint: Checkpoint = field(kw_only=True)
    forms: dict[str, WeightLayout] = field(kw_only=True)
    """Each matrix that an adapter may change, by its parameter's name: stored layers, head, embedding."""
    plain: Any = field(kw_only=True)
    """The original model of transformers, on the meta device."""

    @property
    def device(self) -> torch.device:
        """The device of an adapter's tensors; the base's weights are on none."""
        return torch.device("cpu")

    def parameter_of(self, layer: str) -> str:
        """The parameter of a layer's weight: `….q_proj` -> `….q_proj.weight`; a stack is a parameter itself."""
        return layer if layer in self.forms else f"{layer}.weight"

    def stored_forms(self) -> dict[str, tuple[WeightLayout, Precision]]:
        """The weights with a stored form, and the precision of each; embedding and head are excluded."""
        found: dict[str, tuple[WeightLayout, Precision]] = {}
        for name, module in self.stored().items():
            parameter = self.parameter_of(name.removesuffix(".stored"))
            if module is not self.structure.head:
                found[parameter] = (self.forms[parameter], module.precision)
        return found

    def spans(self) -> dict[str, list[RowSpan]]:
        """Where each of `forms` is in the checkpoint; a tied head is left out."""
        tied = self.tied
        head = f"{self.structure.head_name}.weight"
        forms = {n: f for n, f in self.forms.items() if not (tied and n == head)}
        shapes = {n: t.shape for n, t in self.checkpoint.tensors.items()}
        return spans_of(self.plain, shapes, forms, self.folder)

    @property
    def tied(self) -> bool:
        """Whether embedding and head share one tensor."""
        return bool(self.plain.get_output_embeddings().weight is self.plain.get_input_embeddings().weight)


def load_meta_base(name: str, *, precision: Precision = "float32", trust_remote_code: bool = False) -> MetaBase:
    """Find a base and its names and shapes as `load_base` would. Raises ModelError as it does."""
    folder = resolve(name, trust_remote_code)
    config = load_config(folder, trust_remote_code)
    checkpoint = Checkpoint(folder)
    plain, model = _empty(config, trust_remote_code), _empty(config, trust_remote_code)
    replacements = find_replacements(model, precision)
    forms = {n: WeightLayout(m.shape, m.transposed) for n, m in replacements.all().items()}
    replace_modules(model, find_replacements(model, "float32"), "float32", torch.float32)
    structure = MetaStructure(model)
    for path in (structure.embedding_name, structure.head_name):
        weight: Any = plain.get_submodule(path).weight
        forms.setdefault(f"{path}.weight", WeightLayout(tuple(weight.shape)))
    for stored_name, module in model.named_modules():
        if isinstance(module, Stored) and module is not structure.head:
            parameter = stored_name.removesuffix(".stored")
            parameter = parameter if parameter in forms else f"{parameter}.weight"
            module.precision = replacements.all()[parameter].precision
    found = MetaBase(
        name=name,
        folder=folder,
        model=model,
        tokenizer=load_tokenizer(folder, trust_remote_code),
        precision=precision,
        compute_dtype="float32",
        structure=structure,
        not_converted=replacements.not_converted,
        checkpoint=checkpoint,
        forms=forms,
        plain=plain,
    )
    _fill(found)
    return found


def _empty(config: Any, trust_remote_code: bool) -> Any:
    """A model of a config on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _fill(base: MetaBase) -> None:
    """Load the values of embedding and head, to compare an adapter's copies with them."""
    wanted = {f"{base.structure.embedding_name}.weight", f"{base.structure.head_name}.weight"}
    for name, (parameter, _) in names_of(base.plain, base.checkpoint.tensors).items():
        if parameter in wanted:
            value = base.checkpoint.read(name)
            expected = base.forms[parameter].shape
            if tuple(value.shape) != expected:
                raise ModelError(
                    f"{base.folder}: tensor '{name}' has shape {tuple(value.shape)}, the config asks for {expected}"
                )
            module: Any = base.model.get_submodule(parameter.removesuffix(".weight"))
            module.weight = nn.Parameter(value, requires_grad=False)
    if base.tied:
        head: Any = base.structure.head
        head.weight = base.structure.embedding.weight
