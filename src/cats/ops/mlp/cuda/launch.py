"""Load a variant of ``gated_mlp.cu`` on a device and launch it on the current stream."""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from cuda.bindings import driver
from torch import Tensor

from cats.ops.cuda.device import shared_memory
from cats.ops.cuda.function import Function
from cats.ops.cuda.status import check
from cats.ops.cuda.workspace import COUNTERS, workspace
from cats.ops.mlp.arguments import GatedMLPArguments
from cats.ops.mlp.cuda.arguments import MLPArguments
from cats.ops.mlp.cuda.variant import Variant, variant_for

__all__ = ["Shares", "gated_mlp", "shares_of"]

# Share of the router rows that blocks take by their index. Blocks ask for the others one run at a
# time, by counting tickets.
_FIXED_SHARE = 0.75
# Where a group has no more runs than this, all are fixed.
_MIN_RUNS = 6
# Rows per group that are handed out last, in half runs.
_SHORT_SHARE = 4
# Functions whose launches may be followed by a launch that requests weights early.
_own_functions: set[int] = set()
# First and last address of the output of the last launch, by device, stream and capture.
_outputs: dict[tuple[int, int, int], tuple[int, int]] = {}


def gated_mlp(arguments: GatedMLPArguments) -> Tensor:
    """See :func:`cats.ops.gated_mlp`: one launch on the current stream.

    Raises:
        BackendError: If the kernel does not compile, load or launch.
    """
    x = arguments.x
    device = x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return gated_mlp(arguments)
    router, router_bias, other, other_bias = arguments.by_role()
    down_bias, product_thresholds = arguments.down_bias, arguments.product_thresholds
    thresholds = arguments.thresholds
    batch, hidden = x.shape
    neurons = router.shape[0]
    kernel = _kernel(device, hidden, x.dtype, batch, arguments.activation)
    stream = torch._C._cuda_getCurrentRawStream(device)  # as Triton does; 2 us less
    capture, after_own = 0, False
    if torch.cuda.is_current_stream_capturing():
        capture, after_own = _capture(stream)
    owner = (device, stream, capture)
    # an output of the launch before this one may serve as a weight
    early = after_own and not _written(owner, (router, router_bias, thresholds))
    memory = workspace(device, stream, capture, kernel.variant.copies * batch * hidden)
    in_order = torch.are_deterministic_algorithms_enabled()

    out = torch.empty_like(x)
    shares = shares_of(kernel.variant, neurons, kernel.blocks, in_order)
    struct = MLPArguments(
        x=x.data_ptr(),
        router=router.data_ptr(),
        other=other.data_ptr(),
        down=arguments.down.data_ptr(),
        thresholds=thresholds.data_ptr(),
        out=out.data_ptr(),
        sums=memory + 4 * COUNTERS,
        counters=memory,
        neurons=neurons,
        fixed_runs=shares.fixed_runs,
        long_tickets=shares.long_tickets,
        short_rows=shares.short_rows,
        gate_is_router=arguments.router == "gate",
        request_early=early,
    )
    if product_thresholds is not None:
        struct.product_thresholds = product_thresholds.data_ptr()
    if router_bias is not None:
        struct.router_bias = router_bias.data_ptr()
    if other_bias is not None:
        struct.other_bias = other_bias.data_ptr()
    if down_bias is not None:
        struct.down_bias = down_bias.data_ptr()
    if in_order:
        count = shares.blocks * batch * hidden
        partials = torch.empty(count, dtype=torch.float32, device=x.device)
        struct.partials = partials.data_ptr()
    kernel.function.launch(struct, blocks=shares.blocks, stream=stream, dependent=early)
    if capture:
        _outputs[owner] = _span(out)
    return out


class Shares(NamedTuple):
    """How router rows are divided between blocks; the names are those of ``struct Arguments``."""

    blocks: int
    fixed_runs: int
    long_tickets: int
    short_rows: int


@cache
def shares_of(variant: Variant, neurons: int, multiprocessors: int, in_order: bool) -> Shares:
    """Shares of ``neurons`` router rows; with ``in_order``, groups take all rows by their index."""
    rows, groups = variant.rows, variant.groups
    runs = math.ceil(neurons / rows)
    blocks = max(1, min(multiprocessors, runs))
    fixed_runs = math.ceil(runs / (groups * blocks))
    if fixed_runs > _MIN_RUNS and not in_order:
        fixed_runs = int(_FIXED_SHARE * fixed_runs)
    ticket_rows = max(0, neurons - fixed_runs * groups * blocks * rows)
    long_tickets = max(0, ticket_rows - _SHORT_SHARE * groups * blocks) // rows
    return Shares(blocks, fixed_runs, long_tickets, max(1, rows // 2))


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def _written(owner: tuple[int, int, int], tensors: Iterable[Tensor | None]) -> bool:
    """Whether the owner's last launch writes one of the tensors; True if there was no launch."""
    if owner not in _outputs:
        return True
    start, stop = _outputs[owner]
    spans = [_span(tensor) for tensor in tensors if tensor is not None]
    return any(begin < stop and start < end for begin, end in spans)


class _Kernel:
    """One variant, loaded on one device."""

    def __init__(self, device: int, variant: Variant) -> None:
        self.variant = variant
        self.blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.function = Function(
            device,
            "mlp/cuda/gated_mlp.cu",
            variant.defines(),
            threads=variant.threads,
            shared_bytes=variant.shared_bytes,
        )
        _own_functions.add(self.function.handle)


@cache
def _kernel(device: int, hidden: int, dtype: torch.dtype, batch: int, activation: str) -> _Kernel:
    variant = variant_for(hidden, dtype, batch, activation, shared_limit=shared_memory(device))
    assert variant is not None, "refuses() lets only rows through that fit"
    return _Kernel(device, variant)


def _capture(stream: int) -> tuple[int, bool]:
    """The number of the capture, and whether the call directly follows a launch of this kernel.

    Only then may the launch start, and request weights, before the previous one ends: any other
    kernel might write the weights. This one writes only its output and its workspace, and lets the
    next kernel start only when all kernels before it are complete.
    """
    handle = driver.CUstream(stream)
    _, number, _, nodes, *_ = check(driver.cuStreamGetCaptureInfo(handle))
    kernel_node = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    if len(nodes) != 1 or check(driver.cuGraphNodeGetType(nodes[0])) != kernel_node:
        return int(number), False
    function = check(driver.cuGraphKernelNodeGetParams(nodes[0])).func
    return int(number), int(function) in _own_functions
