"""Graft: fine-tune language models in full, with LoRA or with QLoRA.

    import graftlm as graft
    model = graft.load("demo", base_precision="nf4")
    run = graft.train(model, rows, eval_data="5%")
    model.generate("Hi", adapter=run)

Names are imported when they are first used: this module itself imports neither torch nor transformers. `docs/python.md` has
every name with its types, units and errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from graftlm.adapters.store import Store
    from graftlm.api.calls import board, check, compare, merge, plan, serve, sweep, train
    from graftlm.api.model import Model, load
    from graftlm.api.run import Run
    from graftlm.errors import GraftError, Stopped
    from graftlm.training.callbacks import Callback, EarlyStopping

__all__ = [
    "Callback", "EarlyStopping", "GraftError", "Model", "Run", "Stopped", "Store", "__version__", "board", "check", "compare",
    "load", "merge", "plan", "serve", "sweep", "train",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("board", "check", "compare", "merge", "plan", "serve", "sweep", "train"), "graftlm.api.calls"),
    **dict.fromkeys(("Model", "load"), "graftlm.api.model"),
    **dict.fromkeys(("Callback", "EarlyStopping"), "graftlm.training.callbacks"),
    **dict.fromkeys(("GraftError", "Stopped"), "graftlm.errors"),
    "Run": "graftlm.api.run",
    "Store": "graftlm.adapters.store",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'graftlm' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
