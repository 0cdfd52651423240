"""Cards by name, memory with units, and the machine at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.errors import ConfigError
from graftlm.planning import hardware
from graftlm.planning.hardware import GiB, card, cards, from_memory, local, memory_bytes


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("24GB", 24_000_000_000), ("24GiB", 24 * GiB), (" 0.5 tb ", 500_000_000_000), ("900mb", 900_000_000)],
)
def test_memory_is_read_with_its_unit(text: str, bytes_: int) -> None:
    assert memory_bytes(text) == bytes_


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("24", r"memory '24' has no unit; did you mean 24GB\?"),
        ("much", "'much' is not understood"),
        ("24XB", "'24XB' is not understood"),
        ("-4GB", "not understood"),
        ("24MB", "less than 100 MB"),
    ],
)
def test_memory_that_says_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        memory_bytes(text)


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_known_by_its_key_and_by_its_makers_name(name: str) -> None:
    assert card(name).key == "rtx-4090"


def test_an_unknown_card_is_answered_with_the_nearest_and_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"unknown card 'rtx-4091', did you mean 'rtx-4090'\?.*--memory 24GB"):
        card("rtx-4091")


def test_every_card_has_sensible_figures() -> None:
    for known in cards().values():
        assert 8 * GiB <= known.memory <= 300 * GiB, known
        assert 50e9 <= known.bandwidth <= 10e12, known
        assert 1e12 <= known.float32 <= known.rate <= 5e15, known
        assert 0.6 * known.memory < known.usable < known.memory, known
    assert {"rtx-3060", "rtx-4090", "a100-80gb", "h100", "b200", "mi300x", "apple-m3-max-64gb"} <= set(cards())


def test_cards_are_listed_from_the_smallest_memory_on() -> None:
    memories = [known.memory for known in cards().values()]
    assert memories == sorted(memories)


def test_a_card_of_which_only_the_memory_is_known_has_no_rate() -> None:
    known = from_memory("24GB")
    assert (known.kind, known.memory, known.rate, known.compute_dtype) == ("cuda", 24_000_000_000, 0.0, "bfloat16")


def test_products_run_in_bfloat16_only_where_a_card_has_it() -> None:
    assert card("h100").compute_dtype == "bfloat16"
    assert card("t4").compute_dtype == "float32"


def test_the_local_machine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_gpu", lambda device: None)
    found = local()
    assert found == card("cpu") == card("local")
    assert found.here
    assert 0 < found.usable < found.memory <= hardware.machine_memory()
    assert found.rate > 0


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "low").write_text("2000000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(hardware, "_group_limits", lambda: [tmp_path / "none", tmp_path / "missing", tmp_path / "low"])
    assert hardware.machine_memory() == 2_000_000_000


def test_a_processor_that_multiplies_bfloat16_trains_at_twice_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[float, str, str]] = []
    monkeypatch.setattr("graftlm.kernels.has_bf16_matmul", lambda: True)
    for flags in ("avx2 avx512f", "avx2 avx512f avx512_bf16"):
        monkeypatch.setattr(hardware, "_cpuinfo", lambda flags=flags: flags)
        found = card("cpu")
        rates.append((found.rate, found.matmul_dtype, found.compute_dtype))
    assert rates[1] == (2 * rates[0][0], "bfloat16 summed in float32", "float32")
    assert rates[0][1:] == ("float32", "float32")
    monkeypatch.setattr("graftlm.kernels.has_bf16_matmul", lambda: False)  # without the C kernels
    assert card("cpu").bf16_mixed == 0


@pytest.mark.parametrize(
    ("cpuinfo", "fused_dequant"),
    [
        ("vendor_id: AuthenticAMD\nflags: avx2 avx512f\n", True),
        ("vendor_id: AuthenticAMD\nflags: avx2\n", True),
        ("vendor_id: GenuineIntel\nflags: avx2 avx512f\n", False),
        ("vendor_id: AuthenticAMD\nflags: sse4_2\n", False),
        ("", False),
    ],
)
def test_only_our_own_product_reads_weights_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, fused_dequant: bool
) -> None:
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: cpuinfo)
    assert hardware.processor().fused_dequant == fused_dequant


def test_the_plan_and_the_kernels_agree_on_whose_product_runs_here() -> None:
    library = pytest.importorskip("graftlm.kernels.native.library").get()
    if not library.instructions:
        pytest.skip(f"no C kernels here: {library.reason}")
    assert hardware.processor().fused_dequant == library.has_fast_matmul
