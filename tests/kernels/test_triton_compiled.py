"""The Triton programs compiled for NVIDIA GPUs, which takes no GPU: what they need of one, and how many instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (80, 89, 90, 100)  # A100, RTX 4090, H100 and H200, B200
# `make test` compiles the product with NF4 for each of them, and the other programs once or twice.
QUICK = (
    *(f"{capability}:nf4_product" for capability in CAPABILITIES), "80:nf4_dequantize", "100:nf4_dequantize",
    "89:nf4_product back", "80:shrink 128", "90:expand 128", "90:int8_dequantize", "89:q4_k_product", "90:q6_k_product back",
    "90:adamw 8 bits", "90:attend split", "80:attend wide", "90:dropped factor_gradient 16", "80:dropped expand 128",
    "80:cross_entropy", "100:dropped", "89:adamw of many", "80:rms_norm back", "90:gated back", "89:rotary",
)  # fmt: skip
REGISTERS = 255  # a thread has no more
MOST_SHARED = 99 << 10  # bytes that consumer cards give a program
# Instructions a weight value, in the loop where there is one.
OF_A_VALUE = {
    "nf4_dequantize": 10,
    "nf4_dequantize float32": 12,
    "int8_dequantize": 7,
    "nf4_product": 13,
    "nf4_product back": 9,
    "q4_0_dequantize": 12,
    "q4_k_dequantize": 14,
    "q6_k_dequantize": 22,
    "q4_0_product": 10,
    "q4_1_product": 11,
    "q8_0_product": 9,
    "q4_k_product": 13,
    "q6_k_product": 19,
    "q4_0_product back": 12,
    "q4_1_product back": 12,
    "q8_0_product back": 13,
    "q4_k_product back": 12,
    "q6_k_product back": 19,
}

Compile = Callable[[tuple[str, ...]], dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def compile_for(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Of "90:nf4_product" and the like, the fields of `gpu_code.Code`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = importlib.import_module("triton").__path__[0]
    tools = [Path(folder) / "backends" / "nvidia" / "bin" / name for name in ("ptxas", "cuobjdump")]
    missing = [tool.name for tool in tools if not tool.is_file()]
    if missing:
        pytest.skip(f"this triton has no {' and no '.join(missing)}")
    cache = str(tmp_path_factory.mktemp("triton"))

    def ask(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("gpu_code.py")), *names], env=os.environ | environment,
            capture_output=True, text=True, timeout=7200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout)

    return ask


def check(found: dict[str, dict[str, Any]]) -> None:
    for asked, code in found.items():
        _, _, name = asked.partition(":")
        assert code["registers"] <= REGISTERS, (asked, code["registers"])
        assert code["stack"] == 0, (asked, code["stack"])  # nothing is spilled
        assert code["shared"] <= MOST_SHARED, (asked, code["shared"])
        if name in OF_A_VALUE:
            assert 3 < code["of_a_value"] <= OF_A_VALUE[name], (asked, code["of_a_value"])
        if name.startswith("adamw"):  # every operation rounds by itself, as IEEE 754 wants it
            assert "div.rn.f32" in code["ptx"]
            assert "sqrt.rn.f32" in code["ptx"]
            assert not re.search(r"\bfma|\.approx|\.ftz|div\.full", code["ptx"])


def test_programs_spill_nothing_and_take_few_instructions_a_value(compile_for: Compile) -> None:
    found = compile_for(QUICK)
    assert {name.partition(":")[0] for name in found} == {str(capability) for capability in CAPABILITIES}
    check(found)


@pytest.mark.prove
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_specialisation_of_any_program_spills_on_any_card(compile_for: Compile, capability: int) -> None:
    from gpu_code import specialisations

    check(compile_for(tuple(f"{capability}:{name}" for name in specialisations())))


def test_instructions_are_counted_in_the_largest_loop() -> None:
    from gpu_code import instructions

    text = "\n".join(
        f"        /*{16 * i:04x}*/                   {what} ;                /* 0x0 */"
        for i, what in enumerate(
            ["S2R R0", "MOV R1, R2", "FADD R1", "@P0 BRA 0x20", "@!P1 BRA 0x10", "EXIT", "BRA 0x60", "NOP"]
        )
    )
    assert instructions(text) == 4
    assert instructions(text.replace("BRA 0x20", "NOP").replace("BRA 0x10", "NOP")) == 7
