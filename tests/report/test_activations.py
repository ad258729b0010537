import pytest

from cats.report.activations import histograms, layer_labels
from cats.results import ProfileRecord
from tests.records import profile
from tests.report.svg import texts

pytest.importorskip("matplotlib", reason="needs the extra report")


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
    fields = profile(0.2)
    layer = fields["layers"][0]
    fields["layers"] = [layer | {"name": f"model.layers.{i}.mlp.act_fn"} for i in range(count)]
    del fields["version"], fields["kind"]
    drawing = histograms(ProfileRecord.model_validate(fields), "f")
    labels = [text for text in texts(drawing) if text.startswith("layer")]
    assert labels == [f"layer {i}" for i in expected]
