// Packed rows of codes, as ops/quantised/rows.py lays them out: codes | scales | zeros or shifts | padding. A number of the
// matrix is (code - zero) * scale + shift.
#pragma once

#include <cstdint>

namespace cats {

// Types of scales and of x, by the numbers of SCALE_CODES in ops/quantised/codes.py.
enum class Number : int64_t { kFloat16, kBFloat16, kFloat32 };

// What there is besides codes and scales: ZeroMode in ops/quantised/codes.py.
enum class ZeroMode : int64_t { kConstant, kZeros, kShifts };

inline int64_t size_of(Number number) { return number == Number::kFloat32 ? 4 : 2; }

// Columns of a row are in blocks, the columns of the smallest group, and codes in units.
constexpr int64_t kBlock = 32;
constexpr int64_t kUnitBytes = 64;

struct RowFormat {
  int64_t bits, columns;
  int64_t group;  // 32, 64 or 128 columns; 0 where all share a scale
  Number scale;
  ZeroMode mode;
  int64_t zero;   // the constant zero point
  int64_t pitch;  // bytes from one row to the next

  int64_t unit() const { return 8 * kUnitBytes / bits; }
  int64_t units() const { return (columns + unit() - 1) / unit(); }
  int64_t width() const { return units() * unit(); }
  int64_t groups() const { return group ? (columns + group - 1) / group : 1; }
  // of the padded row
  int64_t padded_groups() const { return group ? (width() + group - 1) / group : 1; }
  int64_t code_bytes() const { return units() * kUnitBytes; }
  int64_t extras_offset() const { return code_bytes() + padded_groups() * size_of(scale); }
  int64_t used_bytes() const {
    const int64_t extra = mode == ZeroMode::kConstant ? 0 : mode == ZeroMode::kZeros ? 1 : size_of(scale);
    return extras_offset() + padded_groups() * extra;
  }
  // The group of a block is `block >> group_shift()`.
  int64_t group_shift() const { return group == 32 ? 0 : group == 64 ? 1 : group == 128 ? 2 : 62; }
};

}  // namespace cats
