// Dot products with packed rows. For the codes c of a group, with zero point z and scale s,
//
//   sum((c - z) * s * x) = s * (sum(c * x) - z * sum(x)),
//
// so a code costs a conversion and a multiplication. x is put in the order of the codes once per call, and its sums are kept
// for each lane of a vector: the zero point is subtracted in each lane after a few codes, before rounding can matter.
#pragma once

#include "packed_linear/packed_inputs.h"

// For loops over arrays of vectors: these are in registers where such loops are unrolled, which GCC does not do for all at -O2.
#if defined(__GNUC__) && !defined(__clang__)
#define CATS_UNROLL _Pragma("GCC unroll 16")
#else
#define CATS_UNROLL
#endif

namespace cats {
namespace {

// What has one scale: a unit; or each block; or each half of a block.
enum class Scaling { kUnits, kBlocks, kHalfBlocks };

// The value of a block's group; with kWidth 16, the upper lanes are those of the block in the other half of 16 bytes.
template <class Lanes, int kPlanes>
typename Lanes::Vector of_block(const float* values, int64_t block, int64_t shift) {
  if constexpr (Lanes::kWidth == 16)
    return Lanes::halves(values[block >> shift], values[(block + kPlanes) >> shift]);
  else
    return Lanes::broadcast(values[block >> shift]);
}

// The values of the half blocks in a part of 16 bytes of a unit: four bytes are of one half block.
template <class Lanes, int kPlanes>
typename Lanes::Vector of_half_blocks(const float* values, int64_t unit, int64_t part, int plane) {
  const auto of_four_bytes = [&](int64_t w) {
    return values[kPlanes == 1 ? unit * 4 + w : unit * 8 + w / 2 * 4 + 2 * plane + w % 2];
  };
  if constexpr (Lanes::kWidth == 16)
    return Lanes::quarters(of_four_bytes(0), of_four_bytes(1), of_four_bytes(2), of_four_bytes(3));
  else if constexpr (Lanes::kWidth == 8)
    return Lanes::halves(of_four_bytes(2 * part), of_four_bytes(2 * part + 1));
  else
    return Lanes::broadcast(of_four_bytes(part));
}

// Dot products of R rows and B tokens.
template <class Lanes, int kBits, Scaling kScaling, int R, int B>
struct PackedDot {
  using Vector = typename Lanes::Vector;
  static constexpr int64_t W = Lanes::kWidth, kSpan = span_of<Lanes>(kScaling == Scaling::kHalfBlocks), kParts = 16 / kSpan;
  static constexpr int kPlanes = 8 / kBits;
  // a chain of dependent additions must not be slower than the conversion of codes
  static constexpr int kChains = R * B * kPlanes >= 8 ? 1 : 2;

  using Sums = Vector[kPlanes][R][B];

  static void clear(Sums& sums) {
    CATS_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      CATS_UNROLL
      for (int r = 0; r < R; ++r) {
        CATS_UNROLL
        for (int b = 0; b < B; ++b) sums[p][r][b] = Lanes::broadcast(0.0f);
      }
    }
  }

  // sums += the products of x and the codes in W bytes of each row, from byte i of a unit
  static void add_codes(const uint8_t* const (&codes)[R], const float* const (&x)[B], int64_t i, Sums& sums) {
    Vector numbers[kPlanes][R];
    CATS_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto bytes = Lanes::load_codes(codes[r] + i);
      if constexpr (kBits == 8) {
        numbers[0][r] = Lanes::whole(bytes);
      } else {
        numbers[0][r] = Lanes::low(bytes);
        numbers[1][r] = Lanes::high(bytes);
      }
    }
    CATS_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      CATS_UNROLL
      for (int b = 0; b < B; ++b) {
        const Vector inputs = Lanes::load(x[b] + p * kUnitBytes + i);
        CATS_UNROLL
        for (int r = 0; r < R; ++r) sums[p][r][b] = Lanes::multiply_add(numbers[p][r], inputs, sums[p][r][b]);
      }
    }
  }

  // totals += factor * sums
  static void add_scaled(Vector factor, const Vector (&sums)[B], Vector (&totals)[B]) {
    CATS_UNROLL
    for (int b = 0; b < B; ++b) totals[b] = Lanes::multiply_add(factor, sums[b], totals[b]);
  }

  // totals += the codes of a unit, all of one group. x_sums: of the unit, [tokens, W] from the first token.
  static void add_unit(const uint8_t* const (&codes)[R], const float* const (&inputs)[B], const RowTables (&tables)[R],
                       int64_t group, bool has_shifts, const float* x_sums, Vector (&totals)[R][B]) {
    Sums sums[kChains];
    CATS_UNROLL
    for (int c = 0; c < kChains; ++c) clear(sums[c]);
    Vector x_sum[B];
    CATS_UNROLL
    for (int b = 0; b < B; ++b) x_sum[b] = Lanes::load(x_sums + b * W);
    CATS_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vector zero = Lanes::broadcast(tables[r].zeros[group]);
      CATS_UNROLL
      for (int b = 0; b < B; ++b) sums[0][0][r][b] = Lanes::subtract_product(sums[0][0][r][b], zero, x_sum[b]);
    }
    for (int64_t i = 0; i < kUnitBytes; i += kChains * W) {
      CATS_UNROLL
      for (int c = 0; c < kChains; ++c) add_codes(codes, inputs, i + c * W, sums[c]);
    }
    CATS_UNROLL
    for (int r = 0; r < R; ++r) {
      Vector total[B];
      CATS_UNROLL
      for (int b = 0; b < B; ++b) {
        total[b] = sums[0][0][r][b];
        if constexpr (kPlanes == 2) total[b] = Lanes::add(total[b], sums[0][kPlanes - 1][r][b]);
        if constexpr (kChains == 2) total[b] = Lanes::add(total[b], sums[kChains - 1][0][r][b]);
        if constexpr (kChains * kPlanes == 4) total[b] = Lanes::add(total[b], sums[kChains - 1][kPlanes - 1][r][b]);
      }
      add_scaled(Lanes::broadcast(tables[r].scales[group]), total, totals[r]);
    }
    if (!has_shifts) return;
    CATS_UNROLL
    for (int r = 0; r < R; ++r) add_scaled(Lanes::broadcast(tables[r].shifts[group]), x_sum, totals[r]);
  }

  // The values of a table for a part of each 16 bytes of a unit.
  static Vector of_part(const float* values, int64_t unit, int64_t part, int plane, int64_t shift) {
    if constexpr (kScaling == Scaling::kHalfBlocks) return of_half_blocks<Lanes, kPlanes>(values, unit, part, plane);
    return of_block<Lanes, kPlanes>(values, unit * 2 * kPlanes + part * kPlanes + plane, shift);
  }

  // totals += one part of each 16 bytes of a unit, or all bytes with W 16. x_sums: of the part, from the first token;
  // `plane_sums` numbers to the next plane.
  static void add_part(const uint8_t* const (&codes)[R], const float* const (&inputs)[B], const RowTables (&tables)[R],
                       int64_t unit, int64_t part, int64_t shift, bool has_shifts, const float* x_sums, int64_t plane_sums,
                       Vector (&totals)[R][B]) {
    Vector x_sum[kPlanes][B];
    Sums sums;
    clear(sums);
    CATS_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      CATS_UNROLL
      for (int b = 0; b < B; ++b) x_sum[p][b] = Lanes::load(x_sums + p * plane_sums + b * W);
      CATS_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vector zero = of_part(tables[r].zeros, unit, part, p, shift);
        CATS_UNROLL
        for (int b = 0; b < B; ++b) sums[p][r][b] = Lanes::subtract_product(sums[p][r][b], zero, x_sum[p][b]);
      }
    }
    CATS_UNROLL
    for (int64_t t = 0; t < 4; ++t)
      for (int64_t v = 0; v < kSpan; v += W) add_codes(codes, inputs, 16 * t + kSpan * part + v, sums);
    CATS_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      CATS_UNROLL
      for (int r = 0; r < R; ++r)
        add_scaled(of_part(tables[r].scales, unit, part, p, shift), sums[p][r], totals[r]);
    }
    if (!has_shifts) return;
    CATS_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      CATS_UNROLL
      for (int r = 0; r < R; ++r)
        add_scaled(of_part(tables[r].shifts, unit, part, p, shift), x_sum[p], totals[r]);
    }
  }

  // out[r][b] = the dot product of rows[r] and token first + b; prefetches next[r].
  static void run(const RowFormat& format, const uint8_t* const (&rows)[R], const uint8_t* const (&next)[R],
                  const RowTables (&tables)[R], const PackedInputs& x, int64_t first, float (&out)[R][B]) {
    const int64_t shift = format.group_shift, plane_sums = x.tokens * W;
    const bool has_shifts = format.mode == ZeroMode::kShifts;
    const uint8_t *codes[R], *ahead[R];
    const float* inputs[B];
    std::copy_n(rows, R, codes);
    std::copy_n(next, R, ahead);
    for (int b = 0; b < B; ++b) inputs[b] = x.ordered + (first + b) * x.width;
    const float* x_sums = x.sums + first * W;

    Vector totals[R][B];
    CATS_UNROLL
    for (int r = 0; r < R; ++r) {
      CATS_UNROLL
      for (int b = 0; b < B; ++b) totals[r][b] = Lanes::broadcast(0.0f);
    }
    for (int64_t u = 0; u < format.units; ++u) {
      for (int r = 0; r < R; ++r) prefetch(ahead[r]);
      if constexpr (kScaling == Scaling::kUnits) {
        add_unit(codes, inputs, tables, u * 2 * kPlanes >> shift, has_shifts, x_sums, totals);
        x_sums += plane_sums;
      } else {
        CATS_UNROLL
        for (int64_t part = 0; part < kParts; ++part) {
          add_part(codes, inputs, tables, u, part, shift, has_shifts, x_sums, plane_sums, totals);
          x_sums += kPlanes * plane_sums;
        }
      }
      for (int r = 0; r < R; ++r) {
        codes[r] += kUnitBytes;
        ahead[r] += kUnitBytes;
      }
      for (int b = 0; b < B; ++b) inputs[b] += kPlanes * kUnitBytes;
    }
    const int64_t tables_size = format.used_bytes - format.code_bytes;
    for (int64_t i = 0; i < tables_size; i += kLineBytes)
      for (int r = 0; r < R; ++r) prefetch(ahead[r] + i);

    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) {
        out[r][b] = Lanes::sum(totals[r][b]);
        const int64_t token = first + b;
        if (!is_finite(out[r][b]) && !x.has_nan[token]) out[r][b] = plain_dot(format, rows[r], x.plain + token * x.width);
      }
  }
};

template <class Lanes, int kBits, Scaling kScaling, int B, class Row>
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
    PackedDot<Lanes, kBits, kScaling, R, B>::run(format, rows, next, tables, x, first, values);
    for (int r = 0; r < R && i + r < count; ++r) std::copy_n(values[r], B, out + (i + r) * x.tokens + first);
  }
}

// out[i * tokens + b] = the dot product of row(i) and token b, for i < count.
template <class Lanes, class Row>
void dot_packed_rows(const RowFormat& format, const Row& row, int64_t count, const PackedInputs& x, float* out) {
  const auto run = [&](auto bits, auto scaling) {
    constexpr int kBits = decltype(bits)::value;
    constexpr Scaling kScaling = decltype(scaling)::value;
    // the rows of a call for eight tokens are read twice, the second time from a cache
    for (int64_t first = 0; first < x.tokens; first += 4) switch (x.tokens - first) {
        case 1: dot_packed_rows<Lanes, kBits, kScaling, 1>(format, row, count, x, first, out); break;
        case 2: dot_packed_rows<Lanes, kBits, kScaling, 2>(format, row, count, x, first, out); break;
        case 3: dot_packed_rows<Lanes, kBits, kScaling, 3>(format, row, count, x, first, out); break;
        default: dot_packed_rows<Lanes, kBits, kScaling, 4>(format, row, count, x, first, out); break;
      }
  };
  using std::integral_constant;
  const auto run_bits = [&](auto bits) {
    if (is_unit_in_group(format)) return run(bits, integral_constant<Scaling, Scaling::kUnits>{});
    if (format.is_in_half_blocks()) return run(bits, integral_constant<Scaling, Scaling::kHalfBlocks>{});
    run(bits, integral_constant<Scaling, Scaling::kBlocks>{});
  };
  format.bits == 4 ? run_bits(integral_constant<int, 4>{}) : run_bits(integral_constant<int, 8>{});
}

}  // namespace
}  // namespace cats
