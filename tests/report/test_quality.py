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
    """Dense, CATS and another method of one model: perplexity, and the time of a token."""
    model = dict(model="tiny", dtype="float32")
    variants = {
        "dense": (20.0, 20.0),
        "cats-50": (25.0, 16.0),
        "cats-70": (40.0, 13.0),
        "cascade-67": (20.4, 16.5),
        "cascade-50": (21.0, 14.0),
    }
    results = [perplexity(name, value, **model) for name, (value, _) in variants.items()]
    for name, (_, milliseconds) in variants.items():
        loop = dict(variant="cats.generate, eager", sparsity=0.5 * (name != "dense"))
        results.append(demo_time(milliseconds, model_variant=name, **loop))
    results.append(demo_time(50.0, model_variant="dense", variant="model.generate"))
    return Material(results=results)


def test_one_sentence_says_what_was_gained_for_what(demo):
    (gain,) = demo.tradeoffs()
    assert gain.sentence() == (
        "cascade-50 decodes 1.43 times as fast as the dense model (71.4 instead of 50.0 tokens per "
        "second), for +5.0% of perplexity on held-out text (21.00 instead of 20.00); CATS-70 "
        "decodes 1.54 times as fast, for +100.0%."
    )


def test_figure_has_a_line_for_each_method_from_the_dense_model(demo):
    (gain,) = demo.tradeoffs()
    drawn = texts(tradeoff(gain, "f"))
    for label in ("dense", "cats-50", "cats-70", "cascade-67", "cascade-50"):
        assert drawn.count(label) == 1
    assert {"cats, cats.generate, eager", "cascade, cats.generate, eager"} <= {*drawn}


def test_times_of_older_files_are_told_by_their_sparsity():
    model = dict(model="tiny", dtype="float32")
    results = [perplexity("dense", 20.0, **model), perplexity("cats-50", 25.0, **model)]
    results += [demo_time(20.0), demo_time(16.0, sparsity=0.5)]
    (gain,) = Material(results=results).tradeoffs()
    assert gain.sentence().startswith("CATS-50 decodes 1.25 times as fast")


def test_speed_of_another_model_is_no_tradeoff(demo):
    other = [r for r in demo.results if r.benchmark == "perplexity"]
    times = [
        r.model_copy(update={"model": "another"}) for r in demo.results if r.benchmark == "demo"
    ]
    assert Material(results=[*other, *times]).tradeoffs() == []
