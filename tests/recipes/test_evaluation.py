import cats
from cats.recipes import compare_perplexities
from tests import models

BATCHES = models.make_ids(rows=4).split(2)


def test_dense_and_sparse_are_measured_on_the_same_text(model, progress):
    dense = compare_perplexities(model, BATCHES)
    assert dense.dense == cats.metrics.perplexity(model, BATCHES)
    assert (dense.sparse, dense.method, dense.realized_sparsity) == (None, None, {})
    cats.sparsify_(model, cats.calibrate(model, BATCHES, target_sparsity=0.9))
    sparse = cats.metrics.perplexity(model, BATCHES)
    measured = compare_perplexities(model, BATCHES, progress=progress)
    assert (measured.dense, measured.sparse) == (dense.dense, sparse)
    assert (measured.method, measured.target_sparsity) == ("cats", 0.9)
    assert all(0.8 < share < 1 for share in measured.realized_sparsity.values())
    assert progress.tracked == [("sparse perplexity", 2), ("dense perplexity", 2)]
