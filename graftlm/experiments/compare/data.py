"""What a comparison stands on, read once before anything is trained: rows, prompts with references, general text.

Every run reads the same files itself; here they are read to be refused early (bad rows, too few eval rows, a metric
that does not fit), to know which eval rows share a prompt, and to part off rows for the search of learning rates:

    data ----+-- training rows --+-- rows that the search trains on
             |                   `-- rows that the search judges by        never the eval ones: a rate chosen on
             `-- eval rows                                              them would flatter itself
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.base.chat import Encoder
from graftlm.base.loading import load_config, load_tokenizer, resolve
from graftlm.config import CompareConfig
from graftlm.config.fields import TrainOn
from graftlm.data.dataset import Dataset, Example, load, split
from graftlm.data.questions import Question, parsed_rows, questions_of, spread_out
from graftlm.data.rows import ChatRow, CompletionRow, ParsedRow, TextRow
from graftlm.data.sampler import make_sampler
from graftlm.data.sources import Source, named_source, share, token_limit
from graftlm.errors import ConfigError, DataError
from graftlm.experiments.compare.statistics import MIN_GROUPS
from graftlm.files import write_json
from graftlm.scores import check_fits, check_package

GENERAL = Path(__file__).parent / "general.jsonl"
_SEARCH_ROWS = (20, 100)  # fewest and most rows that the search judges by
_FEWEST_TO_SEARCH = 40


@dataclass(frozen=True, eq=False)
class ComparisonData:
    """What every run of a comparison is trained and measured on."""

    train: Dataset
    eval_dataset: Dataset
    groups: NDArray[np.int64]
    """(eval rows,): rows of one number share a prompt and are drawn together."""
    questions: tuple[Question, ...]
    """Eval prompts to answer for the metric; empty without one."""
    longest_answer: int
    """Tokens of the longest reference."""
    general: Path | None
    """Text on which forgetting is measured."""
    steps: int
    """Optimizer steps of a run."""
    sources: tuple[Source, ...]
    train_on: TrainOn
    notes: tuple[str, ...]


def load_comparison_data(config: CompareConfig) -> ComparisonData:
    """Read and check everything. Raises GraftError for what would make the comparison fail or mean nothing."""
    if config.metric is not None:
        check_package(config.metric, "metric")
    folder = resolve(config.model, config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    text_config = load_config(folder, config.trust_remote_code).get_text_config()
    encoder = Encoder(tokenizer, train_on=config.train_on, date=config.template_date)
    limit = token_limit(config.max_length, getattr(text_config, "max_position_embeddings", None))
    sources = tuple(named_source(text, "train") for text in config.data)
    train = load(sources, encoder, max_tokens=limit, overlong=config.overlong)
    fraction = share(config.eval_data)
    if fraction is None:
        eval_sources = (named_source(config.eval_data, "valid"),)
        eval_dataset = load(eval_sources, encoder, max_tokens=limit, overlong=config.overlong)
    else:
        eval_sources = sources
        train, eval_dataset = split(train, fraction)
    notes: list[str] = []
    prompted = eval_dataset
    if config.train_on == "everything":  # then nothing in an example says where its prompt ends
        answers_only = Encoder(tokenizer, date=config.template_date)
        prompted = load(eval_sources, answers_only, max_tokens=limit, overlong=config.overlong)
    groups = _groups(eval_dataset, {example.row: example for example in prompted.examples}, notes)
    if eval_dataset.rows < MIN_GROUPS:
        raise DataError(
            f"--eval-data gives {eval_dataset.rows} eval rows, and a bootstrap needs at least {MIN_GROUPS} to say anything "
            "about rows it has not seen; hold out a larger share, such as 20%, or give a file with more rows"
        )
    digests = {d.digest for d in train.examples}
    known = sum(d.digest in digests for d in eval_dataset.examples)
    if known:
        notes.append(
            f"{known} of {eval_dataset.rows} eval rows are training rows too; their losses flatter every method"
        )
    questions: tuple[Question, ...] = ()
    longest = 0
    if config.metric is not None:
        wanted = {d.row for d in eval_dataset.examples}
        found = questions_of([e for e in parsed_rows(eval_sources) if e.row in wanted], encoder)
        check_fits(config.metric, [q.references for q in found], eval_dataset.rows, option="metric")
        questions = spread_out(found, config.metric_prompts)
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
        load([Source(path=str(general))], encoder, max_tokens=limit, overlong="truncate")
    sampler = make_sampler(
        [len(p.examples) for p in train.parts], [p.weight for p in train.parts], seed=0, batch_size=config.batch_size,
        epochs=config.epochs, steps=config.steps,
    )  # fmt: skip
    return ComparisonData(
        train,
        eval_dataset,
        groups,
        questions,
        longest,
        general,
        sampler.steps,
        sources,
        config.train_on,
        (*encoder.notes, *dict.fromkeys((*train.notes, *eval_dataset.notes)), *notes),
    )


def _groups(eval_dataset: Dataset, prompted: Mapping[str, Example], notes: list[str]) -> NDArray[np.int64]:
    """Eval rows numbered by what the model reads before their answer, where that leaves enough groups.

    `prompted` are the rows as examples of which the answers alone are trained.
    """
    numbers: dict[str, int] = {}
    found: list[int] = []
    for eval_example in eval_dataset.examples:
        example = prompted.get(eval_example.row, eval_example)  # one that is cut before its answer stands for itself
        first = int(example.loss_mask.argmax())
        # A plain text has no prompt (at most a start token); each is a group of its own.
        key = hashlib.blake2b(example.ids[:first].tobytes()).hexdigest() if first > 1 else example.row
        found.append(numbers.setdefault(key, len(numbers)))
    if len(numbers) == eval_dataset.rows:
        return np.array(found, np.int64)
    if len(numbers) >= MIN_GROUPS:
        notes.append(
            f"the {eval_dataset.rows} eval rows have {len(numbers)} prompts; rows of one prompt are drawn together"
        )
        return np.array(found, np.int64)
    notes.append(
        f"the {eval_dataset.rows} eval rows have only {len(numbers)} prompts, so rows are drawn one by one: what is said "
        "holds for other answers to these prompts, not for other prompts"
    )
    return np.arange(eval_dataset.rows)


def _hashed(example: Example) -> int:
    """A number that depends on the content alone, and not as the split of validation rows does."""
    return int.from_bytes(hashlib.blake2b(bytes.fromhex(example.digest), digest_size=8, person=b"search").digest())


def write_search_rows(
    comparison_data: ComparisonData, batch_size: int, steps: int, out: Path
) -> tuple[tuple[str, ...], str]:
    """Write rows to search learning rates with: what is trained on, one file a source, and what is judged by.

    Judged by are at most 100 training rows, chosen by content; trained on are the others, in the order of the first run, no
    more than `steps` batches of them. Returns the files as --data and --eval-data take them. Raises ConfigError where
    there are too few rows.
    """
    examples = comparison_data.train.examples
    if len(examples) < _FEWEST_TO_SEARCH:
        raise ConfigError(
            f"{len(examples)} training rows are too few to search a learning rate on (at least {_FEWEST_TO_SEARCH}); give "
            "rates, such as --learning-rate lora=2e-4,full=2e-5"
        )
    fewest, most = _SEARCH_ROWS
    count = min(most, max(fewest, len(examples) // 10))
    form = {e.row: e.kind for e in parsed_rows(comparison_data.sources)}
    first = form[examples[0].row]  # a file has rows of one format
    ranked = sorted((d for d in examples if form[d.row] == first), key=_hashed)
    judges = {d.digest for d in ranked[:count]}
    sampler = make_sampler(
        [len(p.examples) for p in comparison_data.train.parts], [p.weight for p in comparison_data.train.parts], seed=0,
        batch_size=batch_size, epochs=None, steps=max(1, len(examples) // batch_size),
    )  # fmt: skip
    drawn = dict.fromkeys(sampler.example(draw) for draw in range(sampler.draws))
    trained = [examples[i].row for i in drawn if examples[i].digest not in judges][: steps * batch_size]
    wanted = {**dict.fromkeys(trained, "train"), **dict.fromkeys((d.row for d in ranked[:count]), "valid")}
    out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for number, source in enumerate(comparison_data.sources):
        for parsed in parsed_rows([source]):
            part = wanted.get(parsed.row)
            if part is not None:
                name = f"train-{number + 1}" if part == "train" else part
                columns = _columns(parsed, prompt=comparison_data.train_on != "everything")
                lines.setdefault(name, []).append(json.dumps(columns, ensure_ascii=False))
    for name, found in lines.items():
        (out / f"{name}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")
    write_json(out / "rows.json", {"trained": len(trained), "judged": count})
    return tuple(str(out / f"{n}.jsonl") for n in sorted(lines) if n != "valid"), str(out / "valid.jsonl")


def _columns(parsed: ParsedRow, *, prompt: bool) -> dict[str, Any]:
    """A row again; `prompt`: whether a conversation's prompt is marked as not trained."""
    match parsed:
        case CompletionRow():
            return {"prompt": parsed.prompt, "completion": parsed.completion}
        case TextRow():
            return {"text": parsed.text}
        case ChatRow():
            tools = {} if parsed.tools is None else {"tools": list(parsed.tools)}
            masked = {*parsed.masked, *(range(parsed.prompt) if prompt else ())}
            messages = [
                {**message, "weight": 0} if place in masked else message
                for place, message in enumerate(parsed.messages)
            ]
            return {"messages": messages, **tools}
