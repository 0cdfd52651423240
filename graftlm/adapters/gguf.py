"""placeholder"""
from pathlib import Path
from typing import Any
def write_gguf(folder: Path, file: Path, kind: str) -> dict[str, Any]:
    raise NotImplementedError
