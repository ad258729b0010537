"""Errors of the CUDA driver as exceptions."""

from typing import Any

from cuda.bindings import driver

from cats.errors import BackendError

__all__ = ["check"]


def check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call, which returns its status first.

    Raises:
        BackendError: If the status is not success, with the driver's name and description of it.
    """
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        name = driver.cuGetErrorName(status)[1] or b"unknown error"
        text = driver.cuGetErrorString(status)[1] or b"no description"
        raise BackendError(f"CUDA: {name.decode()}: {text.decode()}")
    return values[0] if len(values) == 1 else tuple(values)
