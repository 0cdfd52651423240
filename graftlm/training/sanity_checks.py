"""Whether training moves what it should and nothing else, judged over its first three steps.

A wrong target, an optimizer that holds other tensors than the model, or a base that is written to in passing train without
an error and without an effect, or spoil what was to stay. So every tensor's checksum is taken before the first step and after
the third. A trained tensor must have changed if the steps were large enough to show in its type:

    update of an element ~ lr |g| / (|g| + eps)            AdamW's first steps
    shows for sure       if it reaches 2^-23 |w| (float32)
    shows with chance    update / (2^-7 |w|) (bfloat16, rounded at random): judged where 20 such are expected, so that
                         a tensor is called unchanged by mistake once in e^20 times

Frozen tensors must not have changed by a bit. Tensors that never got a gradient, and experts that no token reached, are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from graftlm.adapters.bank import Bank, LowRank
from graftlm.base.loading import Base
from graftlm.base.modules import StoredStack
from graftlm.errors import TrainingError

STEPS = 3
_EXPECTED = 20.0
_BLOCK = 1 << 15  # words at a time: a MB or less with all that is made of them, however large the tensor
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A number that changes when any bit of the tensor does, save by a chance of about 2^-32.

    Sum over all words of word x odd number drawn for its place, in 64 bits that wrap.
    """
    words = tensor.detach().reshape(-1)
    words = words.view(_WORDS[words.element_size()])
    place = torch.arange(min(_BLOCK, max(1, len(words))), dtype=torch.int64, device=words.device)
    odd = (place * 0x2545F4914F6CDD1D) >> 7 | 1  # (block,)
    total = 0
    for block, start in enumerate(range(0, len(words), _BLOCK)):
        part = words[start : start + _BLOCK]
        total += int((part.to(torch.int64) * odd[: len(part)]).sum()) * (2 * block + 1)
    return total & ((1 << 64) - 1)


def _tensors(base: Base) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the base consists of, in whatever form it is stored."""
    yield from base.model.named_parameters()
    for name, module in base.stored().items():
        packed = module.compressed
        if packed is not None:
            for part, value in packed.tensors().items():
                yield f"{name.removesuffix('.stored')} ({part})", value


def _expert_views(base: Base) -> dict[int, tuple[str, Callable[[Tensor], Tensor]]]:
    """For each tensor that holds all experts of a stack, by identity: the stack's name, and a gradient -> (E, values)."""
    found: dict[int, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for full, module in base.stored().items():
        if not isinstance(module, StoredStack):
            continue
        name, experts = full.removesuffix(".stored"), module.experts
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:
                found[id(parameter)] = name, lambda g: g.flatten(1)
        slots = module.bank.slots.values() if isinstance(module.bank, Bank) else ()
        for slot in slots:
            if isinstance(slot, LowRank):
                found[id(slot.A)] = name, lambda g, e=experts: g.view(e, -1)
                found[id(slot.B)] = name, lambda g, e=experts: g.view(-1, e).T  # the expert runs fastest
    return found


class UpdateCheck:
    """Watches one trial: `gradients` (or `gradient`, one by one) before an update, `stepped` after it; then nothing more."""

    def __init__(
        self, base: Base, parameters: Mapping[str, nn.Parameter], epsilon: float, *, with_base: bool = True
    ) -> None:
        """`with_base`: whether it also sees to it that nothing frozen changes; of trials that begin together one does."""
        self.base, self.parameters, self.epsilon = base, parameters, epsilon
        self.steps = 0
        own = {id(p) for p in parameters.values()}
        frozen = ((name, t) for name, t in _tensors(base) if id(t) not in own and not t.requires_grad)
        self._frozen = {name: checksum(t) for name, t in frozen} if with_base else {}
        self._before = {name: checksum(p) for name, p in parameters.items()}
        self._certain: set[str] = set()
        """Tensors of which some element's change must show."""
        self._expected = dict.fromkeys(parameters, 0.0)
        """How many elements' changes should show, for types that are rounded at random."""
        self._touched: set[str] = set()
        self._views = _expert_views(base)
        self._reached: dict[str, Tensor] = {}  # stack -> (E,) bool

    def gradients(self, rate: float, ratios: Mapping[str, float], factor: float = 1.0) -> None:
        """Hear of every gradient that is there, of what clipping multiplies it with, of the step's learning rate and of
        tensors' factors on that."""
        for name, parameter in self.parameters.items() if self.steps < STEPS else ():
            if parameter.grad is not None:
                self.gradient(name, parameter.grad, rate * ratios.get(name, 1.0), factor)

    @torch.no_grad()
    def gradient(self, name: str, gradient: Tensor, rate: float, factor: float = 1.0) -> None:
        """Hear of a tensor's gradient, its factor, and of the learning rate that its update will have."""
        parameter = self.parameters[name]
        flat = parameter.detach().reshape(-1)
        for i, part in enumerate(gradient.detach().reshape(-1).split(_BLOCK)):
            size = part.abs().float() * factor
            if not bool(size.any()):
                continue
            self._touched.add(name)
            if name in self._certain:
                continue
            update = rate * size / (size + self.epsilon)
            weight = flat[i * _BLOCK : (i + 1) * _BLOCK].abs().float()
            shows = update / (torch.finfo(parameter.dtype).eps * weight).clamp_min(1e-38)
            if parameter.dtype == torch.float32:
                if bool((shows >= 1).any()):
                    self._certain.add(name)
            else:
                self._expected[name] += float(shows.clamp_max(1).sum())
        view = self._views.get(id(parameter))
        if view is not None:
            stack, of_experts = view
            hit = of_experts(gradient.detach()).any(dim=1)
            self._reached[stack] = self._reached[stack] | hit if stack in self._reached else hit

    def stepped(self, name: str, siblings: Callable[[str], str | None]) -> list[str]:
        """After the third step: what a user should know of the trial `name`; nothing after the others.

        `siblings` gives what the tensors of experts that are modules of their own have in common. Raises TrainingError for
        tensors that should have changed and did not, and for frozen ones that did.
        """
        self.steps += 1
        if self.steps != STEPS:
            return []
        judged = self._certain | {n for n, count in self._expected.items() if count >= _EXPECTED}
        still = [n for n, p in self.parameters.items() if n in judged and checksum(p) == self._before[n]]
        if still:
            raise TrainingError(
                f"{name}: '{still[0]}'{_more(still)} got gradients and has not changed in {STEPS} steps: the optimizer holds "
                "other tensors than the model uses. This is a fault of Graft, please report it; nothing was saved"
            )
        changed = [n for n, t in _tensors(self.base) if n in self._frozen and checksum(t) != self._frozen[n]]
        if changed:
            raise TrainingError(
                f"{name}: the frozen tensor '{changed[0]}'{_more(changed)} has changed in {STEPS} steps, so the adapter would "
                "fit no base. This is a fault of Graft or of the model's own code, please report it; nothing was saved"
            )
        notes: list[str] = []
        idle = [n for n in self.parameters if n not in self._touched]
        alike = {siblings(n) for n in self._touched} - {None}
        experts = [n for n in idle if siblings(n) in alike]
        others = [n for n in idle if n not in experts]
        missed = [
            (stack, int(i)) for stack, hit in self._reached.items() for i in torch.nonzero(~hit).flatten().tolist()
        ]
        if missed:
            total = sum(len(hit) for hit in self._reached.values())
            stack, expert = missed[0]
            notes.append(
                f"{len(missed)} of {total} experts got no token in the first {STEPS} steps, the first is expert {expert} of "
                f"'{stack}'"
            )
        if experts:
            notes.append(f"{len(experts)} tensors of experts got no token in the first {STEPS} steps: '{experts[0]}'")
        if others:
            notes.append(f"'{others[0]}'{_more(others)} got no gradient in the first {STEPS} steps and stays as it is")
        return notes


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


__all__ = ["STEPS", "UpdateCheck", "checksum"]
