"""Compile the Triton kernels for any GPU, without one: ``compile_triton.py hip:gfx942 ...``."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cats.ops.mlp.triton import kernels


def compile_for(backend: str, architecture: int | str, fn: object, **constants: object) -> set[str]:
    """Names of the stages of compilation. Arguments without a type are ``constants``, or None."""
    types = dict.fromkeys(("x", "routing", "other", "down", "out", "weight"), "*bf16")
    types |= dict.fromkeys(("thresholds", "partial", "sums"), "*fp32")
    types |= dict.fromkeys(("D", "F", "programs"), "i32")
    names = fn.arg_names
    constants |= dict.fromkeys(
        name for name in names if name not in types and name not in constants
    )
    source = ASTSource(
        fn,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): constants[name] for name in names if name in constants},
    )
    target = GPUTarget(backend, architecture, 64 if backend == "hip" else 32)
    return set(triton.compile(source, target=target, options={"num_warps": 4}).asm)


def main(target: str) -> None:
    """Compile every kernel for ``target``, such as ``cuda:90`` or ``hip:gfx942``."""
    backend, _, name = target.partition(":")
    architecture = int(name) if backend == "cuda" else name
    dependent = backend == "cuda" and int(name) >= 90
    constants = dict(BATCH=1, ROWS=64, BLOCK_D=32, DEPENDENT=dependent)
    stages = compile_for(backend, architecture, kernels.add_partials, **constants)
    columns = dict(BATCH=2, ROWS=32, BLOCK_F=128, DEPENDENT=dependent)
    stages &= compile_for(backend, architecture, kernels.sum_columns, **columns)
    constants |= dict(ROWS=2, BLOCK_D=1024, ACTIVATION="gelu_tanh")
    for batch, gate_routes in ((1, True), (2, False)):
        constants |= dict(BATCH=batch, GATE_ROUTES=gate_routes)
        stages &= compile_for(backend, architecture, kernels.stream_neurons, **constants)
    print(target, *sorted(stages))


if __name__ == "__main__":
    for target in sys.argv[1:]:
        main(target)
