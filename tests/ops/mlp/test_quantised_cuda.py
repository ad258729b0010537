"""The CUDA kernel of quantised gated MLPs, on a GPU."""

import pytest
import torch

from cats.ops.quantised import ZeroMode
from tests.ops.cases import needs_nvrtc
from tests.ops.mlp.quantised_cases import check, make_mlp, run

CONSTANT, ZEROS, SHIFTS = ZeroMode
pytestmark = [
    needs_nvrtc,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("bits", "hidden", "neurons", "group_size", "zero_mode", "scale_dtype"),
    [
        (4, 4096, 14336, 128, CONSTANT, torch.bfloat16),
        (4, 4096, 11008, 128, ZEROS, torch.float16),
        (4, 2048, 8192, 32, SHIFTS, torch.float16),
        (8, 4096, 14336, 0, CONSTANT, torch.bfloat16),
        (8, 576, 1536, 32, ZEROS, torch.float16),
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
    for counted in (False, True):
        counter = torch.zeros(1, dtype=torch.int32, device="cuda") if counted else None
        found = run(
            quantised, case, multiprocessors=multiprocessors(0), counter=counter, stream=stream
        )
        check(found, case)
