"""Compile the Triton kernels of packed MLPs for GPUs, without one.

``python -m tests.ops.packed_mlp.compile_triton cuda:90 hip:gfx942``
"""

import sys

import torch
import triton.language as tl

from cats.ops.packed_linear.triton.launch import codes_of
from cats.ops.packed_mlp.triton import kernels, launch
from tests.ops.packed_cases import make_matrix, packed_columns, packed_rows
from tests.ops.packed_linear.compile_triton import COMPILED_KINDS, compile_for, target_of


def main(name: str) -> None:
    """Compile every kernel for one target, and print the stages of compilation."""
    target, stages = target_of(name), []
    for kind in COMPILED_KINDS:
        _, layout = packed_rows(make_matrix(4, 131, kind))
        down = packed_columns(make_matrix(4096, 3, kind)).layout
        row_codes, codes = (codes_of(part, torch.bfloat16) for part in (layout, down))
        tables = dict(
            scales=pointer(codes.scale),
            extras="*u8" if codes.has_zeros else pointer(codes.scale),
        )
        shape = dict(CODES=codes, ONE_GROUP=True, COLUMNS=32, BYTES=64)
        stages.append(compile_for(target, kernels.dequantise_columns, tables, **shape))
        for batch in (1, 16):
            plan = launch.plan(batch, 14336, down, 1000)
            shape = dict(
                ROWS=plan.rows,
                ROW_UNITS=plan.row_units,
                CHUNK=plan.chunk,
                CHUNK_UNITS=plan.chunk_units,
                TOKENS=plan.tokens,
                STAGES=plan.stages,
            )
            options = dict(CODES=row_codes, ACTIVATION="silu", GATE_ROUTES=batch == 1) | shape
            stages.append(compile_for(target, kernels.multiply_branches, **options))
            shape = dict(CHUNK=plan.columns, BYTES=plan.column_bytes, TOKENS=plan.tokens)
            options = dict(CODES=codes, NUMBER=tl.bfloat16, ONE_GROUP=True, SEGMENT=32) | shape
            stages.append(compile_for(target, kernels.add_columns, tables, **options))
    print(name, *sorted(set.intersection(*stages)))


def pointer(dtype: tl.dtype) -> str:
    return "*" + {tl.float16: "fp16", tl.bfloat16: "bf16", tl.float32: "fp32"}[dtype]


if __name__ == "__main__":
    for target in sys.argv[1:]:
        main(target)
