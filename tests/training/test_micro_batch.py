"""A micro-batch: how examples are laid out in it, and the eval losses that are measured by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

from graftlm.base.loading import Base, load_base
from graftlm.training.micro_batch import BatchItem, collate, example_losses, micro_batches

ROWS = tiny.examples((9, 4, 12, 9, 7, 15))
EVAL_ROWS = tiny.examples((6, 11, 8), seed=5)


def loaded() -> Base:
    return load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")


def test_examples_are_laid_out_with_what_is_predicted_from_where() -> None:
    base = loaded()
    items = [BatchItem(row, 1, (0, i), 0.5) for i, row in enumerate(ROWS)]
    for group in micro_batches(base, items, 25):
        micro_batch = collate(base, group)
        at = 0
        for item, start in zip(group, micro_batch.segments.starts):
            ids, trained = item.example.ids, item.example.loss_mask
            assert micro_batch.ids[start : start + len(ids)].tolist() == ids.tolist()
            for t in np.flatnonzero(trained):
                if t > 0:
                    assert micro_batch.sources[at] == start + t - 1
                    assert micro_batch.labels[at] == ids[t]
                    at += 1
        assert at == len(micro_batch.labels) == sum(micro_batch.target_counts)


def test_a_label_that_is_no_token_of_the_model_is_refused_before_it_comes_to_a_device() -> None:
    base = loaded()
    row = tiny.examples((5,))[0]
    wrong = replace(row, ids=np.array([3, 4, 83, 5, 6], dtype=np.int32), loss_mask=np.ones(5, dtype=np.bool_))
    with pytest.raises(IndexError, match=r"a label is not in 0 \.\. 82"):
        collate(base, [BatchItem(wrong, 1, (0, 0), 1.0)])


def test_an_evaluation_is_each_rows_plain_loss_without_dropout() -> None:
    base = loaded()
    tiny.adapted(base, dropout=0.5)
    found = example_losses(base, EVAL_ROWS, 0, 17)  # slot 0: the bare base
    model = tiny.plain(base.folder)
    for row, example in zip(found, EVAL_ROWS):
        assert row.row_name == example.row
        assert row.target_tokens == int(example.loss_mask[1:].sum())
        assert row.loss == pytest.approx(tiny.mean_loss(model, [example]).item() * row.target_tokens, rel=1e-5)
    adapted = example_losses(base, EVAL_ROWS, 1, 17)
    plain = loaded()
    tiny.adapted(plain, dropout=0.0)
    assert [r.loss for r in adapted] == [r.loss for r in example_losses(plain, EVAL_ROWS, 1, 17)]
    assert [r.loss for r in adapted] != [r.loss for r in found]
