"""The parts of a causal language model: body, head, embedding, layers. Body and head can run separately.

structure.hidden(ids, context)     the body over segments
structure.logits(hidden)           the model's own code from there on, for a few tokens at a time
"""

# The types of transformers' internals are partial: the checks that only restate that are off.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graftlm.base import context
from graftlm.base.activation_offload import ActivationOffload
from graftlm.base.context import ForwardContext
from graftlm.base.modules import Stored, StoredLinear, WeightHandle
from graftlm.base.surgery import head_and_embedding
from graftlm.base.transformers_log import first_line
from graftlm.distributed.group import ALONE, Ranks
from graftlm.distributed.shard import SplitWeights
from graftlm.errors import ModelError
from graftlm.kernels import to_device

_T = TypeVar("_T")


class _BodyOutput(dict[str, Any]):
    """A body's output with the given hidden states; all other fields are None."""

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


class _FixedHiddenStates(nn.Module):
    """Replaces a model's body and returns fixed hidden states."""

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
    """A stored head for the model's own code: Mamba first casts its input to the dtype of the head's weight.

    The real head keeps its Parameter, so the model's own code gets this wrapper, which offers a `WeightHandle`.
    """

    def __init__(self, head: StoredLinear, activation_dtype: torch.dtype) -> None:
        super().__init__()
        object.__setattr__(self, "_head", head)
        self.__dict__["weight"], self.bias = WeightHandle(head, activation_dtype), head.bias

    def forward(self, x: Tensor) -> Tensor:
        return self._head(x)


def _stored(model: nn.Module) -> list[Stored]:
    return [module for module in model.modules() if isinstance(module, Stored)]


def _copy_with_submodule(module: nn.Module, path: Sequence[str], other: nn.Module) -> Any:
    """A module that shares everything with `module` but has `other` at `path`.

    The model itself does not change: another thread may run it at the same time.
    """
    own: Any = module
    copy = object.__new__(type(module))
    child = other if len(path) == 1 else _copy_with_submodule(own._modules[path[0]], path[1:], other)
    copy.__dict__.update(own.__dict__)
    copy.__dict__["_modules"] = {**own._modules, path[0]: child}
    return copy


def _checkpointed_forward(forward: Any, offload: ActivationOffload | None, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward that saves its inputs alone and is recomputed in backward; its random numbers are counter-based.

    With `offload` the inputs wait in the host's memory.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    forward_context = context.current()  # autograd may recompute it in another thread

    def run(*args: Any) -> Any:
        with forward_context:
            return forward(*args, **kwargs)

    with nullcontext() if offload is None else offload.saving():
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


class ModelStructure:
    """The parts of a causal language model: body, head, embedding, layers."""

    def __init__(
        self, model: PreTrainedModel, activation_dtype: torch.dtype, weights: SplitWeights | None = None
    ) -> None:
        """Find the parts and check that body and head together give the model's logits. Raises ModelError if not.

        `activation_dtype` is the dtype of the hidden states. Weights that are split over ranks must be there: a pass runs.
        """
        self.model, self._activation_dtype, self.weights = model, activation_dtype, weights
        names = {id(module): name for name, module in model.named_modules()}
        head, embedding = head_and_embedding(model)
        self.head_name, self.embedding_name = names[id(head)], names[id(embedding)]
        self.embedding: Any = embedding  # a StoredEmbedding after `replace_modules`
        self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        config: Any = model.config.get_text_config()
        self.vocabulary = int(head.weight.shape[0])
        self.max_positions = int(getattr(config, "max_position_embeddings", 0) or 0)
        ids = torch.arange(6, device=model.device)[None] % self.vocabulary
        self.body_name, self.body = self._find_body(head, ids)
        parameters = inspect.signature(self.body.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.head_is_plain_matmul = self._check_plain_matmul()

    @property
    def head(self) -> nn.Module:
        return self.model.get_submodule(self.head_name)

    @property
    def sharing(self) -> Ranks:
        """The ranks that the weights are split over."""
        return ALONE if self.weights is None else self.weights.ranks

    def in_pass(self, call: Callable[[], _T]) -> _T:
        """What `call` returns; while it runs, weights that are split over ranks are there, each where it is used."""
        return call() if self.weights is None else self.weights.run(call)

    def with_head(self) -> AbstractContextManager[None]:
        """In a pass: the head's weight is there."""
        return nullcontext() if self.weights is None else self.weights.gathered(self.head)

    def _model_with_readable_head(self) -> Any:
        """The model with a head whose weight the model's own code can read."""
        head = self.head
        if not isinstance(head, StoredLinear):
            return self.model
        return _copy_with_submodule(self.model, self.head_name.split("."), _ReadHead(head, self._activation_dtype))

    def tail_modules(self) -> list[nn.Module]:
        """Every module outside the body, which together turn hidden states into logits, including the head."""
        body, found, waiting = self.body, list[nn.Module](), list[nn.Module]([self.model])
        while waiting:
            module = waiting.pop()
            found.append(module)
            waiting.extend(child for child in module.children() if child is not body)
        return found

    @torch.no_grad()
    def _check_plain_matmul(self) -> bool:
        """Whether the logits are the head's matmul and nothing else: no soft cap, scale, bias or other layer."""
        head = self.head
        if not isinstance(head, StoredLinear) or head.weight is None or head.bias is not None:
            return False
        generator = torch.Generator().manual_seed(0)
        for scale in (1.0, 100.0):  # a soft cap changes large logits
            hidden = torch.randn(1, 2, head.in_features, generator=generator).mul_(scale)
            hidden = hidden.to(device=head.weight.device, dtype=self._head_input_dtype)
            found, expected = self.logits(hidden), head(hidden)[0]
            if found.dtype != expected.dtype or not torch.equal(found, expected):
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
            expected = self._model_with_readable_head()(input_ids=ids, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The model's own code may raise anything: in float32 it has the weights that transformers gives it.
            plain = all(s.dense is not None and s.dense.dtype == self._activation_dtype for s in _stored(self.model))
            hint = (
                "Please report this architecture"
                if plain
                else "Try --base-precision float32 --compute-dtype float32, which leave the weights' dtypes as they are; if "
                "that fails too, please report this architecture"
            )
            raise ModelError(
                f"{type(self.model).__name__} does not run with {'its own' if plain else 'converted'} weights "
                f"({type(error).__name__}: {first_line(error)}). {hint}"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()
        hidden = seen[0]
        self._head_input_dtype = hidden.dtype
        same = [n for n, t in outputs if t.shape == hidden.shape and t.data_ptr() == hidden.data_ptr()]
        candidates = sorted(same, key=lambda n: n.count("."))[:1]
        base_name = self.model.base_model_prefix
        if base_name and hasattr(self.model, base_name):
            candidates.append(base_name)
        outputs_by_name = dict(outputs)
        for name in candidates:
            self.body_name, self.body = name, self.model.get_submodule(name)
            try:
                found = self.logits(outputs_by_name[name])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # this candidate is not the body
                continue
            if found.shape == expected[0].shape and torch.allclose(found, expected[0], rtol=1e-4, atol=1e-4):
                return name, self.body
        raise ModelError(
            f"{type(self.model).__name__}: the part between its layers and its logits cannot be run on its own, so Graft "
            "cannot compute its loss; please report this architecture"
        )

    def hidden(self, ids: Tensor, forward_context: ForwardContext) -> Tensor:
        """The body alone: ids (T,) laid out as the context's segments -> hidden states (T, width)."""
        return self.in_pass(partial(self._hidden, ids, forward_context))

    def _hidden(self, ids: Tensor, forward_context: ForwardContext) -> Tensor:
        segments = forward_context.segments
        with forward_context:
            if segments.batched:
                count, length = len(segments.lengths), segments.lengths[0]
                output = self.body(input_ids=ids.view(count, length), use_cache=False)
            else:
                positions = to_device([segments.positions], ids.device)[0][None]
                output = self.body(input_ids=ids[None], position_ids=positions, use_cache=False)
        hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        return hidden.reshape(-1, hidden.shape[-1])

    def logits(self, hidden: Tensor, forward_context: ForwardContext | None = None) -> Tensor:
        """From hidden states (n, width) or (1, n, width) to logits (n, vocabulary), by the model's own code.

        The class's forward runs with its body replaced by the given states, so soft caps and scales are applied. The context's
        segments are those of the n rows; a head with adapters needs it.
        """
        return self.in_pass(partial(self._logits, hidden, forward_context))

    def _logits(self, hidden: Tensor, forward_context: ForwardContext | None) -> Tensor:
        states = hidden if hidden.ndim == 3 else hidden[None]
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        model_copy = _copy_with_submodule(
            self._model_with_readable_head(), self.body_name.split("."), _FixedHiddenStates(self.body, states)
        )
        with self.with_head(), nullcontext() if forward_context is None else forward_context:
            return model_copy(input_ids=ids, use_cache=False).logits[0]

    def checkpoint_layers(self, on: bool, offload: ActivationOffload | None = None) -> int:
        """Turn activation checkpointing of the layers on or off; returns the number of layers. With `offload` their inputs,
        which it saves, wait in the host's memory."""
        for layer in self.layers:
            # Not with transformers' own: that needs training mode, in which OPT's layers apply dropout.
            layer.__dict__.pop("forward", None)
            if on:
                layer.forward = partial(_checkpointed_forward, layer.forward, offload)
        return len(self.layers)
