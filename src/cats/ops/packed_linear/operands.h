// How operators over packed codes read their arguments. ops/packed_linear/arguments.py has checked them, with better messages:
// what is checked again here keeps a kernel from reading beyond its tensors.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cpu/operators.h"

namespace cats {

inline void expect(bool fits, const std::string& what) {
  if (!fits) throw std::runtime_error("cats: packed codes: shape, dtype or layout of " + what);
}

// The data of a contiguous tensor with this dtype and these sizes.
inline void* data_of_size(AtenTensorHandle tensor, const char* name, int32_t dtype, std::initializer_list<int64_t> sizes) {
  bool fits = dtype_of(tensor) == dtype && dim_of(tensor) == static_cast<int64_t>(sizes.size()) && is_contiguous(tensor);
  const int64_t* actual = sizes_of(tensor);
  if (fits)
    for (const int64_t size : sizes) fits &= *actual++ == size;
  expect(fits, name);
  return data_of(tensor);
}

inline void* optional_data_of_size(AtenTensorHandle tensor, const char* name, int32_t dtype, std::initializer_list<int64_t> sizes) {
  return tensor ? data_of_size(tensor, name, dtype, sizes) : nullptr;
}

inline int32_t dtype_of_number(Number number) {
  switch (number) {
    case Number::kFloat16: return torch.aoti_torch_dtype_float16();
    case Number::kBFloat16: return torch.aoti_torch_dtype_bfloat16();
    case Number::kFloat32: break;
  }
  return torch.aoti_torch_dtype_float32();
}

inline Number number_of(AtenTensorHandle tensor, const char* name) {
  for (const Number number : {Number::kFloat16, Number::kBFloat16, Number::kFloat32})
    if (dtype_of(tensor) == dtype_of_number(number)) return number;
  expect(false, name);
  return Number::kFloat32;
}

// The tokens of x [B, columns].
inline int64_t tokens_of(AtenTensorHandle x, int64_t columns) {
  const bool fits = dim_of(x) == 2 && sizes_of(x)[1] == columns && is_contiguous(x);
  expect(fits && sizes_of(x)[0] >= 1 && sizes_of(x)[0] <= kMaxBatch, "x");
  return sizes_of(x)[0];
}

// Checks what rows and columns have in common: `layout` is the property `numbers` of RowLayout or ColumnLayout.
inline void expect_codes(const StableIValue* layout, const char* name) {
  const int64_t bits = layout[0], size = layout[1], group = layout[2], scale = layout[3], mode = layout[4], zero = layout[5];
  expect((bits == 4 || bits == 8) && size >= 1 && group >= 0, name);
  expect(scale >= 0 && scale <= 2 && mode >= 0 && mode <= 2 && zero >= 0 && zero < int64_t{1} << bits, name);
}

// The layout of packed rows, with the pitch of a matrix that has it.
inline RowFormat row_format(const StableIValue* layout, AtenTensorHandle rows) {
  expect_codes(layout, "packed rows");
  const int64_t group = layout[2];
  expect(group == 0 || group == 16 || group == 32 || group == 64 || group == 128, "packed rows");
  expect(dim_of(rows) == 2 && sizes_of(rows)[0] >= 1, "packed rows");
  const RowFormat format(layout[0], layout[1], group, static_cast<Number>(layout[3]), static_cast<ZeroMode>(layout[4]),
                         layout[5], sizes_of(rows)[1]);
  expect(format.used_bytes <= format.pitch, "packed rows");
  return format;
}

}  // namespace cats
