import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cats
from cats import Statistics
from cats.errors import ConfigError, FormatError, ModelMismatchError
from cats.storage import load_tensors, save_tensors
from tests import models


def _model(*mlps):
    torch.manual_seed(0)
    return models.Body(*(mlps or [models.MLP()]))


def assert_equal(a, b):
    names = {field.name for field in dataclasses.fields(Statistics)} - {"counts", "fingerprints"}
    assert all(getattr(a, name) == getattr(b, name) for name in names)
    assert all(torch.equal(a.counts[name], counts) for name, counts in b.counts.items())
    assert all(torch.equal(a.fingerprints[name], f) for name, f in b.fingerprints.items())


@settings(max_examples=5, deadline=None)
@given(where=st.integers(0, 6), order=st.permutations(range(6)))
def test_parts_add_up_to_the_whole_bit_for_bit(where, order):
    model, rows = _model(), [*models.make_ids(6, 8).split(1)]
    whole = cats.collect(model, rows)
    shuffled = [rows[i] for i in order]
    parts = [cats.collect(model, part) for part in (shuffled[:where], shuffled[where:])]
    assert_equal(parts[0] + parts[1], whole)
    assert_equal(parts[1] + parts[0], whole)
    assert_equal(cats.collect(model, shuffled[where:], statistics=parts[0]), whole)


def test_ten_times_the_tokens_take_the_same_memory():
    model = _model()
    sizes = [
        sum(c.nbytes for c in cats.collect(model, [models.make_ids(n, 16)]).counts.values())
        for n in (1, 10)
    ]
    assert sizes[0] == sizes[1] <= 32e6


def test_statistics_come_back_from_their_file(tmp_path):
    statistics = cats.collect(_model(), [models.make_ids()])
    statistics.save(tmp_path / "s.safetensors")
    assert_equal(Statistics.load(tmp_path / "s.safetensors"), statistics)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("layers.0.bins"),
        lambda t: t.pop("layers.0.counts"),
        lambda t: t.pop("layers.0.fingerprint"),
        lambda t: t.update({"layers.0.counts": t["layers.0.counts"][:-1].clone()}),
        lambda t: t.update({"layers.0.bins": t["layers.0.bins"] + (1 << 22)}),
        lambda t: t.update({"layers.0.counts": t["layers.0.counts"].float()}),
    ],
    ids=["no bins", "no counts", "no fingerprint", "too few counts", "bins too large", "float"],
)
def test_damaged_file_is_a_format_error(tmp_path, change):
    path = tmp_path / "s.safetensors"
    cats.collect(_model(), [models.make_ids()]).save(path)
    tensors, block = load_tensors(path)
    change(tensors)
    save_tensors(path, tensors, block)
    with pytest.raises(FormatError):
        Statistics.load(path)


def test_thresholds_file_is_no_statistics_file(tmp_path):
    path = tmp_path / "t.safetensors"
    cats.calibrate(_model(), [models.make_ids()], target_sparsity=0.5).save(path)
    with pytest.raises(FormatError, match="expected statistics"):
        Statistics.load(path)


def test_statistics_of_two_models_or_methods_do_not_add():
    statistics = cats.collect(_model(), [models.make_ids()])
    torch.manual_seed(1)
    others = [
        cats.collect(models.Body(models.MLP()), []),
        cats.collect(_model(models.MLP(), models.MLP()), []),
        cats.collect(_model(), [], method="relu"),
    ]
    for other in others:
        with pytest.raises(ModelMismatchError):
            statistics + other


def test_hash_tells_texts_apart_and_not_orders():
    model, ids = _model(), models.make_ids()
    same, other = ids.flip(0), ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 256
    hashes = [cats.collect(model, [x]).text_hash for x in (ids, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_one_pass_serves_every_target_with_rising_thresholds():
    statistics = cats.collect(_model(), [models.make_ids()])
    thresholds = [float(statistics.config(t / 100).thresholds["layers.0"]) for t in range(1, 100)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < thresholds[-1]
    for target in (0, 1):
        with pytest.raises(ConfigError):
            statistics.config(target)


def test_statistics_of_models_that_differ_outside_their_mlps_do_not_add():
    ids = [models.make_ids()]
    one, other = _model(), _model()
    with torch.no_grad():
        other.embed.weight[5, 3] += 1
    mine = cats.collect(one, ids)
    with pytest.raises(ModelMismatchError, match="other weights or dtypes differ"):
        mine + cats.collect(other, ids)
    with pytest.raises(ModelMismatchError, match="of an older release"):
        mine + dataclasses.replace(mine, weights="")
