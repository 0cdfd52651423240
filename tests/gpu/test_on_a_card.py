"""Loading, training and serving on the fake card: no operation between devices, and what a step may ask of a card.

A budget is what the step asks for today; who lowers a count lowers its budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from fake_trace import Budget, Trace
from fixtures import ROOT, Worker

# ---- loading ----


@pytest.mark.parametrize(("architecture", "precision"), [("qwen3", "float32"), ("mixtral", "nf4")])
def test_a_checkpoint_loads_on_a_card_without_accelerate(card: Worker, architecture: str, precision: str) -> None:
    found = card.ask("load", folder=str(tiny.folder(architecture)), precision=precision)
    assert {device for device, _ in found.values()} == {"cuda:1"}, found


def test_a_cards_memory_is_taken_in_segments_that_grow_unless_the_user_chose_otherwise(
    card: Worker, tmp_path: Path
) -> None:
    kernel = tmp_path / "osrelease"
    kernel.write_text("6.6.87.2-microsoft-standard-WSL2\n")
    found = card.ask("allocator", kernel_of_wsl=str(kernel))
    assert found.pop("nothing") == "expandable_segments:True"
    assert found.pop("chosen in Python") == "max_split_size_mb:100"
    assert found == dict.fromkeys(("initialized", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "WSL2", "cpu"), "")


# ---- training ----

METHODS: dict[str, tuple[dict[str, Any], Budget]] = {
    "full in float32": ({"method": "full", "base_precision": "float32"}, Budget(launches=(64, 49))),
    "full in bfloat16": ({"method": "full", "base_precision": "bfloat16"}, Budget(launches=(53, 38))),
    "steps in backward": (
        {"method": "full", "base_precision": "bfloat16", "optimizer_in_backward": True, "max_grad_norm": 0.0,
         "optimizer": "adamw-8bit"},
        Budget(launches=(89, 57), synchronisations=(0, 1)),
    ),
    "offloaded states": (
        {"method": "full", "base_precision": "bfloat16", "offload_optimizer": True}, Budget(launches=(71, 44))
    ),
    "lora": ({"method": "lora", "base_precision": "bfloat16"}, Budget(launches=(63, 27))),
    "lora with dropout": (
        {"method": "lora", "base_precision": "bfloat16", "lora_dropout": 0.1}, Budget(launches=(63, 28))
    ),
    "dora": ({"method": "lora", "base_precision": "bfloat16", "dora": True}, Budget(launches=(168, 27))),
    "lora on int8": ({"method": "lora", "base_precision": "int8"}, Budget(launches=(77, 24))),
    "qlora": ({"method": "qlora", "base_precision": "nf4"}, Budget(launches=(77, 24))),
    "qlora, checkpointed": (
        {"method": "qlora", "base_precision": "nf4", "activation_checkpointing": True}, Budget(launches=(108, 24))
    ),
    "lora of a mixture": (
        {"method": "lora", "base_precision": "bfloat16", "experts": 4}, Budget(launches=(132, 27))
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_step_stays_on_its_card_and_within_its_budget(card: Worker, method: str) -> None:
    options, budget = METHODS[method]
    one, two = (Trace.from_json(found) for found in card.ask("train", layers=[1, 2], **options))
    assert not two.astray
    budget.check(one, two)


def test_the_loss_of_a_large_vocabulary_takes_two_chunks_and_no_synchronisation_of_its_own(card: Worker) -> None:
    options, budget = METHODS["lora"]
    (found,) = card.ask("train", layers=[1], lengths=[1024, 1000], vocabulary=128_256, **options)
    trace = Trace.from_json(found)
    assert trace.synchronisations.total() <= budget.synchronisations[1] <= 2, trace
    assert trace.launches["triton in_place"] == 2, trace


def test_wider_layers_take_no_more_launches(card: Worker) -> None:
    options, _ = METHODS["full in float32"]
    narrow, _ = (Trace.from_json(found) for found in card.ask("train", layers=[1, 2], **options))
    (wide,) = (Trace.from_json(found) for found in card.ask("train", layers=[1], times=8, **options))
    assert wide.launches.total() <= narrow.launches.total() + 5, wide


def test_the_checks_of_the_first_steps_read_the_card_once_before_and_twice_after(card: Worker) -> None:
    for options in ({"method": "lora", "experts": 4}, {"method": "full"}):
        traces = card.traces("check_updates", layers=1, base_precision="bfloat16", **options)
        counts = {name: trace.synchronisations.total() for name, trace in traces.items()}
        assert counts.pop("end") <= 2, traces["end"]
        assert counts == {"start": 1, "first step": 0, "second step": 0, "third step": 0}
        assert not any(trace.copies for trace in traces.values())


def test_programs_run_on_their_tensors_card_in_a_thread_that_was_told_of_none(card: Worker) -> None:
    trace = card.trace("programs_of_a_thread")
    assert sum(count for name, count in trace.launches.items() if name.startswith("triton ")) >= 10
    assert not trace.astray


def test_the_page_states_the_budgets() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    between = page.split("<!-- launches:")[1].split("<!-- /launches")[0]
    stated = [line for line in between.splitlines() if line.startswith("| ")][1:]
    assert stated == [
        f"| {method} | {budget.of(32):,} | {budget.synchronisations[0] * 32 + budget.synchronisations[1]} |"
        for method, (_, budget) in METHODS.items()
    ]


# ---- serving ----

ONE = (0, 1)  # the host waits for a step's tokens, and for nothing else; a decoding step is a graph, whatever the depth
SERVED: dict[str, tuple[dict[str, Any], Budget, Budget]] = {  # what is served, its prefill and its decode
    "base in nf4": (
        {"precision": "nf4"},
        Budget(launches=(30, 19), synchronisations=ONE), Budget(launches=(0, 7), synchronisations=ONE),
    ),
    "two adapters": (
        {"adapters": 2},
        Budget(launches=(34, 26), synchronisations=ONE), Budget(launches=(0, 7), synchronisations=ONE),
    ),
    "sampled": (
        {"temperature": 0.7},
        Budget(launches=(23, 45), synchronisations=ONE), Budget(launches=(0, 33), synchronisations=ONE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("served", SERVED)
def test_prefill_and_decode_stay_on_their_card_and_within_their_budgets(card: Worker, served: str) -> None:
    options, prefill, decode = SERVED[served]
    one, two = card.ask("serve", layers=[1, 2], **options)
    for step, budget in (("prefill", prefill), ("decode", decode)):
        budget.check(Trace.from_json(one[step]), Trace.from_json(two[step]))


SAMPLED = {
    "a tail cut off": {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "bias": {"7": 2.0}},
    "greedy and drawn": {"temperature": 0.7, "min_p": 0.1, "every_other": True},
}


@pytest.mark.parametrize("kind", SAMPLED)
def test_the_host_waits_once_for_the_tokens_of_a_step_however_they_are_drawn(card: Worker, kind: str) -> None:
    trace = Trace.from_json(card.ask("serve", layers=[1], **SAMPLED[kind])[0]["decode"])
    assert trace.synchronisations.total() == 1, trace
    assert not trace.pageable, trace


@pytest.mark.parametrize(
    "options", [{"adapters": 2}, {"adapters": 0, "experts": 4}, {"adapters": 2, "precision": "nf4"}]
)
def test_what_a_captured_step_launches_depends_on_the_number_of_its_rows_alone(
    card: Worker, options: dict[str, Any]
) -> None:
    """Two steps of three and of four sequences: other tokens, lengths, blocks and adapters, the same launches, numbers, shapes
    and addresses. Nothing is copied from the host, and the host waits for nothing."""
    found = card.ask("region", layers=2, **options)
    first, second = found["runs"]
    assert first == second
    assert len(first) > 30
    for trace in map(Trace.from_json, found["traces"]):
        assert not trace.synchronisations, trace
        assert not trace.copies, trace


def test_of_the_adapters_tables_only_changed_slots_are_written_to_where_they_lay(card: Worker) -> None:
    written = card.ask("tables", layers=2)
    assert not written["none"]["launches"]
    places: list[list[str]] = []
    for name, slots in (("all", 3), ("one", 1)):
        trace = Trace.from_json(written[name]["trace"])
        launches = [launch for launch in written[name]["launches"] if not launch.startswith("_to_copy")]
        assert [launch.split(" ")[0] for launch in launches] == ["index_copy_"] * 4, launches  # A, B, ranks, scales
        assert all(f"(14, {slots})" in launch for launch in launches), launches  # seven linear layers each
        assert not trace.synchronisations
        assert not trace.pageable
        assert trace.copies.total() == 5  # and which entries they are
        places.append([launch.split("at ")[1].split("+")[0] for launch in launches])
    assert places[0] == places[1]


def test_a_mixture_whose_experts_are_taken_one_by_one_is_not_captured_and_the_reason_is_known(card: Worker) -> None:
    found = card.ask("region", layers=1, adapters=0, experts=4, precision="nf4")
    assert "are taken one by one" in found["reason"]


def test_attention_over_long_contexts_takes_bounded_memory_whatever_their_lengths(card: Worker) -> None:
    """Padded to the longest and with heads repeated, sixteen texts of 32k tokens would take 4 GiB for keys alone."""
    for lengths in ([32768] * 16, [32768] + [17] * 15, [100] * 256):
        trace = card.trace("attend", lengths=lengths)
        assert trace.peak_bytes < 300 << 20, lengths
        assert not trace.synchronisations
        assert not trace.copies


def test_a_long_prompt_over_a_cached_beginning_takes_bounded_memory(card: Worker) -> None:
    traces = card.traces("chunk", cached=30_000, length=1024)
    assert traces["plain"].peak_bytes < 400 << 20, traces["plain"]
    assert traces["soft cap"].peak_bytes < 900 << 20, traces["soft cap"]


@pytest.mark.parametrize(("width", "vocabulary", "sampling"), [
    (512, 8000, {}), (256, 128_000, {"temperature": 0.7, "repetition_penalty": 1.2}),
])  # fmt: skip
def test_the_memory_of_steps_and_of_captured_graphs_is_what_is_estimated(
    card: Worker, width: int, vocabulary: int, sampling: dict[str, float]
) -> None:
    model = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    found = card.ask("steps_memory", model=model, tokens=4096, sequences=128, prompt=32, **sampling)
    assert found["step"] == pytest.approx(found["planned_step"], rel=0.05), found
    captured = found["captured"]
    assert captured["most"] == pytest.approx(found["planned_graphs"], rel=0.05), found
    assert captured["kept"] < found["planned_graphs"], "graphs share their pool"


def test_a_server_on_a_card_takes_larger_batches_by_default_and_says_what_they_take(card: Worker) -> None:
    folder = str(tiny.folder("llama"))
    found = card.ask("build_server", folder=folder, memory=80 << 30)
    assert (found["limits"]["max_num_seqs"], found["limits"]["max_num_batched_tokens"]) == (128, 4096)
    # 2 MB are the states of 4,096 tokens, (3 x 44 + 4 x 28) values of two bytes each
    assert found["notes"][-1] == "steps      4,096 tokens at most, 2 MB, CUDA graphs 0 MB (estimated)"
    scarce = card.ask("build_server", folder=folder, memory=1 << 28, kv_cache_gb=1e-3)  # which adapters may take whole
    assert (scarce["limits"]["max_num_seqs"], scarce["limits"]["max_num_batched_tokens"]) == (128, 256)
    assert scarce["limits"] == scarce["scheduled"]
    chosen = card.ask("build_server", folder=folder, memory=1 << 28, max_num_seqs=5, max_num_batched_tokens=400)
    assert (chosen["limits"]["max_num_seqs"], chosen["limits"]["max_num_batched_tokens"]) == (5, 400)
    assert "400 tokens at most" in chosen["notes"][-1]
