"""Which release of transformers brought which causal language model: graftlm/base/first_releases.json.

    python tools/first_releases.py                     # downloads the first wheel of each minor release from PyPI
    python tools/first_releases.py --wheels FOLDER     # takes the wheels that are there already

Each wheel is read, not imported: the names of AutoModelForCausalLM's mapping, as the source of `modeling_auto.py` has them.
A type that is in a release and not in the one before it came with that release; those of the oldest are not listed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from graftlm.base.transformers_versions import BELOW, FIRST_RELEASES, OLDEST

MAPPING = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


def minors() -> list[str]:
    """The minor releases of transformers on PyPI that Graft takes, `5.17` and up, in their order."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {(int(a), int(b)) for a, b in re.findall(r"\b(\d+)\.(\d+)\.\d+\b", said)}
    return [f"{a}.{b}" for a, b in sorted(found) if _numbers(OLDEST) <= (a, b) < _numbers(BELOW)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def download(minor: str, folder: Path) -> None:
    """The wheel of a minor's first release, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, f"transformers=={minor}.0"], check=True)


def causal_types(wheel: Path) -> set[str]:
    """The model types for which the transformers of a wheel has a causal language model."""
    with zipfile.ZipFile(wheel) as inside:
        source = inside.read("transformers/models/auto/modeling_auto.py").decode("utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == MAPPING:
            assert isinstance(node.value, ast.Call)
            return {pair[0] for pair in ast.literal_eval(node.value.args[0])}
    raise SystemExit(f"{wheel}: modeling_auto.py has no {MAPPING}")


def first_releases(types: dict[str, set[str]]) -> dict[str, str]:
    """Release -> its types, oldest first; type -> the first release that has it, for types that the oldest lacks."""
    oldest, *later = types
    found: dict[str, str] = {}
    for release in later:
        found |= {name: release for name in sorted(types[release]) if name not in found and name not in types[oldest]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="a folder with transformers-5.17.0-py3-none-any.whl and so on")
    given: Path | None = parser.parse_args().wheels
    types: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given or Path(temporary)
        for minor in minors():
            wheel = folder / f"transformers-{minor}.0-py3-none-any.whl"
            if not wheel.is_file():
                download(minor, folder)
            types[minor] = causal_types(wheel)
    written = {"surveyed": [*types][-1], "first_release": first_releases(types)}
    FIRST_RELEASES.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"{FIRST_RELEASES}: {len(written['first_release'])} types came after {OLDEST}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
