"""A compiled kernel on one device, and its launch."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

import torch
from cuda.bindings import driver

from cats.ops.cuda.arguments import Arguments
from cats.ops.cuda.compiler import compile_kernel
from cats.ops.cuda.status import check
from cats.ops.cuda.workspace import relaxed_capture

__all__ = ["Function", "Launch"]

_Pointers = ctypes.c_void_p * 1


class Function:
    """The kernel of a source file, specialised by macros, on a device until the process ends.

    Attributes:
        handle: The driver's function, as a number.
    """

    def __init__(
        self,
        device: int,
        source: str,
        defines: Mapping[str, int],
        *,
        threads: int,
        shared_bytes: int,
    ) -> None:
        """
        Args:
            device: Index of the GPU.
            source: File under ``cats/ops``, such as ``linear/linear.cu``. The kernel has its name.
            defines: Macros of the source.
            threads: Threads per block.
            shared_bytes: Dynamic shared memory per block.

        Raises:
            BackendError: If the kernel does not compile or load.
        """
        properties = torch.cuda.get_device_properties(device)
        code = compile_kernel(source, defines, (properties.major, properties.minor))
        name = PurePosixPath(source).stem
        self._threads, self._shared_bytes = threads, shared_bytes
        self._waits = (
            properties.major >= 9
        )  # on older GPUs, kernels do not wait for the kernel before
        with relaxed_capture():
            # never unloaded: graphs may hold the function
            library = check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
            self._function = check(
                driver.cuKernelGetFunction(check(driver.cuLibraryGetKernel(library, name.encode())))
            )
            attribute = driver.CUfunction_attribute
            for key, value in (
                (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
                (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
            ):
                check(driver.cuFuncSetAttribute(self._function, key, value))
        self.handle = int(self._function)
        self._config = cache(self._make_config)

    def launch(
        self, arguments: Arguments, *, blocks: int, stream: int, dependent: bool, columns: int = 1
    ) -> None:
        """
        Args:
            arguments: The argument of the kernel, which the driver copies.
            blocks: First dimension of the grid.
            stream: Handle of the stream.
            dependent: Whether blocks may start before the previous kernel has ended, where the GPU
                can do that.
            columns: Second dimension of the grid.

        Raises:
            BackendError: If the driver refuses.
        """
        pointers = _Pointers(ctypes.addressof(arguments))
        config = self._config(blocks, columns, stream, dependent)
        check(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))

    def _make_config(
        self, blocks: int, columns: int, stream: int, dependent: bool
    ) -> driver.CUlaunchConfig:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, columns, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = driver.CUstream(stream)
        if dependent and self._waits:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        return config


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its arguments, to be launched later."""

    function: Function
    arguments: Arguments
    blocks: int
    columns: int = 1
