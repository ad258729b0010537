// Dot products with packed rows. For the codes c of a group, with zero point z and scale s,
//
//   sum((c - z) * s * x) = s * (sum(c * x) - z * sum(x)),
//
// so a code costs a conversion and a multiplication. x is put in the order of the codes once per call, and its sums are kept
// for each lane of a vector: the zero point is subtracted in each lane after a few codes, before rounding can matter.
//
// An instruction set (`Lanes`, see cpu/rows.h) also has
//
//   Codes, load_codes             kWidth bytes, each as an integer
//   whole, low, high              floats: of the byte, of its low and of its high four bits
//   halves(a, b)                  with kWidth 16: 8 lanes of each
#pragma once

#include <cmath>
#include <limits>

#include "cpu/rows.h"
#include "packed_linear/formats.h"

namespace cats {
namespace {

// --- numbers in memory

// Calls body with a value of the type.
template <class Body>
void with_type(Number number, const Body& body) {
  switch (number) {
    case Number::kFloat16: return body(Float16{});
    case Number::kBFloat16: return body(BFloat16{});
    case Number::kFloat32: return body(float{});
  }
}

template <class Lanes>
typename Lanes::Vector widen_some(const uint8_t* p) {
  return Lanes::whole(Lanes::load_codes(p));
}
template <class Lanes, class T>
typename Lanes::Vector widen_some(const T* p) {
  return Lanes::widen(p);
}

// `count` numbers in float32, then zeros up to a whole vector.
template <class Lanes, class T>
void widen_array(const T* numbers, int64_t count, float* out) {
  constexpr int64_t W = Lanes::kWidth;
  int64_t i = 0;
  for (; i + W <= count; i += W) Lanes::store(out + i, widen_some<Lanes>(numbers + i));
  if (i == count) return;
  T rest[W] = {};
  std::memcpy(rest, numbers + i, (count - i) * sizeof(T));
  Lanes::store(out + i, widen_some<Lanes>(rest));
}

template <class Lanes>
void widen_array(const void* numbers, Number type, int64_t count, float* out) {
  with_type(type, [&](auto number) { widen_array<Lanes>(static_cast<const decltype(number)*>(numbers), count, out); });
}

inline float number_at(const void* numbers, Number type, int64_t i) {
  float wide;
  with_type(type, [&](auto number) {
    std::memcpy(&number, static_cast<const uint8_t*>(numbers) + i * sizeof number, sizeof number);
    wide = to_float(number);
  });
  return wide;
}

inline bool is_finite(float value) { return std::fabs(value) <= std::numeric_limits<float>::max(); }

// --- the order of codes

// Where a code is in its row: see rows.py. A unit is 64 bytes; column 32 * q + 16 * h + 4 * t + b of it is in byte
// 16 * t + 4 * w + b. With 8 bits, w is 2 * q + h. With 4 bits, q is 2 * j + p and w is 2 * j + h, where p is the half of the
// byte. So bit 3 of the byte's number (a half of 16 bytes, q or j) and p tell the block of 32 columns.
inline int64_t code_at(const RowFormat& format, const uint8_t* row, int64_t column) {
  const int64_t unit = column / format.unit(), c = column % format.unit();
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
  const float* sums;     // [units, parts, tokens, kWidth]; see dot_packed
  bool has_nan[kMaxBatch];
};

// Whether all of a unit has one scale.
inline bool is_unit_in_group(const RowFormat& format) { return format.group == 0 || format.group >= format.unit(); }

template <class Lanes>
PackedInputs packed_inputs(const RowFormat& format, const void* x, Number dtype, int64_t tokens, std::vector<float>& memory) {
  constexpr int64_t W = Lanes::kWidth, kSpan = std::max<int64_t>(W, 8);
  const int64_t D = format.columns, width = format.width(), units = format.units(), planes = 8 / format.bits;
  const int64_t parts = is_unit_in_group(format) ? 1 : 16 / kSpan * planes;
  const int64_t size = tokens * width, sums_size = units * parts * tokens * W;
  float* plain = at_least(memory, 2 * size + sums_size);
  float *ordered = plain + size, *sums = ordered + size;
  PackedInputs inputs{tokens, width, plain, ordered, sums, {}};
  std::fill(sums, sums + sums_size, 0.0f);
  for (int64_t b = 0; b < tokens; ++b) {
    float* row = plain + b * width;
    std::fill(row + D / W * W, row + width, 0.0f);
    const auto* stored = static_cast<const uint8_t*>(x) + b * D * size_of(dtype);
    widen_array<Lanes>(static_cast<const void*>(stored), dtype, D, row);
    for (int64_t i = 0; i < D; ++i) inputs.has_nan[b] |= row[i] != row[i];
    for (int64_t u = 0; u < units; ++u)
      for (int64_t p = 0; p < planes; ++p) {
        float* out = ordered + b * width + (u * planes + p) * kUnitBytes;
        for (int64_t t = 0; t < 4; ++t)
          for (int64_t w = 0; w < 4; ++w) {
            const int64_t column = planes == 1 ? 16 * w : 64 * (w / 2) + 32 * p + 16 * (w % 2);
            std::memcpy(out + 16 * t + 4 * w, row + u * format.unit() + column + 4 * t, 4 * sizeof(float));
          }
        for (int64_t i = 0; i < kUnitBytes; i += W) {
          const int64_t part = parts == 1 ? 0 : i % 16 / kSpan * planes + p;
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
    size_ = format.padded_groups() + Lanes::kWidth;
    static thread_local std::vector<float> memory;
    data_ = at_least(memory, (2 * rows + 1) * size_);
    // groups of padding have zeros, whatever the padding holds
    std::fill(data_, data_ + 2 * rows * size_, 0.0f);
    zero_ = data_ + 2 * rows * size_;
    std::fill(zero_, zero_ + size_, static_cast<float>(format.zero));
  }

  RowTables read(const uint8_t* row, int64_t place) {
    float *scales = data_ + 2 * place * size_, *extras = scales + size_;
    const uint8_t* stored = row + format_.extras_offset();
    const int64_t groups = format_.groups();
    widen_array<Lanes>(static_cast<const void*>(row + format_.code_bytes()), format_.scale, groups, scales);
    switch (format_.mode) {
      case ZeroMode::kConstant: break;
      case ZeroMode::kZeros: widen_array<Lanes>(stored, groups, extras); return {scales, extras, nullptr};
      case ZeroMode::kShifts:
        widen_array<Lanes>(static_cast<const void*>(stored), format_.scale, groups, extras);
        return {scales, zero_, extras};
    }
    return {scales, zero_, nullptr};
  }

 private:
  const RowFormat& format_;
  int64_t size_;
  float *data_, *zero_;
};

// The dot product as the format defines it, number by number: where the result is not finite, infinities may not be factored.
inline float plain_dot(const RowFormat& format, const uint8_t* row, const float* x) {
  float total = 0;
  for (int64_t i = 0; i < format.columns; ++i) {
    const int64_t group = i / kBlock >> format.group_shift();
    const uint8_t* extras = row + format.extras_offset();
    const int64_t zero = format.mode == ZeroMode::kZeros ? extras[group] : format.zero;
    float number = static_cast<float>(code_at(format, row, i) - zero) * number_at(row + format.code_bytes(), format.scale, group);
    if (format.mode == ZeroMode::kShifts) number += number_at(extras, format.scale, group);
    total += number * x[i];
  }
  return total;
}

// --- dot products

// The value of a block's group; with kWidth 16, the upper lanes are those of the block in the other half of 16 bytes.
template <class Lanes, int kPlanes>
typename Lanes::Vector of_block(const float* values, int64_t block, int64_t shift) {
  if constexpr (Lanes::kWidth == 16)
    return Lanes::halves(values[block >> shift], values[(block + kPlanes) >> shift]);
  else
    return Lanes::broadcast(values[block >> shift]);
}

// out[r][b] = the dot product of rows[r] and token first + b; prefetches next[r]. With kWhole, a unit has one scale; else each
// half of 16 bytes and each half of a byte has its own.
template <class Lanes, int kBits, bool kWhole, int R, int B>
void dot_packed(const RowFormat& format, const uint8_t* const (&rows)[R], const uint8_t* const (&next)[R],
                const RowTables (&tables)[R], const PackedInputs& x, int64_t first, float (&out)[R][B]) {
  using Vector = typename Lanes::Vector;
  constexpr int64_t W = Lanes::kWidth, kSpan = std::max<int64_t>(W, 8), kHalves = 16 / kSpan;
  constexpr int kPlanes = 8 / kBits;
  constexpr int64_t kParts = kWhole ? 1 : kHalves * kPlanes;
  const int64_t units = format.units(), shift = format.group_shift();
  const bool has_shifts = format.mode == ZeroMode::kShifts;

  Vector totals[R][B], sums[kPlanes][R][B];
  for (auto& row : totals)
    for (auto& total : row) total = Lanes::broadcast(0.0f);

  for (int64_t u = 0; u < units; ++u) {
    for (int r = 0; r < R; ++r) prefetch(next[r] + u * kUnitBytes);
    const float* ordered = x.ordered + first * x.width + u * kPlanes * kUnitBytes;
    const auto x_sum = [&](int64_t part, int b) {
      return Lanes::load(x.sums + ((u * kParts + part) * x.tokens + first + b) * W);
    };
    const auto add_codes = [&](int64_t i) {
      Vector codes[kPlanes][R];
      for (int r = 0; r < R; ++r) {
        const auto bytes = Lanes::load_codes(rows[r] + u * kUnitBytes + i);
        if constexpr (kBits == 8) {
          codes[0][r] = Lanes::whole(bytes);
        } else {
          codes[0][r] = Lanes::low(bytes);
          codes[1][r] = Lanes::high(bytes);
        }
      }
      for (int p = 0; p < kPlanes; ++p)
        for (int b = 0; b < B; ++b) {
          const Vector inputs = Lanes::load(ordered + b * x.width + p * kUnitBytes + i);
          for (int r = 0; r < R; ++r) sums[p][r][b] = Lanes::multiply_add(codes[p][r], inputs, sums[p][r][b]);
        }
    };
    if constexpr (kWhole) {
      const int64_t group = u * 2 * kPlanes >> shift;
      for (int r = 0; r < R; ++r) {
        const Vector zero = Lanes::broadcast(tables[r].zeros[group]);
        for (int b = 0; b < B; ++b) {
          sums[0][r][b] = Lanes::subtract_product(Lanes::broadcast(0.0f), zero, x_sum(0, b));
          if constexpr (kPlanes == 2) sums[1][r][b] = Lanes::broadcast(0.0f);
        }
      }
      for (int64_t i = 0; i < kUnitBytes; i += W) add_codes(i);
      for (int r = 0; r < R; ++r) {
        const Vector scale = Lanes::broadcast(tables[r].scales[group]);
        for (int b = 0; b < B; ++b) {
          Vector sum = sums[0][r][b];
          if constexpr (kPlanes == 2) sum = Lanes::add(sum, sums[1][r][b]);
          totals[r][b] = Lanes::multiply_add(sum, scale, totals[r][b]);
          if (has_shifts)
            totals[r][b] = Lanes::multiply_add(Lanes::broadcast(tables[r].shifts[group]), x_sum(0, b), totals[r][b]);
        }
      }
    } else {
      for (int64_t half = 0; half < kHalves; ++half) {
        const int64_t block = u * 2 * kPlanes + half * kPlanes;
        for (int p = 0; p < kPlanes; ++p)
          for (int r = 0; r < R; ++r) {
            const Vector zero = of_block<Lanes, kPlanes>(tables[r].zeros, block + p, shift);
            for (int b = 0; b < B; ++b)
              sums[p][r][b] = Lanes::subtract_product(Lanes::broadcast(0.0f), zero, x_sum(half * kPlanes + p, b));
          }
        for (int64_t t = 0; t < 4; ++t)
          for (int64_t v = 0; v < kSpan; v += W) add_codes(16 * t + kSpan * half + v);
        for (int p = 0; p < kPlanes; ++p)
          for (int r = 0; r < R; ++r) {
            const Vector scale = of_block<Lanes, kPlanes>(tables[r].scales, block + p, shift);
            for (int b = 0; b < B; ++b) totals[r][b] = Lanes::multiply_add(sums[p][r][b], scale, totals[r][b]);
            if (!has_shifts) continue;
            const Vector add = of_block<Lanes, kPlanes>(tables[r].shifts, block + p, shift);
            for (int b = 0; b < B; ++b)
              totals[r][b] = Lanes::multiply_add(add, x_sum(half * kPlanes + p, b), totals[r][b]);
          }
      }
    }
  }
  for (int64_t i = format.code_bytes(); i < format.used_bytes(); i += kLineBytes)
    for (int r = 0; r < R; ++r) prefetch(next[r] + i);

  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      out[r][b] = Lanes::sum(totals[r][b]);
      const int64_t token = first + b;
      if (!is_finite(out[r][b]) && !x.has_nan[token]) out[r][b] = plain_dot(format, rows[r], x.plain + token * x.width);
    }
}

template <class Lanes, int kBits, bool kWhole, int B, class Row>
void dot_packed_rows(const RowFormat& format, const Row& row, int64_t count, const PackedInputs& x, int64_t first,
                     float* out) {
  constexpr int R = B == 1 ? Lanes::kAccumulators / 4 : B == 2 ? Lanes::kAccumulators / 8 : 1;
  TableMemory<Lanes> memory(format, R);
  for (int64_t i = 0; i < count; i += R) {
    // past the end, a group of rows repeats the last one
    const uint8_t *rows[R], *next[R];
    RowTables tables[R];
    for (int r = 0; r < R; ++r) {
      rows[r] = row(std::min(i + r, count - 1));
      next[r] = row(std::min(i + R + r, count - 1));
      tables[r] = memory.read(rows[r], r);
    }
    float values[R][B];
    dot_packed<Lanes, kBits, kWhole, R, B>(format, rows, next, tables, x, first, values);
    for (int r = 0; r < R && i + r < count; ++r) std::copy_n(values[r], B, out + (i + r) * x.tokens + first);
  }
}

// out[i * tokens + b] = the dot product of row(i) and token b, for i < count.
template <class Lanes, class Row>
void dot_packed_rows(const RowFormat& format, const Row& row, int64_t count, const PackedInputs& x, float* out) {
  const auto run = [&](auto bits, auto whole) {
    constexpr int kBits = decltype(bits)::value;
    constexpr bool kWhole = decltype(whole)::value;
    // the rows of a call for eight tokens are read twice, the second time from a cache
    for (int64_t first = 0; first < x.tokens; first += 4) switch (x.tokens - first) {
        case 1: dot_packed_rows<Lanes, kBits, kWhole, 1>(format, row, count, x, first, out); break;
        case 2: dot_packed_rows<Lanes, kBits, kWhole, 2>(format, row, count, x, first, out); break;
        case 3: dot_packed_rows<Lanes, kBits, kWhole, 3>(format, row, count, x, first, out); break;
        default: dot_packed_rows<Lanes, kBits, kWhole, 4>(format, row, count, x, first, out); break;
      }
  };
  using std::integral_constant;
  const bool whole = is_unit_in_group(format);
  if (format.bits == 4 && whole) run(integral_constant<int, 4>{}, std::true_type{});
  if (format.bits == 4 && !whole) run(integral_constant<int, 4>{}, std::false_type{});
  if (format.bits == 8 && whole) run(integral_constant<int, 8>{}, std::true_type{});
  if (format.bits == 8 && !whole) run(integral_constant<int, 8>{}, std::false_type{});
}

}  // namespace
}  // namespace cats
