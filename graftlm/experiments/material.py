"""What a comparison stands on, read once before anything is trained: rows, prompts with references, general text.

Every run reads the same files itself; here they are read to be refused early (bad rows, too few held-out rows, a metric
that does not fit), to know which held-out rows share a prompt, and to part off rows for the search of learning rates:

    data ----+-- training rows --+-- rows that the search trains on
             |                   `-- rows that the search judges by        never the held-out ones: a rate chosen on
             `-- held-out rows                                              them would flatter itself
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.base.chat import Encoder
from graftlm.base.load import load_config, load_tokenizer, resolve
from graftlm.config import CompareConfig
from graftlm.data.columns import Fault, format_of
from graftlm.data.documents import Dataset, Document, load, split
from graftlm.data.order import make_order
from graftlm.data.rows import Chat, Completion, Example, Text, parse
from graftlm.data.sources import Source, named_source, read, share, token_limit
from graftlm.errors import ConfigError, DataError
from graftlm.experiments.metrics import Question, check_fits, check_metric
from graftlm.experiments.statistics import MIN_GROUPS
from graftlm.files import write_json

GENERAL = Path(__file__).parent / "general.jsonl"
_SEARCH_ROWS = (20, 100)  # fewest and most rows that the search judges by
_FEWEST_TO_SEARCH = 40


@dataclass(frozen=True, eq=False)
class Material:
    """What every run of a comparison is trained and measured on."""

    train: Dataset
    held_out: Dataset
    groups: NDArray[np.int64]
    """(held-out rows,): rows of one number share a prompt and are drawn together."""
    questions: tuple[Question, ...]
    """Held-out prompts to answer for the metric; empty without one."""
    longest_answer: int
    """Tokens of the longest reference."""
    general: Path | None
    """Text on which forgetting is measured."""
    steps: int
    """Optimizer steps of a run."""
    sources: tuple[Source, ...]
    notes: tuple[str, ...]


def gather(config: CompareConfig) -> Material:
    """Read and check everything. Raises GraftError for what would make the comparison fail or mean nothing."""
    if config.metric is not None:
        check_metric(config.metric)
    folder = resolve(config.model, config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    text_config = load_config(folder, config.trust_remote_code).get_text_config()
    encoder = Encoder(tokenizer, train_on=config.train_on, date=config.template_date)
    limit = token_limit(config.max_tokens_per_document, getattr(text_config, "max_position_embeddings", None))
    sources = tuple(named_source(text, "train") for text in config.data)
    train = load(sources, encoder, max_tokens=limit, too_long=config.too_long)
    fraction = share(config.eval_data)
    if fraction is None:
        eval_sources = (named_source(config.eval_data, "valid"),)
        held_out = load(eval_sources, encoder, max_tokens=limit, too_long=config.too_long)
    else:
        eval_sources = sources
        train, held_out = split(train, fraction)
    notes: list[str] = []
    groups = _groups(held_out, notes)
    if held_out.rows < MIN_GROUPS:
        raise DataError(
            f"--eval-data gives {held_out.rows} held-out rows, and a bootstrap needs at least {MIN_GROUPS} to say anything "
            "about rows it has not seen; hold out a larger share, such as 20%, or give a file with more rows"
        )
    digests = {d.digest for d in train.documents}
    known = sum(d.digest in digests for d in held_out.documents)
    if known:
        notes.append(
            f"{known} of {held_out.rows} held-out rows are training rows too; their losses flatter every method"
        )
    questions: tuple[Question, ...] = ()
    longest = 0
    if config.metric is not None:
        wanted = {d.row for d in held_out.documents}
        found = _questions([e for e in _examples(eval_sources) if e.row in wanted], encoder)
        check_fits(config.metric, found, held_out.rows)
        questions = _spread_out(found, config.metric_prompts)
        longest = max(len(tokenizer.encode(r, add_special_tokens=False)) for q in questions for r in q.references)
    general = None if config.general_data == "none" else GENERAL
    if config.general_data not in ("none", "general"):
        general = Path(config.general_data)
        if not general.is_file():
            raise DataError(
                f"--general-data '{config.general_data}' is no file; give one of plain texts, `general` for the bundled "
                "one, or `none`"
            )
    if general is not None:
        load([Source(path=str(general))], encoder, max_tokens=limit, too_long="cut")
    order = make_order(
        [len(p.documents) for p in train.parts], [p.weight for p in train.parts], seed=0, batch_size=config.batch_size,
        epochs=config.epochs, steps=config.steps,
    )  # fmt: skip
    return Material(
        train,
        held_out,
        groups,
        questions,
        longest,
        general,
        order.steps,
        sources,
        (*encoder.notes, *dict.fromkeys((*train.notes, *held_out.notes)), *notes),
    )


def _groups(held_out: Dataset, notes: list[str]) -> NDArray[np.int64]:
    """Held-out rows numbered by what the model reads before their first trained token, where that leaves enough groups."""
    numbers: dict[str, int] = {}
    found: list[int] = []
    for document in held_out.documents:
        first = int(document.trained.argmax())
        # A plain text has no prompt (at most a start token); each is a group of its own.
        key = hashlib.blake2b(document.ids[:first].tobytes()).hexdigest() if first > 1 else document.row
        found.append(numbers.setdefault(key, len(numbers)))
    if len(numbers) == held_out.rows:
        return np.array(found, np.int64)
    if len(numbers) >= MIN_GROUPS:
        notes.append(
            f"the {held_out.rows} held-out rows have {len(numbers)} prompts; rows of one prompt are drawn together"
        )
        return np.array(found, np.int64)
    notes.append(
        f"the {held_out.rows} held-out rows have only {len(numbers)} prompts, so rows are drawn one by one: what is said "
        "holds for other answers to these prompts, not for other prompts"
    )
    return np.arange(held_out.rows)


def _examples(sources: Sequence[Source]) -> Iterator[Example]:
    """Rows as typed examples; faults were refused when the same sources were loaded."""
    for source in sources:
        form: Any = None
        for raw in read(source):
            if isinstance(raw, Fault):
                continue
            form = form or format_of(raw)
            found = parse(raw, form)
            if not isinstance(found, list):
                yield found


def _questions(examples: Sequence[Example], encoder: Encoder) -> list[Question]:
    """Prompts with all their references, in the order in which a prompt comes first."""
    found: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for example in examples:
        match example:
            case Completion():
                prompt, answer = encoder.prompt_text(example.prompt), example.completion
            case Chat():
                last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
                before, answer = example.messages[:last], str(example.messages[last].get("content") or "")
                if not before:
                    continue
                prompt = encoder.prompt(before, example.tools)
            case _:
                continue
        if prompt and answer.strip():
            found.setdefault(tuple(prompt), []).append((example.row, answer.strip()))
    return [Question(known[0][0], prompt, tuple(a for _, a in known)) for prompt, known in found.items()]


def _spread_out(questions: Sequence[Question], most: int) -> tuple[Question, ...]:
    """At most `most` of them, evenly over the file."""
    if len(questions) <= most:
        return tuple(questions)
    return tuple(questions[i * len(questions) // most] for i in range(most))


def _hashed(document: Document) -> int:
    """A number that depends on the content alone, and not as the split of validation rows does."""
    return int.from_bytes(hashlib.blake2b(bytes.fromhex(document.digest), digest_size=8, person=b"search").digest())


def write_search_rows(material: Material, batch_size: int, steps: int, out: Path) -> tuple[tuple[str, ...], str]:
    """Write rows to search learning rates with: what is trained on, one file a source, and what is judged by.

    Judged by are at most 100 training rows, chosen by content; trained on are the others, in the order of the first run, no
    more than `steps` batches of them. Returns the files as --data and --eval-data take them. Raises ConfigError where
    there are too few rows.
    """
    documents = material.train.documents
    if len(documents) < _FEWEST_TO_SEARCH:
        raise ConfigError(
            f"{len(documents)} training rows are too few to search a learning rate on (at least {_FEWEST_TO_SEARCH}); give "
            "rates, such as --learning-rate lora=2e-4,full=2e-5"
        )
    fewest, most = _SEARCH_ROWS
    count = min(most, max(fewest, len(documents) // 10))
    form = {e.row: e.kind for e in _examples(material.sources)}
    first = form[documents[0].row]  # a file has rows of one format
    ranked = sorted((d for d in documents if form[d.row] == first), key=_hashed)
    judges = {d.digest for d in ranked[:count]}
    order = make_order(
        [len(p.documents) for p in material.train.parts], [p.weight for p in material.train.parts], seed=0,
        batch_size=batch_size, epochs=None, steps=max(1, len(documents) // batch_size),
    )  # fmt: skip
    drawn = dict.fromkeys(order.document(draw) for draw in range(order.draws))
    trained = [documents[i].row for i in drawn if documents[i].digest not in judges][: steps * batch_size]
    wanted = {**dict.fromkeys(trained, "train"), **dict.fromkeys((d.row for d in ranked[:count]), "valid")}
    out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for number, source in enumerate(material.sources):
        for example in _examples([source]):
            part = wanted.get(example.row)
            if part is not None:
                name = f"train-{number + 1}" if part == "train" else part
                lines.setdefault(name, []).append(json.dumps(_columns(example), ensure_ascii=False))
    for name, found in lines.items():
        (out / f"{name}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")
    write_json(out / "rows.json", {"trained": len(trained), "judged": count})
    return tuple(str(out / f"{n}.jsonl") for n in sorted(lines) if n != "valid"), str(out / "valid.jsonl")


def _columns(example: Example) -> dict[str, Any]:
    """A row again."""
    match example:
        case Completion():
            return {"prompt": example.prompt, "completion": example.completion}
        case Text():
            return {"text": example.text}
        case Chat():
            tools = {} if example.tools is None else {"tools": list(example.tools)}
            messages = [
                {**message, "weight": 0} if place in example.masked and message["role"] == "assistant" else message
                for place, message in enumerate(example.messages)
            ]
            return {"messages": messages, **tools}
