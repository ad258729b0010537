"""One token by the kernel of the engine ``stream``: ``mlp/cuda/quantised_mlp.cu``, alone.

It reads 16-bit fixed-point activations, and adds up neurons in any order.
"""

import torch
from torch import Tensor

from cats.errors import UnsupportedModelError
from cats.ops.cuda import unavailable
from cats.ops.cuda.arguments import address
from cats.ops.cuda.device import DTYPES, VECTOR_BYTES, multiprocessors, shared_memory
from cats.ops.cuda.residual import Residual
from cats.ops.packed_mlp.arguments import PackedMLPArguments
from cats.ops.quantised import PackedRows

__all__ = ["packed_gated_mlp", "refuses", "unavailable"]


def refuses(arguments: PackedMLPArguments) -> str | None:
    """Why the backend leaves this call to another one, or None where it takes it."""
    a, x = arguments, arguments.x
    if not x.is_cuda:
        return f"expected tensors on an NVIDIA GPU, got {x.device}"
    if len(x) != 1:
        return f"takes one token, got {len(x)}"
    if a.router != "gate" or a.product_thresholds is not None:
        return "takes thresholds on the gate alone"
    if x.dtype not in DTYPES:
        return f"takes bfloat16, float16 or float32, got {x.dtype}"
    # 2: not those that only ask for a warning
    if torch.get_deterministic_debug_mode() == 2:
        return "adds up in any order, and deterministic algorithms are asked for"
    if len(a.gate) == 0:
        return "there are no neurons"
    if any(t.data_ptr() % VECTOR_BYTES for t in (a.gate, a.up, a.down, a.down_scales)):
        return f"tensors must begin at a multiple of {VECTOR_BYTES} bytes"
    from cats.ops.mlp.cuda.quantised import macros

    device = x.device.index
    try:
        macros(
            a.rows,
            a.columns,
            dtype=x.dtype,
            activation=a.activation,
            neurons=len(a.gate),
            multiprocessors=multiprocessors(device),
            shared_limit=shared_memory(device),
            plain=True,
        )
    except UnsupportedModelError as error:
        return str(error)
    return None


def packed_gated_mlp(arguments: PackedMLPArguments) -> Tensor:
    """See :func:`cats.ops.packed_mlp.packed_gated_mlp`: one launch on the current stream.

    Raises:
        BackendError: If the kernel does not compile, load or launch.
    """
    # needs the packages whose absence `unavailable` reports
    from cats.ops.mlp.cuda.quantised import launch

    a, device = arguments, arguments.x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return packed_gated_mlp(arguments)
    hidden, neurons = a.rows.columns, len(a.gate)
    x = a.x[0].float()
    sums = torch.zeros(hidden, device=a.x.device)
    made = launch(
        x=Residual(base=address(x)),
        gate=PackedRows(a.gate, a.rows, neurons),
        up=PackedRows(a.up, a.rows, neurons),
        down=a.packed_down,
        thresholds=a.thresholds,
        activation=a.activation,
        gate_bias=a.gate_bias,
        up_bias=a.up_bias,
        dtype=a.x.dtype,
        sums=sums,
        multiprocessors=multiprocessors(a.x.device.index),
        early=False,
        plain=True,
    )
    stream = torch._C._cuda_getCurrentRawStream(device)
    made.function.launch(made.arguments, blocks=made.blocks, stream=stream, dependent=False)
    if a.down_bias is not None:
        sums = sums + a.down_bias
    return sums.to(a.x.dtype).unsqueeze(0)
