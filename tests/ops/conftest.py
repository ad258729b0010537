import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cats.ops import cpu
from tests.ops.cases import RefusedError

# cuBLAS warns without it in deterministic mode, in which the tests run; read when CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def floating_point_as_on_a_gpu():
    """Triton's interpreter computes with NumPy, which would warn of infinities; a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except RefusedError:
        return True


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "generic"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if cpu.unavailable() or request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}, or no kernels are built")
    before = cpu.instruction_set()
    cpu.select(request.param)
    yield request.param
    cpu.select(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
