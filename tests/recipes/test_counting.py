import pytest

import cats
from cats.errors import DataError
from cats.recipes import count, counting
from tests import models

BLOCKS = models.make_ids(rows=10)


def same(a, b):
    return a.text_hash == b.text_hash and all((a.counts[n] == b.counts[n]).all() for n in a.counts)


def test_parts_add_up_and_are_continued_from_a_file(model, tmp_path, monkeypatch, progress):
    whole, path = cats.collect(model, [BLOCKS]), tmp_path / "s"
    monkeypatch.setattr(counting, "SAVE_EVERY", 1)
    count(model, BLOCKS[:4], batch_size=2, statistics=path)
    counted = count(model, BLOCKS, batch_size=2, statistics=path, progress=progress)
    assert same(counted, whole)
    assert same(cats.Statistics.load(path), whole)
    assert progress.tracked == [(f"calibrating {i}/3", 1) for i in (1, 2, 3)]


def test_counts_of_other_blocks_are_refused(model, tmp_path):
    path = tmp_path / "s"
    count(model, BLOCKS, statistics=path)
    with pytest.raises(DataError, match="more than are asked for"):
        count(model, BLOCKS[:5], statistics=path)
    with pytest.raises(DataError, match="another text"):
        count(model, BLOCKS.flip(1), statistics=path)
