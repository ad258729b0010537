"""Memory that the blocks of a call share: counters and float32 sums, zero before and after a call.

Calls that follow each other on a stream share a workspace. Calls that may run at the same time must
not, so there is one for each device and stream, and one more for each stream of each captured
graph: a graph keeps the addresses that it was captured with, and may be replayed beside other work.
Workspaces of streams live as long as the process. When a graph is gone, its workspace serves a
later graph. Each takes 8 * B * D + 4096 bytes, or a little more.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from cuda.bindings import driver
from torch import Tensor

from cats.ops.cuda.status import check

__all__ = ["COUNTERS", "relaxed_capture", "workspace", "workspaces"]

# 32-bit counters before the sums; gated_mlp.cu says what each counts.
COUNTERS = 1024
_MIN_FLOATS = 2 * 8192

_NON_BLOCKING = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
_Owner = tuple[int, int, int]
_workspaces: dict[_Owner, list[Tensor]] = {}
# Workspaces of graphs that are gone, by device.
_unused: dict[int, list[Tensor]] = {}
_graphs: dict[_Owner, "_GraphLife"] = {}
_lock = threading.Lock()


def workspace(device: int, stream: int, capture: int, floats: int) -> int:
    """Address of ``COUNTERS`` zero counters and at least ``floats`` zero sums.

    Args:
        device: Index of the GPU.
        stream: Handle of the stream that the call is on.
        capture: Number of the capture that the stream is in, 0 if it is in none.
        floats: How many sums.
    """
    owner = (device, stream, capture)
    count = COUNTERS + max(floats, _MIN_FLOATS)
    spaces = _workspaces.get(owner)
    if spaces is None or spaces[-1].numel() < count:
        with _lock:
            _collect()
            # smaller ones stay alive: calls on the GPU may still use them, and graphs always will
            spaces = _workspaces.setdefault(owner, [])
            if not spaces or spaces[-1].numel() < count:
                spaces.append(_take(device, count))
            if capture and owner not in _graphs and os.name == "posix":
                _graphs[owner] = _GraphLife(stream)
    return spaces[-1].data_ptr()


def workspaces() -> list[Tensor]:
    """All workspaces, also those that wait for a new graph: for tests and measurements."""
    return [space for spaces in (*_workspaces.values(), *_unused.values()) for space in spaces]


class _GraphLife:
    """Tells when a graph that is being captured, and everything made from it, is gone.

    The driver then calls the C library's ``sem_post`` in a thread of its own. It does not call
    Python, which may have ended by then.
    """

    def __init__(self, stream: int) -> None:
        self._library = ctypes.CDLL(None)
        self._semaphore = ctypes.create_string_buffer(64)
        self._library.sem_init(self._semaphore, 0, 0)
        post = ctypes.cast(self._library.sem_post, ctypes.c_void_p).value
        graph = check(driver.cuStreamGetCaptureInfo(driver.CUstream(stream)))[2]
        address, callback = ctypes.addressof(self._semaphore), driver.CUhostFn(post)
        asynchronous = driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        life = check(driver.cuUserObjectCreate(address, callback, 1, asynchronous))
        moved = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
        check(driver.cuGraphRetainUserObject(graph, life, 1, moved))

    def has_ended(self) -> bool:
        value = ctypes.c_int()
        self._library.sem_getvalue(self._semaphore, ctypes.byref(value))
        return value.value > 0


def _collect() -> None:
    """Take back the workspaces of graphs that are gone."""
    for owner in [owner for owner, life in _graphs.items() if life.has_ended()]:
        del _graphs[owner]
        _unused.setdefault(owner[0], []).extend(_workspaces.pop(owner, []))


def _take(device: int, count: int) -> Tensor:
    """A workspace of zeros: one that no graph needs any more, or a new one."""
    unused = _unused.get(device, [])
    for index, space in enumerate(unused):
        if space.numel() >= count:
            return _zeros(device, unused.pop(index))
    return _zeros(device, count)


def _zeros(device: int, memory: int | Tensor) -> Tensor:
    """New memory of a number of zeros, or a tensor set to zero, outside of any graph.

    PyTorch sends allocations of a capturing stream, or of all streams of a thread, to the memory
    pool of the graph, which may reuse them after the capture. A stream and a thread of our own
    avoid that.
    """

    def zeros(stream: int) -> Tensor:
        with relaxed_capture(), torch.cuda.stream(torch.cuda.ExternalStream(stream, device)):
            if isinstance(memory, Tensor):
                return memory.zero_()
            return torch.zeros(memory, dtype=torch.int32, device=device)

    with relaxed_capture():
        # not one of PyTorch's streams, which are shared: it might be the captured one
        stream = check(driver.cuStreamCreate(_NON_BLOCKING))
        with ThreadPoolExecutor(1) as executor:
            result = executor.submit(zeros, int(stream)).result()
        check(driver.cuStreamSynchronize(stream))
        check(driver.cuStreamDestroy(stream))
    return result


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let this thread load code and wait for its own stream while some stream is captured."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        yield
    finally:
        check(driver.cuThreadExchangeStreamCaptureMode(before))
