import errno
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from cats.errors import FormatError, StorageError
from cats.storage import load_json, load_tensors, replacing, save_json, save_tensors

TENSORS = {"a.threshold": torch.tensor(0.25), "b": torch.arange(6).view(2, 3)}


def test_tensors_and_metadata_come_back(tmp_path):
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"kind": "test"})
    tensors, block = load_tensors(tmp_path / "x.safetensors")
    assert block == {"version": 1, "kind": "test"}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        load_tensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_a_format_error(tmp_path, share):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        load_tensors(path)


def test_file_of_another_program_is_a_format_error(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="not one that cats wrote"):
        load_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ('{"version": 3}', "upgrade"),
        ("{}", "no format version"),
        ("[1]", "no format version"),
        ('{"version": "1"}', "no format version"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_block_is_a_format_error(tmp_path, block, message):
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"cats": block})
    with pytest.raises(FormatError, match=message):
        load_tensors(tmp_path / "x.safetensors")


def test_newer_version_of_save_is_refused(tmp_path):
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"version": 7})
    with pytest.raises(FormatError, match="version 7"):
        load_tensors(tmp_path / "x.safetensors")


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {})
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        save_tensors(path, {"a": torch.ones(9)}, {})
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == before


_TOO_LARGE = """
import resource, signal, sys, torch
from cats.errors import StorageError
from cats.storage import replacing, save_tensors
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
big = {"x": torch.ones(100_000)}
for write in (
    lambda: save_tensors(sys.argv[1] + "/x.safetensors", big, {}),
    lambda: save_folder(),
):
    def save_folder():
        with replacing(sys.argv[1] + "/folder", directory=True) as folder:
            save_file(big, folder / "x.safetensors")
    try:
        write()
    except StorageError as error:
        print("refused")
"""


def test_full_disk_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", _TOO_LARGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "refused"]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted_folder_leaves_nothing_behind(tmp_path, error):
    def write():
        with replacing(tmp_path / "folder", directory=True) as folder:
            (folder / "x").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [*tmp_path.iterdir()] == []


def interrupted(act, at):
    """Raise KeyboardInterrupt at the line ``at``, counted from 0; return whether it was reached."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("directory", [False, True])
def test_control_c_at_any_line_leaves_nothing_or_all(tmp_path, directory):
    path = tmp_path / "x"

    def write():
        with replacing(path, directory=directory) as temporary:
            (temporary / "y" if directory else temporary).touch()

    written = []
    came = True
    while came:
        came = interrupted(write, at=len(written))
        assert {*tmp_path.iterdir()} <= {path}, f"at line {len(written)}"
        written.append(path.exists())
        if path.is_dir():
            assert [*path.iterdir()] == [path / "y"]
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    assert {*written} == {False, True}
    assert len(written) > 20


def test_folder_with_content_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("precious")
    with (
        pytest.raises(StorageError, match="exists"),
        replacing(tmp_path / "folder", directory=True),
    ):
        pass
    assert (tmp_path / "folder" / "mine").read_text() == "precious"


def test_metadata_is_json_text(tmp_path):
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"kind": "test"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cats"])["kind"] == "test"


def test_json_document_of_another_kind_or_damaged_is_refused(tmp_path):
    path = tmp_path / "a.json"
    save_json(path, "recipe", {"settings": {"seed": 1}})
    assert load_json(path, "recipe")["settings"] == {"seed": 1}
    with pytest.raises(FormatError, match="holds recipe, expected a profile"):
        load_json(path, "profile")
    path.write_text(path.read_text()[:10])
    with pytest.raises(FormatError, match="not a recipe"):
        load_json(path, "recipe")
    with pytest.raises(StorageError, match="cannot be read"):
        load_json(tmp_path / "absent.json", "recipe")
