"""The structs that launches pass are those of the CUDA sources."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

import cats.ops
from cats.errors import UnsupportedModelError
from cats.ops.attention.cuda import AttentionArguments
from cats.ops.attention.rows import AttentionRowsArguments
from cats.ops.choice.cuda import ChoiceArguments
from cats.ops.choice.rows import ChoiceRowsArguments
from cats.ops.cuda.arguments import Arguments, Pointer, address, with_stamps
from cats.ops.cuda.residual import Residual
from cats.ops.cuda.runs import Deal
from cats.ops.embedding.cuda import EmbeddingArguments
from cats.ops.embedding.rows import EmbeddingRowsArguments
from cats.ops.linear.cuda import LinearArguments
from cats.ops.linear.quantised import QuantisedLinearArguments
from cats.ops.linear.rows import LinearRowsArguments
from cats.ops.mlp.cuda.arguments import MLPArguments
from cats.ops.mlp.cuda.quantised import QuantisedMLPArguments
from cats.ops.mlp.cuda.rows import MLPRowsArguments
from cats.ops.rms_norm.rows import NormRowsArguments

OPS = Path(cats.ops.__file__).parent
STRUCTS = {
    "attention/attention.cu": AttentionArguments,
    "attention/attention_rows.cu": AttentionRowsArguments,
    "choice/choose.cu": ChoiceArguments,
    "choice/choose_rows.cu": ChoiceRowsArguments,
    "embedding/embedding.cu": EmbeddingArguments,
    "embedding/embedding_rows.cu": EmbeddingRowsArguments,
    "linear/linear.cu": LinearArguments,
    "linear/linear_rows.cu": LinearRowsArguments,
    "linear/quantised.cu": QuantisedLinearArguments,
    "mlp/cuda/gated_mlp.cu": MLPArguments,
    "mlp/cuda/mlp_rows.cu": MLPRowsArguments,
    "mlp/cuda/quantised_mlp.cu": QuantisedMLPArguments,
    "rms_norm/norm_rows.cu": NormRowsArguments,
    "cuda/residual.cuh": Residual,
    "cuda/runs.cuh": Deal,
}
TYPES = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "int64": ctypes.c_int64,
    "Residual": Residual,
    "Deal": Deal,
}


def members(source):
    """Name and type of each member of the struct in a source, in the order of the source."""
    text = re.sub(r"//.*", "", (OPS / source).read_text())
    body = re.search(r"struct (?:Arguments : Traced|Residual|Deal) \{(.*?)\};", text, re.DOTALL)[1]
    constants = dict(re.findall(r"\b(MATRICES) = (\d+)", text))
    for declaration in body.split(";"):
        if not declaration.strip():
            continue
        kind, name, count = re.fullmatch(
            r"\s*(.+?[ *])(\w+)(?:\[(\w+)\])?\s*", declaration
        ).groups()
        ctype = Pointer if "*" in kind else TYPES[kind.removeprefix("const ").strip()]
        yield name, ctype * int(constants[count]) if count else ctype


@pytest.mark.parametrize("source", STRUCTS)
def test_names_order_and_types_are_those_of_the_source(source):
    # ctypes makes one type of an array for each element and length
    assert tuple(STRUCTS[source]._fields_) == tuple(members(source))


def test_every_kernel_has_a_struct():
    sources = {str(path.relative_to(OPS)) for path in OPS.rglob("*.cu")}
    assert sources == {name for name in STRUCTS if name.endswith(".cu")}


@pytest.mark.parametrize("kind", STRUCTS.values())
def test_a_wrong_name_is_an_error(kind):
    with pytest.raises(AttributeError):
        kind(no_such_member=1)


def test_stamps_come_before_the_other_members():
    arguments = EmbeddingArguments(table=16, count=3)
    stamps = torch.zeros(4, dtype=torch.int64)
    traced = with_stamps(arguments, stamps)
    assert isinstance(traced, Arguments)
    assert bytes(traced) == bytes(Pointer(stamps.data_ptr())) + bytes(arguments)


def test_a_view_that_is_not_aligned_is_refused():
    assert address(None) == 0
    tensor = torch.zeros(8)
    assert address(tensor[1:], 4) == tensor.data_ptr() + 4
    with pytest.raises(UnsupportedModelError, match="expected a multiple of 16"):
        address(tensor[1:])
