"""The reader of headers agrees with that of the package gguf."""

import gguf
import numpy as np
import pytest

from cats.errors import FormatError, StorageError
from cats.formats.gguf import read_header


@pytest.fixture
def file(tmp_path):
    """A file with settings and lists of every kind, and tensors of several."""
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for number, (name, value) in enumerate(
        {"uint8": 1, "int8": -1, "uint16": 2, "int16": -2, "uint32": 3, "int32": -3}.items()
    ):
        getattr(writer, f"add_{name}")(f"test.{number}", value)
    writer.add_uint64("test.uint64", 2**60)
    writer.add_int64("test.int64", -(2**60))
    writer.add_float32("test.float32", 0.5)
    writer.add_float64("test.float64", 1e-300)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "grüße")
    writer.add_array("test.strings", ["a", "", "bcd"])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_array("test.floats", [1.5, 2.5])
    rng = np.random.default_rng(0)
    writer.add_tensor("matrix", rng.normal(size=(3, 64)).astype(np.float32))
    writer.add_tensor("vector", rng.normal(size=5).astype(np.float16))
    blocks = gguf.quantize(
        rng.normal(size=(2, 3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1
    )
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_settings_and_tensors_are_those_of_the_library(file):
    header, reader = read_header(file), gguf.GGUFReader(file)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or field.types[0] == gguf.GGUFValueType.ARRAY:
            continue
        assert header.settings[name] == field.contents()
    assert "test.strings" not in header.settings
    assert header.tensors.keys() == {t.name for t in reader.tensors}
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert found.kind == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert np.array_equal(found.data, tensor.data.view(np.uint8))


def test_files_that_are_not_whole_are_refused(file, tmp_path):
    data = file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for keep in (0, 3, 10, 30, 100, 300, len(data) - 64):
        damaged.write_bytes(data[:keep])
        with pytest.raises(FormatError, match="not a whole GGUF file"):
            read_header(damaged)
    damaged.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + data[8:])
    with pytest.raises(FormatError, match="version 9"):
        read_header(damaged)
    with pytest.raises(StorageError, match="cannot be read"):
        read_header(tmp_path / "none.gguf")
