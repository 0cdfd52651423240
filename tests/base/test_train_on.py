"""What `train_on` makes of a row: of everything, all tokens but the first and those of messages with weight 0 are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_run
import yaml
from test_chat import CHATML, bytelevel, trained_text
from trl_templates import CONVERSATIONS, NAMES, encoder_of, mark

from graftlm.base.chat import Encoded, Encoder
from graftlm.base.template import Marked
from graftlm.commands.check import check_data
from graftlm.commands.plan import plan
from graftlm.commands.train import train
from graftlm.config import CheckConfig, PlanConfig, TrainConfig
from graftlm.data.dataset import load
from graftlm.data.sources import Source
from graftlm.training.view import View

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "the fox"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "blue dog"},
    {"role": "user", "content": "over: the"},
    {"role": "assistant", "content": "lazy fox"},
]


def everything(**more: Any) -> Encoder:
    return Encoder(bytelevel(template=CHATML, **more), train_on="everything")


def trl_labels(encoder: Encoder, rows: list[dict[str, Any]]) -> list[list[int]]:
    """What TRL's trainer makes of rows when it is told to count every token."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    asked: dict[str, Any] = {"assistant_only_loss": False, "completion_only_loss": False, "max_length": None}
    trainer: Any = SFTTrainer(
        model=tiny.random_model("llama", vocab_size=512),
        args=SFTConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **asked),
        train_dataset=Dataset.from_list(rows), processing_class=encoder.tokenizer,
    )  # fmt: skip
    return [list(row["labels"]) for row in trainer.train_dataset]


def labels(encoded: Encoded) -> list[int]:
    return np.where(encoded.loss_mask, encoded.ids, -100).tolist()


def test_everything_is_what_trl_counts_with_assistant_only_loss_off() -> None:
    encoder = everything()
    chats = [TURNS[:3], TURNS, TURNS[1:3]]
    found = trl_labels(encoder, [{"messages": chat} for chat in chats])
    for chat, theirs in zip(chats, found, strict=True):
        ours = labels(encoder.chat(chat))
        assert ours[0] == -100  # nothing comes before it; TRL's loss leaves it out too, by shifting
        assert ours[1:] == theirs[1:]


def test_everything_is_what_trl_counts_with_completion_only_loss_off() -> None:
    encoder = everything()
    # A token over the border is split here, so that training sees the prompt as generation gives it; these have none.
    pairs = [("question: why?", " blue"), ("the lazy", " dog over: the fox")]
    found = trl_labels(encoder, [{"prompt": p, "completion": c} for p, c in pairs])
    lists = [{"prompt": TURNS[:4], "completion": TURNS[4:]}]
    found += trl_labels(encoder, lists)
    ours = [labels(encoder.completion(*pair)) for pair in pairs]
    ours.append(labels(encoder.encode([encoder.mark_chat(TURNS, prompt=4)])[0]))
    assert [row[1:] for row in ours] == [row[1:] for row in found]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_of_a_template_is_the_same_and_all_of_it_is_trained(name: str) -> None:
    for title, conversation in CONVERSATIONS.items():
        answers = mark(name, conversation)
        whole = mark(name, conversation, train_on="everything")
        if isinstance(answers, str):
            assert whole == answers, title
            continue
        assert isinstance(whole, Marked), title
        assert (whole.text, whole.eos) == (answers.text, answers.eos), title
        assert whole.spans[0][0] == 0
        assert [end for _, end in whole.spans] == [*(start for start, _ in whole.spans[1:]), len(whole.text)], title
        one, other = encoder_of(name).encode([answers, whole])
        assert one.ids.tolist() == other.ids.tolist(), title
        assert other.loss_mask[1:].all(), title


@pytest.mark.parametrize("make", [bytelevel, lambda: bytelevel(trim=True), lambda: bytelevel(bos=True)])
def test_the_ids_of_a_completion_do_not_depend_on_what_is_trained(make: Any) -> None:
    for pair in (("the quick ", "brown"), ("", "fox"), ("why?\n", "\nblue"), ("the qui", "ck brown")):
        one, other = (Encoder(make(), train_on=how).completion(*pair) for how in ("all-assistant", "everything"))
        assert one.ids.tolist() == other.ids.tolist()
        # A start token that the tokenizer puts in front is the first one; what follows it is text.
        assert other.loss_mask.tolist() == [False] + [True] * (len(other.ids) - 1)


def test_a_plain_text_is_trained_as_it_is_without() -> None:
    one, other = (Encoder(bytelevel(), train_on=how).text("the quick fox") for how in ("all-assistant", "everything"))
    assert labels(one) == labels(other)


@pytest.mark.parametrize(
    ("masked", "left_out"),
    [(set[int](), []), ({0}, ["the fox"]), ({1}, ["why?"]), ({0, 2}, ["the fox", "blue dog<|im_end|>"])],
)
def test_a_message_of_weight_0_is_left_out(masked: set[int], left_out: list[str], tmp_path: Path) -> None:
    # Of an assistant its turn, with the marker that ends it; of any other what it says.
    turns = [{**turn, "weight": 0} if i in masked else turn for i, turn in enumerate(TURNS[:3])]
    file = tiny_run.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    encoder = everything()
    (example,) = load([Source(path=str(file))], encoder).examples
    expected = (
        "system\nthe fox<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nblue dog<|im_end|>\n"
    )
    for text in left_out:
        expected = expected.replace(text, "", 1)
    assert trained_text(encoder, Encoded(example.ids, example.loss_mask)) == expected
    assert example.ids.tolist() == encoder.chat(TURNS[:3]).ids.tolist()


def test_a_prompt_of_messages_is_trained_but_for_its_message_of_weight_0(tmp_path: Path) -> None:
    row = {"prompt": [*TURNS[:3], {**TURNS[3], "weight": 0}], "completion": TURNS[4:]}
    file = tiny_run.write_rows(tmp_path / "rows.jsonl", [row])
    encoder = everything()
    (example,) = load([Source(path=str(file))], encoder).examples
    text = trained_text(encoder, Encoded(example.ids, example.loss_mask))
    assert "why?" in text
    assert "blue dog" in text
    assert "over: the" not in text
    assert "lazy fox" in text


def test_an_axolotl_file_with_train_on_inputs_trains_every_token(tmp_path: Path) -> None:
    rows = tiny_run.rows(9)
    data = tiny_run.write_rows(tmp_path / "rows.jsonl", rows)
    asked = {
        "base_model": str(tiny_run.folder()), "datasets": [{"path": str(data), "type": "completion"}],
        "train_on_inputs": True, "adapter": "lora", "lora_r": 2, "micro_batch_size": 4, "max_steps": 2,
        "output_dir": str(tmp_path / "out"), "bf16": False, "optimizer": "adamw_torch", "learning_rate": 1e-3,
    }  # fmt: skip
    (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    config = TrainConfig.read(tmp_path / "axolotl.yaml", {})
    assert config.train_on == "everything"
    summary = train(config, View(quiet=True))
    assert summary["steps"] == 2
    read = json.loads((tmp_path / "out" / "data.json").read_text())
    tokens = sum(len(row["prompt"].encode()) + len(row["completion"].encode()) + 1 for row in rows)
    assert read["train"]["tokens"] == tokens
    assert read["train"]["target_tokens"] == tokens - len(rows)
    assert read["train_on"] == "everything"
    (first, _) = [line for line in tiny_run.lines(tmp_path / "out" / "metrics.jsonl") if line["kind"] == "train"]
    assert first["target_tokens"] == first["tokens"] - 4


def test_check_and_plan_count_the_tokens_that_are_trained(tmp_path: Path) -> None:
    data = str(tiny_run.write_rows(tmp_path / "rows.jsonl", tiny_run.rows(9)))
    model = str(tiny_run.folder())
    for how, all_of_them in (("everything", True), ("all-assistant", False)):
        report = check_data(CheckConfig.build({"data": data, "model": model, "train_on": how}))
        assert (report.target_tokens == report.tokens - 9) == all_of_them
        planned = plan(PlanConfig.build({"model": model, "data": data, "train_on": how, "ask_base": "no"}))
        (found,) = planned.to_json()["plans"]
        assert found["data"]["target_tokens"] == report.target_tokens
