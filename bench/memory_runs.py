"""The runs of `bench/memory.py`: bases, methods, examples of one length, options; and the files that a run reads.

Real bases learn the longest rows of GSM8K, cut at one length, so that every micro-batch of a run is the heaviest, as it is
planned. Random Llamas of 5 to 60 million values learn nonsense: they vary shapes, ranks, lengths and batches.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
REAL = ("smollm2", "gemma")
SHAPES: dict[str, dict[str, int]] = {
    "5m": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
           "num_attention_heads": 4, "num_key_value_heads": 2},
    "12m": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5,
            "num_attention_heads": 6, "num_key_value_heads": 6},
    "30m": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8},
    "60m": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 4},
}  # fmt: skip
AGAIN = {"activation_checkpointing": True}
F32, BF16, INT8 = ({"base_precision": name} for name in ("float32", "bfloat16", "int8"))
EIGHT = {"optimizer": "adamw-8bit"}
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0}
ANSWERS = {"score": "rouge-l", "eval_data": "rows.jsonl", "score_max_tokens": 256}


@dataclass(frozen=True)
class Run:
    """One run: a base, a method, examples of one length, and options of `graft train`."""

    base: str
    method: Any
    length: int
    batch: int
    micro_batch_tokens: int
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def real(self) -> bool:
        return self.base in REAL

    @property
    def precision(self) -> str:
        """What the base is stored in."""
        lora = "gguf" if self.real else "bfloat16"
        return self.options.get("base_precision", {"full": "float32", "lora": lora, "qlora": "nf4"}[self.method])

    @property
    def label(self) -> str:
        left_out = ("max_grad_norm", "eval_data", "score_max_tokens")
        given = ", ".join(str(v) if k in ("base_precision", "optimizer") else f"{k.replace('_', ' ')} {v}" if v is not True else
                         k.replace("_", " ") for k, v in self.options.items() if k not in left_out)  # fmt: skip
        return f"{self.method}{', ' + given if given else ''}"

    @property
    def name(self) -> str:
        """What tells it from every other run."""
        return f"{self.base} {self.label}, {self.batch} x {self.length}, {self.micro_batch_tokens} a pass"


def _real(base: str) -> tuple[Run, ...]:
    """Every method on one real base."""
    return (
        Run(base, "full", 256, 2, 512),
        Run(base, "full", 256, 2, 512, {**BF16, **EIGHT}),
        Run(base, "full", 256, 2, 512, {**BF16, **EIGHT, **IN_BACKWARD}),
        Run(base, "full", 256, 4, 512, {**BF16, **EIGHT, **AGAIN}),
        Run(base, "lora", 256, 2, 512, F32),
        Run(base, "lora", 256, 2, 512, BF16),
        Run(base, "lora", 256, 2, 512, INT8),
        Run(base, "lora", 256, 2, 512),
        Run(base, "lora", 128, 1, 128),
        Run(base, "lora", 256, 4, 1024, {"rank": 64}),
        Run(base, "lora", 256, 4, 1024, AGAIN),
        Run(base, "lora", 256, 2, 512, {"dora": True}),
        Run(base, "lora", 256, 2, 512, {"lora_dropout": 0.1}),
        Run(base, "lora", 64, 2, 128, ANSWERS),
        Run(base, "qlora", 256, 2, 512),
        Run(base, "qlora", 256, 4, 512, {"targets": ["attention"]}),
        Run(base, "qlora", 256, 4, 1024, AGAIN),
    )


RUNS = (
    *_real("smollm2"),
    *_real("gemma"),
    Run("5m", "lora", 512, 4, 2048),
    Run("5m", "lora", 128, 16, 1024, {"rank": 64}),
    Run("5m", "full", 256, 8, 2048),
    Run("5m", "qlora", 1024, 4, 4096),
    Run("12m", "lora", 256, 4, 1024, {"rank": 4}),
    Run("12m", "full", 512, 4, 2048),
    Run("12m", "full", 512, 4, 2048, {**BF16, **EIGHT}),
    Run("12m", "qlora", 512, 8, 4096),
    Run("12m", "lora", 512, 4, 2048, {"targets": ["attention"]}),
    Run("30m", "lora", 128, 4, 512),
    Run("30m", "lora", 512, 4, 2048),
    Run("30m", "lora", 512, 8, 4096, {"rank": 64}),
    Run("30m", "lora", 512, 4, 2048, AGAIN),
    Run("30m", "lora", 256, 8, 1024, INT8),
    Run("30m", "qlora", 1024, 2, 2048, {"targets": ["attention"]}),
    Run("30m", "full", 512, 4, 2048),
    Run("30m", "full", 512, 8, 1024, AGAIN),
    Run("30m", "full", 256, 4, 1024, EIGHT),
    Run("30m", "full", 256, 4, 1024, {**BF16, **EIGHT, **IN_BACKWARD}),
    Run("60m", "lora", 512, 2, 1024),
    Run("60m", "qlora", 256, 8, 2048, {"rank": 32}),
    Run("60m", "lora", 256, 8, 2048, {"targets": ["q_proj", "v_proj"]}),
    Run("60m", "qlora", 512, 4, 2048, AGAIN),
    Run("60m", "full", 256, 8, 1024, BF16),
    Run("60m", "full", 512, 2, 1024, {**EIGHT, **AGAIN}),
)


def make_model(sizes: dict[str, int], folder: Path) -> None:
    """A Llama with random weights, and the bundled base's tokenizer, filled up to its vocabulary."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from graftlm import demo

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.resolve_model("demo"))
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fill_tokenizer(folder / "tokenizer.json", sizes["vocab_size"])


def fill_tokenizer(file: Path, entries: int) -> None:
    """Add entries that no text has, pairs of private letters with their merges: a tokenizer's memory is planned too."""
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary, merges = values["model"]["vocab"], values["model"]["merges"]
    free = max(*vocabulary.values(), *(token["id"] for token in values["added_tokens"])) + 1
    letters = [chr(0xE000 + i) for i in range(200)]
    pairs = [("", letter) for letter in letters] + [(a, b) for a in letters for b in letters]
    for i, (a, b) in zip(range(free, entries), pairs):
        vocabulary[a + b] = i
        if a:
            merges.append([a, b])
    file.write_text(json.dumps(values), encoding="utf-8")


def _begins_to_answer(line: str, length: int) -> bool:
    """Whether a row's question ends well within `length` tokens, at two characters a token, so that targets are left."""
    return len(json.loads(line)["messages"][0]["content"]) <= 2 * length


def write_rows(run: Run, file: Path) -> None:
    """As many rows as two batches have, each longer than the run's length; training cuts them there."""
    count = 2 * run.batch
    if run.real:
        lines = ROWS.read_text(encoding="utf-8").strip().split("\n")
        rows = sorted((line for line in lines if _begins_to_answer(line, run.length)), key=len)[-count:]
    else:
        letters = random.Random(0)
        rows: list[str] = []
        for i in range(count):
            words = ["".join(letters.choices("abcdefghiklmnoprstuvw", k=5)) for _ in range(run.length)]
            rows.append(json.dumps({"prompt": f"{i}", "completion": " ".join(words)}))
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
