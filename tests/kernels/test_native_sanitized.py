"""fuzz.c under AddressSanitizer and UndefinedBehaviorSanitizer, and once more as an ARM program under qemu."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "graftlm" / "kernels" / "native"
SOURCES = [str(HERE / "fuzz.c"), *sorted(str(path) for path in NATIVE.glob("*.c"))]
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{NATIVE}"]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


QUICK = ["--param", "asan-instrumentation-with-call-threshold=0", "-fno-sanitize=object-size,null,alignment"]
"""Two thirds of the time to compile: bytes are checked by a call, and neither alignment nor what AddressSanitizer sees too."""


@pytest.mark.parametrize(
    ("rounds", "more"), [(20, QUICK), pytest.param(1000, [], marks=pytest.mark.prove)], ids=["20", "1000"]
)
def test_random_calls_touch_no_byte_beyond_their_buffers_and_are_defined_c(
    rounds: int, more: list[str], tmp_path: Path
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = str(tmp_path / "fuzz")
    sanitize = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *more]
    built = subprocess.run(
        [compiler, *FLAGS, *sanitize, *SOURCES, "-o", program, "-lm", "-pthread"], capture_output=True, text=True
    )
    if built.returncode != 0 and "sanitize" in built.stderr + built.stdout:
        pytest.skip(f"{compiler} has no sanitizers")
    assert built.returncode == 0, built.stderr
    assert f"{rounds} rounds" in run(program, str(rounds), "1")


def test_the_neon_kernels_give_the_same_answers_under_qemu(tmp_path: Path) -> None:
    compiler, machine = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")
    if compiler is None or machine is None:
        pytest.skip("no ARM compiler and qemu (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)")
    program = str(tmp_path / "fuzz")
    run(compiler, *FLAGS, "-O2", "-static", *SOURCES, "-o", program, "-lm", "-pthread")
    printed = run(machine, program, "30", "2")
    assert "NEON" in printed
    assert "30 rounds" in printed
