"""What Triton's compiler makes of our programs for NVIDIA GPUs, which takes no GPU; run by `test_triton_compiled.py`.

    python gpu_code.py 80:nf4_dequantize 90:expand ...      JSON: for each of these, what `Code` has

A specialisation is a program with the types and constants of a launch; sizes and addresses are multiples of 16, as nearly all
are. It is measured in what NVIDIA's disassembler shows: registers and stack of a thread, and instructions.
"""

# pyright: basic
# (Triton's compiler, and what `triton.jit` makes of a function, have no Python types.)

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

from graftlm.kernels.triton.device import STAGES


@dataclass(frozen=True)
class Specialisation:
    file: str  # of programs/
    program: str
    types: dict[str, Any]
    constants: dict[str, Any]
    values: int = 0  # weight values a program decodes, in one turn of its loop if it has one
    fuse: bool = False
    warps: int = 4


@dataclass(frozen=True)
class Code:
    registers: int
    stack: int  # bytes of a thread in memory: where registers do not suffice, they are spilled there
    shared: int  # bytes of a program
    instructions: int  # of the largest loop, or of all where there is none
    of_a_value: float  # instructions for each weight value; 0 where `values` is
    ptx: str = field(repr=False)


def specialisations() -> dict[str, Specialisation]:
    from graftlm.kernels.triton import blocks

    stored = {"stored": ("*i32", "*u8", "*fp32", "*fp32", "*fp32", "*fp32"), "start": "i64"}
    found = {
        "int8_dequantize": Specialisation(
            "weights", "int8_dequantize", {"values": "*i8", "scale": "*fp32", "out": "*bf16", "inner": "i32"},
            {"TILE": 2048}, values=2048,
        ),
        "dropped": Specialisation(
            "dropout", "dropped",
            {"x": "*bf16", "keys": "*i32", "out": "*bf16", "scale": "fp32"}
            | dict.fromkeys(["row_stride", "features", "module_key", "threshold"], "i32"), {"TILE": 1024},
        ),
    }  # fmt: skip
    for name, out in (("nf4_dequantize", "*bf16"), ("nf4_dequantize float32", "*fp32")):
        types = {**stored, "out": out, "count": "i64", "words": "i64"}
        found[name] = Specialisation("weights", "nf4_dequantize", types, {"BLOCKS": 64}, values=4096)
    found |= _products(stored) | _routed() | _steps() | _fused() | _paged() | _dropout_products()
    for kind, number in blocks.KINDS.items():
        types = {"stored": "*i16", "out": "*bf16", "count": "i64"}
        constants = {"KIND": number, "TILE": blocks.TILE}
        found[f"{kind}_dequantize"] = Specialisation("blocks", "dequantize", types, constants, values=blocks.TILE)
    of_loss = {"stride": "i64", "labels": "*i64", "weights": "*fp32", "losses": "*fp32", "columns": "i32"}
    for name, logits, gradient in (("cross_entropy", "*bf16", True), ("cross_entropy float32", "*fp32", False)):
        found[name] = Specialisation(
            "cross_entropy",
            "in_place",
            of_loss | {"logits": logits},
            {"GRADIENT": gradient, "TILE": 8192},
            fuse=True,
            warps=8,
        )
    return found


def _products(stored: dict[str, Any]) -> dict[str, Specialisation]:
    from graftlm.kernels.stored import GgufBlocks, Nf4
    from graftlm.kernels.triton.blocks import KINDS
    from graftlm.kernels.triton.product import FEW_ROWS, TILES, WARPS
    from graftlm.kernels.triton.programs import blocks, weights

    found: dict[str, Specialisation] = {}
    sizes = dict.fromkeys(["rows", "summed", "made", "inner", "row_stride"], "i32")
    for (form, size), tile in TILES.items():
        kinds = {"nf4": 0} if form is Nf4 else KINDS
        assert form in (Nf4, GgufBlocks)
        types = sizes | (stored if form is Nf4 else {"stored": "*i16", "start": "i64"})
        types |= dict.fromkeys(["x", "y"], "*bf16" if size == 2 else "*fp32")
        for kind, number in kinds.items():
            for transposed in (False, True):
                made, summed = tile[transposed]
                constants = {
                    "DECODE": weights.nf4_tile if form is Nf4 else blocks.tile, "KIND": number, "TRANSPOSED": transposed,
                    "ROWS": FEW_ROWS, "MADE": made, "SUMMED": summed, "UPCAST": False,
                }  # fmt: skip
                name = f"{kind}_product{' float32' if size == 4 else ''}{' back' if transposed else ''}"
                found[name] = Specialisation(
                    "product", "few_rows", types, constants, values=made * summed, warps=WARPS.get((form, size), 4)
                )
    return found


def _paged() -> dict[str, Specialisation]:
    from graftlm.kernels.triton.paged import positions_of

    types = dict.fromkeys(["rows", "visible", "table"], "*i64") | {"sums": "*fp32", "scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(["q_row", "q_head", "table_stride", "heads", "width", "value_width", "window"], "i32")
    found: dict[str, Specialisation] = {}
    for name, kind, width, windowed in (
        ("", "*bf16", 128, False),
        (" wide", "*bf16", 256, True),
        (" float32", "*fp32", 128, True),
    ):
        size = 2 if kind == "*bf16" else 4
        shared = {"GROUP": 4, "GROUP_TILE": 16, "WIDTH": width, "VALUE_WIDTH": width, "BLOCK": 16, "UPCAST": False}
        shared |= {"POSITIONS": positions_of(width, size), "WINDOWED": windowed, "CAPPED": windowed}
        for splits in (1, 16):
            given = types | dict.fromkeys(["q", "keys", "values"], kind) | {"out": kind if splits == 1 else "*fp32"}
            found[f"attend{name}{' split' if splits > 1 else ''}"] = Specialisation(
                "paged", "attend", given, {**shared, "SPLITS": splits}, fuse=True
            )
    types = {"parts": "*fp32", "sums": "*fp32", "rows": "*i64", "out": "*bf16", "heads": "i32", "value_width": "i32"}
    found["combine"] = Specialisation("paged", "combine", types, {"VALUE_WIDTH": 256, "SPLITS": 16}, fuse=True)
    return found


def _dropout_products() -> dict[str, Specialisation]:
    from graftlm.kernels.triton.dropout import TOKENS, WIDE

    found: dict[str, Specialisation] = {}
    for kind in ("*bf16", "*fp32"):
        types = dict.fromkeys(["x", "A", "h", "dh", "dx"], kind) | {"dA": "*fp32", "scale": "fp32", "factor": "fp32"}
        types |= dict.fromkeys(["keys", "module_keys", "offsets"], "*i32")
        names = ["x_stride", "h_stride", "dh_stride", "dx_stride", "tokens", "wide", "modules", "threshold"]
        types |= dict.fromkeys(names, "i32")
        for rank in (16, 128):
            summed = 16 if kind == "*fp32" else 32 if rank > 64 else 64
            shared, wide = {"R": rank, "SUMMED": summed, "UPCAST": False}, WIDE[4 if kind == "*fp32" else 2]
            rest = f"{rank}{' float32' if kind == '*fp32' else ''}"
            for program, constants in (
                ("shrink", {"TOKENS": TOKENS}), ("factor_gradient", {"WIDE": wide}),
                ("expand", {"TOKENS": TOKENS, "WIDE": wide, "SUMMED": min(rank, summed)}),
            ):  # fmt: skip
                found[f"dropped {program} {rest}"] = Specialisation(
                    "dropout", program, types, {**shared, **constants}, fuse=True
                )
    return found


def _routed() -> dict[str, Specialisation]:
    import torch

    from graftlm.kernels.triton.routed import WIDE, expand_summed, shrink_summed

    routes = {"tiles": "*i32", "pointers": "*i64", "ranks": "*i32", "scales": "*fp32", "wide": "i32", "h_stride": "i32"}
    found: dict[str, Specialisation] = {}
    for kind, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
        for rank in (16, 128):
            for rank_first in (True, False):
                shared = {"RANK_FIRST": rank_first, "SCALED": True, "TOKENS": 64, "R": rank, "UPCAST": False}
                rest = f"{rank}{'' if rank_first else ' transposed'}{' float32' if dtype == torch.float32 else ''}"
                found[f"shrink {rest}"] = Specialisation(
                    "routed", "shrink", routes | {"h": kind, "x": kind, "x_stride": "i32"},
                    {**shared, "SUMMED": shrink_summed(dtype, rank)}, fuse=True,
                )  # fmt: skip
                found[f"expand {rest}"] = Specialisation(
                    "routed", "expand", routes | {"h": kind, "y": kind, "y_stride": "i32"},
                    {**shared, "SUMMED": expand_summed(dtype, rank), "WIDE": WIDE}, fuse=True,
                )  # fmt: skip
    return found


def _steps() -> dict[str, Specialisation]:
    types = dict.fromkeys(
        ["mean_scale", "square_scale", "mean_code", "square_code", "mean_parts", "square_parts", "gate"], "*fp32"
    )
    types |= dict.fromkeys(["factor", "beta1", "rest1", "beta2", "rest2", "epsilon", "decay", "rate", "fix"], "fp32")
    types |= {"gradient": "*bf16", "count": "i64", "start": "i32", "turn": "i32"}
    small = {"parameter": "*i16", "mean": "*u8", "square": "*u8"}
    large = dict.fromkeys(["parameter", "mean", "square"], "*fp32")
    constants = {"BLOCKS": 4, "ZERO": 127, "OTHER_BITS": 0x2545F491}
    eight, plain = {"ROUNDED": True, "EIGHT": True, "GATED": True}, {"ROUNDED": False, "EIGHT": False, "GATED": False}
    many = types | {"table": "*i64", "numbers": "*fp32"}
    return {
        "adamw 8 bits": Specialisation("adamw", "step", types | small, {**constants, **eight}),
        "adamw": Specialisation("adamw", "step", types | large, {**constants, **plain}),
        "adamw of many": Specialisation("adamw", "steps", many, {"TILE": 2048}),
    }


def _fused() -> dict[str, Specialisation]:
    norm = dict.fromkeys(["x", "weight", "y", "dy", "dx"], "*bf16") | dict.fromkeys(["r", "dw"], "*fp32")
    norm |= dict.fromkeys(["x_stride", "dy_stride", "rows", "features", "step"], "i32")
    norm |= {"epsilon": "fp32", "offset": "fp32"}
    gate = dict.fromkeys(["gate", "up", "y", "dy", "dgate", "dup"], "*bf16") | {"features": "i32"}
    gate |= dict.fromkeys(["gate_stride", "up_stride", "dy_stride", "out_stride"], "i32")
    rotary = dict.fromkeys(["q", "k", "yq", "yk", "cos", "sin"], "*bf16")
    rotary |= dict.fromkeys(["q_token", "q_head", "k_token", "k_head", "q_heads", "k_heads"], "i32")
    rotary |= dict.fromkeys(["width", "period", "turned"], "i32")
    wide, narrow = {"ROWS": 1, "TILE": 8192}, {"ROWS": 16, "TILE": 128}
    many = {
        "rms_norm": ("rms_norm", norm, wide, 8),
        "rms_norm back": ("rms_norm_backward", norm, {"WEIGHT": True, **wide}, 8),
        "rms_norm of heads back": ("rms_norm_backward", norm, {"WEIGHT": False, **narrow}, 4),
        "gated": ("gated", gate, {"GELU": True, "TILE": 1024}, 4),
        "gated back": ("gated_backward", gate, {"GELU": True, "TILE": 1024}, 4),
        "rotary": ("rotary", rotary, {"BACK": True, "HEADS": 8, "HALF": 64, "REST": 32}, 4),
    }
    return {
        name: Specialisation("fused", program, types, constants, fuse=True, warps=warps)
        for name, (program, types, constants, warps) in many.items()
    }


ODD = {"rows", "module_key", "modules", "threshold", "tokens", "turn", "window"}  # numbers that are no multiple of 16


def compiled(capability: int, of: Specialisation) -> Code:
    """Down to machine code for a compute capability, 80 for 8.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graftlm.kernels.triton.device import programs

    kernel = getattr(programs(of.file), of.program)
    names = kernel.arg_names
    types = {name: of.types.get(name, "constexpr") for name in names}
    by_16: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        odd = name in ODD or (name == "start" and of.file == "adamw")
        if isinstance(types[name], tuple):
            by_16 |= {(i, j): [["tt.divisibility", 16]] for j in range(len(types[name]))}
        elif not odd and (types[name][0] == "*" or types[name] in ("i32", "i64")):
            by_16[i,] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in of.constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=by_16)
    options = {"enable_fp_fusion": of.fuse, "num_stages": STAGES, "num_warps": of.warps}
    made: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = _disassembled(made.asm["cubin"])
    code = instructions(text)
    return Code(
        registers=int(re.findall(r"REG:(\d+)", text)[0]),
        stack=int(re.findall(r"STACK:(\d+)", text)[0]),
        shared=made.metadata.shared,
        instructions=code,
        of_a_value=round(code * 32 * of.warps / of.values, 1) if of.values else 0.0,
        ptx=str(made.asm["ptx"]),
    )


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def instructions(text: str) -> int:
    """Instructions of the largest loop of a disassembled program, of the whole program where it has none."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    code = [(int(at, 16), what) for at, what in lines if not what.startswith("NOP")]
    loops = [0]
    for at, what in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", what)
        if jump and int(jump[1], 16) < at:
            loops.append(sum(int(jump[1], 16) <= place <= at for place, _ in code))
    return max(loops) or len(code)


if __name__ == "__main__":
    known = specialisations()
    print(
        json.dumps(
            {
                asked: asdict(compiled(int(asked[: asked.index(":")]), known[asked[asked.index(":") + 1 :]]))
                for asked in sys.argv[1:]
            }
        )
    )
