"""Sanity checks: losses and gradients are finite, gradients reach every trained tensor, updates reach only those.

**What is not finite.** A NaN loss does not show its cause, and by the time it is seen the forward pass is over. So
the examples of the step are run once more, each alone, with a hook on every module: the first whose output, or whose
output's gradient, is not finite is the one to look at. All random numbers come from counters, so the second run repeats
the first.

**What changes.** A wrong target, an optimizer that holds other tensors than the model, or a base that is written to by
accident train without an error and without an effect, or spoil what must stay. So every tensor's checksum is taken
before the first step and after the third. A trained tensor must have changed if the steps were large enough to show in
its type:

    update of an element ~ lr |g| / (|g| + eps)            AdamW's first steps
    shows for sure       if it reaches 2^-23 |w| (float32)
    shows with chance    update / (2^-7 |w|) (bfloat16, stochastic rounding): judged where 20 such are expected, so that
                         a tensor is called unchanged by mistake once in e^20 times

Frozen tensors must not have changed by a bit. Tensors that never got a gradient, and experts that no token reached, are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.adapters.bank import Bank, LowRank
from graftlm.base.loading import Base
from graftlm.base.modules import StoredStack
from graftlm.data.dataset import Example
from graftlm.errors import Diverged, TrainingError
from graftlm.training.micro_batch import BatchItem, collate, count_target_tokens, forward
from graftlm.training.trial import ExampleLoss, Trial, name_rows

STEPS = 3
"""Optimizer steps that an `UpdateCheck` observes."""
_EXPECTED = 20.0
_BLOCK = 1 << 15  # words at a time: a MB or less with all that is made of them, however large the tensor
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- what changes ----------------------------------------------------------------------------------------------------


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


def _base_tensors(base: Base) -> Iterator[tuple[str, Tensor]]:
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
    """Observes a trial's first steps: `observe_gradients` (or `observe_gradient`, one by one) before an update, `after_step`
    after it."""

    def __init__(
        self, base: Base, parameters: Mapping[str, nn.Parameter], epsilon: float, *, with_base: bool = True
    ) -> None:
        """`with_base`: whether it also checks that nothing frozen changes; of trials that begin together one does."""
        self.base, self.parameters, self.epsilon = base, parameters, epsilon
        self.steps = 0
        own = {id(p) for p in parameters.values()}
        frozen = ((name, t) for name, t in _base_tensors(base) if id(t) not in own and not t.requires_grad)
        self._frozen = {name: checksum(t) for name, t in frozen} if with_base else {}
        self._before = {name: checksum(p) for name, p in parameters.items()}
        self._certain: set[str] = set()
        """Tensors of which some element's change must show."""
        self._expected = dict.fromkeys(parameters, 0.0)
        """How many elements' changes should show, for types that are rounded at random."""
        self._touched: set[str] = set()
        self._views = _expert_views(base)
        self._reached: dict[str, Tensor] = {}  # stack -> (E,) bool

    @property
    def done(self) -> bool:
        """Whether it has observed all the steps that it is for."""
        return self.steps >= STEPS

    def observe_gradients(self, rate: float, ratios: Mapping[str, float], factor: float = 1.0) -> None:
        """Observe every gradient that is there: `rate` is the step's learning rate, `ratios` multiplies it for single tensors,
        and clipping multiplies the gradients by `factor`."""
        for name, parameter in self.parameters.items() if not self.done else ():
            if parameter.grad is not None:
                self.observe_gradient(name, parameter.grad, rate * ratios.get(name, 1.0), factor)

    @torch.no_grad()
    def observe_gradient(self, name: str, gradient: Tensor, rate: float, factor: float = 1.0) -> None:
        """Observe one tensor's gradient: `rate` is its own learning rate, clipping multiplies it by `factor`."""
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

    def after_step(self, name: str) -> list[str]:
        """After the third step: what a user should know of the trial `name`; nothing after the others.

        Raises TrainingError for tensors that should have changed and did not, and for frozen ones that did.
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
        changed = [n for n, t in _base_tensors(self.base) if n in self._frozen and checksum(t) != self._frozen[n]]
        if changed:
            raise TrainingError(
                f"{name}: the frozen tensor '{changed[0]}'{_more(changed)} has changed in {STEPS} steps, so the adapter would "
                "fit no base. This is a fault of Graft or of the model's own code, please report it; nothing was saved"
            )
        return self._notes()

    def _notes(self) -> list[str]:
        """Which tensors and experts were not trained so far."""
        notes: list[str] = []
        idle = [n for n in self.parameters if n not in self._touched]
        reached = {expert_group(n) for n in self._touched} - {None}
        experts = [n for n in idle if expert_group(n) in reached]
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


# ---- which tensors get a gradient ------------------------------------------------------------------------------------


def check_gradients_reach_every_tensor(trial: Trial) -> None:
    """Raise TrainingError if, after the first backward pass, a trained tensor has no gradient: it would never be trained.

    An expert that is a module of its own, `layers.1.experts.2.up.weight`, may have none as long as another expert of its layer
    has one.
    """
    if trial.step > 0:
        return
    got = trial.optimizer.squares
    reached = {expert_group(name) for name in got} - {None}
    missing = [name for name in trial.parameters if name not in got and expert_group(name) not in reached]
    if missing:
        way_out = (
            "leave it out with --method lora and --targets that name other layers"
            if trial.slot == 0
            else "leave its layer out: name the others with --targets, such as attention, mlp or patterns"
        )
        raise TrainingError(
            f"{trial.name}: '{missing[0]}'{_more(missing)} got no gradient in the first step, so it would never be trained: "
            f"the model's code does not use it, or reads it past the layer. Nothing was changed; {way_out}"
        )


def expert_group(name: str) -> str | None:
    """What the tensors of all experts in one list of one layer have in common: the name without the expert's number.

    `layers.1.experts.2.up.weight` -> `layers.1.experts.*.up.weight`; None for a tensor that is in no list within its layer.
    """
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
    if len(numbered) < 2:  # the layer's own number, and no list within it
        return None
    return ".".join([*parts[: numbered[-1]], "*", *parts[numbered[-1] + 1 :]])


# ---- what is not finite ----------------------------------------------------------------------------------------------


def nonfinite_items(items: Sequence[BatchItem], token_losses: Tensor, counts: Sequence[int]) -> list[BatchItem]:
    """The examples of a micro-batch whose loss is not finite; `token_losses` are theirs in order, `counts` of each."""
    if torch.isfinite(token_losses).all():
        return []
    finite = [bool(part.isfinite().all()) for part in token_losses.split(list(counts))]
    return [item for item, good in zip(items, finite) if not good]


def check_step_is_finite(
    base: Base, trial: Trial, loss: float, grad_norm: float, nonfinite: Sequence[BatchItem]
) -> None:
    """Raise Diverged, with rows and module, if the loss or the gradient norm of a trial's next step is not finite.

    `nonfinite` are the examples, of any trial, whose loss is not.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    drawn = [(trial.seed, draw, example) for draw, example in trial.next_examples()]
    where, rows = locate_nonfinite(base, trial, drawn, with_backward=True)
    bad = [item.example.row for item in nonfinite if item.slot == trial.slot]
    bad = bad or rows or [example.row for _, _, example in drawn]
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
    raise Diverged(
        f"{trial.name}: {what} at step {trial.step + 1} on rows {name_rows(bad)}{where}. "
        "Lower --learning-rate, or look at these rows"
    )


def check_eval_is_finite(base: Base, trial: Trial, losses: Sequence[ExampleLoss]) -> None:
    """Raise Diverged, with rows and module, if the loss of an eval row is not finite."""
    bad = [row.row for row in losses if not math.isfinite(row.loss)]
    if not bad:
        return
    first = [(0, i, example) for i, example in enumerate(trial.eval_examples) if example.row == bad[0]]
    where, _ = locate_nonfinite(base, trial, first, with_backward=False)
    raise Diverged(
        f"{trial.name}: the loss is not finite after step {trial.step} on eval rows {name_rows(bad)}{where}. "
        "Lower --learning-rate, or look at these rows"
    )


def locate_nonfinite(
    base: Base, trial: Trial, examples: Sequence[tuple[int, int, Example]], *, with_backward: bool
) -> tuple[str, list[str]]:
    """Where the first value that is not finite comes from, as words, and on which rows; (seed, draw, example) are given."""

    def run(i: int) -> None:
        seed, draw, example = examples[i]
        weight = 1.0 / max(1, count_target_tokens([example]))
        micro_batch = collate(base, [BatchItem(example, trial.slot, (seed, draw), weight)])
        with torch.set_grad_enabled(with_backward):
            loss, _ = forward(base, micro_batch)
            if with_backward and loss.requires_grad:
                loss.backward()

    rows = [example.row for _, _, example in examples]
    where, bad = find_nonfinite(base.model, rows, trial.parameters.items(), run)
    return (f"; first {where}" if where else ""), bad


def _float_tensors(output: Any) -> Iterator[Tensor]:
    """The float tensors in what a module returned, however it is nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from (t for value in output.values() for t in _float_tensors(value))
    elif isinstance(output, (tuple, list)):
        yield from (t for value in output for t in _float_tensors(value))


@contextmanager
def hook_nonfinite(model: nn.Module) -> Iterator[list[str]]:
    """Collect, while open, what first was not finite: at most one entry, such as "the output of 'model.norm'"."""
    found: list[str] = []

    def note(what: str, name: str, module: nn.Module) -> None:
        if found:
            return
        bad = [n for n, p in module.named_parameters(recurse=False) if not bool(p.isfinite().all())]
        name = name.removesuffix(".stored") or type(module).__name__
        found.append(f"{what} of '{name}'" + (f", whose own {bad[0]} is not finite" if bad else ""))

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _float_tensors(output):
                if not bool(tensor.detach().isfinite().all()):
                    note("the output", name, module)
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda g: None if bool(g.isfinite().all()) else note("the output's gradient", name, module)
                    )

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_nonfinite(
    model: nn.Module, rows: Sequence[str], parameters: Iterable[tuple[str, nn.Parameter]], run: Callable[[int], None]
) -> tuple[str | None, list[str]]:
    """Run each of the examples alone; returns what first was not finite, and the rows that were not.

    `run(i)` runs example i forward, and backward where that is wanted. Where no example is to blame alone, None and [].
    """
    named = list(parameters)
    where: str | None = None
    bad: list[str] = []
    for i, row in enumerate(rows):
        for _, parameter in named:
            parameter.grad = None
        with hook_nonfinite(model) as found:
            run(i)
        for name, parameter in named:
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                found.append(f"the gradient of '{name}'")
                break
        if found:
            where = where or found[0]
            bad.append(row)
    for _, parameter in named:
        parameter.grad = None
    return where, bad
