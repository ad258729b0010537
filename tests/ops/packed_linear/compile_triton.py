"""Compile the Triton kernels of packed rows for GPUs, without one.

``python -m tests.ops.packed_linear.compile_triton cuda:90 hip:gfx942``
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cats.ops.packed_linear.triton import kernels, launch
from tests.ops.packed_cases import KINDS, make_matrix, packed_rows

# with zero points, and with shifts
COMPILED_KINDS = KINDS[1], KINDS[20]
# what the kernels of packed linears and MLPs take; other arguments are 32-bit integers
TYPES = (
    dict.fromkeys(("packed", "routing", "other"), "*u8")
    | dict.fromkeys(("x", "bias", "routing_bias", "other_bias", "out"), "*bf16")
    | dict.fromkeys(("thresholds", "product_thresholds", "products", "partial"), "*fp32")
)
# as the launcher marks them, where sizes are multiples of 16
MULTIPLES = "pitch", "columns", "outputs", "neurons"


def compile_for(
    target: GPUTarget, fn: object, types: dict[str, str] | None = None, **constants: object
) -> set[str]:
    """The stages of compilation of a kernel.

    Args:
        target: See :func:`target_of`.
        fn: The kernel.
        types: Of arguments that :data:`TYPES` does not know.
        constants: Arguments that are known when it is compiled, None among them.
    """
    types = TYPES | (types or {})
    names = fn.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in MULTIPLES
    }
    source = ASTSource(
        fn,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=divisible,
    )
    options = dict(num_warps=4, enable_fp_fusion=False)
    return set(triton.compile(source, target=target, options=options).asm)


def target_of(name: str) -> GPUTarget:
    """``cuda:90`` or ``hip:gfx942``."""
    backend, _, architecture = name.partition(":")
    if backend == "cuda":
        return GPUTarget(backend, int(architecture), 32)
    return GPUTarget(backend, architecture, 64)


def main(name: str) -> None:
    """Compile every kernel for one target, and print the stages of compilation."""
    target, stages = target_of(name), []
    for kind in COMPILED_KINDS:
        _, layout = packed_rows(make_matrix(4, 131, kind))
        codes = launch.codes_of(layout, torch.bfloat16)
        shape = dict(CODES=codes, ROWS=16, UNITS=4)
        stages.append(compile_for(target, kernels.dequantise_rows, **shape))
        for batch in (1, 16):
            plan = launch.plan(batch, 10000)
            shape = dict(ROWS=plan.rows, UNITS=plan.units, TOKENS=plan.tokens, STAGES=plan.stages)
            options = dict(CODES=codes, bias=None) | shape
            stages.append(compile_for(target, kernels.packed_linear, **options))
    print(name, *sorted(set.intersection(*stages)))


if __name__ == "__main__":
    for target in sys.argv[1:]:
        main(target)
