"""Cards by name, memory with units, and the machine at hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("driver_name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA A30", "a30"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GH200 144G HBM3e", "gh200-144gb"),
        ("NVIDIA B200", "b200"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla V100-PCIE-16GB", "v100"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_driver_s_name_means_its_own_card(driver_name: str, key: str) -> None:
    found = hardware.known_gpu(driver_name)
    assert found is not None
    assert found.key == key


@pytest.mark.parametrize(
    "driver_name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4070 SUPER", "NVIDIA A16",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L20", "NVIDIA GB200", "Apple M2",
    ],
)  # fmt: skip
def test_a_card_that_is_not_known_gets_no_other_card_s_rates(driver_name: str) -> None:
    assert hardware.known_gpu(driver_name) is None


def _torch_sees(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """PyTorch with these GPUs, each of 40 GiB, and none of the paths of a driver on Linux, as in WSL2."""
    torch = pytest.importorskip("torch")

    def properties(device: Any) -> SimpleNamespace:
        return SimpleNamespace(name=names[torch.device(device).index or 0], total_memory=40 * GiB)

    monkeypatch.setattr(hardware, "_GPU_PATHS", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def test_where_a_gpu_is_asked_for_pytorch_decides_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    _torch_sees(monkeypatch, ["NVIDIA GeForce RTX 4090", "NVIDIA L40S"])
    first, second = local("cuda"), local("cuda:1")
    assert (first.key, first.kind, first.memory, first.here) == ("rtx-4090", "cuda", 40 * GiB, True)
    assert (second.key, second.bfloat16) == ("l40s", card("l40s").bfloat16)
    assert local("cpu").kind == "cpu"
    _torch_sees(monkeypatch, [])
    assert local("cuda").kind == "cpu"


def test_the_gpu_of_wsl2_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "/dev/dxg" in hardware._GPU_PATHS  # pyright: ignore[reportPrivateUsage]
    _torch_sees(monkeypatch, ["NVIDIA GeForce RTX 4090"])
    assert local().kind == "cpu", "without a sign of a GPU, PyTorch is not imported to look for one"
    monkeypatch.setattr(hardware, "_GPU_PATHS", (str(tmp_path),))
    assert local().key == "rtx-4090"


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "low").write_text("2000000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(hardware, "_group_limits", lambda: [tmp_path / "none", tmp_path / "missing", tmp_path / "low"])
    assert hardware.machine_memory() == 2_000_000_000


def test_free_memory_is_what_a_control_group_has_left_where_that_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's limit, and not its node's memory: a cache planned for the node would end the pod."""
    pod, old, open_end = tmp_path / "pod", tmp_path / "old", tmp_path / "open"
    for place, files in (
        (pod, {"memory.max": "3000000", "memory.current": "1200000", "memory.stat": "anon 7\ninactive_file 200000\n"}),
        (old, {"memory.limit_in_bytes": "5000000", "memory.usage_in_bytes": "4500000",
               "memory.stat": "inactive_file 1\ntotal_inactive_file 300000\n"}),
        (open_end, {"memory.max": "max", "memory.current": "9", "memory.stat": ""}),
    ):  # fmt: skip
        place.mkdir()
        for name, text in files.items():
            (place / name).write_text(text + "\n")
    monkeypatch.setattr(hardware, "_available_memory", lambda: 2_500_000)
    limits = [open_end / "memory.max", pod / "memory.max"]
    monkeypatch.setattr(hardware, "_group_limits", lambda: limits)
    assert hardware.free_machine_memory() == 2_000_000
    limits.append(old / "memory.limit_in_bytes")
    assert hardware.free_machine_memory() == 800_000
    (pod / "memory.current").write_text("3500000")  # above its limit for a moment
    assert hardware.free_machine_memory() == 0
    limits.clear()
    assert hardware.free_machine_memory() == 2_500_000
    monkeypatch.undo()
    assert 0 < hardware.free_machine_memory() <= hardware.machine_memory()


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
