"""The argument of a kernel: a struct of its source, filled in by name."""

import ctypes
from functools import cache

from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda.device import VECTOR_BYTES

__all__ = ["Arguments", "Pointer", "address", "with_stamps"]

Pointer = ctypes.c_void_p


class Arguments(ctypes.Structure):
    """Base of the structs; ``_fields_`` has the names and the order of ``struct Arguments``.

    As in C, a field that is not named is 0, or a null pointer. A name that the struct does not have
    is an error.
    """

    # an instance with a dictionary would accept a wrong name
    __slots__ = ()


def address(tensor: Tensor | None, alignment: int = VECTOR_BYTES) -> int:
    """Address of the first element in bytes, or 0 for None.

    Raises:
        UnsupportedModelError: If the address is not a multiple of ``alignment``.
    """
    start = 0 if tensor is None else tensor.data_ptr()
    if start % alignment:
        raise UnsupportedModelError(
            f"a tensor starts at address {start:#x}, expected a multiple of {alignment} bytes: "
            "it is a view into a larger one; clone it"
        )
    return start


def with_stamps(arguments: Arguments, stamps: Tensor) -> Arguments:
    """The arguments of a kernel that was compiled with ``TRACE``: it writes times into ``stamps``.

    ``trace.cuh`` says which times.
    """
    return _traced(type(arguments))(stamps=address(stamps), arguments=arguments)


@cache
def _traced(kind: type[Arguments]) -> type[Arguments]:
    class Traced(Arguments):
        __slots__ = ()
        _fields_ = (("stamps", Pointer), ("arguments", kind))

    return Traced
