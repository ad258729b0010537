import re

import pytest

from cats.report.figures import has_lines, histograms, layer_labels, tradeoff
from cats.report.material import Material
from tests.report.test_page import profile, quality, result

pytest.importorskip("matplotlib", reason="needs the extra report")


def texts(svg):
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_layers_are_called_by_their_number():
    names = [f"model.layers.{i}.mlp.act_fn" for i in range(3)]
    assert layer_labels(names) == ["layer 0", "layer 1", "layer 2"]
    two_towers = [f"{tower}.layers.0.mlp.act_fn" for tower in ("vision", "text")]
    assert layer_labels(two_towers) == two_towers
    assert layer_labels(["mlp.act_fn"]) == ["mlp.act_fn"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 1]), (6, [0, 1, 2, 3, 4, 5]), (30, [0, 6, 12, 17, 23, 29])],
)
def test_legend_of_magnitudes_has_first_middle_and_last_layers(count, expected):
    given = profile(0.2)
    layer = given["layers"][0]
    given["layers"] = [layer | {"name": f"model.layers.{i}.mlp.act_fn"} for i in range(count)]
    named = [text for text in texts(histograms(given, "f")) if text.startswith("layer")]
    assert named == [f"layer {i}" for i in expected]


def test_one_point_of_each_loop_is_no_line():
    times = [
        result("mlp", "time", 20.0, "us", variant=v, sparsity=s)
        for v, s in [("dense_eager", 0.0), ("cpu", 0.5)]
    ]
    assert not has_lines(times)
    assert has_lines([*times, result("mlp", "time", 20.0, "us", variant="cpu", sparsity=0.7)])


@pytest.fixture
def demo():
    """Dense and CATS-50 of one model: perplexity, and the time of a token through two loops."""
    rows = (("dense", None, 0.5), ("cats", 0.5, 0.4))
    found = [r for row in rows for r in quality(*row) if r.benchmark == "perplexity"]
    for loop, milliseconds in (("cats.generate, eager", 20.0), ("model.generate", 50.0)):
        for sparsity, share in ((0.0, 1.0), (0.5, 0.8)):
            time = milliseconds * share
            found.append(result("demo", "time", time, "ms", variant=loop, sparsity=sparsity,
                                model="tiny", dtype="float32"))  # fmt: skip
    return Material(results=found)


def test_one_sentence_says_what_was_gained_for_what(demo):
    (found,) = demo.tradeoffs()
    assert found.sentence() == (
        "CATS-50 decodes 1.25 times as fast as the dense model (62.5 instead of 50.0 tokens per "
        "second), and its perplexity on held-out text is 25.00 instead of 20.00."
    )


def test_figure_has_dense_and_sparse_points_of_each_loop(demo):
    (found,) = demo.tradeoffs()
    drawn = texts(tradeoff(found, "f"))
    assert drawn.count("dense") == drawn.count("cats-50") == 2
    assert {"cats.generate, eager", "model.generate"} <= {*drawn}


def test_speed_of_another_model_is_no_tradeoff(demo):
    other = [r for r in demo.results if r.benchmark == "perplexity"]
    times = [r for r in demo.results if r.benchmark == "demo"]
    for time in times:
        time.settings["model"] = "another"
    assert Material(results=[*other, *times]).tradeoffs() == []
