"""The data of examples/real_demo: three small tasks cut from two public sets, as rows of messages.

    describe    the facts of a place -> one sentence                     E2E NLG Challenge, CC BY-SA 4.0
    extract     a sentence about a place -> its facts as JSON            the same rows, turned around
    redact      a sum in words -> the same with [NAME] for every name    GSM8K, MIT

`python -m tools.demo_real.subsets shared/data examples/real_demo/data` writes TASK-train.jsonl and TASK-eval.jsonl.
E2E's training and eval rows share no set of facts. A sentence is taken only if it is one sentence that names all of its facts.
Names in the eval rows of `redact` occur in none of its training rows.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KEYS = {
    "name": "name", "eatType": "type", "food": "food", "priceRange": "price", "customer rating": "rating", "area": "area",
    "familyFriendly": "family_friendly", "near": "near",
}  # fmt: skip
"""E2E's names of facts, and those of the demo's JSON."""
PLACES, NAMES, EVALUATED = 400, 240, 24
"""Training rows of the tasks about places, and of `redact`; eval rows of each."""
RARE = 2
"""In how many questions a name may occur that is kept for the eval rows."""
LONGEST_SENTENCE, LONGEST_SUM = 200, 160  # characters

Facts = dict[str, str | bool | None]


def e2e_rows(lines: Iterable[str], count: int, seed: int) -> list[tuple[Facts, str]]:
    """At most `count` pairs of facts and sentence from E2E's lines, as evenly from the sets of facts as there are sentences."""
    by_facts: dict[str, list[str]] = {}
    for line in lines:
        row = json.loads(line)
        facts = read_facts(row["prompt"])
        if is_complete(row["completion"], facts):
            by_facts.setdefault(row["prompt"], []).append(row["completion"])
    order = random.Random(seed)
    pairs: list[tuple[Facts, str]] = []
    prompts = sorted(by_facts)
    while len(pairs) < count and any(by_facts.values()):
        order.shuffle(prompts)
        for prompt in prompts:
            if by_facts[prompt] and len(pairs) < count:
                pairs.append((read_facts(prompt), by_facts[prompt].pop(order.randrange(len(by_facts[prompt])))))
    return pairs


def read_facts(text: str) -> Facts:
    """`name[Aromi], familyFriendly[yes]` -> every key of the demo's JSON, None for what is not said."""
    said = dict(re.findall(r"([A-Za-z][A-Za-z ]*)\[([^\]]*)\]", text))
    facts: Facts = {ours: said.get(theirs) for theirs, ours in KEYS.items()}
    if facts["family_friendly"] is not None:
        facts["family_friendly"] = facts["family_friendly"] == "yes"
    return facts


def is_complete(sentence: str, facts: Facts) -> bool:
    """Whether `sentence` is one tidy sentence that names all of `facts`."""
    text = sentence.lower()
    named = all(value.lower() in text for value in facts.values() if isinstance(value, str))
    families = facts["family_friendly"] is None or (
        re.search(r"famil|child|kid", text) is not None
        and (re.search(r"\bno[nt]?\b|n't|adult", text) is None) == facts["family_friendly"]
    )
    tidy = re.fullmatch(r"[A-Z][^.!?\n]*\.", sentence) is not None and "  " not in sentence
    return (
        named and families and tidy and len(sentence) <= LONGEST_SENTENCE and len([v for v in facts.values() if v]) > 3
    )


def describe(facts: Facts, sentence: str) -> dict[str, Any]:
    """The row of the task `describe`."""
    spoken = {True: "yes", False: "no"}
    said = [
        f"{key.replace('_', ' ')}: {spoken[value] if isinstance(value, bool) else value}"
        for key, value in facts.items()
        if value is not None
    ]
    return conversation("Describe this place in one sentence, with all of its facts.\n\n" + "\n".join(said), sentence)


def extract(facts: Facts, sentence: str) -> dict[str, Any]:
    """The row of the task `extract`."""
    task = f"Extract the facts as one JSON object with the keys {', '.join(facts)}. Write null for what is not said."
    return conversation(f"{task}\n\n{sentence}", json.dumps(facts, ensure_ascii=False))


def redact(questions: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the task `redact`, for training and unseen, from GSM8K's questions.

    A name is a word with a capital that does or did something somewhere in the set, and that is never written small. A
    question with any other capital inside of a sentence is left out: it may be a name too.
    """
    small = {word for question in questions for word in re.findall(r"\b[a-z]+\b", question)}
    acting = re.compile(r"\b(?:did|does|will|can|would|should|must) ([A-Z][a-z]+)\b(?! [A-Z])")
    names = {name for question in questions for name in acting.findall(question) if name.lower() not in small}

    def named(question: str) -> set[str]:
        return set(re.findall(r"\b[A-Z][a-z]+\b", question)) & names

    def sure(question: str) -> bool:
        inside = set(re.findall(r"(?<=[a-z0-9,;:\"'] )[A-Z]\w*", question))
        others = set(re.findall(r"\b[A-Z]\w*", question)) - names
        plain = question.isascii() and "  " not in question and len(question) <= LONGEST_SUM
        return plain and inside <= names and all(word.lower() in small for word in others)

    candidates = [question for question in questions if named(question) and sure(question)]
    random.Random(0).shuffle(candidates)
    uses = Counter(name for question in candidates for name in named(question))
    rare = [question for question in candidates if all(uses[name] <= RARE for name in named(question))]
    unseen = rare[:EVALUATED]
    held = {name for question in unseen for name in named(question)}
    train = [question for question in candidates if question not in unseen and not named(question) & held]

    def row(question: str) -> dict[str, Any]:
        redacted = re.sub(r"\b[A-Z][a-z]+\b", lambda found: "[NAME]" if found[0] in names else found[0], question)
        return conversation(
            f"Replace every name of a person with [NAME] and change nothing else.\n\n{question}", redacted
        )

    return [row(question) for question in train[:NAMES]], [row(question) for question in unseen]


def conversation(user: str, assistant: str) -> dict[str, Any]:
    """A row of messages."""
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def subsets(shared: Path) -> dict[str, list[dict[str, Any]]]:
    """Every file's rows by its name; `shared` holds e2e/ and gsm8k/."""

    def lines(name: str) -> list[str]:
        return (shared / name).read_text(encoding="utf-8").rstrip("\n").split("\n")  # a row may hold other line ends

    train, unseen = e2e_rows(lines("e2e/train.jsonl"), PLACES, 0), e2e_rows(lines("e2e/valid.jsonl"), EVALUATED, 0)
    questions = [json.loads(line)["messages"][0]["content"] for line in lines("gsm8k/train.jsonl")]
    redacted, unseen_names = redact(questions)
    return {
        "describe-train": [describe(*pair) for pair in train], "describe-eval": [describe(*pair) for pair in unseen],
        "extract-train": [extract(*pair) for pair in train], "extract-eval": [extract(*pair) for pair in unseen],
        "redact-train": redacted, "redact-eval": unseen_names,
    }  # fmt: skip


def main(shared: str, out: str) -> None:
    """Write every file."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, rows in subsets(Path(shared)).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(out) / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
