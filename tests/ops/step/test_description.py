"""The structs that describe a token are those of the C++ source."""

import ctypes
import re
from pathlib import Path

import pytest

import cats.ops.step
from cats.ops.step.description import StepColumns, StepLayer, StepMatrix, StepModel

HEADER = Path(cats.ops.step.__file__).with_name("description.h")
TYPES = {
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "StepMatrix": StepMatrix,
    "StepColumns": StepColumns,
}


@pytest.mark.parametrize("struct", [StepMatrix, StepColumns, StepLayer, StepModel])
def test_fields_have_the_names_order_and_types_of_the_source(struct):
    text = re.sub(r"//.*", "", HEADER.read_text())
    body = re.search(rf"struct {struct.__name__} \{{(.*?)\n\}};", text, re.DOTALL)[1]
    expected = []
    for kind, pointer, names in re.findall(r"^\s*(?:const )?(\w+)(\*?) ([\w, ]+);", body, re.M):
        for name in names.split(", "):
            expected.append((name, ctypes.c_void_p if pointer else TYPES[kind]))
    fields = [
        (name, ctypes.c_void_p if hasattr(kind, "contents") else kind)
        for name, kind in struct._fields_
    ]
    assert fields == expected
