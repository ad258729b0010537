"""Errors of the CUDA driver."""

import pytest
import torch

from cats.errors import BackendError
from tests.ops.cases import skip_unavailable


def test_errors_of_the_driver_are_backend_errors():
    skip_unavailable("cuda")
    torch.zeros(1, device="cuda")  # makes the context that the driver asks for
    from cuda.bindings import driver

    from cats.ops.cuda.status import check

    with pytest.raises(BackendError, match="CUDA_ERROR_INVALID_VALUE"):
        check(driver.cuMemAlloc(0))
