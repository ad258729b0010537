"""The Triton kernels of packed MLPs: results, numbers of columns, and which bytes are read."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cats.functional import ACTIVATIONS
from cats.ops.packed_mlp import PackedMLPArguments, packed_gated_mlp
from cats.ops.packed_mlp.reference import packed_gated_mlp as reference
from tests.ops import packed_cases
from tests.ops.cases import DTYPES, TOLERANCE
from tests.ops.packed_cases import (
    FEW_KINDS,
    KINDS,
    Kind,
    make_matrix,
    make_mlp,
    packed_columns,
    routed_and_product,
)
from tests.thorough import usual

triton = pytest.importorskip("triton")

from cats.ops.packed_mlp import triton as backend  # noqa: E402
from cats.ops.packed_mlp.triton import launch  # noqa: E402
from tests.ops.interpreting import bfloat16_as_on_a_gpu  # noqa: E402, F401

INT4 = Kind(bits=4, group_size=32, scale_dtype=torch.bfloat16)


def assert_output(case):
    arguments, expected = case
    arguments.check()
    # not through the operator, which refuses bfloat16 in the interpreter
    found = backend.packed_gated_mlp(arguments)
    dtype = arguments.x.dtype
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, equal_nan=True, **TOLERANCE[dtype])


@pytest.mark.parametrize("arithmetic", DTYPES)
@pytest.mark.parametrize("kind", packed_cases.ids(KINDS))
def test_numbers_are_those_of_the_format_bit_for_bit(kind, arithmetic, device):
    # groups that are cut off, and blocks of outputs that are
    matrix = make_matrix(132, 141, kind, arithmetic=arithmetic, special=True)
    packed = on_device(packed_columns(matrix), device)
    for dtype in {torch.bfloat16, arithmetic}:
        found = backend.dequantise_columns(packed, arithmetic, dtype)
        expected = packed_cases.numbers(matrix, dtype)
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_groups_of_any_size_are_written(device):
    for group_size in (1, 5, 48):
        matrix = make_matrix(36, 67, Kind(bits=4, group_size=group_size))
        packed = on_device(packed_columns(matrix), device)
        found = backend.dequantise_columns(packed, torch.float32, torch.float64)
        assert torch.equal(found.cpu(), packed_cases.numbers(matrix, torch.float64))


def test_a_matrix_without_neurons_has_no_numbers(device):
    packed = packed_columns(make_matrix(36, 67, Kind(bits=8)))
    none = type(packed)(packed.columns[:0], packed.scales, None, packed.layout)
    found = backend.dequantise_columns(on_device(none, device), torch.float32, torch.bfloat16)
    assert found.shape == (36, 0)


@pytest.mark.parametrize(
    ("kind", "batch"), [(kind, 1 + 2 * (i % 2)) for i, kind in enumerate(KINDS)], ids=str
)
def test_every_kind_of_codes(kind, batch, device):
    assert_output(make_mlp(68, 141, kind, dtype=torch.bfloat16, device=device, batch=batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("products", [None, 0.5], ids=["", "products"])
def test_every_option(router, products, batch, dtype, device):
    for bias, activation in zip((True, False), ("silu", "relu"), strict=True):
        case = make_mlp(
            132,
            45,
            INT4,
            dtype=dtype,
            device=device,
            batch=batch,
            router=router,
            product_sparsity=products,
            bias=bias,
            activation=activation,
        )
        assert_output(case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sparsity", [0, 0.9, 1])
def test_every_activation_and_sparsity(sparsity, batch, activation, device):
    options = dict(batch=batch, sparsity=sparsity, activation=activation, bias=True)
    assert_output(make_mlp(36, 67, INT4, dtype=torch.float32, device=device, **options))


@pytest.mark.parametrize(("hidden", "neurons"), [(4, 1), (4, 97), (1156, 2)])
def test_odd_sizes(hidden, neurons, device):
    for batch in (1, 2):
        options = dict(dtype=torch.float32, device=device, batch=batch)
        assert_output(make_mlp(hidden, neurons, FEW_KINDS[1], **options))


@pytest.mark.parametrize("batch", [1, 2])
def test_down_may_have_other_codes_and_groups_of_any_size(batch, device):
    for down in (Kind(bits=8), Kind(bits=4, group_size=5, scale_dtype=torch.float16)):
        options = dict(dtype=torch.float16, device=device, batch=batch, down=down)
        assert_output(make_mlp(36, 67, INT4, **options))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("place", ["gate_bias", "up_bias", "down_bias", "x", "down_scales"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinities_and_nan_come_out_as_in_the_definition(value, place, batch, device):
    options = dict(dtype=torch.float32, batch=batch, bias=True, product_sparsity=0.2)
    arguments, _ = make_mlp(36, 67, INT4, **options)
    # some outputs stay finite where one scale of down is bad
    getattr(arguments, place).view(-1)[-1] = value
    expected = reference(arguments)
    assert not expected.isfinite().all()
    moved = (a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
    assert_output((PackedMLPArguments(*moved), expected.to(device)))


def test_bad_scales_of_dropped_neurons_change_nothing(device):
    arguments, expected = make_mlp(36, 67, Kind(bits=8, group_size=32), dtype=torch.float32)
    # the last group of down: neurons 64 to 66
    arguments.thresholds[64:] = torch.inf
    expected = reference(arguments)
    arguments.down_scales[2] = torch.nan
    moved = (a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
    assert_output((PackedMLPArguments(*moved), expected.to(device)))


@pytest.mark.parametrize("batch", [1, 16])
def test_the_operator_runs_it_by_name(batch, device):
    case = make_mlp(36, 67, INT4, dtype=torch.float16, device=device, batch=batch)
    found = packed_gated_mlp(case[0], "triton")
    torch.testing.assert_close(found, case[1], **TOLERANCE[torch.float16])


def test_two_calls_give_the_same_bits(device):
    for batch in (1, 2):
        arguments, _ = make_mlp(36, 97, INT4, dtype=torch.float32, device=device, batch=batch)
        first = packed_gated_mlp(arguments, "triton")
        assert torch.equal(first, packed_gated_mlp(arguments, "triton"))


def test_what_it_leaves_to_others_is_refused_with_the_reason(device):
    arguments, _ = make_mlp(36, 67, INT4, dtype=torch.float32, device=device, batch=17)
    assert backend.refuses(arguments) == "the batch 17 is larger than 16"
    arguments = arguments._replace(x=arguments.x[:2])
    assert backend.refuses(arguments) is None
    assert backend.refuses(arguments._replace(gate=arguments.gate[:0])) == "a tensor is empty"


@pytest.fixture
def read_addresses(monkeypatch) -> list[np.ndarray]:
    """Addresses that the kernels read, as Triton's interpreter sees them."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("counts loads in Triton's interpreter, which runs on a CPU")
    from triton.runtime.interpreter import InterpreterBuilder

    addresses = []
    load = InterpreterBuilder.create_masked_load

    def recording_load(self, pointers, mask, *args):
        addresses.append(pointers.data[mask.data])
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recording_load)
    return addresses


@pytest.mark.parametrize("router", ["gate", "up"])
@pytest.mark.parametrize("product_sparsity", [None, 0.5], ids=["", "product"])
@pytest.mark.parametrize("batch", [1, 2])
def test_exactly_the_rows_and_columns_of_kept_neurons_are_read(
    read_addresses, batch, router, product_sparsity
):
    options = dict(batch=batch, router=router, sparsity=0.8, product_sparsity=product_sparsity)
    arguments, _ = make_mlp(36, 141, INT4, dtype=torch.float32, **options)
    packed_gated_mlp(arguments, "triton")
    routing, other = (arguments.gate, arguments.up)[:: 1 if router == "gate" else -1]
    routed, products = routed_and_product(arguments)
    kept = (routed.abs() >= arguments.thresholds).any(0)
    columns = kept
    if product_sparsity is not None:
        columns = (products.abs() >= arguments.product_thresholds).any(0)
        assert columns.sum() < kept.sum()
    assert 0 < kept.sum() < len(kept)
    assert rows_read(routing, read_addresses).all()
    assert torch.equal(rows_read(other, read_addresses), kept)
    assert torch.equal(rows_read(arguments.down, read_addresses), columns)


def test_what_belongs_to_an_exact_zero_is_not_read(read_addresses):
    options = dict(dtype=torch.float32, activation="relu", sparsity=0)
    arguments, _ = make_mlp(36, 141, INT4, **options)
    packed_gated_mlp(arguments, "triton")
    positive = routed_and_product(arguments)[0][0] > 0
    assert 0 < positive.sum() < len(positive)
    assert torch.equal(rows_read(arguments.up, read_addresses), positive)
    assert torch.equal(rows_read(arguments.down, read_addresses), positive)


def rows_read(weight: torch.Tensor, addresses: list[np.ndarray]) -> torch.Tensor:
    """Which rows of a packed matrix the kernels read a byte of."""
    offsets = np.concatenate([part.ravel() for part in addresses]).astype(np.int64)
    offsets -= weight.data_ptr()
    inside = offsets[(offsets >= 0) & (offsets < weight.nbytes)]
    read = torch.zeros(len(weight), dtype=torch.bool)
    read[inside // weight.shape[1]] = True
    return read


@pytest.mark.parametrize("processors", [1, 16, 132])
@pytest.mark.parametrize(("hidden", "neurons"), [(4, 1), (576, 1536), (4096, 14336), (8192, 28672)])
def test_every_program_has_neurons_and_sums_stay_small(hidden, neurons, processors):
    layout = packed_columns(make_matrix(4, 1, INT4)).layout
    layout = type(layout)(bits=4, outputs=hidden, group_size=32, scale_dtype=layout.scale_dtype)
    plan = launch.plan(1, neurons, layout, 8 * processors)
    assert 1 <= plan.splits <= max(1, neurons // 8)
    if hidden >= 4096:
        assert 4 * plan.splits * hidden < hidden * neurons / 2 / 4


def on_device(packed, device):
    extras = None if packed.extras is None else packed.extras.to(device)
    moved = packed.columns.to(device), packed.scales.to(device)
    return type(packed)(*moved, extras, packed.layout)


@pytest.mark.parametrize("target", usual(["cuda:90", "hip:gfx942"], ["cuda:90"]))
def test_kernels_compile_without_a_gpu(target):
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.packed_mlp.compile_triton", target],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (compiled,) = (line.split() for line in run.stdout.splitlines())
    assert compiled[0] == target
    assert {"cuda": "cubin", "hip": "hsaco"}[target.partition(":")[0]] in compiled
