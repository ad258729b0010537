import json
from pathlib import Path

import pytest

from cats.errors import FormatError
from cats.evaluation.profile import profile
from cats.results import ProfileRecord
from tests import models

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"


def test_committed_profiles_and_what_is_saved_now_are_read(tmp_path):
    files = sorted(COMMITTED.rglob("profile*.json"))
    assert files
    assert all(ProfileRecord.load(path).layers for path in files)
    measured = profile(models.make_model(), [models.make_ids()])
    measured.save(tmp_path / "profile.json", model="tiny", text="a text", block=8, cats=None)
    read = ProfileRecord.load(tmp_path / "profile.json")
    assert [layer.name for layer in read.layers] == [layer.name for layer in measured.layers]
    assert read.tokens == measured.tokens


CHANGES = {
    "missing": (lambda block: block.pop("near"), "near: field required"),
    "unknown": (lambda block: block.update(colour="red"), "colour: "),
    "of a layer": (lambda block: block["layers"][1].update(zero="0"), r"layers\.1\.zero: input"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_profile_that_breaks_its_schema_is_named_with_its_field(tmp_path, change, message):
    block = json.loads(next(iter(sorted(COMMITTED.rglob("profile*.json")))).read_text())
    change(block)
    (tmp_path / "profile.json").write_text(json.dumps(block))
    with pytest.raises(FormatError, match=rf"profile\.json: {message}"):
        ProfileRecord.load(tmp_path / "profile.json")
