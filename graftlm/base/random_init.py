"""Models with random weights: dense, or with each weight converted to its stored form as it is created."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftlm.base.surgery import Replacements, find_replacements, freeze, replace_modules
from graftlm.base.transformers_log import quiet
from graftlm.config import Precision


def random_model(config: Any, seed: int, trust_remote_code: bool) -> PreTrainedModel:
    """A model of `config` with random weights, the same for the same seed."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def random_stored_model(
    config: Any, precision: Precision, activation_dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[PreTrainedModel, Replacements]:
    """A model of `config` with random weights that are created on `device`, each converted to its stored form at once.

    It is built on the meta device; then one module after another gets weights from its class's own initialization, so that one
    weight at a time is in memory in full (float32).
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
    replaced = replace_modules(model, replacements, precision, activation_dtype)
    return freeze(model), replaced
