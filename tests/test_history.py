import json
from pathlib import Path

import pytest

from cats.errors import FormatError, StorageError
from cats.history import History, Point, is_history, recovered

POINTS = [
    Point(step=0, tokens=0, losses={"a": 3.0}),
    Point(step=5, tokens=640, train_loss=2.5, learning_rate=1e-4, losses={"a": 2.0}, sparsity=0.5),
]


def test_history_comes_back(tmp_path):
    history = History(settings={"method": "cats"}, environment={"device": "x"}, points=POINTS)
    history.save(tmp_path / "h.jsonl")
    assert History.load(tmp_path / "h.jsonl") == history
    history.complete = True
    history.save(tmp_path / "h.jsonl")
    assert History.load(tmp_path / "h.jsonl").complete


BAD = {
    "other file": '{"benchmark": "mlp"}\n',
    "newer": '{"kind": "finetuning", "version": 9, "settings": {}, "environment": {}}\n',
    "not json": "hello\n",
    "other points": '{"kind": "finetuning", "version": 1, "settings": {}, "environment": {}}\n'
    '{"steps": 1}\n',
    "no settings": '{"kind": "finetuning", "version": 1, "environment": {}}\n',
    "no environment": '{"kind": "finetuning", "version": 1, "settings": {}}\n',
    "empty": "",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "h.jsonl").write_text(text)
    with pytest.raises(FormatError, match=r"h\.jsonl"):
        History.load(tmp_path / "h.jsonl")


POINTS_THAT_ARE_NONE = {
    "type": ({"step": "1", "tokens": 2}, "step: input should be a valid integer"),
    "inside": ({"step": 1, "tokens": 2, "losses": {"c4": "low"}}, "losses.c4: input should be"),
    "missing": ({"step": 1}, "tokens: field required"),
    "unknown": ({"step": 1, "tokens": 2, "colour": 3}, "colour: "),
}


@pytest.mark.parametrize(
    ("point", "message"), POINTS_THAT_ARE_NONE.values(), ids=POINTS_THAT_ARE_NONE
)
def test_point_that_is_none_is_named_with_file_line_and_field(tmp_path, point, message):
    path = tmp_path / "h.jsonl"
    History(settings={}, points=POINTS).save(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(point)]) + "\n")
    with pytest.raises(FormatError, match=f"line {len(lines) + 1}: not a point of.*{message}"):
        History.load(path)


def test_committed_histories_are_read_and_written_again_byte_for_byte(tmp_path):
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    files = [path for path in sorted(folder.rglob("*.jsonl")) if is_history(path)]
    assert files
    for path in files:
        History.load(path).save(tmp_path / "again.jsonl")
        assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        History.load(tmp_path / "absent.jsonl")


def test_recovered_loss_is_counted_against_a_dense_run_of_the_same_weights_and_text():
    def history(method, losses, **settings):
        points = [Point(step=i, tokens=i, losses={"c4": loss}) for i, loss in enumerate(losses)]
        return History(settings={"method": method, "weights": "a"} | settings, points=points)

    sparse = history("cats", (4.0, 3.0))
    assert recovered(sparse, [history("dense", (3.0, 2.5))], "c4") == pytest.approx(2 / 3)
    for other in (
        history("dense", (3.0, 2.5), weights="b"),
        history("dense", (3.0, 2.5), evaluations={"c4": {"hash": "other"}}),
    ):
        assert recovered(sparse, [other], "c4") is None
