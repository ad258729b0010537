import pytest

import cats
from cats.errors import ConfigError
from cats.model import is_sparse
from cats.recipes import largest_sparsity, max_loss
from tests import models

# The search starts on the first batch.
BATCHES = models.make_ids(rows=8).split(4)


def search(monkeypatch, model, progress, limit, loss):
    """Search where perplexity is ``10 * (1 + loss(share, "part" or "rest"))``."""
    measured = []

    def fake(model, batches):
        where = "part" if next(iter(batches)) is BATCHES[0] else "rest"
        share = getattr(model.config, "cats", {}).get("target_sparsity", 0)
        measured.append((round(100 * share), where))
        return 10 * (1 + (loss(share, where) if share else 0))

    statistics = cats.collect(model, BATCHES)
    monkeypatch.setattr(max_loss, "perplexity", fake)
    largest = largest_sparsity(
        model, lambda p: statistics.config(p / 100), BATCHES, max_loss=limit, progress=progress
    )
    return largest, measured


def test_the_largest_sparsity_within_the_limit_is_found(monkeypatch, model, progress):
    # 1 % of loss for each 10 % of sparsity
    largest, measured = search(
        monkeypatch, model, progress, 0.037001, lambda share, where: share / 10
    )
    assert largest.config.target_sparsity == 0.37
    assert largest.perplexity_dense == pytest.approx(10)
    # most shares are compared on a part alone, and nothing is measured twice
    assert [share for share, where in measured if where == "rest"] == [0, 37, 38]
    assert len(measured) == len(set(measured))
    assert not is_sparse(model)


@pytest.mark.parametrize("bias", [-0.9, -0.2, 0.3, 0.9])
def test_the_limit_holds_on_the_whole_text_where_a_part_misleads(
    monkeypatch, model, progress, bias
):
    def loss(share, where):
        return share / 10 * (1 + bias * (1 if where == "part" else -0.5))

    largest, _ = search(monkeypatch, model, progress, 0.037001, loss)

    def of_both(share):
        # of two batches, one is the part
        return ((1 + loss(share, "part")) * (1 + loss(share, "rest"))) ** 0.5 - 1

    share = largest.config.target_sparsity
    assert of_both(share) <= 0.037001 < of_both(share + 0.01)


@pytest.mark.parametrize(("limit", "share"), [(0.0995, 0.99), (0.0015, 0.01)])
def test_both_ends_are_reached(monkeypatch, model, progress, limit, share):
    largest, _ = search(monkeypatch, model, progress, limit, lambda share, where: share / 10)
    assert largest.config.target_sparsity == share


def test_a_limit_that_nothing_keeps_is_an_error_and_the_model_dense(monkeypatch, model, progress):
    message = "even 1 % sparsity raises the held-out perplexity by more than 1.00%"
    with pytest.raises(ConfigError, match=message):
        search(monkeypatch, model, progress, 0.01, lambda share, where: 0.5)
    assert not is_sparse(model)


def test_a_search_that_is_stopped_leaves_the_model_dense(monkeypatch, model, progress):
    def stop(share, where):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(monkeypatch, model, progress, 0.01, stop)
    assert not is_sparse(model)


def test_the_search_says_first_how_long_it_takes_and_then_what_it_does(
    monkeypatch, model, progress
):
    search(monkeypatch, model, progress, 0.037001, lambda share, where: share / 10)
    (line,) = progress.lines
    assert line.startswith("One perplexity takes about 1 s on a part of the held-out text and 1 s")
    assert progress.tracked[:3] == [
        ("at 0 %, a part", 1),
        ("at 0 %, the rest", 1),
        ("at 50 %, a part", 1),
    ]
