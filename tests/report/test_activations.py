import re

import pytest

from cats.report.activations import histograms, layer_labels
from cats.results import ProfileRecord
from tests.report.test_page import profile

pytest.importorskip("matplotlib", reason="needs the extra report")


def texts(svg):
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def record(given):
    fields = {name: given[name] for name in given.keys() - {"version", "kind"}}
    return ProfileRecord.model_validate(fields)


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
    named = [text for text in texts(histograms(record(given), "f")) if text.startswith("layer")]
    assert named == [f"layer {i}" for i in expected]
