"""Quantised weights as kernels read them, in plain tensors: no models, no checkpoints.

``rows.py`` is the layout of matrices that CUDA kernels stream row by row.
"""

from cats.ops.quantised.rows import PackedRows, RowLayout, pack_rows, unpack_rows

__all__ = ["PackedRows", "RowLayout", "pack_rows", "unpack_rows"]
