import gzip
import json
import sys

import pytest

from cats.errors import ConfigError, DataError, StorageError
from cats.finetuning.sources import Source, read_rows, read_texts


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


def texts(name, **kwargs):
    return [*read_texts(Source.parse(name), **kwargs)]


def test_text_file_is_one_text(write):
    assert texts(write("a.txt", "one\ntwo\n")) == ["one\ntwo\n"]
    assert texts(write("a.txt.gz", "one\ntwo\n")) == ["one\ntwo\n"]


@pytest.mark.parametrize("percent", [1, 33, 50, 99])
def test_parts_share_no_line_and_leave_none_out(write, percent):
    content = "".join(f"line {i}\n" for i in range(50))
    name = write("a.txt", content)
    [first], [second] = texts(f"{name}[:{percent}%]"), texts(f"{name}[{percent}%:]")
    assert first + second == content
    assert first.endswith("\n")


def test_rows_give_their_text_column(write):
    rows = "".join(json.dumps({"content": f"t{i}", "url": "u"}) + "\n" for i in range(4))
    for name in (write("a.jsonl", rows), write("a.jsonl.gz", rows)):
        assert texts(name) == ["t0", "t1", "t2", "t3"]
        assert texts(f"{name}[50%:]") == ["t2", "t3"]
        assert texts(name, column="url") == ["u"] * 4


def test_parquet_rows_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(Source(str(tmp_path / "a.parquet")), ["question", "answer"]) == rows


BAD = {
    "no text column": ('{"body": "x"}\n', DataError, r"row 1: no column text or content.*body"),
    "not json": ("hello\n", DataError, "line 1: not JSON"),
    "not an object": ("[1]\n", DataError, "line 1: expected an object"),
}


@pytest.mark.parametrize(("content", "error", "message"), BAD.values(), ids=BAD)
def test_bad_lines_are_named(write, content, error, message):
    with pytest.raises(error, match=message):
        texts(write("a.jsonl", content))


def test_missing_column_is_named(write):
    name = write("a.jsonl", '{"question": "q", "answer": "a"}\n{"question": "q"}\n')
    with pytest.raises(DataError, match=r"row 2: no answer; there are \['question'\]"):
        read_rows(Source(name), ["question", "answer"])


def test_no_rows_is_an_error(write):
    with pytest.raises(DataError, match="no rows"):
        read_rows(Source(write("a.jsonl", "")), ["question"])
    with pytest.raises(DataError, match="expected rows"):
        read_rows(Source(write("a.txt", "x")), ["question"])


def test_missing_file_is_not_taken_for_a_data_set():
    for name in ("absent.txt", "/no/such/file", "./data"):
        with pytest.raises(StorageError, match="no such file"):
            texts(name)


@pytest.mark.parametrize("name", ["a.txt[60%:40%]", "a.txt[:101%]"])
def test_impossible_parts_are_refused(name):
    with pytest.raises(DataError, match="expected a part"):
        Source.parse(name)


@pytest.mark.parametrize("rows", ["", '{"text": " "}\n{"text": ""}\n'])
def test_rows_without_text_name_their_file(tmp_path, rows):
    path = tmp_path / "e.jsonl"
    path.write_text(rows)
    with pytest.raises(DataError, match=r"e\.jsonl: holds no text"):
        texts(str(path))


def test_data_set_without_a_network_is_a_storage_error():
    pytest.importorskip("datasets")
    with pytest.raises(StorageError, match="no/such-data-set"):
        texts("no/such-data-set")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("some/set", "datasets")])
def test_absent_library_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="pip install"):
        next(read_texts(Source(name)))
