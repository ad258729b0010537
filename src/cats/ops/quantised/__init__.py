"""Quantised weights as kernels read them, in plain tensors: no models, no checkpoints.

``rows.py`` is the layout of matrices that CUDA kernels stream row by row, ``columns.py`` that of
``down``, of which they stream columns. ``numbers.py`` says what numbers they stand for.
"""

from cats.ops.quantised.columns import ColumnLayout, PackedColumns, pack_columns, unpack_columns
from cats.ops.quantised.numbers import numbers_of, numbers_of_columns, numbers_of_rows
from cats.ops.quantised.rows import (
    SCALE_CODES,
    PackedRows,
    RowLayout,
    ZeroMode,
    pack_rows,
    unpack_rows,
)

__all__ = [
    "SCALE_CODES",
    "ColumnLayout",
    "PackedColumns",
    "PackedRows",
    "RowLayout",
    "ZeroMode",
    "numbers_of",
    "numbers_of_columns",
    "numbers_of_rows",
    "pack_columns",
    "pack_rows",
    "unpack_columns",
    "unpack_rows",
]
