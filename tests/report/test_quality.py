import pytest

from cats.report.material import Material
from cats.report.page_tables import has_lines
from cats.report.quality import tradeoff
from tests.records import demo_time, mlp_time, perplexity
from tests.report.svg import texts

pytest.importorskip("matplotlib", reason="needs the extra report")


def test_one_point_of_each_loop_is_no_line():
    times = [
        mlp_time(20.0, variant=variant, sparsity=sparsity)
        for variant, sparsity in [("dense_eager", 0.0), ("cpu", 0.5)]
    ]
    assert not has_lines(times)
    assert has_lines([*times, mlp_time(20.0, variant="cpu", sparsity=0.7)])


@pytest.fixture
def demo():
    """Dense and CATS-50 of one model: perplexity, and the time of a token through two loops."""
    model = dict(model="tiny", dtype="float32")
    results = [perplexity("dense", 20.0, **model), perplexity("cats-50", 25.0, **model)]
    for loop, milliseconds in (("cats.generate, eager", 20.0), ("model.generate", 50.0)):
        for sparsity, share in ((0.0, 1.0), (0.5, 0.8)):
            time = milliseconds * share
            results.append(demo_time(time, variant=loop, sparsity=sparsity))
    return Material(results=results)


def test_one_sentence_says_what_was_gained_for_what(demo):
    (gain,) = demo.tradeoffs()
    assert gain.sentence() == (
        "CATS-50 decodes 1.25 times as fast as the dense model (62.5 instead of 50.0 tokens per "
        "second), and its perplexity on held-out text is 25.00 instead of 20.00."
    )


def test_figure_has_dense_and_sparse_points_of_each_loop(demo):
    (gain,) = demo.tradeoffs()
    drawn = texts(tradeoff(gain, "f"))
    assert drawn.count("dense") == drawn.count("cats-50") == 2
    assert {"cats.generate, eager", "model.generate"} <= {*drawn}


def test_speed_of_another_model_is_no_tradeoff(demo):
    other = [r for r in demo.results if r.benchmark == "perplexity"]
    times = [
        r.model_copy(update={"model": "another"}) for r in demo.results if r.benchmark == "demo"
    ]
    assert Material(results=[*other, *times]).tradeoffs() == []
