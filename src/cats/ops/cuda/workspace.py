"""Memory that the blocks of a call share: counters and float32 sums, zero before and after it.

Calls that follow each other on a stream share a workspace. Calls that may run at the same time must
not, so there is one for each device and stream, and one more for each stream of each captured
graph: a graph keeps the addresses that it was captured with, and may be replayed beside anything.
Workspaces live as long as the process; each takes 8 * B * D + 4096 bytes, or a little more.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from cuda.bindings import driver
from torch import Tensor

from cats.ops.cuda.status import check

__all__ = ["COUNTERS", "relaxed_capture", "workspace"]

# 32-bit counters in front of the sums; gated_mlp.cu says which is which.
COUNTERS = 1024
_MIN_FLOATS = 2 * 8192

_NON_BLOCKING = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
_Owner = tuple[int, int, int]
_workspaces: dict[_Owner, list[Tensor]] = {}
_lock = threading.Lock()


def workspace(device: int, stream: int, capture: int, floats: int) -> int:
    """Address of ``COUNTERS`` zero counters and at least ``floats`` zero sums.

    Args:
        device: Index of the GPU.
        stream: Handle of the stream that the call is on.
        capture: Number of the capture that the stream is in, 0 if it is in none.
        floats: How many.
    """
    owner = (device, stream, capture)
    count = COUNTERS + max(floats, _MIN_FLOATS)
    found = _workspaces.get(owner)
    if found is None or found[-1].numel() < count:
        with _lock:
            # smaller ones stay alive: calls on the GPU may still use them, and graphs always will
            found = _workspaces.setdefault(owner, [])
            if not found or found[-1].numel() < count:
                found.append(_allocate(device, count))
    return found[-1].data_ptr()


def _allocate(device: int, count: int) -> Tensor:
    """Zeros that belong to no graph, even while one is captured.

    PyTorch sends allocations of a capturing stream, or of a whole thread, to the memory pool of the
    graph, which may reuse them once the capture ends. A stream and a thread of our own are outside
    of all that.
    """

    def zeros(stream: int) -> Tensor:
        with relaxed_capture(), torch.cuda.stream(torch.cuda.ExternalStream(stream, device)):
            return torch.zeros(count, dtype=torch.int32, device=device)

    with relaxed_capture():
        # not one of PyTorch's streams: it hands those out again and again, also the captured one
        stream = check(driver.cuStreamCreate(_NON_BLOCKING))
        with ThreadPoolExecutor(1) as executor:
            result = executor.submit(zeros, int(stream)).result()
        check(driver.cuStreamSynchronize(stream))
        check(driver.cuStreamDestroy(stream))
    return result


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Lets this thread load code and wait for its own stream while some stream is captured."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        yield
    finally:
        check(driver.cuThreadExchangeStreamCaptureMode(before))
