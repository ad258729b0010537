import os

import numpy as np
import pytest

# cuBLAS warns without it in deterministic mode, in which the tests run; read when CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def floating_point_as_on_a_gpu():
    """Triton's interpreter computes with NumPy, which would warn of infinities; a GPU does not."""
    with np.errstate(all="ignore"):
        yield
