"""Compile the Triton kernels of experts for a GPU, without one: ``compile_triton.py cuda:90``."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cats.ops.experts.triton import kernels

TYPES = {
    **dict.fromkeys(("x", "gate_up", "down", "out"), "*bf16"),
    **dict.fromkeys(("thresholds", "partial", "shares"), "*fp32"),
    **dict.fromkeys(("D", "F", "E", "programs", "pairs"), "i32"),
    "index": "*i64",
}
CONSTANTS = dict(PLACES=2, ACTIVATION="silu", ROWS=2, BLOCK_D=1024)


def main(target: str) -> None:
    backend, _, name = target.partition(":")
    architecture = int(name) if backend == "cuda" else name
    for kernel in (kernels.stream_experts, kernels.add_experts):
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            signature={name: TYPES.get(name, "constexpr") for name in names},
            constexprs={(names.index(n),): v for n, v in CONSTANTS.items() if n in names},
        )
        gpu = GPUTarget(backend, architecture, 64 if backend == "hip" else 32)
        stages = set(triton.compile(source, target=gpu, options={"num_warps": 4}).asm)
        print(target, kernel.__name__, *sorted(stages))


if __name__ == "__main__":
    main(sys.argv[1])
