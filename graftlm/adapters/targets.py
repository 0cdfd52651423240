"""The layers that an `adapter_config.json` targets, exactly as PEFT 0.21 reads it.

    target_modules       a list: full names, or their ends after a dot; a string: `all-linear`, or a regular expression
    exclude_modules      the same two forms; they override target_modules
    modules_to_save      ends of names; as regular expressions they exclude layers from the targets
    layers_to_transform  layer numbers, for a list of ends only; layers_pattern is the name before the number
    target_parameters    a list of parameter names or their ends: stacks, and weights of layers that PEFT would rename

A layer that PEFT leaves out is not part of the adapter, even if the file has tensors for it; a targeted layer must have its
tensors. `Targets` needs the config alone, so a folder can be checked without a base; `applied` matches it with a base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftlm.adapters.attach import adaptable
from graftlm.adapters.patterns import Expressions, named_by
from graftlm.base.checkpoint_layout import mixture_of_v4
from graftlm.base.loading import Base
from graftlm.base.modules import Stored, StoredLinear, StoredStack
from graftlm.errors import AdapterError, nearest

# Modules of transformers 4's mixtures, and the parameters that hold them since 5: PEFT's `_MOE_TARGET_MODULE_MAPPING`.
_SINCE_V5 = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    },
}  # fmt: skip
_FUSED = "gate_up_proj"


def layers(base: Base) -> dict[str, Stored]:
    """Every layer that a file may have tensors for: the adaptable ones, and the head, which PEFT adapts if it is named."""
    head = base.structure.head
    return {**adaptable(base), **({base.structure.head_name: head} if isinstance(head, Stored) else {})}


def key_of(name: str, layer: Stored, parameter: bool) -> str:
    """The name that PEFT matches patterns with: the module's, or the parameter's for a target parameter."""
    return f"{name}.weight" if parameter and not isinstance(layer, StoredStack) else name


class Targets:
    """The entries of a config that name layers; `where` begins every error. Raises AdapterError for entries PEFT refuses."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        expressions = Expressions(where)
        self.modules: list[str] | str = config.get("target_modules") or []
        self.parameters: list[str] = list(config.get("target_parameters") or [])
        self.every = isinstance(self.modules, str) and self.modules.lower() == "all-linear"
        given = config.get("layers_to_transform")
        self.numbers: list[int] = [] if given is None else given if isinstance(given, list) else [given]
        if config.get("target_modules") is None and not self.parameters:
            raise AdapterError(
                f"{where}: target_modules is missing, and PEFT then uses a list of its own for each architecture; name them"
            )
        if isinstance(self.modules, str) and given is not None:
            raise AdapterError(f"{where}: layers_to_transform needs target_modules that are a list, as in PEFT")
        behind = config.get("layers_pattern") or []
        if behind and (given is None or isinstance(self.modules, str)):
            raise AdapterError(f"{where}: layers_pattern needs layers_to_transform and a list, as in PEFT")
        self._target = _form(expressions, "target_modules", self.modules if not self.every else [])
        self._excluded = _form(expressions, "exclude_modules", config.get("exclude_modules") or [])
        self._saved = [
            (entry, expressions.whole("modules_to_save", entry, r"(^|.*\.){}($|\..*)"))
            for entry in config.get("modules_to_save") or ()
        ]
        self._behind = [
            expressions.compile("layers_pattern", entry, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
            for entry in ([behind] if isinstance(behind, str) else behind)
        ] or [expressions.compile("layers_pattern", r"[^.]*", r".*?\.{}\.(?P<idx>\d+)\.")]
        self.ranks = expressions.values("rank_pattern", config.get("rank_pattern"))
        self.alphas = expressions.values("alpha_pattern", config.get("alpha_pattern"))

    def left_out(self, name: str, linear: bool) -> str | None:
        """Why PEFT does not adapt a module (`check_target_module_exists`); None if it does."""
        if self._excluded(name):
            return "exclude_modules names it"
        saved = next((entry for entry, fits in self._saved if fits(name)), None)
        if saved is not None:
            return f"modules_to_save names it with '{saved}'"
        if self.every:
            return None if linear else "all-linear does not include it"
        if not self._target(name):
            return f"target_modules {_short(self.modules)} does not name it"
        if not self.numbers or name in self.modules:
            return None
        found = next((m for m in (fits.match(name.encode()) for fits in self._behind) if m), None)
        if found is not None and int(found[b"idx"]) in self.numbers:
            return None
        return f"layers_to_transform {_short(self.numbers)} leaves its layer out"

    def listed(self, modules: list[str]) -> Targets:
        """A copy with another list of target_modules."""
        other = copy(self)
        other.modules, other.every = modules, False
        other._target = _form(Expressions(self.where), "target_modules", modules)
        return other


def _form(expressions: Expressions, key: str, value: list[str] | str) -> Callable[[str], bool]:
    if isinstance(value, str):
        return expressions.whole(key, value)
    return expressions.ends(key, value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def applied(base: Base, targets: Targets) -> tuple[set[str], set[str], Callable[[str], str]]:
    """The layers that PEFT adapts as modules, those that it adapts as parameters, and why it leaves a layer out.

    Raises AdapterError if the config names a layer that cannot be adapted, one layer in both ways, or no layer.
    """
    modules, parameters = _renamed(base, targets)
    known = layers(base)
    head = base.structure.head_name
    as_modules: set[str] = set()
    reasons: dict[str, str] = {}
    for name, module in _modules(base):
        linear = isinstance(module, (StoredLinear, nn.Linear, Conv1D)) and name != head
        why = modules.left_out(name, linear)
        if why is not None:
            reasons[name] = why
        elif isinstance(known.get(name), StoredLinear) and isinstance(module, StoredLinear):
            as_modules.add(name)
        else:
            raise AdapterError(
                f"{targets.where}: target_modules {_short(targets.modules)} names '{name}' too, and Graft cannot adapt "
                f"it: {base.not_converted.get(name) or f'it is a {type(module).__name__}'}"
            )
    wanted = Expressions(targets.where).ends("target_parameters", parameters)
    as_parameters = {
        name.removesuffix(".weight") if name.removesuffix(".weight") in known else name
        for name in _parameters(base) if wanted(name)
    }  # fmt: skip
    odd = sorted(as_parameters - known.keys())
    if odd:
        raise AdapterError(
            f"{targets.where}: target_parameters {_short(parameters)} names '{odd[0]}', which Graft cannot adapt"
        )
    both = sorted(as_modules & as_parameters)
    if both:
        raise AdapterError(f"{targets.where}: target_modules and target_parameters both name '{both[0]}'")
    if not as_modules and not as_parameters:
        ends = {name.rpartition(".")[2] for name in known}
        also = f" and target_parameters {_short(parameters)}" if parameters else ""
        first = targets.modules if isinstance(targets.modules, str) else next(iter([*targets.modules, *parameters]), "")
        raise AdapterError(
            f"{targets.where}: target_modules {_short(targets.modules)}{also} name no "
            f"layer of this base{nearest(first, ends)} it has: {', '.join(sorted(ends))}. Is it another architecture's adapter?"
        )

    def no_slot_reason(name: str) -> str:
        if isinstance(known.get(name), StoredStack) or name not in reasons:
            return f"target_parameters {_short(parameters)} does not name it"
        return reasons[name]

    return as_modules, as_parameters, no_slot_reason


def _modules(base: Base) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the model has without Graft; stacks and stored layers inside routers are parameters there."""
    for name, module in base.model.named_modules():
        if name and not isinstance(module, StoredStack) and not name.endswith(".stored"):
            yield name, module


def _parameters(base: Base) -> Iterator[str]:
    """Names of the parameters that the model has without Graft."""
    known = layers(base)
    for name, module in known.items():
        yield name if isinstance(module, StoredStack) else f"{name}.weight"
    for name, _ in base.model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if owner.removesuffix(".stored") not in known or name.endswith(".bias"):
            yield name


def _renamed(base: Base, targets: Targets) -> tuple[Targets, list[str]]:
    """The targets as PEFT rewrites them for a mixture (`_convert_peft_config_moe`), and the target parameters.

    A string becomes the last names of what it fits, on every layer; names of transformers 4's experts become parameters.
    """
    since = _SINCE_V5.get(mixture_of_v4(base.model) or "")
    if since is None:
        return targets, targets.parameters
    entries = targets.modules
    if isinstance(entries, str):
        fitting = {
            name.rpartition(".")[2]
            for name, linear in [
                *((n, isinstance(m, (StoredLinear, nn.Linear)) and n != base.structure.head_name) for n, m in _modules(base)),
                *((n, False) for n in _parameters(base)),
            ]
            if targets.left_out(name, linear) is None
        }  # fmt: skip
        if targets.every:
            fitting |= since.keys()
        if not fitting:
            return targets, targets.parameters
        entries = sorted(fitting)
    modules, parameters = list[str](), list(targets.parameters)
    for entry in entries:
        old = next((name for name in since if named_by(entry, name)), None)
        if old is None:
            modules.append(entry)
        elif since[old] == _FUSED:
            raise AdapterError(
                f"{targets.where}: target_modules names '{entry}', an expert's matrix of transformers 4, which PEFT now joins "
                "with another one at twice the rank; load the adapter with PEFT, save it again, and take that"
            )
        else:
            parameters.append(since[old])
    return targets.listed(modules), parameters
