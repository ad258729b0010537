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

// Columns of a row are in blocks, codes in units. A group is one or more blocks, or half of one.
constexpr int64_t kBlock = 32;
constexpr int64_t kHalfBlock = 16;
constexpr int64_t kUnitBytes = 64;

struct RowFormat {
  int64_t bits, columns;
  int64_t group;  // 16, 32, 64 or 128 columns; 0 where all share a scale
  Number scale;
  ZeroMode mode;
  int64_t zero;   // the constant zero point
  int64_t pitch;  // bytes from one row to the next

  // What follows from these, once per call: divisions take as long as many codes.
  int64_t unit;                   // columns in a unit
  int64_t units, width;           // of a row; its columns, padded to whole units
  int64_t groups, padded_groups;  // of its columns, and of the padded row
  int64_t group_shift;            // the group of a block is `block >> group_shift`, unless groups are half blocks
  int64_t code_bytes, extras_offset, used_bytes;

  RowFormat() = default;
  RowFormat(int64_t code_bits, int64_t column_count, int64_t group_size, Number scale_type, ZeroMode zero_mode,
            int64_t zero_point, int64_t row_pitch)
      : bits(code_bits), columns(column_count), group(group_size), scale(scale_type), mode(zero_mode), zero(zero_point),
        pitch(row_pitch) {
    unit = 8 * kUnitBytes / bits;
    units = (columns + unit - 1) / unit;
    width = units * unit;
    groups = group ? (columns + group - 1) / group : 1;
    padded_groups = group ? (width + group - 1) / group : 1;
    group_shift = group == 32 ? 0 : group == 64 ? 1 : group == 128 ? 2 : 62;
    code_bytes = units * kUnitBytes;
    extras_offset = code_bytes + padded_groups * size_of(scale);
    const int64_t extra = mode == ZeroMode::kConstant ? 0 : mode == ZeroMode::kZeros ? 1 : size_of(scale);
    used_bytes = extras_offset + padded_groups * extra;
  }

  bool is_in_half_blocks() const { return group == kHalfBlock; }
  int64_t group_of(int64_t column) const {
    return is_in_half_blocks() ? column / kHalfBlock : column / kBlock >> group_shift;
  }
};

}  // namespace cats
