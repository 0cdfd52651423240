"""The C kernels against the reference: bits for quantize and dequantize, 1e-5 for products; and life without them."""

import random
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graftlm.kernels as kernels
from graftlm.kernels import native, reference
from graftlm.kernels.native import library, stored_matmul, weights
from graftlm.kernels.stored import Int8, Nf4, Quantized

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the result's norm

needs_library = pytest.mark.skipif(
    "without" in native.status(), reason="the C kernels are not compiled (pip install -e . with a C compiler)"
)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding; for float32 to 1e-5 of the norm."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).norm() <= TOLERANCE[a.dtype] * b.norm() + 1e-30)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(3.0).to(dtype)


def odd_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element after an aligned address."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a view with gaps."""
    wide = tensor.new_zeros(tensor.shape[0], tensor.shape[1] * 2)
    wide[:, ::2] = tensor
    return wide[:, ::2]


def stored(weight: torch.Tensor, form: str) -> Quantized:
    return reference.nf4_quantize(weight) if form == "nf4" else reference.int8_quantize(weight)


@needs_library
def test_nf4_quantize_equals_the_reference_bit_for_bit(instructions: str) -> None:
    pick = random.Random(4)
    for round_ in range(40):
        shape = (pick.randint(1, 40), pick.choice([1, 63, 64, 65, 130, pick.randint(1, 1500)]))
        weight = randn(*shape, dtype=pick.choice(FLOATS), seed=round_)
        if round_ % 5 == 0:
            weight.view(-1)[pick.randrange(weight.numel())] = pick.choice([float("inf"), float("nan"), 0.0])
        if round_ % 3 == 0:
            weight = pick.choice([odd_view, spread])(weight)
        ours, truth = native.nf4_quantize(weight), reference.nf4_quantize(weight)
        assert ours.shape == truth.shape
        for name, tensor in ours.tensors().items():
            assert same(tensor, truth.tensors()[name]), (name, shape, weight.dtype)


@needs_library
def test_nf4_quantize_breaks_ties_as_the_reference_does(instructions: str) -> None:
    ties = torch.cat([reference.NF4_MIDPOINTS, reference.NF4_CODE, torch.zeros(33)])  # (64,), absmax 1
    for nudge in (1.0, 1.0 - 2**-24, 1.0 + 2**-23):
        weight = torch.cat([ties * nudge, -ties * nudge, torch.zeros(64), ties * 2.0**-130, ties[:31] * nudge])
        assert same(native.nf4_quantize(weight).packed, reference.nf4_quantize(weight).packed)


@needs_library
@pytest.mark.parametrize("value", [0.0, 1e-39, -3e-38])
def test_nf4_quantize_gives_a_last_part_block_of_almost_nothing_the_least_absmax(value: float) -> None:
    weight = torch.full((64 + 6,), value)
    for name, tensor in native.nf4_quantize(weight).tensors().items():
        assert same(tensor, reference.nf4_quantize(weight).tensors()[name]), name


@needs_library
def test_dequantize_equals_the_reference_bit_for_bit(instructions: str) -> None:
    pick = random.Random(5)
    for round_ in range(40):
        shape = (pick.randint(2, 40), pick.choice([1, 63, 64, 65, 130, pick.randint(1, 1500)]))
        weight = reference.nf4_quantize(randn(*shape, seed=round_))
        first = pick.randrange(shape[0])
        part = weight.narrow(first, pick.randint(1, shape[0] - first))
        small = reference.int8_quantize(randn(*shape, seed=round_))
        for dtype in FLOATS:
            assert same(native.nf4_dequantize(weight, dtype), reference.nf4_dequantize(weight, dtype)), shape
            assert same(native.nf4_dequantize(part, dtype), reference.nf4_dequantize(part, dtype)), (shape, part.start)
            assert same(native.int8_dequantize(small, dtype), reference.int8_dequantize(small, dtype)), shape


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_result_too_large_for_the_caches_is_the_same(instructions: str, dtype: torch.dtype) -> None:
    weight = reference.nf4_quantize(randn(1027, 9001))  # streamed past the caches; rows begin at any alignment
    small = reference.int8_quantize(randn(1027, 9001))
    assert same(native.nf4_dequantize(weight, dtype), reference.nf4_dequantize(weight, dtype))
    part = weight.narrow(1, 1025)
    assert same(native.nf4_dequantize(part, dtype), reference.nf4_dequantize(part, dtype))
    assert same(native.int8_dequantize(small, dtype), reference.int8_dequantize(small, dtype))
    given = torch.empty(1027, 9001, dtype=dtype)
    for out in (given, odd_view(given)):
        assert kernels.nf4_dequantize(weight, out=out) is out
        assert same(out, reference.nf4_dequantize(weight, dtype))
        assert same(kernels.int8_dequantize(small, out=out), reference.int8_dequantize(small, dtype))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.nf4_dequantize(weight, out=given.T)


@needs_library
def test_dequantize_rounds_values_at_the_edges_of_each_type_as_pytorch_does(instructions: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(32)  # (8192,): 256 blocks
    for scale in (1e-40, 1e-7, 3e-6, 1.0, 9e4, 7e4, 3e38, float("inf"), float("nan")):
        weight = Nf4(codes, codes[:256], torch.tensor([scale]), torch.tensor(0.0), (256, 64))
        for dtype in FLOATS:
            assert same(native.nf4_dequantize(weight, dtype), reference.nf4_dequantize(weight, dtype)), (scale, dtype)


@needs_library
@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmuls_equal_the_reference(form: str, dtype: torch.dtype, instructions: str) -> None:
    pick = random.Random(6)
    for round_ in range(24):
        outer, inner = pick.randint(1, 90), pick.choice([1, 64, 192, pick.randint(1, 700)])
        rows = pick.choice([1, 2, 3, 7, 8, 9, native.FEW_ROWS, native.FEW_ROWS + 1, 40])
        weight = stored(randn(outer, inner, seed=round_), form)
        if outer > 3:
            weight = weight.narrow(2, outer - 3)
        x, dy = randn(rows, inner, dtype=dtype, seed=99), randn(rows, weight.shape[0], dtype=dtype, seed=98)
        if round_ % 3 == 0:
            x, dy = odd_view(x), odd_view(dy)
        elif round_ % 3 == 1:
            x, dy = spread(x), spread(dy)
        dense = reference.dequantize(weight)
        assert close(native.matmul(x, weight), (x.float() @ dense.T).to(dtype)), (rows, outer, inner)
        assert close(native.matmul_t(dy, weight), (dy.float() @ dense).to(dtype)), (rows, outer, inner)


@needs_library
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_matmul_in_panels_equals_the_reference(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_matmul, "PANEL_BYTES", 70 * 4 * 64)
    weight = stored(randn(70, 331), form)
    x, dy = randn(2, 21, 331), randn(2, 21, 70)
    assert close(native.matmul(x, weight), reference.matmul(x, weight))
    assert close(native.matmul_t(dy, weight), reference.matmul_t(dy, weight))


@needs_library
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_matmuls_keep_leading_dimensions_and_accept_none(form: str) -> None:
    weight = stored(randn(5, 37), form)
    for lead in ((), (3,), (2, 3), (0,), (2, 0)):
        assert kernels.matmul(torch.ones(*lead, 37), weight).shape == (*lead, 5)
        assert kernels.matmul_t(torch.ones(*lead, 5), weight).shape == (*lead, 37)


@needs_library
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    dense, x = randn(150, 1003), randn(3, 1003)
    before = torch.get_num_threads()
    results: list[list[torch.Tensor]] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weight = native.nf4_quantize(dense)
            results.append([weight.packed, native.nf4_dequantize(weight), native.matmul(x, weight)])
    finally:
        torch.set_num_threads(before)
    assert all(same(a, b) for other in results[1:] for a, b in zip(results[0], other))


@needs_library
def test_kernels_run_on_as_many_threads_as_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Recording:
        """The library, noting the number of threads: the last argument of every operation here."""

        def __getattr__(self, name: str) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                asked.append(int(arguments[-1]))  # type: ignore[call-overload]
                return getattr(library.calls(), name)(*arguments)

            return call

    for module in (weights, stored_matmul):
        monkeypatch.setattr(module, "calls", Recording)
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            torch.set_num_threads(threads)
            weight = native.nf4_quantize(randn(40, 100))
            native.nf4_dequantize(weight)
            stored_matmul.matmul(randn(2, 100), weight)
            stored_matmul.matmul_t(randn(2, 40), weight)
            stored_matmul.matmul(randn(2, 100), stored(randn(40, 100), "int8"))
            assert len(asked) == 6
            assert set(asked) == {threads}
            asked.clear()
    finally:
        torch.set_num_threads(before)


@needs_library
def test_a_tensor_without_values_here_is_refused_before_c_reads_it() -> None:
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)  # as a parameter that is gathered for a pass alone has it between passes
    for nothing in (freed, torch.ones(3, device="meta")):
        with pytest.raises(ValueError, match=r"a Tensor of shape \(3,\) on .* has no values here that C could read"):
            library.address(nothing)
    assert library.address(torch.ones(3)[1:]) > 0
    library.address(torch.empty(0))  # nothing is read


def test_the_interpreter_lock_is_free_while_a_kernel_runs() -> None:
    values = randn(1 << 23)
    native.choose("scalar C")
    try:
        worker = threading.Thread(target=native.nf4_quantize, args=(values,))
        worker.start()
        turns = 0
        while worker.is_alive():
            time.sleep(0.001)
            turns += 1
    finally:
        native.choose(None)
    assert turns >= 5, "with the lock held this thread would not have run before the kernel's end"


@needs_library
def test_the_widest_instruction_set_is_chosen_when_the_library_is_loaded() -> None:
    sets = native.instruction_sets()
    assert sets[0] == "scalar C"
    assert library.Library().instructions == sets[-1]
    assert native.status() == f"C kernels ({sets[-1]})"


@needs_library
def test_python_threads_may_call_at_once() -> None:
    weights = [reference.nf4_quantize(randn(60, 700, seed=seed)) for seed in range(4)]
    x = randn(3, 700)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not close(native.matmul(x, weights[index]), reference.matmul(x, weights[index])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_library
def test_threads_started_for_the_call_do_the_work_where_no_openmp_can_be_borrowed(tmp_path: Path) -> None:
    calls = library.Library().calls
    assert calls is not None
    weight = reference.nf4_quantize(randn(300, 1000))
    out = torch.empty(300, 1000)
    try:
        calls.graft_openmp(None)
        pointers = [tensor.data_ptr() for tensor in weight.tensors().values()]
        calls.graft_nf4_dequantize(*pointers, 0, 300, 1000, 1000, out.data_ptr(), 0, 0, 3)
    finally:
        library.Library()  # hands the team over again
    assert same(out, reference.nf4_dequantize(weight))


@needs_library
def test_every_operation_passes_its_own_check() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for operation in native.self_check.operations:
            if operation != "gemm" or library.get().has_fast_matmul:
                assert native.usable(operation, torch.zeros(1)), operation


def test_without_the_library_the_reference_does_the_work_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(native, "self_check", native.new_self_check())
    weight = randn(5, 77)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ours = kernels.nf4_quantize(weight)
        dense = kernels.nf4_dequantize(ours)
        product = kernels.matmul(randn(3, 77), ours)
    assert ["not compiled" in str(warning.message) for warning in warned] == [True]
    assert "without C kernels" in kernels.backend()
    assert same(dense, reference.nf4_dequantize(ours))
    assert close(product, reference.matmul(randn(3, 77), ours))


@needs_library
def test_an_operation_with_a_wrong_answer_is_left_aside_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "self_check", native.new_self_check())
    monkeypatch.setattr(weights, "nf4_dequantize", lambda weight, dtype=torch.float32: torch.zeros(weight.shape))
    weight = reference.nf4_quantize(randn(5, 77))
    with pytest.warns(RuntimeWarning, match="nf4_dequantize does not give the reference's answer"):
        assert same(kernels.nf4_dequantize(weight), reference.nf4_dequantize(weight))
    assert native.usable("nf4_quantize", torch.zeros(1))


def test_other_devices_and_types_go_to_the_reference() -> None:
    assert not native.usable("matmul", torch.zeros(2, device="meta"))
    assert not native.usable("matmul", torch.zeros(2, dtype=torch.float64))
    weight = reference.nf4_quantize(randn(5, 77))
    assert kernels.nf4_dequantize(weight, torch.float64).dtype == torch.float64


@needs_library
def test_a_contiguous_copy_is_made_of_a_transposed_int8_weight() -> None:
    weight = reference.int8_quantize(randn(6, 9))
    transposed = Int8(weight.values.T, torch.ones(9))
    assert close(native.matmul(randn(2, 6), transposed), reference.matmul(randn(2, 6), transposed))
    assert close(native.matmul_t(randn(2, 9), transposed), reference.matmul_t(randn(2, 9), transposed))


@needs_library
def test_what_holds_pytorch_to_narrower_instructions_holds_the_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.instruction_sets()[-1] != "AVX-512":
        pytest.skip("this processor has nothing wider than AVX2")
    try:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        held = library.Library()
        assert held.instructions == "AVX2"
        assert not held.has_bf16_matmul
    finally:  # the instruction set is the process's
        monkeypatch.delenv("ATEN_CPU_CAPABILITY")
        assert library.Library().instructions == "AVX-512"
