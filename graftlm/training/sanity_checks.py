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
Of weights that ranks share, each rank looks at its own rows; what they found is added up before anything follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftlm import kernels
from graftlm.adapters.bank import LayerBank, LowRank
from graftlm.base.loading import Base
from graftlm.base.modules import StoredStack
from graftlm.data.dataset import Example
from graftlm.distributed.shard import everywhere, is_split, local, offset
from graftlm.errors import Diverged, TrainingError
from graftlm.progress import sign_of_life
from graftlm.training.micro_batch import BatchItem, collate, count_target_tokens, forward
from graftlm.training.trial import ExampleLoss, Trial, name_rows

STEPS = 3
"""Optimizer steps that an `UpdateCheck` observes."""
_EXPECTED = 20.0
_CPU_BLOCK = 1 << 15  # words at a time: a MB or less with all that is made of them, however large the tensor
_GPU_BLOCK = 1 << 22  # the same on a GPU, where every operation is a launch: 100 MB or less
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


# ---- what changes ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor a number that changes when any bit of it does, save by a chance of about 2^-32; all read at once.

    Sum over all words of 32 bits (fewer where they do not divide the tensor) of word x odd number drawn for its place, in 64
    bits that wrap. With words of 64 bits a change of their highest bit would not depend on the place.
    """
    rows = [_words(tensor) for tensor in tensors]
    found = [0] * len(rows)
    for here in kernels.by_device(dict(enumerate(rows))):
        for i, value in zip(here, _checksums([rows[i] for i in here])):
            found[i] = value
    return found


def _checksums(rows: Sequence[Tensor]) -> list[int]:
    """The same of words that are on one device."""
    device = rows[0].device
    block = _block(device)
    place = torch.arange(min(block, max(len(words) for words in rows)), dtype=torch.int64, device=device)
    odd = (place * 0x2545F4914F6CDD1D) >> 7 | 1  # (block,)
    return torch.stack([_weighted_sum(words, odd, block) for words in rows]).tolist()


def _weighted_sum(words: Tensor, odd: Tensor, block: int) -> Tensor:
    """words (n,), odd (block,) -> () int64, still on the device."""
    total = (words[:block] * odd[: len(words)]).sum()
    for i, first in enumerate(range(block, len(words), block), start=1):
        part = words[first : first + block]
        total.add_((part * odd[: len(part)]).sum(), alpha=2 * i + 1)
    return total


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bits as a row of the widest words, up to 32 bits, that divide it."""
    flat = local(tensor.detach()).reshape(-1).contiguous()
    width = next(size for size in (4, 2, 1) if flat.nbytes % size == 0)
    begins_between = flat.storage_offset() * flat.element_size() % width
    return (flat.clone() if begins_between else flat).view(_WORDS[width])


def _enough(parameter: Tensor) -> float:
    """From how much on a tensor is judged; see `UpdateCheck._observed`."""
    return 1 if parameter.dtype == torch.float32 else _EXPECTED


def _block(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def _base_tensors(base: Base) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the base consists of, in whatever form it is stored."""
    yield from base.model.named_parameters()
    for name, module in base.stored().items():
        packed = module.compressed
        if packed is not None:
            for part, value in packed.tensors().items():
                if is_split(value):
                    continue  # a parameter
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
        adapters = module.bank.adapters.values() if isinstance(module.bank, LayerBank) else ()
        for adapter in adapters:
            if isinstance(adapter, LowRank):
                found[id(adapter.A)] = name, lambda g, e=experts: g.view(e, -1)
                found[id(adapter.B)] = name, lambda g, e=experts: g.view(-1, e).T  # the expert runs fastest
    return found


class UpdateCheck:
    """Observes a trial's first steps: `observe_gradients` (or `observe_gradient`, one by one) before an update, `after_step`
    after it."""

    def __init__(
        self, base: Base, parameters: Mapping[str, nn.Parameter], epsilon: float, *, check_frozen: bool = True
    ) -> None:
        """`check_frozen`: whether it also checks that nothing frozen changes; of trials that begin together one does."""
        self.base, self.parameters, self.epsilon = base, parameters, epsilon
        self.steps = 0
        self._ranks = base.structure.sharing
        own = {id(p) for p in parameters.values()}
        frozen = (
            {n: t for n, t in _base_tensors(base) if id(t) not in own and not t.requires_grad} if check_frozen else {}
        )
        found = checksums([*frozen.values(), *parameters.values()])
        self._frozen = dict(zip(frozen, found))
        self._before = dict(zip(parameters, found[len(frozen) :]))
        self._observed: dict[str, Tensor] = {}
        for names in kernels.by_device(parameters):
            device = parameters[names[0]].device
            self._observed.update(zip(names, torch.zeros(len(names), 2, dtype=torch.float64, device=device)))
        """Of each tensor, on its device: whether a gradient was not zero (> 0); and whether some element's change must show
        (float32, > 0), or how many elements' changes should show (types that are rounded at random)."""
        self._views = _expert_views(base)
        self._reached: dict[str, Tensor] = {}  # stack -> (E,) bool

    @property
    def done(self) -> bool:
        """Whether it has observed all the steps that it is for."""
        return self.steps >= STEPS

    def observe_gradients(
        self, rate: float, lr_multipliers: Mapping[str, float], clip_coefficient: float = 1.0
    ) -> None:
        """Observe every gradient that is there: `rate` is the step's learning rate, `lr_multipliers` multiply it for single
        tensors, and clipping multiplies the gradients by `clip_coefficient`."""
        for name, parameter in self.parameters.items() if not self.done else ():
            if parameter.grad is not None:
                self.observe_gradient(name, parameter.grad, rate * lr_multipliers.get(name, 1.0), clip_coefficient)

    @torch.no_grad()
    def observe_gradient(self, name: str, gradient: Tensor, rate: float, clip_coefficient: float = 1.0) -> None:
        """Observe one tensor's gradient: `rate` is its own learning rate, clipping multiplies it by `clip_coefficient`."""
        whole, observed = self.parameters[name], self._observed[name]
        parameter, gradient = local(whole), local(gradient)
        block, eps = _block(parameter.device), torch.finfo(parameter.dtype).eps
        flat = parameter.detach().reshape(-1)
        for part, weight in zip(gradient.detach().reshape(-1).split(block), flat.split(block)):
            size = part.abs().float() * clip_coefficient
            update = rate * size / (size + self.epsilon)
            shows = update / (eps * weight.abs().float()).clamp_min(1e-38)
            observed[0].add_(size.any())
            observed[1].add_((shows >= 1).any() if parameter.dtype == torch.float32 else shows.clamp_max(1).nansum())
            if observed.device.type == "cpu" and observed[1] >= _enough(parameter):  # a GPU would be waited for
                break
        view = self._views.get(id(whole))
        if view is not None:
            stack, of_experts = view
            hit = of_experts(gradient.detach()).any(dim=1)
            if is_split(whole):
                first = offset(whole) // max(1, math.prod(whole.shape[1:]))
                hit = torch.nn.functional.pad(hit, (first, len(whole) - first - len(hit)))
            self._reached[stack] = self._reached[stack] | hit if stack in self._reached else hit

    def after_step(self, name: str) -> list[str]:
        """After the third step: what a user should know of the trial `name`; nothing after the others.

        Raises TrainingError for tensors that should have changed and did not, and for frozen ones that did.
        """
        self.steps += 1
        if self.steps != STEPS:
            return []
        touched, shown, missed = self._read()
        judged = [name for name, parameter in self.parameters.items() if shown[name] >= _enough(parameter)]
        frozen = {n: t for n, t in _base_tensors(self.base) if n in self._frozen}
        now = checksums([*frozen.values(), *(self.parameters[n] for n in judged)])
        before = [*(self._frozen[n] for n in frozen), *(self._before[n] for n in judged)]
        # Of a split tensor this rank's rows may be as they were, and another's not.
        changes = self._ranks.total([float(found != known) for found, known in zip(now, before)])
        still = [n for n, change in zip(judged, changes[len(frozen) :]) if not change]
        if still:
            raise TrainingError(
                f"{name}: '{still[0]}'{_more(still)} got gradients and has not changed in {STEPS} steps: the optimizer holds "
                "other tensors than the model uses. This is a fault of Graft, please report it; nothing was saved"
            )
        changed = [n for n, change in zip(frozen, changes) if change]
        if changed:
            raise TrainingError(
                f"{name}: the frozen tensor '{changed[0]}'{_more(changed)} has changed in {STEPS} steps, so the adapter would "
                "fit no base. This is a fault of Graft or of the model's own code, please report it; nothing was saved"
            )
        return self._notes(touched, missed)

    def _read(self) -> tuple[set[str], dict[str, float], list[tuple[str, int]]]:
        """What was observed, read from the device once: the names that got a gradient; how much should show of each (see
        `_observed`); the experts that no token reached."""
        first, rows = self._ranks.first, self._ranks.counted  # whole gradients are on all ranks, rows once on each node
        seen = [t if (rows if is_split(self.parameters[n]) else first) else t * 0 for n, t in self._observed.items()]
        found = [*seen, *(hit.double() for hit in self._reached.values())]
        together = len(kernels.by_device(dict(enumerate(found)))) == 1
        values = self._ranks.total(torch.cat(found if together else [t.cpu() for t in found]).tolist())
        touched = {name for name, got in zip(self._observed, values[0::2]) if got}
        shown = dict(zip(self._observed, values[1::2]))
        missed: list[tuple[str, int]] = []
        at = 2 * len(self._observed)
        for stack, hit in self._reached.items():
            missed += [(stack, expert) for expert, got in enumerate(values[at : at + len(hit)]) if not got]
            at += len(hit)
        return touched, shown, missed

    def _notes(self, touched: set[str], missed: Sequence[tuple[str, int]]) -> list[str]:
        """Which tensors and experts were not trained so far."""
        notes: list[str] = []
        idle = [n for n in self.parameters if n not in touched]
        reached = {expert_group(n) for n in touched} - {None}
        experts = [n for n in idle if expert_group(n) in reached]
        others = [n for n in idle if n not in experts]
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
    bad = [one.row_name for one in losses if not math.isfinite(one.loss)]
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


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


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
        bad = [n for n, p in module.named_parameters(recurse=False) if not _finite(local(p))]
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
        sign_of_life()
        for name, parameter in named:
            if parameter.grad is not None and not everywhere(parameter.grad, _finite):
                found.append(f"the gradient of '{name}'")
                break
        if found:
            where = where or found[0]
            bad.append(row)
    for _, parameter in named:
        parameter.grad = None
    return where, bad
