"""The CPU kernel of ``cats::packed_gated_mlp``, in each instruction set."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cats.errors import BackendError
from cats.functional import ACTIVATIONS
from cats.ops import GatedMLPArguments
from cats.ops.mlp import cpu as mlp_cpu
from cats.ops.mlp import reference as mlp_reference
from cats.ops.packed_mlp import PackedMLPArguments, cpu, packed_gated_mlp, reference
from cats.ops.packed_mlp.backends import BACKENDS
from cats.ops.packed_mlp.cpu import _OPERATOR, operands
from cats.ops.quantised import numbers_of_columns, numbers_of_rows
from tests.ops.cases import DTYPES, TOLERANCE, needs_cpu_kernels
from tests.ops.packed_cases import FEW_KINDS, KINDS, Kind, ids, make_mlp, routed_and_product

# (hidden, neurons): less than a vector, a block and a group, whole ones, and remainders
SIZES = [(4, 1), (36, 5), (128, 256), (132, 203)]


def wide(arguments: PackedMLPArguments) -> PackedMLPArguments:
    """The same call in float32: numbers of the matrices are not rounded to the dtype of x."""
    tensors = {
        name: value.float()
        for name in ("x", "gate_bias", "up_bias", "down_bias")
        if (value := getattr(arguments, name)) is not None
    }
    return arguments._replace(**tensors)


def assert_matches(arguments: PackedMLPArguments) -> None:
    found, dtype = packed_gated_mlp(arguments, "cpu"), arguments.x.dtype
    assert found.dtype == dtype
    expected = reference.packed_gated_mlp(wide(arguments))
    torch.testing.assert_close(found.float(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ids(KINDS))
def test_instruction_set_matches(instruction_set, kind):
    for hidden, neurons in SIZES:
        assert_matches(make_mlp(hidden, neurons, kind, dtype=torch.float32)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", range(1, 9))
def test_instruction_set_matches_in_each_batch_and_dtype(instruction_set, batch, dtype):
    options = dict(batch=batch, dtype=dtype, bias=True, product_sparsity=0.3)
    for kind in FEW_KINDS:
        assert_matches(make_mlp(132, 203, kind, **options)[0])


@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_instruction_set_matches_in_each_form(instruction_set, activation, router):
    options = dict(activation=activation, router=router, batch=3, bias=True)
    assert_matches(make_mlp(72, 104, FEW_KINDS[1], dtype=torch.float32, **options)[0])


@pytest.mark.parametrize("down", ids(KINDS))
def test_down_may_be_packed_in_another_way(instruction_set, down):
    for sparsity in (0, 0.5, 1):
        # outputs of more than one block of sums
        options = dict(sparsity=sparsity, down=down, bias=True)
        assert_matches(make_mlp(2124, 150, KINDS[4], dtype=torch.float32, **options)[0])


def test_groups_of_any_number_of_neurons_match(instruction_set):
    for size in (1, 3, 100, 129, 300):
        for kind in (Kind(bits=4), Kind(bits=8)):
            down = replace(kind, group_size=size)
            options = dict(dtype=torch.float32, down=down, sparsity=0)
            assert_matches(make_mlp(36, 300, kind, **options)[0])


def assert_matches_where_finite(arguments: PackedMLPArguments, expected: torch.Tensor) -> None:
    found = packed_gated_mlp(arguments, "cpu")
    torch.testing.assert_close(found, expected, equal_nan=True, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ids(FEW_KINDS))
def test_nan_and_infinite_inputs_show_in_their_token_alone(instruction_set, kind, value):
    arguments, _ = make_mlp(72, 104, kind, dtype=torch.float32, batch=3)
    usual = packed_gated_mlp(arguments, "cpu")
    x = arguments.x.clone()
    x[1, 69] = value
    changed = arguments._replace(x=x)
    expected = reference.packed_gated_mlp(changed)
    assert not expected[1].isfinite().all()
    assert_matches_where_finite(changed, expected)
    torch.testing.assert_close(packed_gated_mlp(changed, "cpu")[::2], usual[::2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ids(FEW_KINDS))
def test_nan_and_infinite_scales_of_down_show_where_a_neuron_is_needed(
    instruction_set, kind, value
):
    arguments, _ = make_mlp(72, 104, kind, dtype=torch.float32, batch=2)
    scales = arguments.down_scales.clone()
    scales[0, 5] = value
    scales[-1, 71] = value
    changed = arguments._replace(down_scales=scales)
    expected = reference.packed_gated_mlp(changed)
    assert not expected.isfinite().all()
    assert_matches_where_finite(changed, expected)
    # nothing of down is read where no neuron is kept
    nothing = changed._replace(thresholds=torch.full((104,), torch.inf))
    assert torch.equal(packed_gated_mlp(nothing, "cpu"), torch.zeros(2, 72))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("router", ["gate", "up"])
def test_the_other_branch_does_not_reach_tokens_that_drop_the_neuron(
    instruction_set, router, value
):
    arguments, _ = make_mlp(36, 20, FEW_KINDS[1], dtype=torch.float32, batch=2, router=router)
    # of neuron 3, which token 0 keeps and token 1 drops
    bias = torch.zeros(20)
    bias[3] = value
    name = "up_bias" if router == "gate" else "gate_bias"
    routed, _ = routed_and_product(arguments)
    arguments.thresholds[3] = routed[:, 3].abs().mean()
    x = arguments.x[routed[:, 3].abs().argsort(descending=True)]
    changed = arguments._replace(x=x, **{name: bias})
    expected = reference.packed_gated_mlp(changed)
    assert not expected[0].isfinite().any()
    assert expected[1].isfinite().all()
    assert_matches_where_finite(changed, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinite_values_of_the_router_are_kept(instruction_set, value):
    for router in ("gate", "up"):
        options = dict(router=router, bias=True, activation="relu")
        arguments, _ = make_mlp(36, 20, KINDS[1], dtype=torch.float32, **options)
        bias = arguments.up_bias if router == "up" else arguments.gate_bias
        bias[3] = value
        arguments.thresholds.fill_(1e6)
        expected = reference.packed_gated_mlp(arguments)
        assert_matches_where_finite(arguments, expected)


def test_codes_of_dropped_neurons_are_not_read(instruction_set):
    # a number of the other branch or of down that would make any sum NaN
    kind = Kind(bits=8, scale_dtype=torch.float32)
    arguments, expected = make_mlp(72, 104, kind, dtype=torch.float32)
    gate = arguments.rows
    numbers = numbers_of_rows(arguments.gate, gate, torch.float32, torch.float32)
    routed = ACTIVATIONS["silu"](F.linear(arguments.x, numbers))[0]
    dropped = routed.abs() < arguments.thresholds
    assert 0 < dropped.sum() < 104
    up = arguments.up.clone()
    scales = up[:, gate.code_bytes : gate.code_bytes + 4]
    scales[dropped] = torch.tensor([torch.nan]).view(torch.uint8)
    found = packed_gated_mlp(arguments._replace(up=up), "cpu")
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_one_sign_cancel_little_more_than_with_numbers(instruction_set, bits):
    kind = Kind(bits=bits)
    options = dict(dtype=torch.float32, activation="relu", sparsity=0, bias=True)
    arguments, _ = make_mlp(64, 4000, kind, **options)
    # all products near 1
    arguments = arguments._replace(
        x=arguments.x * 1e-2,
        gate_bias=torch.ones(4000),
        up_bias=torch.ones(4000),
        down_bias=None,
    )
    a = arguments
    numbers = GatedMLPArguments(
        a.x,
        numbers_of_rows(a.gate, a.rows, torch.float32, torch.float32),
        numbers_of_rows(a.up, a.rows, torch.float32, torch.float32),
        numbers_of_columns(a.packed_down, torch.float32, torch.float32).t().contiguous().t(),
        *(a.thresholds, a.activation, a.router, a.gate_bias, a.up_bias),
    )
    wide = (t.double() if isinstance(t, torch.Tensor) else t for t in numbers)
    wanted = mlp_reference.gated_mlp(GatedMLPArguments(*wide))
    ours, others = (
        (found.double() - wanted).square().mean().sqrt()
        for found in (packed_gated_mlp(arguments, "cpu"), mlp_cpu.gated_mlp(numbers))
    )
    assert ours <= 2 * others


@needs_cpu_kernels
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_threads_matches_and_repeats_bitwise(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for kind in FEW_KINDS:
            arguments, _ = make_mlp(1100, 700, kind, dtype=torch.bfloat16, batch=2)
            assert_matches(arguments)
            first = packed_gated_mlp(arguments, "cpu")
            assert all(torch.equal(packed_gated_mlp(arguments, "cpu"), first) for _ in range(5))
    finally:
        torch.set_num_threads(before)


@needs_cpu_kernels
def test_calls_in_several_python_threads_do_not_disturb_each_other(two_threads):
    cases = [
        make_mlp(704 + 152 * i, 900 - 130 * i, FEW_KINDS[i], dtype=torch.float32, batch=i + 1)[0]
        for i in range(4)
    ]
    expected = [packed_gated_mlp(arguments, "cpu") for arguments in cases]
    wrong: list[int] = []

    def repeat(start: int) -> None:
        for step in range(40):
            i = (start + step) % 4
            if not torch.equal(packed_gated_mlp(cases[i], "cpu"), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cpu_kernels
def test_auto_leaves_larger_batches_and_empty_calls_to_dense():
    for batch, expected in ((1, "cpu"), (8, "cpu"), (9, "dense"), (0, "dense")):
        arguments, _ = make_mlp(36, 20, KINDS[0], dtype=torch.float32, batch=8)
        x = torch.randn(batch, 36)
        assert BACKENDS.backend_for(arguments._replace(x=x)) == expected


@needs_cpu_kernels
def test_what_the_kernel_refuses_is_named():
    arguments, _ = make_mlp(36, 20, KINDS[0], dtype=torch.float32, batch=9)
    with pytest.raises(BackendError, match="cpu cannot run this call: expected 1 to 8 tokens, got"):
        packed_gated_mlp(arguments, "cpu")


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[:, 1:].contiguous(), "x"),
        (0, lambda x: x.expand(9, -1).contiguous(), "x"),
        (0, lambda x: x.double(), "x"),
        (1, lambda gate: gate[:, :32].contiguous(), "packed rows"),
        (1, lambda gate: gate[1:], "up"),
        (2, lambda up: up.t().contiguous().t(), "up"),
        (3, lambda down: down[1:], "down"),
        (3, lambda down: down[:, :15].contiguous(), "packed columns"),
        (4, lambda scales: scales[1:], "down_scales"),
        (4, lambda scales: scales.double(), "down_scales"),
        (5, lambda extras: None, "down_extras"),
        (5, lambda extras: extras.float(), "down_extras"),
        (6, lambda thresholds: thresholds.double(), "thresholds"),
        (7, lambda activation: 4, "activation"),
        (7, lambda activation: -1, "activation"),
        (9, lambda bias: bias[1:], "gate_bias"),
        (10, lambda bias: bias.half(), "up_bias"),
        (11, lambda bias: bias[1:], "down_bias"),
        (12, lambda thresholds: thresholds[1:], "product_thresholds"),
        (14, lambda columns: 40, "gate and down"),
        (19, lambda bits: 5, "packed columns"),
        (20, lambda outputs: 35, "packed columns"),
        (20, lambda outputs: 4000, "packed columns"),
        (21, lambda group: 8, "down_scales"),
        (22, lambda scale: 3, "packed columns"),
        (23, lambda mode: 3, "packed columns"),
        (23, lambda mode: 0, "down_extras"),
        (24, lambda zero: 16, "packed columns"),
    ],
)
def test_a_direct_call_that_does_not_fit_is_an_error(place, change, message):
    kind = next(kind for kind in KINDS if str(kind).endswith("zeros") and kind.group_size == 32)
    options = dict(dtype=torch.float32, bias=True, product_sparsity=0.2)
    arguments, _ = make_mlp(36, 70, kind, **options)
    changed = list(operands(arguments))
    changed[place] = change(changed[place])
    with pytest.raises(RuntimeError, match=f"shape, dtype or layout of {message}"):
        _OPERATOR(*changed)


@needs_cpu_kernels
def test_calls_release_their_tensors():
    kind = next(kind for kind in KINDS if str(kind).endswith("zeros"))
    options = dict(dtype=torch.float32, bias=True, product_sparsity=0.2)
    arguments, _ = make_mlp(36, 70, kind, **options)
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    assert len(tensors) == 11
    before = [tensor._use_count() for tensor in tensors]
    out = packed_gated_mlp(arguments, "cpu")
    assert out._use_count() == before[0]
    with pytest.raises(RuntimeError, match="of down_bias"):
        _OPERATOR(*operands(arguments._replace(down_bias=arguments.down_bias.half())))
    assert [tensor._use_count() for tensor in tensors] == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ids(KINDS))
def test_columns_are_written_out_bit_for_bit(kind, dtype):
    for hidden, neurons in SIZES:
        packed = make_mlp(hidden, neurons, kind, dtype=dtype)[0].packed_down
        assert cpu.writes_out(packed.columns, torch.float32, dtype)
        found = cpu.dequantise_columns(packed, dtype)
        assert torch.equal(found, numbers_of_columns(packed, torch.float32, dtype))
        assert found.is_contiguous()
