"""Sources to examples: counts, lengths, digests, splits, and the real sets."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from small_rows import encoder, numbered, write

from graftlm import progress
from graftlm.base.chat import Encoder
from graftlm.data import dataset as examples
from graftlm.data.dataset import Dataset, load, split
from graftlm.data.sources import Source
from graftlm.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def test_an_example_has_its_row_and_its_loss_mask(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbered(3))
    dataset = load([source], encoder())
    assert [example.row for example in dataset.examples] == [f"{source.path}:{line}" for line in (1, 2, 3)]
    example = dataset.examples[1]
    decoded = encoder().tokenizer.decode(example.ids[example.loss_mask].tolist())
    assert decoded == " 7919<|endoftext|>"
    assert (dataset.rows, dataset.kinds) == (3, {"completion": 3})
    assert dataset.tokens == sum(len(d.ids) for d in dataset.examples)
    assert dataset.target_tokens == sum(int(d.loss_mask.sum()) for d in dataset.examples)
    assert dataset.longest == max(len(d.ids) for d in dataset.examples)


def test_sources_keep_their_weights_and_may_have_formats_of_their_own(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", numbered(2))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    two = write(tmp_path / "b.jsonl", [{"messages": messages}])
    dataset = load([one, Source(path=two.path, weight=0.5)], encoder())
    assert [(part.name, part.weight, len(part.examples)) for part in dataset.parts] == [
        (one.path, 1.0, 2),
        (two.path, 0.5, 1),
    ]
    assert dataset.kinds == {"completion": 2, "chat": 1}


def test_bad_rows_of_all_files_come_in_one_error_and_nothing_is_given(tmp_path: Path) -> None:
    one = tmp_path / "a.jsonl"
    one.write_text('{"text": "good"}\n{"text": 3}\n{"text": \n')
    two = write(tmp_path / "b.jsonl", [{"text": "good"}] + [{"text": ""}] * 25)
    with pytest.raises(DataError) as caught:
        load([Source(path=str(one)), two], encoder())
    message = str(caught.value)
    assert message.startswith("27 rows cannot be trained on; nothing was trained:")
    assert f"{one}:2: text: 3" in message
    assert f"{one}:3: line: broken JSON" in message
    assert message.endswith("and 7 more")
    assert message.index(f"{one}:3:") < message.index(f"{two.path}:2:")


def test_a_row_that_the_chat_template_refuses_is_reported_with_its_line(tmp_path: Path) -> None:
    fast = encoder().tokenizer.__class__(
        tokenizer_object=encoder().tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    bad = [{"role": "system", "content": "Be"}, *good]
    source = write(tmp_path / "a.jsonl", [{"messages": good}, {"messages": bad}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: messages: .*No system role"):
        load([source], Encoder(fast))


def test_rows_that_are_too_long_are_an_error_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    long = {"prompt": "The pub", "completion": " near the river" * 30}
    late = {"prompt": "near the river " * 30, "completion": "pub"}  # cut, it has no target token left
    source = write(tmp_path / "a.jsonl", [*numbered(2), long, late])
    with pytest.raises(DataError, match=r"a\.jsonl:3: length: \d+ tokens; expected at most 40\. Raise --max-length"):
        load([source], encoder(), max_tokens=40)
    dropped = load([source], encoder(), max_tokens=40, overlong="drop")
    assert (dropped.rows, dropped.dropped, dropped.truncated) == (2, 2, 0)
    cut = load([source], encoder(), max_tokens=40, overlong="truncate")
    assert (cut.rows, cut.dropped, cut.truncated) == (3, 1, 1)
    assert cut.longest == 40
    whole = load([source], encoder())
    np.testing.assert_array_equal(cut.examples[2].ids, whole.examples[2].ids[:40])
    assert cut.examples[2].digest != whole.examples[2].digest
    with pytest.raises(DataError, match="no row is left"):
        load([source], encoder(), max_tokens=2, overlong="drop")
    with pytest.raises(ConfigError, match="at least 2"):
        load([source], encoder(), max_tokens=1)


def test_digests_name_contents_and_not_places(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", numbered(3)), write(tmp_path / "b.jsonl", numbered(3))
    first, second = load([one], encoder()), load([two], encoder())
    assert [d.digest for d in first.examples] == [d.digest for d in second.examples]
    assert first.digest == second.digest
    assert load([Source(path=one.path, weight=2)], encoder()).digest != first.digest
    assert load([write(tmp_path / "c.jsonl", numbered(3)[::-1])], encoder()).digest != first.digest
    # the same tokens, otherwise trained
    text = load([write(tmp_path / "d.jsonl", [{"text": "0: 0"}])], encoder()).examples[0]
    np.testing.assert_array_equal(text.ids, first.examples[0].ids)
    assert text.digest != first.examples[0].digest


def sides(pair: tuple[Dataset, Dataset]) -> tuple[set[str], set[str]]:
    return tuple({d.digest for d in dataset.examples} for dataset in pair)  # type: ignore[return-value]


def test_a_row_stays_on_its_side_when_others_come_and_go(tmp_path: Path) -> None:
    some = sides(split(load([write(tmp_path / "a.jsonl", numbered(200))], encoder()), 0.2))
    more = sides(split(load([write(tmp_path / "b.jsonl", numbered(300, start=-50)[::-1])], encoder()), 0.2))
    assert some[0] < more[0]
    assert some[1] < more[1]
    assert not more[0] & more[1]
    assert 40 < len(more[1]) < 80


def test_equal_rows_stay_together_and_weights_are_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbered(60) * 3)
    train, valid = split(load([Source(path=source.path, weight=2.5)], encoder()), 0.3)
    assert train.rows + valid.rows == 180
    assert train.rows % 3 == valid.rows % 3 == 0
    assert train.parts[0].weight == valid.parts[0].weight == 2.5
    assert train.digest != valid.digest


def test_a_split_with_an_empty_side_is_an_error(tmp_path: Path) -> None:
    dataset = load([write(tmp_path / "a.jsonl", numbered(1))], encoder())
    for fraction in (0.001, 0.999):
        with pytest.raises(DataError, match=r"leaves no row for (training|validation)"):
            split(dataset, fraction)
    for fraction in (0.0, 1.0, 5.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            split(dataset, fraction)


def test_no_source_is_an_error() -> None:
    with pytest.raises(DataError, match="--data"):
        load([], encoder())


class Heard:
    """A display that keeps how far each task was said to be."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}
        self.totals: dict[str, float | None] = {}

    def begin(self, task: progress.Task) -> None:
        self.seen[task.what], self.totals[task.what] = [], task.total

    def moved(self, task: progress.Task) -> None:
        self.seen[task.what].append(task.done)

    def end(self, task: progress.Task) -> None: ...


def test_progress_counts_up_to_all_bytes_and_then_to_all_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbered(12_000))
    size, heard = Path(source.path).stat().st_size, Heard()
    with progress.shown(heard):
        load([source, source], encoder())
    assert heard.totals == {"reading data": 2 * size, "tokenizing": 24_000}
    assert heard.seen["tokenizing"][-1] == 24_000
    assert len(heard.seen["tokenizing"]) > 20
    assert heard.seen["reading data"][-1] > size
    for counts in heard.seen.values():
        assert counts == sorted(counts)


def test_long_rows_are_tokenized_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_BATCH_CHARACTERS", 1000)
    rows = [{"text": "abc " * count} for count in (150, 150, 10, 60, 100, 300, 1)]
    heard = Heard()
    with progress.shown(heard):
        load([write(tmp_path / "a.jsonl", rows)], encoder())
    assert heard.seen["tokenizing"] == [1, 4, 5, 6, 7], "600; 600 + 40 + 240; 400; 1,200; 4 characters"


@needs_shared
def test_the_real_sets_load_and_every_answer_is_trained() -> None:
    begin = time.perf_counter()
    e2e = load([Source(path=str(SHARED / "e2e" / "valid.jsonl"))], encoder())
    gsm8k = load([Source(path=str(SHARED / "gsm8k" / "train.jsonl"))], encoder())
    assert time.perf_counter() - begin < 60
    assert gsm8k.rows == 7473
    assert gsm8k.kinds == {"chat": 7473}
    for dataset, column in ((e2e, "completion"), (gsm8k, "messages")):
        lines = Path(dataset.parts[0].name).read_text().rstrip("\n").split("\n")
        for example, line in list(zip(dataset.examples, lines, strict=True))[::97]:
            value = json.loads(line)[column]
            answer = value if isinstance(value, str) else value[-1]["content"]
            decoded = str(encoder().tokenizer.decode(example.ids[example.loss_mask].tolist()))
            assert decoded == answer + "<|endoftext|>"
