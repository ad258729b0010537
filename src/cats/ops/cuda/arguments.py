"""The one argument of a kernel: a struct of its source, filled in by name."""

import ctypes
from functools import cache

from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda.device import VECTOR_BYTES

__all__ = ["Arguments", "Pointer", "address", "with_stamps"]

Pointer = ctypes.c_void_p


class Arguments(ctypes.Structure):
    """Base of the structs; ``_fields_`` has the names and the order of ``struct Arguments``.

    As in C, a field that is not named is 0: a pointer to nothing. A name that the struct does not
    have is an error.
    """

    # no dictionary, which would take a wrong name in silence
    __slots__ = ()


def address(tensor: Tensor | None, alignment: int = VECTOR_BYTES) -> int:
    """Of the first element, in bytes; 0 for None.

    Raises:
        UnsupportedModelError: If it is not a multiple of ``alignment``.
    """
    start = 0 if tensor is None else tensor.data_ptr()
    if start % alignment:
        raise UnsupportedModelError(
            f"a tensor starts at address {start:#x}, expected a multiple of {alignment} bytes: "
            "it is a view into a larger one; clone it"
        )
    return start


def with_stamps(arguments: Arguments, stamps: Tensor) -> Arguments:
    """The arguments of a kernel that was compiled with ``TRACE``, which notes times in ``stamps``.

    ``trace.cuh`` says what it notes.
    """
    return _traced(type(arguments))(stamps=address(stamps), arguments=arguments)


@cache
def _traced(kind: type[Arguments]) -> type[Arguments]:
    class Traced(Arguments):
        __slots__ = ()
        _fields_ = (("stamps", Pointer), ("arguments", kind))

    return Traced
