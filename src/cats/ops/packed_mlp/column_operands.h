// How operators over packed columns read their layout; packed_linear/operands.h says what is checked where.
#pragma once

#include "packed_linear/operands.h"

namespace cats {

// The layout of packed columns, with the pitch of a matrix that has it.
inline ColumnFormat column_format(const StableIValue* layout, AtenTensorHandle columns) {
  expect_codes(layout, "packed columns");
  ColumnFormat format;
  format.bits = layout[0];
  format.outputs = layout[1];
  format.group = layout[2];
  format.scale = static_cast<Number>(layout[3]);
  format.mode = static_cast<ZeroMode>(layout[4]);
  format.zero = layout[5];
  expect(dim_of(columns) == 2 && format.outputs % 4 == 0, "packed columns");
  format.pitch = sizes_of(columns)[1];
  expect(format.used_bytes() <= format.pitch, "packed columns");
  return format;
}

}  // namespace cats
