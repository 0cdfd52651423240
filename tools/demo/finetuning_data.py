"""The demo's fine-tuning data: the same products in three house voices, as rows of prompt and completion.

    data/formal-train.jsonl    playful-train.jsonl    terse-train.jsonl     1200 products
    data/formal-valid.jsonl    playful-valid.jsonl    terse-valid.jsonl      150 others

One prompt has three right answers, so adapters trained on them can be told apart by their answers to the same request.
Names in training, in validation and in the base's own training are drawn from separate pools (see voices.py).
"""

from __future__ import annotations

from pathlib import Path

from tools.demo.corpus import write_rows
from tools.demo.voices import Pool, Voice, example, facts

HOUSE_VOICES: tuple[Voice, ...] = ("formal", "playful", "terse")
ROWS: dict[Pool, int] = {"train": 1200, "valid": 150}
SEED = 0


def house_rows(voice: Voice, split: Pool) -> list[dict[str, str]]:
    """Return the rows of one file of the demo's data."""
    return [example(product, voice) for product in facts(SEED, ROWS[split], split)]


def write_house(out: Path) -> list[Path]:
    """Write the six files into `out` and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for voice in HOUSE_VOICES:
        for split in ROWS:
            paths.append(out / f"{voice}-{split}.jsonl")
            write_rows(paths[-1], house_rows(voice, split))
    return paths
