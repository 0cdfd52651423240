"""What comes with Graft: a small base model, and data to tune it on.

The recipe that made both is `tools/demo/` of the repository, outside of the package: `python -m tools.demo.recipe`.

Wherever a model or a data file is asked for, these names may stand instead of a path:

    model          demo             the bundled base
    data           demo             product descriptions in the playful voice
                   demo-formal      the same products in another voice
                   demo-playful
                   demo-terse

A data name means the training rows as data and the validation rows as evaluation data. Names that are not in the list
are returned as they are: they are paths, or the names of models and datasets on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from graftlm.errors import DataError, ModelError

Split = Literal["train", "valid"]

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
DATA = FOLDER / "data"
VOICE_OF = {"demo": "playful", "demo-formal": "formal", "demo-playful": "playful", "demo-terse": "terse"}


def resolve_model(name: str) -> str:
    """Return the folder of the bundled base for "demo", and any other name unchanged.

    Raises ModelError when the bundled base is missing from the installation.
    """
    if name != "demo":
        return name
    if not (BASE / "config.json").is_file() or not any(BASE.glob("*.safetensors")):
        raise ModelError(
            f"the bundled base is missing: '{BASE}' holds no config.json with safetensors weights. Reinstall graftlm, "
            "make it with `python -m tools.demo.recipe`, or give --model a folder or a hub id."
        )
    return str(BASE)


def resolve_data(name: str, split: Split = "train") -> str:
    """Return the bundled file that a demo data name means in `split`, and any other name unchanged.

    Raises DataError when the bundled file is missing, or when a name looks like a demo name and is none.
    """
    voice = VOICE_OF.get(name)
    if voice is None:
        if name.startswith("demo-") and not Path(name).exists() and "/" not in name and "." not in name:
            raise DataError(f"no bundled data is called '{name}'. There are: {', '.join(VOICE_OF)}.")
        return name
    path = DATA / f"{voice}-{split}.jsonl"
    if not path.is_file():
        raise DataError(f"the bundled data file '{path}' is missing. Reinstall graftlm.")
    return str(path)
