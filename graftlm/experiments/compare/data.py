"""The data of a comparison, read once before anything is trained: rows, prompts with references, general text.

Every run reads the same files itself. Here they are read to find faults early (bad rows, too few eval rows, an unsuitable
metric), to know which eval rows share a prompt, and to set rows aside for the search of learning rates:

    data ----+-- training rows --+-- rows that the search trains on
             |                   `-- rows that the search is scored on        never the eval set: a rate chosen on it
             `-- eval set                                                     would have too good an eval loss
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from graftlm.data.eval_prompts import EvalPrompt, collect_eval_prompts, evenly, parsed_rows
from graftlm.data.rows import ChatRow, CompletionRow, ParsedRow, TextRow
from graftlm.data.sampler import make_sampler
from graftlm.data.sources import Source, named_source, share, token_limit
from graftlm.errors import ConfigError, DataError
from graftlm.experiments.compare.statistics import MIN_GROUPS
from graftlm.files import write_json
from graftlm.scores import check_fits, check_package

GENERAL = Path(__file__).parent / "general.jsonl"
_SEARCH_ROWS = (20, 100)  # fewest and most rows that the search is scored on
_MIN_ROWS_TO_SEARCH = 40


@dataclass(frozen=True, eq=False)
class ComparisonData:
    """What every run of a comparison is trained and evaluated on."""

    train: Dataset
    eval_dataset: Dataset
    groups: NDArray[np.int64]
    """(eval rows,): rows of one number share a prompt and are resampled together."""
    prompts: tuple[EvalPrompt, ...]
    """Eval prompts to answer for the metric; empty without one."""
    longest_answer: int
    """Tokens of the longest reference."""
    general: Path | None
    """File of texts on which forgetting is measured."""
    steps: int
    """Optimizer steps of a run."""
    sources: tuple[Source, ...]
    train_on: TrainOn
    notes: tuple[str, ...]


def load_comparison_data(config: CompareConfig) -> ComparisonData:
    """Read and check everything. Raises GraftError for data on which the comparison would fail or mean nothing."""
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
    if config.train_on == "everything":  # the loss masks then do not tell where a prompt ends
        answers_only = Encoder(tokenizer, date=config.template_date)
        prompted = load(eval_sources, answers_only, max_tokens=limit, overlong=config.overlong)
    groups = _groups(eval_dataset, {example.row: example for example in prompted.examples}, notes)
    if eval_dataset.rows < MIN_GROUPS:
        raise DataError(
            f"--eval-data gives {eval_dataset.rows} eval rows, and a bootstrap needs at least {MIN_GROUPS}; "
            "take a larger share, such as 20%, or give a file with more rows"
        )
    digests = {d.digest for d in train.examples}
    known = sum(d.digest in digests for d in eval_dataset.examples)
    if known:
        notes.append(
            f"{known} of {eval_dataset.rows} eval rows are training rows too; their losses flatter every method"
        )
    prompts, longest = _metric_prompts(config, eval_sources, eval_dataset, encoder)
    general = _general_text(config)
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
        prompts,
        longest,
        general,
        sampler.steps,
        sources,
        config.train_on,
        (*encoder.notes, *dict.fromkeys((*train.notes, *eval_dataset.notes)), *notes),
    )


def _metric_prompts(
    config: CompareConfig, eval_sources: Sequence[Source], eval_dataset: Dataset, encoder: Encoder
) -> tuple[tuple[EvalPrompt, ...], int]:
    """The eval prompts to answer for the metric, and the tokens of their longest reference; none without a metric."""
    if config.metric is None:
        return (), 0
    rows = {example.row for example in eval_dataset.examples}
    found = collect_eval_prompts([parsed for parsed in parsed_rows(eval_sources) if parsed.row in rows], encoder)
    check_fits(config.metric, [prompt.references for prompt in found], eval_dataset.rows, option="metric")
    prompts = evenly(found, config.metric_prompts)
    references = [reference for prompt in prompts for reference in prompt.references]
    return prompts, max(len(encoder.tokenizer.encode(text, add_special_tokens=False)) for text in references)


def _general_text(config: CompareConfig) -> Path | None:
    """The file on which forgetting is measured, if any."""
    if config.general_data in ("none", "general"):
        return GENERAL if config.general_data == "general" else None
    file = Path(config.general_data)
    if not file.is_file():
        raise DataError(
            f"--general-data '{config.general_data}' is no file; give one of plain texts, `general` for the bundled one, or "
            "`none`"
        )
    return file


def _groups(eval_dataset: Dataset, prompted: Mapping[str, Example], notes: list[str]) -> NDArray[np.int64]:
    """Eval rows numbered by their prompt (the tokens before the answer), where that leaves enough groups.

    `prompted` are the rows as examples whose only target tokens are those of the answer.
    """
    numbers: dict[str, int] = {}
    found: list[int] = []
    for eval_example in eval_dataset.examples:
        example = prompted.get(
            eval_example.row, eval_example
        )  # a row truncated before its answer is in `eval_dataset` only
        first = int(example.loss_mask.argmax())
        # A plain text has no prompt (at most a start token); each is a group of its own.
        key = hashlib.blake2b(example.ids[:first].tobytes()).hexdigest() if first > 1 else example.row
        found.append(numbers.setdefault(key, len(numbers)))
    if len(numbers) == eval_dataset.rows:
        return np.array(found, np.int64)
    if len(numbers) >= MIN_GROUPS:
        notes.append(
            f"the {eval_dataset.rows} eval rows have {len(numbers)} prompts; rows of one prompt are resampled together"
        )
        return np.array(found, np.int64)
    notes.append(
        f"the {eval_dataset.rows} eval rows have only {len(numbers)} prompts, so rows are resampled one by one: the "
        "verdict holds for other answers to these prompts, not for other prompts"
    )
    return np.arange(eval_dataset.rows)


def _hashed(example: Example) -> int:
    """A number that depends on the content alone, and not as the split of validation rows does."""
    return int.from_bytes(hashlib.blake2b(bytes.fromhex(example.digest), digest_size=8, person=b"search").digest())


def write_search_rows(
    comparison_data: ComparisonData, batch_size: int, steps: int, out: Path
) -> tuple[tuple[str, ...], str]:
    """Write the rows that learning rates are searched with: those to train on, one file a source, and those to score on.

    At most 100 training rows, chosen by content, are scored on; the others are trained on, in the order of the first run, no
    more than `steps` batches of them. Returns the files as --data and --eval-data take them. Raises ConfigError where
    there are too few rows.
    """
    examples = comparison_data.train.examples
    if len(examples) < _MIN_ROWS_TO_SEARCH:
        raise ConfigError(
            f"{len(examples)} training rows are too few to search a learning rate on (at least {_MIN_ROWS_TO_SEARCH}); give "
            "rates, such as --learning-rate lora=2e-4,full=2e-5"
        )
    fewest, most = _SEARCH_ROWS
    count = min(most, max(fewest, len(examples) // 10))
    form = {e.row: e.kind for e in parsed_rows(comparison_data.sources)}
    first = form[examples[0].row]  # a file has rows of one format
    ranked = sorted((d for d in examples if form[d.row] == first), key=_hashed)
    scored = {d.digest for d in ranked[:count]}
    sampler = make_sampler(
        [len(p.examples) for p in comparison_data.train.parts], [p.weight for p in comparison_data.train.parts], seed=0,
        batch_size=batch_size, epochs=None, steps=max(1, len(examples) // batch_size),
    )  # fmt: skip
    drawn = dict.fromkeys(sampler.example(draw) for draw in range(sampler.draws))
    trained = [examples[i].row for i in drawn if examples[i].digest not in scored][: steps * batch_size]
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
    """The columns of a row; `prompt`: whether the messages of a conversation's prompt get weight 0."""
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
