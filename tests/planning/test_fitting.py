"""What fits where: the largest batch and length really are the largest, cards share what can be split, changes help."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graftlm.planning.activations import Workload
from graftlm.planning.fitting import (
    PlanCase,
    changes,
    fits,
    largest_batch,
    longest_example,
    smallest_card,
)
from graftlm.planning.hardware import card, cards
from graftlm.planning.method import METHODS
from graftlm.planning.models import find

LOAD = Workload(tokens=2048, target_tokens=1500, longest=512, examples=4)
BY_KEY = {m.key: m for m in METHODS}


def case(model: str = "llama-2-7b", on: str = "rtx-4090", load: Workload = LOAD) -> PlanCase:
    return PlanCase(shape=find(model).shape, targets=("all-linear",), rank=16, load=load, card=card(on), fused=True)


@pytest.mark.parametrize("key", ["lora", "lora-int8", "qlora"])
def test_one_document_more_than_the_largest_batch_does_not_fit(key: str) -> None:
    here, setting = case(on="a100-40gb"), BY_KEY[key]
    count = largest_batch(here, setting)

    def of(examples: int) -> bool:
        tokens = examples * LOAD.longest
        load = replace(
            LOAD, tokens=tokens, target_tokens=round(tokens * LOAD.target_tokens / LOAD.tokens), examples=examples
        )
        return fits(replace(here, load=load).of(setting), here.card)

    assert count >= 1
    assert of(count)
    assert not of(count + 1)


def test_one_token_more_than_the_longest_document_does_not_fit() -> None:
    here, setting = case("llama-3.1-8b"), BY_KEY["qlora"]
    length = longest_example(here, setting)

    def of(tokens: int) -> bool:
        load = Workload(tokens=tokens, target_tokens=round(tokens * LOAD.target_tokens / LOAD.tokens), longest=tokens)
        return fits(replace(here, load=load).of(setting), here.card)

    assert 512 < length < here.shape.max_positions
    assert of(length)
    assert not of(length + 1)


def test_no_document_is_longer_than_the_models_positions() -> None:
    here = case("gpt2", "b200")
    assert longest_example(here, BY_KEY["qlora"]) == here.shape.max_positions == 1024


def test_where_the_weights_alone_do_not_fit_there_is_no_batch_and_no_length() -> None:
    here = case("llama-2-70b")
    assert largest_batch(here, BY_KEY["lora"]) == longest_example(here, BY_KEY["lora"]) == 0


def test_the_smallest_card_is_the_first_that_fits() -> None:
    found = case().of(BY_KEY["lora"].checkpointed())
    smallest = smallest_card(found)
    assert smallest is not None
    assert fits(found, smallest)
    assert not any(fits(found, c) for c in cards().values() if c.kind == "cuda" and c.memory < smallest.memory)
    assert smallest_card(case("llama-3.1-405b").of(BY_KEY["full"])) is None


@pytest.mark.parametrize("key", ["full", "lora", "qlora"])
def test_changes_lead_down_until_it_fits(key: str) -> None:
    here = case("llama-2-13b", "rtx-3060")
    found = changes(here, BY_KEY[key])
    peaks = [here.of(BY_KEY[key]).peak, *(c.peak for c in found)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= here.card.usable
    assert all(peak > here.card.usable for peak in peaks[:-1])


def test_the_cheapest_change_comes_first() -> None:
    texts = [c.text for c in changes(case("llama-2-13b"), BY_KEY["lora"])]
    assert texts[0].startswith("--micro-batch-tokens 512")
    assert texts[1].startswith("--activation-checkpointing")
    assert texts[2].startswith("--base-precision int8")


def test_long_examples_are_told_to_keep_their_layers_inputs_on_the_host() -> None:
    """At 24k tokens these are gigabytes: less costly than fewer bits. A processor has no other memory to keep them in."""
    here = case(load=Workload(tokens=24_000, target_tokens=20_000, longest=24_000))
    found = changes(here, BY_KEY["lora"].checkpointed())
    assert found[0].text.startswith("--offload-activations")
    assert found[0].peak < here.of(BY_KEY["lora"].checkpointed()).peak - 4 * (1 << 30)
    on_processor = changes(replace(here, card=replace(here.card, kind="cpu")), BY_KEY["lora"].checkpointed())
    assert not any("--offload-activations" in change.text for change in on_processor)


def test_what_one_card_cannot_hold_at_all_is_said_to_take_several() -> None:
    here = case("llama-2-70b")
    last = changes(here, BY_KEY["qlora"])[-1]
    assert "2 x NVIDIA GeForce RTX 4090" in last.text  # with what was said before it: layers' inputs on the host, ...
    assert last.peak <= here.card.usable
