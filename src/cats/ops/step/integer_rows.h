// Dot products of packed rows with integers: x is rounded to 15 bits per block of 32 columns, which is finer than bfloat16, and
// held in two bytes. For the codes c of a block with zero point z, scale s and shift m, and x = a * (128 * h + l),
//
//   sum(((c - z) * s + m) * x) = s * a * sum(c * (128 * h + l)) + (m - z * s) * sum(x),
//
// so a code costs two products of bytes, of which an instruction makes 64, and the rest is a few instructions per unit of 64
// bytes. `Set::Bytes` is what an instruction set has for that:
//
//   Integers                         64 bytes, or 16 sums of int32
//   load, load_once, low, high       64 bytes; their low and their high four bits
//   zero, dot(sums, codes, x)        sums of 4 neighbouring products of unsigned codes and signed x
//   shift(sums), to_floats(sums)     128 times the sums; the sums as floats
//   few<n>(numbers)                  n numbers of any type as floats, n 2 or 4, with multiply_add and multiply for them
//   spread<planes>(few, plane)       those of the two blocks of a plane, each at its lanes
//   first(few)                       a Vector with these, and zeros
#pragma once

#include "packed_linear/packed_rows.h"

namespace cats {
namespace {

// What an instruction set without such products has instead.
struct NoIntegers {};
template <class Set, template <class> class Type, bool = Set::kHasIntegers>
struct ChosenIntegers {
  using Chosen = NoIntegers;
};
template <class Set, template <class> class Type>
struct ChosenIntegers<Set, Type, true> {
  using Chosen = Type<Set>;
};
template <class Set, template <class> class Type>
using IfIntegers = typename ChosenIntegers<Set, Type>::Chosen;

constexpr int64_t kPartRange = 128;
constexpr float kLargestInteger = 127 * kPartRange + kPartRange / 2 - 1;

// into the first-level cache
inline void prefetch_near(const void* address) {
#if defined(_MSC_VER)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
#else
  __builtin_prefetch(address, 0, 3);
#endif
}

// Whether rows are read as integers: their groups are whole blocks.
inline bool takes_integers(const RowFormat& format) { return format.group % kBlock == 0; }

// Two bytes whose number is about value * factor.
inline void split_number(float value, float factor, int8_t& high, int8_t& low) {
  // adding it rounds to an integer, in the low bits
  constexpr float kRound = 12582912.0f;
  const float shifted = value * factor + kRound;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t number = (bits & 0x7fffff) - 0x400000;
  const int32_t upper = (number + 64) >> 7;
  high = static_cast<int8_t>(upper);
  low = static_cast<int8_t>(number - upper * 128);
}

// x of a part in integers, for rows of one number of bits.
template <class Set>
class IntegerRows {
  using Bytes = typename Set::Bytes;
  using Base = typename Set::Base;

 public:
  void read(const RowFormat& format, const float* x) {
    const int64_t width = format.width, blocks = width / kBlock, planes = 8 / format.bits;
    plain_ = at_least(plain_memory_, width);
    std::copy_n(x, format.columns, plain_);
    std::fill(plain_ + format.columns, plain_ + width, 0.0f);
    factors_ = at_least(numbers_, 2 * blocks);
    sums_ = factors_ + blocks;
    int8_t* bytes = at_least(bytes_memory_, 2 * width + kUnitBytes);
    bytes += (kUnitBytes - reinterpret_cast<uintptr_t>(bytes) % kUnitBytes) % kUnitBytes;
    bytes_ = bytes;
    is_finite_ = true;
    int8_t high[kBlock], low[kBlock];
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = plain_ + block * kBlock;
      float largest = 0;
      for (int64_t i = 0; i < kBlock; ++i) {
        const float size = std::fabs(from[i]);
        // NaN counts as larger
        largest = size > largest || size != size ? size : largest;
      }
      is_finite_ &= is_finite(largest);
      // for less than this, its inverse is infinite
      const float factor = largest > 1e-30f && is_finite(largest) ? kLargestInteger / largest : 0.0f;
      int32_t sum = 0;
      for (int64_t i = 0; i < kBlock; ++i) {
        split_number(from[i], factor, high[i], low[i]);
        sum += high[i] * static_cast<int32_t>(kPartRange) + low[i];
      }
      factors_[block] = factor ? 1.0f / factor : 0.0f;
      // of the rounded numbers: the zero point then cancels what it adds
      sums_[block] = factors_[block] * static_cast<float>(sum);
      place(high, block, planes, bytes);
      place(low, block, planes, bytes + kUnitBytes);
    }
  }

  // out[i] = the product of the row at address(i) and x, for i < count.
  template <class Row>
  void multiply(const RowFormat& format, const Row& address, int64_t count, float* out) const {
    if (!is_finite_) {
      for (int64_t i = 0; i < count; ++i) out[i] = plain_dot(format, address(i), plain_);
      return;
    }
    if (format.bits == 4)
      multiply_bits<4>(format, address, count, out);
    else
      multiply_bits<8>(format, address, count, out);
  }

 private:
  // One row after the other: rows of a matrix are then one stream, which the hardware prefetches. What comes after this many
  // bytes of rows is requested by the step itself, also where the rows are those of kept neurons.
  static constexpr int kRows = 1;
  static constexpr int64_t kAhead = 4096;

  // The bytes of x lie as those of codes do (see code_at): for each unit and half of a byte, 64 high parts, then 64 low ones.
  static void place(const int8_t* block, int64_t number, int64_t planes, int8_t* bytes) {
    const int64_t in_unit = number % (2 * planes), unit = number / (2 * planes);
    const int64_t plane = in_unit % planes, q = in_unit / planes;
    int8_t* to = bytes + (unit * planes + plane) * 2 * kUnitBytes;
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t t = 0; t < 4; ++t) std::memcpy(to + 16 * t + 4 * (2 * q + h), block + 16 * h + 4 * t, 4);
  }

  // Where scales and extras of a row are: in the row, as they are stored, or in float32, one for each block.
  template <class T>
  struct Tables {
    const T *scales, *shifts;
    const float* zeros;
  };

  // The values of each block of a row, from those of its groups.
  static const float* of_blocks(const RowFormat& format, const float* groups, float* memory) {
    if (format.group == kBlock) return groups;
    const int64_t blocks = format.width / kBlock;
    for (int64_t block = 0; block < blocks; ++block) memory[block] = groups[block >> format.group_shift];
    return memory;
  }

  template <int kBits, class Row>
  void multiply_bits(const RowFormat& format, const Row& address, int64_t count, float* out) const {
    // a scale per block, and no zero points: the numbers are read where they are
    if (format.group == kBlock && format.mode != ZeroMode::kZeros) {
      with_type(format.scale, [&](auto type) {
        using T = decltype(type);
        multiply_with<kBits, T>(format, address, count, out, [&](const uint8_t* row, int) {
          const auto* shifts = format.mode == ZeroMode::kShifts ? reinterpret_cast<const T*>(row + format.extras_offset) : nullptr;
          return Tables<T>{reinterpret_cast<const T*>(row + format.code_bytes), shifts, nullptr};
        });
      });
      return;
    }
    const int64_t blocks = format.width / kBlock;
    TableMemory<Base> tables(format, kRows);
    static thread_local std::vector<float> expanded;
    float* memory = at_least(expanded, kRows * 3 * blocks);
    multiply_with<kBits, float>(format, address, count, out, [&](const uint8_t* row, int r) {
      const RowTables table = tables.read(row, r);
      float* own = memory + r * 3 * blocks;
      const bool has_zeros = format.mode == ZeroMode::kZeros;
      return Tables<float>{of_blocks(format, table.scales, own),
                           table.shifts ? of_blocks(format, table.shifts, own + blocks) : nullptr,
                           has_zeros ? of_blocks(format, table.zeros, own + 2 * blocks) : nullptr};
    });
  }

  template <int kBits, class T, class Row, class ReadTables>
  void multiply_with(const RowFormat& format, const Row& address, int64_t count, float* out, const ReadTables& read) const {
    const int64_t ahead = std::max<int64_t>(kRows, kAhead / format.pitch);
    for (int64_t i = 0; i < count; i += kRows) {
      // past the end, a group of rows repeats the last one
      const uint8_t *rows[kRows], *next[kRows];
      Tables<T> tables[kRows];
      for (int r = 0; r < kRows; ++r) {
        rows[r] = address(std::min(i + r, count - 1));
        next[r] = address(std::min(i + ahead + r, count - 1));
        tables[r] = read(rows[r], r);
      }
      float results[kRows];
      if (tables[0].zeros)
        multiply_rows<kBits, T, true, false>(format, rows, next, tables, results);
      else if (tables[0].shifts)
        multiply_rows<kBits, T, false, true>(format, rows, next, tables, results);
      else
        multiply_rows<kBits, T, false, false>(format, rows, next, tables, results);
      for (int r = 0; r < kRows && i + r < count; ++r)
        out[i + r] = is_finite(results[r]) ? results[r] : plain_dot(format, rows[r], plain_);
    }
  }

  template <int kBits, class T, bool kZeros, bool kShifts>
  void multiply_rows(const RowFormat& format, const uint8_t* const (&rows)[kRows], const uint8_t* const (&next)[kRows],
                     const Tables<T> (&tables)[kRows], float (&out)[kRows]) const {
    constexpr int kPlanes = 8 / kBits, kBlocks = 2 * kPlanes;
    typename Base::Vector totals[kPlanes][kRows];
    // sum(m * sum(x)) and sum(s * sum(x)), the latter times z
    typename Bytes::Few shifted[kRows], centred[kRows];
    CATS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CATS_UNROLL
      for (int p = 0; p < kPlanes; ++p) totals[p][r] = Base::broadcast(0.0f);
      shifted[r] = centred[r] = Bytes::no_numbers();
    }
    const int8_t* x = bytes_;
    for (int64_t u = 0; u < format.units; ++u, x += kPlanes * 2 * kUnitBytes) {
      typename Bytes::Integers bytes[kRows], sums[kPlanes][kRows];
      CATS_UNROLL
      for (int r = 0; r < kRows; ++r) bytes[r] = Bytes::load_once(rows[r] + u * kUnitBytes);
      CATS_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        const auto high = Bytes::load(x + p * 2 * kUnitBytes), low = Bytes::load(x + (2 * p + 1) * kUnitBytes);
        CATS_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const auto codes = kBits == 8 ? bytes[r] : p == 0 ? Bytes::low(bytes[r]) : Bytes::high(bytes[r]);
          sums[p][r] = Bytes::dot(Bytes::shift(Bytes::dot(Bytes::zero(), codes, high)), codes, low);
        }
      }
      const auto factors = Bytes::template few<kBlocks>(factors_ + u * kBlocks);
      const auto x_sums = Bytes::template few<kBlocks>(sums_ + u * kBlocks);
      CATS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        prefetch_near(next[r] + u * kUnitBytes);
        const auto stored = Bytes::template few<kBlocks>(tables[r].scales + u * kBlocks);
        const auto scales = Bytes::multiply(stored, factors);
        if constexpr (kZeros) {
          const auto zeros = Bytes::template few<kBlocks>(tables[r].zeros + u * kBlocks);
          centred[r] = Bytes::multiply_add(Bytes::multiply(stored, zeros), x_sums, centred[r]);
        } else {
          centred[r] = Bytes::multiply_add(stored, x_sums, centred[r]);
        }
        if constexpr (kShifts)
          shifted[r] = Bytes::multiply_add(Bytes::template few<kBlocks>(tables[r].shifts + u * kBlocks), x_sums, shifted[r]);
        CATS_UNROLL
        for (int p = 0; p < kPlanes; ++p)
          totals[p][r] = Base::multiply_add(Bytes::to_floats(sums[p][r]), Bytes::template spread<kPlanes>(scales, p), totals[p][r]);
      }
    }
    for (int64_t i = format.code_bytes; i < format.used_bytes; i += kLineBytes)
      for (int r = 0; r < kRows; ++r) prefetch_near(next[r] + i);
    const float zero = kZeros ? 1.0f : static_cast<float>(format.zero);
    CATS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      auto total = totals[0][r];
      if constexpr (kPlanes == 2) total = Base::add(total, totals[kPlanes - 1][r]);
      const auto minus = Base::multiply_add(Bytes::first(centred[r]), Base::broadcast(-zero), total);
      out[r] = Base::sum(kShifts ? Base::add(minus, Bytes::first(shifted[r])) : minus);
    }
  }

  std::vector<float> plain_memory_, numbers_;
  std::vector<int8_t> bytes_memory_;
  float *plain_ = nullptr, *factors_ = nullptr, *sums_ = nullptr;
  const int8_t* bytes_ = nullptr;
  bool is_finite_ = true;
};

}  // namespace
}  // namespace cats
