// What dot products with packed rows read: x in the order of codes with its sums, scales and zero points in float32, and single
// numbers as the format defines them. packed_rows.h says why.
//
// An instruction set (`Lanes`, see cpu/rows.h) also has
//
//   Codes, load_codes             kWidth bytes, each as an integer
//   whole, low, high              floats: of the byte, of its low and of its high four bits
//   subtract_product(c, a, b)     c - a * b
//   halves(a, b)                  with kWidth 8 or 16: half of the lanes of each
//   quarters(a, b, c, d)          with kWidth 16: 4 lanes of each
#pragma once

#include <cmath>
#include <limits>

#include "cpu/rows.h"
#include "packed_linear/formats.h"
#include "packed_linear/numbers.h"

namespace cats {
namespace {

// --- numbers in memory

template <class Lanes>
typename Lanes::Vector widen_some(const uint8_t* p) {
  return Lanes::whole(Lanes::load_codes(p));
}
template <class Lanes, class T>
typename Lanes::Vector widen_some(const T* p) {
  return Lanes::widen(p);
}

// `count` numbers in float32, then zeros up to a whole vector. `readable` numbers are in memory, `count` or more: where a whole
// vector is, it need not be copied together.
template <class Lanes, class T>
void widen_array(const T* numbers, int64_t count, int64_t readable, float* out) {
  constexpr int64_t W = Lanes::kWidth;
  int64_t i = 0;
  for (; i + W <= count; i += W) Lanes::store(out + i, widen_some<Lanes>(numbers + i));
  if (i == count) return;
  if (i + W <= readable) {
    Lanes::store(out + i, widen_some<Lanes>(numbers + i));
    for (int64_t j = count; j < i + W; ++j) out[j] = 0;
    return;
  }
  T rest[W] = {};
  std::memcpy(rest, numbers + i, (count - i) * sizeof(T));
  Lanes::store(out + i, widen_some<Lanes>(rest));
}

template <class Lanes>
void widen_array(const void* numbers, Number type, int64_t count, int64_t readable, float* out) {
  with_type(type, [&](auto number) {
    widen_array<Lanes>(static_cast<const decltype(number)*>(numbers), count, readable, out);
  });
}

inline bool is_finite(float value) { return std::fabs(value) <= std::numeric_limits<float>::max(); }

// --- the order of codes

// Where a code is in its row: see rows.py. A unit is 64 bytes; column 32 * q + 16 * h + 4 * t + b of it is in byte
// 16 * t + 4 * w + b. With 8 bits, w is 2 * q + h. With 4 bits, q is 2 * j + p and w is 2 * j + h, where p is the half of the
// byte. So bit 3 of the byte's number (a half of 16 bytes, q or j) and p tell the block of 32 columns.
inline int64_t code_at(const RowFormat& format, const uint8_t* row, int64_t column) {
  const int64_t unit = column / format.unit, c = column % format.unit;
  const int64_t t = c / 4 % 4, b = c % 4;
  const uint8_t* bytes = row + unit * kUnitBytes + 16 * t + b;
  if (format.bits == 8) return bytes[4 * (c / 16)];
  const int64_t byte = bytes[4 * (2 * (c / 64) + c / 16 % 2)];
  return c / 32 % 2 ? byte >> 4 : byte & 15;
}

// x of a call: as the kernels read it, and its sums.
struct PackedInputs {
  int64_t tokens, width;
  const float* plain;    // [tokens, width], in the order of columns; zeros after the last
  const float* ordered;  // [tokens, units, planes, 64]: planes are the halves of a byte
  const float* sums;     // [units, parts, tokens, kWidth]; see PackedDot
  bool has_nan[kMaxBatch];
};

// Whether all of a unit has one scale.
inline bool is_unit_in_group(const RowFormat& format) { return format.group == 0 || format.group >= format.unit; }

// How many of 16 bytes have sums of their own, where a unit has several groups: whole vectors, of 4 bytes or more for half
// blocks and of 8 or more for blocks.
template <class Lanes>
constexpr int64_t span_of(bool in_half_blocks) {
  return std::max<int64_t>(Lanes::kWidth, in_half_blocks ? 4 : 8);
}

template <class Lanes>
PackedInputs packed_inputs(const RowFormat& format, const void* x, Number dtype, int64_t tokens, std::vector<float>& memory) {
  constexpr int64_t W = Lanes::kWidth;
  const int64_t span = span_of<Lanes>(format.is_in_half_blocks());
  const int64_t D = format.columns, width = format.width, units = format.units, planes = 8 / format.bits;
  const int64_t parts = is_unit_in_group(format) ? 1 : 16 / span * planes;
  const int64_t size = tokens * width, sums_size = units * parts * tokens * W;
  float* plain = at_least(memory, 2 * size + sums_size);
  float *ordered = plain + size, *sums = ordered + size;
  PackedInputs inputs{tokens, width, plain, ordered, sums, {}};
  std::fill(sums, sums + sums_size, 0.0f);
  for (int64_t b = 0; b < tokens; ++b) {
    float* row = plain + b * width;
    std::fill(row + D / W * W, row + width, 0.0f);
    const auto* stored = static_cast<const uint8_t*>(x) + b * D * size_of(dtype);
    widen_array<Lanes>(static_cast<const void*>(stored), dtype, D, D, row);
    for (int64_t i = 0; i < D; ++i) inputs.has_nan[b] |= row[i] != row[i];
    for (int64_t u = 0; u < units; ++u)
      for (int64_t p = 0; p < planes; ++p) {
        float* out = ordered + b * width + (u * planes + p) * kUnitBytes;
        for (int64_t t = 0; t < 4; ++t)
          for (int64_t w = 0; w < 4; ++w) {
            const int64_t column = planes == 1 ? 16 * w : 64 * (w / 2) + 32 * p + 16 * (w % 2);
            std::memcpy(out + 16 * t + 4 * w, row + u * format.unit + column + 4 * t, 4 * sizeof(float));
          }
        for (int64_t i = 0; i < kUnitBytes; i += W) {
          const int64_t part = parts == 1 ? 0 : i % 16 / span * planes + p;
          float* sum = sums + ((u * parts + part) * tokens + b) * W;
          Lanes::store(sum, Lanes::add(Lanes::load(sum), Lanes::load(out + i)));
        }
      }
  }
  return inputs;
}

// --- scales and zero points of a row

struct RowTables {
  const float *scales, *zeros, *shifts;  // [padded groups]; shifts may be null
};

// Memory of a thread for the tables of some rows.
template <class Lanes>
class TableMemory {
 public:
  TableMemory(const RowFormat& format, int64_t rows) : format_(format) {
    size_ = format.padded_groups + Lanes::kWidth;
    static thread_local std::vector<float> memory;
    data_ = at_least(memory, (2 * rows + 1) * size_);
    // groups of padding have zeros, whatever the padding holds
    std::fill(data_, data_ + 2 * rows * size_, 0.0f);
    zero_ = data_ + 2 * rows * size_;
    std::fill(zero_, zero_ + size_, static_cast<float>(format.zero));
  }

  RowTables read(const uint8_t* row, int64_t place) {
    float *scales = data_ + 2 * place * size_, *extras = scales + size_;
    read_numbers(row, format_.code_bytes, format_.scale, scales);
    switch (format_.mode) {
      case ZeroMode::kConstant: break;
      case ZeroMode::kZeros:
        widen_array<Lanes>(row + format_.extras_offset, format_.groups, format_.pitch - format_.extras_offset, extras);
        return {scales, extras, nullptr};
      case ZeroMode::kShifts:
        read_numbers(row, format_.extras_offset, format_.scale, extras);
        return {scales, zero_, extras};
    }
    return {scales, zero_, nullptr};
  }

 private:
  void read_numbers(const uint8_t* row, int64_t offset, Number type, float* out) const {
    const int64_t readable = (format_.pitch - offset) / (type == Number::kFloat32 ? 4 : 2);
    widen_array<Lanes>(static_cast<const void*>(row + offset), type, format_.groups, readable, out);
  }

  const RowFormat& format_;
  int64_t size_;
  float *data_, *zero_;
};

// The dot product as the format defines it, number by number: where the result is not finite, infinities may not be factored.
inline float plain_dot(const RowFormat& format, const uint8_t* row, const float* x) {
  float total = 0;
  for (int64_t i = 0; i < format.columns; ++i) {
    const int64_t group = format.group_of(i);
    const uint8_t* extras = row + format.extras_offset;
    const int64_t zero = format.mode == ZeroMode::kZeros ? extras[group] : format.zero;
    float number = static_cast<float>(code_at(format, row, i) - zero) * number_at(row + format.code_bytes, format.scale, group);
    if (format.mode == ZeroMode::kShifts) number += number_at(extras, format.scale, group);
    total += number * x[i];
  }
  return total;
}

}  // namespace
}  // namespace cats
