"""The Triton kernels of packed rows: numbers bit for bit, products, refusals, compilation."""

import os
import subprocess
import sys

import pytest
import torch

from cats.errors import BackendError, UnsupportedModelError
from cats.ops.packed_linear import packed_linear
from tests.ops import packed_cases
from tests.ops.cases import DTYPES, TOLERANCE
from tests.ops.packed_cases import FEW_KINDS, KINDS, Kind, make_linear, make_matrix, packed_rows
from tests.thorough import usual

triton = pytest.importorskip("triton")

from cats.ops.packed_linear import triton as backend  # noqa: E402
from tests.ops.interpreting import bfloat16_as_on_a_gpu  # noqa: E402, F401


@pytest.mark.parametrize("arithmetic", DTYPES)
@pytest.mark.parametrize("kind", packed_cases.ids(KINDS))
def test_numbers_are_those_of_the_format_bit_for_bit(kind, arithmetic, device):
    # less than a unit, and a group that is cut off in a later unit
    for columns in (67, 389):
        matrix = make_matrix(19, columns, kind, arithmetic=arithmetic, special=True)
        rows, layout = packed_rows(matrix)
        for dtype in {torch.bfloat16, arithmetic}:
            found = backend.dequantise_rows(rows.to(device), layout, arithmetic, dtype)
            expected = packed_cases.numbers(matrix, dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 64, 128, 1031])
def test_any_width_is_written_in_any_dtype(columns, device):
    for kind in (Kind(bits=4, group_size=128), Kind(bits=8)):
        matrix = make_matrix(2, columns, kind)
        rows, layout = packed_rows(matrix)
        for dtype in (torch.float16, torch.float64):
            found = backend.dequantise_rows(rows.to(device), layout, torch.float32, dtype)
            assert torch.equal(found.cpu(), packed_cases.numbers(matrix, dtype))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", packed_cases.ids(KINDS))
def test_products_are_those_of_the_numbers(kind, batch, device):
    assert_product(make_linear(batch, 5, 389, kind, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_products_of_any_dtype_and_batch(dtype, batch, device):
    for kind in FEW_KINDS:
        arguments = make_linear(batch, 37, 67, kind, dtype=dtype, device=device, bias=False)
        assert_product(arguments)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (67, 2), (3, 2100)])
def test_products_of_odd_sizes(size, device):
    for batch in (1, 2):
        assert_product(make_linear(batch, *size, KINDS[4], dtype=torch.float32, device=device))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", packed_cases.ids(FEW_KINDS))
def test_infinities_and_nan_come_out_as_in_the_definition(kind, batch, device):
    arithmetic = torch.float16
    case = dict(dtype=torch.float32, device=device, special=True, arithmetic=arithmetic)
    arguments, expected = make_linear(batch, 21, 67, kind, **case)
    assert 0 < expected.isfinite().sum() < expected.numel()
    assert_product((arguments, expected))


def test_infinite_inputs_reach_the_outputs(device):
    arguments, _ = make_linear(2, 9, 67, KINDS[3], dtype=torch.float32, device=device)
    arguments.x[0, 66] = torch.inf
    expected = packed_linear(**arguments._asdict(), backend="dense")
    assert not expected[0].isfinite().any()
    assert_product((arguments, expected))


def assert_product(case):
    arguments, expected = case
    arguments.check()
    # not through the operator, which refuses bfloat16 in the interpreter
    found = backend.packed_linear(arguments)
    dtype = arguments.x.dtype
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, equal_nan=True, **TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [1, 16])
def test_the_operator_runs_it_by_name(batch, device):
    arguments, expected = make_linear(batch, 5, 67, KINDS[3], dtype=torch.float16, device=device)
    found = packed_linear(**arguments._asdict(), backend="triton")
    torch.testing.assert_close(found.float(), expected, **TOLERANCE[torch.float16])


def test_the_interpreter_is_refused_bfloat16():
    if not triton.knobs.runtime.interpret:
        pytest.skip("a GPU computes with bfloat16")
    options = dict(dtype=torch.float32, arithmetic=torch.bfloat16)
    arguments, _ = make_linear(1, 5, 67, KINDS[3], **options)
    assert "interpreter" in backend.refuses(arguments)
    assert "interpreter" in backend.refuses(
        arguments._replace(x=arguments.x.bfloat16(), arithmetic=torch.float32)
    )


def test_bytes_that_begin_anywhere_are_read(device):
    arguments, expected = make_linear(1, 5, 67, KINDS[3], dtype=torch.float32, device=device)
    moved = torch.empty(arguments.rows.numel() + 1, dtype=torch.uint8, device=device)[1:]
    moved = moved.view_as(arguments.rows).copy_(arguments.rows)
    assert moved.data_ptr() % 16
    assert_product((arguments._replace(rows=moved), expected))


def test_a_matrix_without_rows_has_no_numbers(device):
    rows, layout = packed_rows(make_matrix(4, 67, KINDS[3]))
    none = rows[:0].to(device)
    found = backend.dequantise_rows(none, layout, torch.float32, torch.bfloat16)
    assert found.shape == (0, 67)


def test_what_it_leaves_to_others_is_refused_with_the_reason(device):
    arguments, _ = make_linear(17, 5, 67, KINDS[3], dtype=torch.float32, device=device)
    assert backend.refuses(arguments) == "the batch 17 is larger than 16"
    arguments = arguments._replace(x=arguments.x[:2])
    assert backend.refuses(arguments) is None
    assert "x is torch.float64" in backend.refuses(arguments._replace(x=arguments.x.double()))
    assert backend.refuses(arguments._replace(x=arguments.x[:0])) == "a tensor is empty"
    wide = arguments._replace(arithmetic=torch.float64)
    assert "arithmetic is torch.float64" in backend.refuses(wide)
    with pytest.raises(BackendError, match=r"arithmetic is torch\.float64"):
        packed_linear(**wide._asdict(), backend="triton")
    with pytest.raises(UnsupportedModelError, match=r"arithmetic is torch\.float64"):
        backend.dequantise_rows(arguments.rows, arguments.layout, torch.float64, torch.float32)


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    arguments, _ = make_linear(1, 5, 67, KINDS[3], dtype=torch.float32)
    assert "needs tensors on a GPU" in backend.refuses(arguments)


def test_without_gpu_and_interpreter_it_says_why(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in backend.unavailable()


@pytest.mark.parametrize("target", usual(["cuda:90", "hip:gfx942"], ["cuda:90"]))
def test_kernels_compile_without_a_gpu(target):
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.packed_linear.compile_triton", target],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (compiled,) = (line.split() for line in run.stdout.splitlines())
    assert compiled[0] == target
    assert {"cuda": "cubin", "hip": "hsaco"}[target.partition(":")[0]] in compiled
