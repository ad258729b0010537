"""The CUDA kernel of quantised gated MLPs, on a GPU."""

import pytest
import torch

from cats.ops.quantised import ColumnLayout, ZeroMode
from tests.ops.cases import needs_nvrtc
from tests.ops.linear.quantised_cases import SHARED, constant_zero, make_layout
from tests.ops.mlp.quantised_cases import check, make_mlp, run
from tests.thorough import usual

CONSTANT, ZEROS, SHIFTS = ZeroMode
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_nvrtc
@pytest.mark.parametrize("capability", usual(SHARED, [(8, 0), (9, 0)]))
@pytest.mark.parametrize(
    ("bits", "group_size", "zero_mode", "scale_dtype", "dtype", "activation"),
    [
        (4, 128, CONSTANT, BF16, BF16, "silu"),
        (4, 32, SHIFTS, F16, F16, "gelu_tanh"),
        (8, 0, ZEROS, F32, F32, "relu"),
    ],
)
def test_each_kind_compiles_for_each_generation(
    tmp_path,
    monkeypatch,
    capability,
    bits,
    group_size,
    zero_mode,
    scale_dtype,
    dtype,
    activation,
):
    from cats.ops.cuda.compiler import compile_kernel
    from cats.ops.mlp.cuda import quantised

    monkeypatch.setenv("CATS_CACHE_DIR", str(tmp_path))
    limit, hidden = 1024 * SHARED[capability], 2048
    columns = ColumnLayout(
        bits=bits,
        outputs=hidden,
        group_size=group_size,
        scale_dtype=scale_dtype,
        zero_mode=zero_mode,
        zero=constant_zero(bits, zero_mode),
    )
    macros = quantised.macros(
        make_layout(bits, hidden, group_size, zero_mode, scale_dtype),
        columns,
        dtype=dtype,
        activation=activation,
        neurons=8192,
        multiprocessors=132,
        shared_limit=limit,
    )
    assert macros["SHARED_BYTES"] <= limit
    assert compile_kernel("mlp/cuda/quantised_mlp.cu", macros, capability)[:4] == b"\x7fELF"


@needs_nvrtc
@needs_gpu
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("bits", "hidden", "neurons", "group_size", "zero_mode", "scale_dtype"),
    [
        (4, 4096, 14336, 128, CONSTANT, BF16),
        (4, 4096, 11008, 128, ZEROS, F16),
        (4, 2048, 8192, 32, SHIFTS, F16),
        (8, 4096, 14336, 0, CONSTANT, BF16),
        (8, 576, 1536, 32, ZEROS, F16),
    ],
)
def test_output_is_that_of_the_dequantised_mlp(
    bits, hidden, neurons, group_size, zero_mode, scale_dtype, sparsity
):
    from cats.ops.cuda.device import multiprocessors
    from cats.ops.mlp.cuda import quantised

    case = make_mlp(
        bits=bits,
        hidden=hidden,
        neurons=neurons,
        group_size=group_size,
        zero_mode=zero_mode,
        scale_dtype=scale_dtype,
        sparsity=sparsity,
        dtype=torch.bfloat16,
        device="cuda",
    )
    stream = torch.cuda.current_stream().cuda_stream
    check(run(quantised, case, multiprocessors=multiprocessors(0), stream=stream), case)
