"""The CPU kernel of ``cats::packed_linear``, in each instruction set."""

import threading

import pytest
import torch
from torch.nn import functional as F

from cats.errors import BackendError
from cats.ops.packed_linear import PackedLinearArguments, call, cpu
from cats.ops.packed_linear.backends import BACKENDS
from cats.ops.quantised import RowLayout, numbers_of_rows, pack_rows
from tests.ops.cases import DTYPES, TOLERANCE, needs_cpu_kernels
from tests.ops.packed_cases import FEW_KINDS, HALF_BLOCKS, KINDS, Kind, ids, make_linear

# (rows, columns): less than a block, a unit or a group of each, whole ones, and remainders
SIZES = [(1, 1), (3, 37), (7, 256), (70, 131), (9, 1029)]


def exact(arguments: PackedLinearArguments) -> torch.Tensor:
    """The result in float64, of numbers that nothing has rounded."""
    a = arguments
    numbers = numbers_of_rows(a.rows, a.layout, torch.float32, torch.float32).double()
    return F.linear(a.x.double(), numbers, None if a.bias is None else a.bias.double())


def assert_matches(arguments: PackedLinearArguments) -> None:
    found, dtype = call(arguments, "cpu"), arguments.x.dtype
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact(arguments), **TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ids(KINDS + HALF_BLOCKS))
def test_instruction_set_matches(instruction_set, kind):
    for rows, columns in SIZES:
        assert_matches(make_linear(1, rows, columns, kind, dtype=torch.float32)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", range(1, 9))
def test_instruction_set_matches_in_each_batch_and_dtype(instruction_set, batch, dtype):
    for kind in FEW_KINDS + HALF_BLOCKS:
        for bias in (False, True):
            assert_matches(make_linear(batch, 11, 333, kind, dtype=dtype, bias=bias)[0])


@pytest.mark.parametrize("kind", ids(KINDS + HALF_BLOCKS))
def test_special_scales_and_zero_points_are_those_of_the_format(instruction_set, kind):
    for batch in (1, 5):
        arguments, expected = make_linear(
            batch, 9, 200, kind, dtype=torch.float32, bias=False, special=True
        )
        found = call(arguments, "cpu")
        finite = expected.isfinite()
        assert not finite.all()
        assert torch.equal(found.nan_to_num()[~finite], expected.nan_to_num()[~finite])
        assert torch.equal(found.isnan(), expected.isnan())
        # numbers of very different sizes: what may be lost is a share of the largest
        numbers = numbers_of_rows(arguments.rows, arguments.layout, torch.float32, torch.float32)
        terms = F.linear(arguments.x.abs(), numbers.abs())
        assert ((found - exact(arguments)).abs() <= 1e-6 * terms)[finite].all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("kind", ids(FEW_KINDS))
def test_nan_infinite_and_huge_inputs_show_in_their_token_alone(instruction_set, kind, value):
    arguments, _ = make_linear(3, 9, 200, kind, dtype=torch.float32)
    usual = call(arguments, "cpu")
    for column in (7, 199):
        x = arguments.x.clone()
        x[1, column] = value
        changed = arguments._replace(x=x)
        numbers = numbers_of_rows(changed.rows, changed.layout, torch.float32, torch.float32)
        expected = F.linear(x, numbers, changed.bias)
        found = call(changed, "cpu")
        torch.testing.assert_close(found, expected, equal_nan=True, **TOLERANCE[torch.float32])
        assert torch.equal(found[::2], usual[::2])


@pytest.mark.parametrize("kind", ids([Kind(bits=8), Kind(bits=4, group_size=128)]))
def test_inputs_far_from_zero_cancel_little_more_than_in_a_sum_of_numbers(instruction_set, kind):
    arguments, _ = make_linear(2, 64, 4096, kind, dtype=torch.float32, bias=False)
    arguments = arguments._replace(x=arguments.x + 100)
    numbers = numbers_of_rows(arguments.rows, arguments.layout, torch.float32, torch.float32)
    wanted = exact(arguments)
    ours, torchs = (
        (found.double() - wanted).square().mean().sqrt()
        for found in (call(arguments, "cpu"), F.linear(arguments.x, numbers))
    )
    assert ours <= 2 * torchs


@pytest.mark.parametrize("columns", [1, 64])
def test_every_float16_scale_is_read_exactly(instruction_set, columns):
    # 64 columns: scales in whole vectors; the codes are 1, and x chooses a group
    groups = -(-columns // 32)
    scales = torch.arange(2**16).to(torch.int16).view(torch.float16).view(-1, groups)
    layout = RowLayout(
        bits=8, columns=columns, group_size=32 * (groups > 1), scale_dtype=torch.float16
    )
    rows = pack_rows(layout, torch.ones(len(scales), columns, dtype=torch.uint8), scales)
    x = torch.zeros(1, columns)
    x[0, 0] = 1
    arguments = PackedLinearArguments(x, rows, None, layout, torch.float32)
    numbers = numbers_of_rows(rows, layout, torch.float32, torch.float32)
    expected = F.linear(x, numbers)
    torch.testing.assert_close(call(arguments, "cpu"), expected, equal_nan=True, rtol=0, atol=0)


def test_results_are_rounded_to_float16_as_torch_does(instruction_set):
    # halfway between two numbers, next to that, and around the limits
    exact_halves = torch.arange(2**15).to(torch.int16).view(torch.float16).float()
    middles = (exact_halves[1:] + exact_halves[:-1]) / 2
    values = torch.cat([exact_halves, middles, torch.tensor([65519.996, 65520.0, 1e30, 1e-30])])
    values = torch.cat([values, values.nextafter(torch.tensor(0.0)), values * 1.0001])
    values = values[values.isfinite()]
    values = torch.cat([values, -values])[:, None]
    layout = RowLayout(bits=8, columns=1, group_size=0, scale_dtype=torch.float32)
    rows = pack_rows(layout, torch.ones(len(values), 1, dtype=torch.uint8), values)
    x = torch.ones(1, 1, dtype=torch.float16)
    arguments = PackedLinearArguments(x, rows, None, layout, torch.float32)
    assert torch.equal(call(arguments, "cpu")[0], values[:, 0].half())


@needs_cpu_kernels
def test_what_padding_holds_does_not_matter():
    for kind in KINDS:
        arguments, _ = make_linear(2, 5, 67, kind, dtype=torch.float32)
        layout, rows = arguments.layout, arguments.rows.clone()
        usual = call(arguments, "cpu")
        rows[:, layout.used_bytes :] = 255
        size = layout.scale_dtype.itemsize
        unused = layout.code_bytes + layout.groups * size
        rows[:, unused : layout.code_bytes + layout.padded_groups * size] = 255
        assert torch.equal(call(arguments._replace(rows=rows), "cpu"), usual)


@needs_cpu_kernels
@pytest.mark.parametrize("kind", ids(FEW_KINDS))
def test_results_are_the_same_in_any_number_of_threads(kind):
    arguments, _ = make_linear(2, 1031, 2049, kind, dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results += [call(arguments, "cpu") for _ in range(3)]
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_cpu_kernels
def test_calls_in_several_python_threads_do_not_disturb_each_other(two_threads):
    # layouts of different sizes share the memory of a thread
    cases = [
        make_linear(i + 1, 900 - 130 * i, 700 + 350 * i, FEW_KINDS[i], dtype=torch.float32)[0]
        for i in range(4)
    ]
    expected = [call(arguments, "cpu") for arguments in cases]
    wrong: list[int] = []

    def repeat(start: int) -> None:
        for step in range(60):
            i = (start + step) % 4
            if not torch.equal(call(cases[i], "cpu"), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cpu_kernels
def test_auto_leaves_larger_batches_and_empty_calls_to_dense():
    for batch, rows, expected in ((1, 7, "cpu"), (8, 7, "cpu"), (9, 7, "dense"), (0, 7, "dense")):
        arguments, _ = make_linear(batch, rows, 67, KINDS[0], dtype=torch.float32)
        assert BACKENDS.backend_for(arguments) == expected
    empty = arguments._replace(rows=arguments.rows[:0], bias=None)
    assert BACKENDS.backend_for(empty) == "dense"


@needs_cpu_kernels
def test_what_the_kernel_refuses_is_named():
    arguments, _ = make_linear(9, 7, 67, KINDS[0], dtype=torch.float32)
    with pytest.raises(BackendError, match="cpu cannot run this call: expected 1 to 8 tokens, got"):
        call(arguments, "cpu")
    arguments, _ = make_linear(1, 7, 67, KINDS[0], dtype=torch.float32)
    with pytest.raises(BackendError, match=r"expected float32, bfloat16 or float16, got .*float64"):
        call(arguments._replace(x=arguments.x.double(), bias=None), "cpu")


@needs_cpu_kernels
def test_gradients_pass_through_the_kernel():
    arguments, _ = make_linear(2, 7, 67, KINDS[1], dtype=torch.float32)
    grads = []
    for backend in ("cpu", "dense"):
        x = arguments.x.clone().requires_grad_()
        bias = arguments.bias.clone().requires_grad_()
        call(arguments._replace(x=x, bias=bias), backend).square().sum().backward()
        grads.append((x.grad, bias.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[:, 1:].contiguous(), "of x"),
        (0, lambda x: x.expand(3, -1), "of x"),
        (0, lambda x: x.expand(9, -1).contiguous(), "of x"),
        (0, lambda x: x.double(), "of x"),
        (1, lambda rows: rows[:, :64].contiguous(), "of packed rows"),
        (1, lambda rows: rows[:0], "of packed rows"),
        (1, lambda rows: rows.char(), "of rows"),
        (1, lambda rows: rows.t().contiguous().t(), "of rows"),
        (2, lambda bias: bias[1:], "of bias"),
        (2, lambda bias: bias.half(), "of bias"),
        (3, lambda bits: 5, "of packed rows"),
        (4, lambda columns: 0, "of packed rows"),
        (4, lambda columns: 10**6, "of packed rows"),
        (5, lambda group: 8, "of packed rows"),
        (6, lambda scale: 3, "of packed rows"),
        (7, lambda mode: -1, "of packed rows"),
        (8, lambda zero: 16, "of packed rows"),
    ],
)
def test_a_direct_call_that_does_not_fit_is_an_error(place, change, message):
    a, _ = make_linear(1, 7, 67, Kind(bits=4, group_size=32), dtype=torch.float32)
    operands = [a.x, a.rows, a.bias, *a.layout.numbers]
    operands[place] = change(operands[place])
    with pytest.raises(RuntimeError, match=f"shape, dtype or layout {message}"):
        torch.ops.cats._packed_linear_cpu(*operands)


@needs_cpu_kernels
def test_calls_release_their_tensors():
    arguments, _ = make_linear(2, 9, 67, KINDS[0], dtype=torch.float32)
    tensors = arguments.x, arguments.rows, arguments.bias
    before = [tensor._use_count() for tensor in tensors]
    out = call(arguments, "cpu")
    assert out._use_count() == before[0]
    operands = *tensors[:2], arguments.bias.half(), *arguments.layout.numbers
    with pytest.raises(RuntimeError, match="of bias"):
        torch.ops.cats._packed_linear_cpu(*operands)
    assert [tensor._use_count() for tensor in tensors] == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ids(KINDS + HALF_BLOCKS))
def test_numbers_are_written_out_bit_for_bit(kind, dtype):
    for rows, columns in SIZES:
        a, _ = make_linear(1, rows, columns, kind, dtype=dtype, special=rows == 7)
        assert cpu.writes_out(a.rows, torch.float32, dtype)
        expected = numbers_of_rows(a.rows, a.layout, torch.float32, dtype)
        found = cpu.dequantise_rows(a.rows, a.layout, dtype)
        assert found.dtype == dtype
        assert torch.equal(found.isnan(), expected.isnan())
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        is_number = ~expected.isnan()
        assert torch.equal(found[is_number].view(bits), expected[is_number].view(bits))


def test_numbers_in_another_arithmetic_are_written_out_by_torch():
    rows = make_linear(1, 3, 40, KINDS[0], dtype=torch.float32)[0].rows
    assert not cpu.writes_out(rows, torch.bfloat16, torch.bfloat16)
    assert not cpu.writes_out(rows, torch.float32, torch.float64)
    assert not cpu.writes_out(rows[:0], torch.float32, torch.float32)
