"""`run`, whole, on tiny models: each method's run folder, and its result as transformers and PEFT read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.base.loading import load_base
from graftlm.base.saving import dense_state_dict
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.training.view import View


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that a tiny model can learn: each completion continues its prompt's words in order."""
    generator = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows: list[dict[str, str]] = []
    for _ in range(24):
        first = int(generator.integers(3, tiny.VOCABULARY - 9))
        words = [f"w{first + i}" for i in range(int(generator.integers(4, 9)))]
        rows.append({"prompt": " ".join(words[:2]) + " ", "completion": " ".join(words[2:])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_learns_and_its_result_is_read_by_others(
    architecture: str, method: Any, data: Path, tmp_path: Path
) -> None:
    adapter: dict[str, Any] = {} if method == "full" else {"rank": 5, "alpha": 7.0}
    config = TrainConfig(
        model=str(tiny.folder(architecture)), data=(str(data),), eval_data="25%", method=method, out=tmp_path / "run",
        compute_dtype="float32", device="cpu", steps=6, batch_size=7, learning_rate=1e-2, **adapter,
        lr_scheduler="constant", warmup_ratio=0.0, micro_batch_tokens=41, eval_every=3, activation_checkpointing=True,
    )  # fmt: skip
    summary = train(config, View(quiet=True))
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["packed"] == (architecture != "bloom")
    if method == "full":
        model = tiny.plain(tmp_path / "run" / "model")
        ours = load_base(str(tmp_path / "run" / "model"), compute_dtype="float32", device="cpu")
        tiny.close(tiny.base_logits(ours, tiny.ids(), slot=0), tiny.plain_logits(model, tiny.ids()))
        return
    base = load_base(config.model, precision=config.stored_precision, compute_dtype="float32", device="cpu")
    attach(base, adapter_format.load(base, tmp_path / "run" / "adapter"))
    plain = tiny.plain(config.model)
    plain.load_state_dict(dense_state_dict(base.model, tiny.torch.float32), strict=False)
    plain.tie_weights()
    peft = tiny.read_peft(plain, tmp_path / "run" / "adapter")
    tiny.close(tiny.plain_logits(peft, tiny.ids()), tiny.base_logits(base, tiny.ids()))
