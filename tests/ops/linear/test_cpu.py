"""The CPU kernel of ``cats::linear``."""

import threading

import pytest
import torch

from cats.ops.linear.cpu import refuses
from tests.ops.cases import needs_cpu_kernels, tolerance

DTYPES = [torch.float32, torch.bfloat16]


def linear(x, weight, bias=None):
    with torch.inference_mode():
        return torch.ops.cats.linear.default(x, weight, bias)


def linear_inputs(N, D, *, dtype, batch=1, bias=True):
    """``x [B, D]``, weight and bias; outputs have about unit variance."""
    x, weight = torch.randn(batch, D, dtype=dtype), torch.randn(N, D, dtype=dtype) * D**-0.5
    return x, weight, torch.randn(N, dtype=dtype) if bias else None


def assert_linear_matches(x, weight, bias):
    actual = linear(x, weight, bias)
    wide = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(x.double(), weight.double(), wide).to(x.dtype)
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance("cpu", x.dtype))


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_matches(instruction_set, batch, dtype):
    # rows longer and shorter than a page, and than a line, are read in different ways
    for N, D in ((1, 1), (3, 5), (61, 37), (257, 131), (67, 1031), (33, 2100)):
        for bias in (False, True):
            assert_linear_matches(*linear_inputs(N, D, dtype=dtype, batch=batch, bias=bias))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_shows_nan_and_inf(instruction_set, dtype, value):
    # one value in the vector part of the row, one in its tail
    for column in (7, 69):
        x, weight, bias = linear_inputs(90, 70, dtype=dtype, batch=2)
        x[0, column] = value
        assert_linear_matches(x, weight, bias)
        x[0, column] = 1
        weight[5, column] = value
        assert_linear_matches(x, weight, bias)
        assert linear(x, weight, bias).isfinite().sum() == 2 * 89


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_same_in_any_number_of_threads(dtype):
    inputs = linear_inputs(1031, 257, dtype=dtype, batch=2)
    before, outs = torch.get_num_threads(), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        outs += [linear(*inputs) for _ in range(5)]
    torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_takes_any_leading_dimensions(dtype):
    x, weight, bias = linear_inputs(61, 37, dtype=dtype, batch=6)
    flat = linear(x, weight, bias)
    assert torch.equal(linear(x.view(2, 3, 37), weight, bias), flat.view(2, 3, 61))
    assert torch.equal(linear(x[0], weight, bias), flat[0])


@needs_cpu_kernels
@pytest.mark.parametrize("case", ["nine tokens", "float16", "transposed weight", "strided x"])
def test_linear_leaves_the_rest_to_torch(case):
    x, weight, bias = linear_inputs(61, 37, dtype=torch.float32, batch=9)
    if case == "float16":
        x, weight, bias = x[:1].half(), weight.half(), bias.half()
    elif case == "transposed weight":
        x, weight = x[:1], weight.t().contiguous().t()
    elif case == "strided x":
        x = x[::2]
    assert refuses(x, weight) is not None
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@needs_cpu_kernels
def test_linear_of_shapes_that_do_not_fit_is_an_error():
    x, weight, _ = linear_inputs(61, 37, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="torch failed to run aten::linear"):
        linear(x, weight[:, :5].contiguous())


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_linear_passes_opcheck(dtype, needs_gradient):
    x, weight, bias = linear_inputs(13, 8, dtype=dtype, batch=2)
    weight.requires_grad_(needs_gradient)
    torch.library.opcheck(torch.ops.cats.linear.default, (x, weight, bias))


@needs_cpu_kernels
def test_linear_has_torchs_gradient():
    x, weight, bias = linear_inputs(13, 8, dtype=torch.float32, batch=2)
    grads = []
    for function in (torch.ops.cats.linear.default, torch.nn.functional.linear):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        function(*inputs).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_cpu_kernels
def test_linears_in_several_python_threads_do_not_disturb_each_other(two_threads):
    cases = [
        linear_inputs(900 - 130 * i, 700 + 150 * i, dtype=DTYPES[i % 2], batch=i + 1)
        for i in range(4)
    ]
    expected = [linear(*inputs) for inputs in cases]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(30):
            if not torch.equal(linear(*cases[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
