// Sums of packed columns of `down`, each times a number h. For the codes c of the neurons of a group, with zero point z and
// scale s of the output,
//
//   sum(h * (c - z) * s) = s * (sum(h * c) - z * sum(h)),
//
// so a code costs a conversion and a multiplication. An instruction set (`Lanes`, see packed_rows.h) also has
//
//   deinterleave(a, b, even, odd)  the lanes of a and b by the parity of their number
#pragma once

#include "packed_linear/packed_rows.h"
#include "packed_mlp/packed_mlp.h"

namespace cats {
namespace {

// The columns that a call needs: their neurons in ascending order, and the factor of each for each token.
struct NeededColumns {
  const PackedMlpCall& call;
  const int64_t* neurons;  // [count]
  const float* products;   // [count, call.B]
};

// Outputs are summed in planes: one with 8 bits; those of even and of odd outputs with 4. A place is an output of a plane.
template <class Lanes, int kBits, int B>
struct ColumnSums {
  using Vector = typename Lanes::Vector;
  static constexpr int64_t W = Lanes::kWidth;
  static constexpr int kPlanes = 8 / kBits;
  // Places at once: their sums, and a table of their scales, stay in the first-level cache.
  static constexpr int64_t kPlaces = B <= 2 ? 1024 : 512;
  // Neurons whose codes are summed before the zero point is subtracted: more would round away too much.
  static constexpr int64_t kRun = 32;
  static constexpr int R = B <= 2 ? 4 : 2;

  const NeededColumns& needed;
  int64_t token;         // the first of B
  int64_t begin, count;  // places

  float sums[B][kPlanes][kPlaces];
  // of a group, for these places, in the order of outputs
  float scales[kPlanes * kPlaces], extras[kPlanes * kPlaces];

  ColumnSums(const NeededColumns& columns, int64_t first_token, int64_t first_place, int64_t places)
      : needed(columns), token(first_token), begin(first_place), count(places) {}

  const ColumnFormat& format() const { return needed.call.columns; }

  void read_tables(int64_t group) {
    const ColumnFormat& f = format();
    const int64_t first = kPlanes * begin, outputs = std::min(kPlanes * count, f.outputs - first);
    const int64_t offset = group * f.outputs + first;
    const auto* stored = static_cast<const void*>(needed.call.down_scales + offset * size_of(f.scale));
    widen_array<Lanes>(stored, f.scale, outputs, outputs, scales);
    if (f.mode == ZeroMode::kZeros) widen_array<Lanes>(needed.call.down_extras + offset, outputs, outputs, extras);
    if (f.mode != ZeroMode::kShifts) return;
    const auto* shifts = static_cast<const void*>(needed.call.down_extras + offset * size_of(f.scale));
    widen_array<Lanes>(shifts, f.scale, outputs, outputs, extras);
  }

  // The values of a table at the places k and after, for each plane.
  static void load_planes(const float* table, int64_t k, Vector (&values)[kPlanes]) {
    if constexpr (kPlanes == 1)
      values[0] = Lanes::load(table + k);
    else
      Lanes::deinterleave(Lanes::load(table + 2 * k), Lanes::load(table + 2 * k + W), values[0], values[1]);
  }

  template <int Rows>
  void add_codes(const uint8_t* const (&rows)[Rows], const uint8_t* const (&next)[Rows], const float* h) {
    Vector factors[Rows][B];
    for (int r = 0; r < Rows; ++r)
      for (int b = 0; b < B; ++b) factors[r][b] = Lanes::broadcast(h[r * needed.call.B + b]);
    for (int64_t k = 0; k < count; k += W) {
      if (k % kLineBytes == 0)
        for (int r = 0; r < Rows; ++r) prefetch(next[r] + k);
      Vector codes[kPlanes][Rows];
      for (int r = 0; r < Rows; ++r) {
        const auto bytes = Lanes::load_codes(rows[r] + k);
        if constexpr (kBits == 8) {
          codes[0][r] = Lanes::whole(bytes);
        } else {
          codes[0][r] = Lanes::low(bytes);
          codes[1][r] = Lanes::high(bytes);
        }
      }
      for (int b = 0; b < B; ++b)
        for (int p = 0; p < kPlanes; ++p) {
          Vector sum = Lanes::load(sums[b][p] + k);
          for (int r = 0; r < Rows; ++r) sum = Lanes::multiply_add(codes[p][r], factors[r][b], sum);
          Lanes::store(sums[b][p] + k, sum);
        }
    }
  }

  // totals += the columns [first, last) of the list, all of one group. `end` is that of the list, for prefetching.
  void add_run(int64_t first, int64_t last, int64_t end, float* totals, int64_t plane_size) {
    const ColumnFormat& f = format();
    float h_sums[B] = {};
    for (int64_t i = first; i < last; ++i)
      for (int b = 0; b < B; ++b) h_sums[b] += needed.products[i * needed.call.B + token + b];
    for (int64_t k = 0; k < count; k += W) {
      Vector zeros[kPlanes];
      for (Vector& zero : zeros) zero = Lanes::broadcast(static_cast<float>(f.zero));
      if (f.mode == ZeroMode::kZeros) load_planes(extras, k, zeros);
      for (int b = 0; b < B; ++b)
        for (int p = 0; p < kPlanes; ++p) {
          const Vector zero = Lanes::broadcast(0.0f);
          Lanes::store(sums[b][p] + k, Lanes::subtract_product(zero, zeros[p], Lanes::broadcast(h_sums[b])));
        }
    }
    const auto row = [&](int64_t i) { return needed.call.down + needed.neurons[std::min(i, end - 1)] * f.pitch + begin; };
    const auto add_rows = [&](int64_t i, auto rows_at_once) {
      constexpr int Rows = decltype(rows_at_once)::value;
      const uint8_t *rows[Rows], *next[Rows];
      for (int r = 0; r < Rows; ++r) {
        rows[r] = row(i + r);
        next[r] = row(i + r + 8);
      }
      add_codes<Rows>(rows, next, needed.products + i * needed.call.B + token);
    };
    int64_t i = first;
    for (; i + R <= last; i += R) add_rows(i, std::integral_constant<int, R>{});
    for (; i < last; ++i) add_rows(i, std::integral_constant<int, 1>{});
    for (int64_t k = 0; k < count; k += W) {
      Vector scale[kPlanes], shift[kPlanes];
      load_planes(scales, k, scale);
      const bool has_shifts = f.mode == ZeroMode::kShifts;
      if (has_shifts) load_planes(extras, k, shift);
      for (int b = 0; b < B; ++b)
        for (int p = 0; p < kPlanes; ++p) {
          float* total = totals + (b * kPlanes + p) * plane_size + begin + k;
          Vector value = Lanes::multiply_add(Lanes::load(sums[b][p] + k), scale[p], Lanes::load(total));
          if (has_shifts) value = Lanes::multiply_add(shift[p], Lanes::broadcast(h_sums[b]), value);
          Lanes::store(total, value);
        }
    }
  }

  // totals[b][plane][begin : begin + count] += the columns [first, last) of the list.
  void add(int64_t first, int64_t last, float* totals, int64_t plane_size) {
    int64_t group = -1;
    for (int64_t i = first; i < last;) {
      const int64_t next_group = format().group_of(needed.neurons[i]);
      if (next_group != group) read_tables(group = next_group);
      int64_t end = i + 1;
      while (end < std::min(last, i + kRun) && format().group_of(needed.neurons[end]) == group) ++end;
      add_run(i, end, last, totals, plane_size);
      i = end;
    }
  }
};

// totals[token][plane][place] += the columns [first, last) of the list, for all tokens and places.
template <class Lanes>
void add_columns(const NeededColumns& needed, int64_t first, int64_t last, float* totals) {
  const int64_t plane_size = needed.call.columns.used_bytes();
  const auto run = [&](auto bits, auto tokens, int64_t token) {
    using Sums = ColumnSums<Lanes, decltype(bits)::value, decltype(tokens)::value>;
    for (int64_t place = 0; place < plane_size; place += Sums::kPlaces) {
      Sums sums(needed, token, place, std::min(Sums::kPlaces, plane_size - place));
      sums.add(first, last, totals + token * Sums::kPlanes * plane_size, plane_size);
    }
  };
  const auto run_tokens = [&](auto bits) {
    using std::integral_constant;
    for (int64_t token = 0; token < needed.call.B; token += 4) switch (needed.call.B - token) {
        case 1: run(bits, integral_constant<int, 1>{}, token); break;
        case 2: run(bits, integral_constant<int, 2>{}, token); break;
        case 3: run(bits, integral_constant<int, 3>{}, token); break;
        default: run(bits, integral_constant<int, 4>{}, token); break;
      }
  };
  if (needed.call.columns.bits == 4)
    run_tokens(std::integral_constant<int, 4>{});
  else
    run_tokens(std::integral_constant<int, 8>{});
}

// An output as the format defines it, number by number: where the result is not finite, infinities may not be factored.
inline float plain_output(const NeededColumns& needed, int64_t count, int64_t token, int64_t output) {
  const PackedMlpCall& call = needed.call;
  const ColumnFormat& format = call.columns;
  float total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t neuron = needed.neurons[i], place = format.group_of(neuron) * format.outputs + output;
    const uint8_t* column = call.down + neuron * format.pitch;
    const int64_t byte = column[format.bits == 8 ? output : output / 2];
    const int64_t code = format.bits == 8 ? byte : output % 2 ? byte >> 4 : byte & 15;
    const int64_t zero = format.mode == ZeroMode::kZeros ? call.down_extras[place] : format.zero;
    float number = static_cast<float>(code - zero) * number_at(call.down_scales, format.scale, place);
    if (format.mode == ZeroMode::kShifts) number += number_at(call.down_extras, format.scale, place);
    total += needed.products[i * call.B + token] * number;
  }
  return total;
}

}  // namespace
}  // namespace cats
