// Sums of packed columns of `down` with integers, as in integer_rows.h: the factors h of up to 32 neurons of a group are rounded
// to 15 bits and held in two bytes. Four neurons are interleaved, so that an instruction adds four products to each output.
//
// `Set::Bytes` also has
//
//   interleave(rows, out)     four rows of 64 bytes by fours
//   in_order(lanes, out)      the order of bytes again
//   broadcast(four bytes), add
#pragma once

#include "packed_mlp/packed_columns.h"
#include "step/integer_rows.h"

namespace cats {
namespace {

template <class Set>
class IntegerColumns {
  using Bytes = typename Set::Bytes;
  using Base = typename Set::Base;
  using Integers = typename Bytes::Integers;
  using Vector = typename Base::Vector;
  static constexpr int64_t W = Base::kWidth;
  static_assert(W == 16, "a sum per lane");

 public:
  // out[D] = the sums of the first `count` columns of the list; false where integers do not serve: a product is not finite.
  bool add(const NeededColumns& needed, int64_t count, float* out) {
    const ColumnFormat& format = needed.call.columns;
    std::fill_n(out, format.outputs, 0.0f);
    for (int64_t first = 0; first < count;) {
      const int64_t group = format.group_of(needed.neurons[first]);
      int64_t last = first + 1;
      while (last < std::min(count, first + kRun) && format.group_of(needed.neurons[last]) == group) ++last;
      if (!read_factors(needed.products + first, last - first)) return false;
      // the next columns of the list are requested while these are read
      const int64_t ahead = std::min(count - last, last - first);
      if (format.bits == 4)
        add_run<4>(needed, first, last, ahead, group, out);
      else
        add_run<8>(needed, first, last, ahead, group, out);
      first = last;
    }
    return true;
  }

 private:
  static constexpr int64_t kRun = 32, kFours = kRun / 4;

  bool read_factors(const float* products, int64_t count) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float size = std::fabs(products[i]);
      largest = size > largest || size != size ? size : largest;
    }
    if (!is_finite(largest)) return false;
    const float factor = largest > 1e-30f ? kLargestInteger / largest : 0.0f;
    scale_ = factor ? 1.0f / factor : 0.0f;
    int8_t high[kRun] = {}, low[kRun] = {};
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      split_number(products[i], factor, high[i], low[i]);
      sum += high[i] * static_cast<int32_t>(kPartRange) + low[i];
    }
    sum_ = scale_ * static_cast<float>(sum);
    fours_ = (count + 3) / 4;
    std::memcpy(high_, high, sizeof high);
    std::memcpy(low_, low, sizeof low);
    return true;
  }

  template <int kBits>
  void add_run(const NeededColumns& needed, int64_t first, int64_t last, int64_t ahead, int64_t group, float* out) const {
    constexpr int kPlanes = 8 / kBits;
    const ColumnFormat& f = needed.call.columns;
    const uint8_t* rows[kRun];
    // past the end, the last column with factors of 0
    for (int64_t i = 0; i < 4 * fours_; ++i) rows[i] = needed.call.down + needed.neurons[std::min(first + i, last - 1)] * f.pitch;
    const uint8_t* next[kRun];
    for (int64_t i = 0; i < ahead; ++i) next[i] = needed.call.down + needed.neurons[last + i] * f.pitch;
    for (int64_t place = 0; place * kPlanes < f.outputs; place += kUnitBytes) {
      for (int64_t i = 0; i < ahead; ++i) prefetch(next[i] + place);
      Integers high[kPlanes][4], low[kPlanes][4];
      CATS_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        CATS_UNROLL
        for (int v = 0; v < 4; ++v) high[p][v] = low[p][v] = Bytes::zero();
      }
      const int64_t readable = f.pitch - place;
      for (int64_t i = 0; i < fours_; ++i) {
        Integers bytes[4], lanes[4];
        CATS_UNROLL
        for (int r = 0; r < 4; ++r) bytes[r] = load(rows[4 * i + r] + place, readable);
        Bytes::interleave(bytes, lanes);
        const Integers upper = Bytes::broadcast(high_[i]), lower = Bytes::broadcast(low_[i]);
        CATS_UNROLL
        for (int v = 0; v < 4; ++v) {
          CATS_UNROLL
          for (int p = 0; p < kPlanes; ++p) {
            const Integers codes = kBits == 8 ? lanes[v] : p == 0 ? Bytes::low(lanes[v]) : Bytes::high(lanes[v]);
            high[p][v] = Bytes::dot(high[p][v], codes, upper);
            low[p][v] = Bytes::dot(low[p][v], codes, lower);
          }
        }
      }
      Vector sums[kPlanes][4];
      CATS_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        Vector mixed[4];
        CATS_UNROLL
        for (int v = 0; v < 4; ++v) mixed[v] = Bytes::to_floats(Bytes::add(Bytes::shift(high[p][v]), low[p][v]));
        Bytes::in_order(mixed, sums[p]);
      }
      CATS_UNROLL
      for (int v = 0; v < 4; ++v) {
        Vector in_planes[kPlanes];
        CATS_UNROLL
        for (int p = 0; p < kPlanes; ++p) in_planes[p] = sums[p][v];
        add_outputs<kPlanes>(needed, group, kPlanes * (place + W * v), in_planes, out);
      }
    }
  }

  // 64 bytes, or what is left of a column.
  static Integers load(const uint8_t* p, int64_t readable) {
    if (readable >= kUnitBytes) return Bytes::load(p);
    uint8_t bytes[kUnitBytes] = {};
    std::memcpy(bytes, p, readable);
    return Bytes::load(bytes);
  }

  // Adds the sums of W places, in planes, to the outputs from `output` on.
  template <int kPlanes>
  void add_outputs(const NeededColumns& needed, int64_t group, int64_t output, const Vector (&sums)[kPlanes], float* out) const {
    const ColumnFormat& f = needed.call.columns;
    const int64_t count = std::min<int64_t>(kPlanes * W, f.outputs - output), offset = group * f.outputs + output;
    if (count <= 0) return;
    Vector in_order[kPlanes];
    if constexpr (kPlanes == 1)
      in_order[0] = sums[0];
    else
      Bytes::pair(sums[0], sums[1], in_order[0], in_order[1]);
    const bool has_zeros = f.mode == ZeroMode::kZeros, has_shifts = f.mode == ZeroMode::kShifts;
    with_type(f.scale, [&](auto type) {
      using T = decltype(type);
      const T* scales = reinterpret_cast<const T*>(needed.call.down_scales) + offset;
      const T* shifts = reinterpret_cast<const T*>(needed.call.down_extras) + offset;
      const uint8_t* zeros = needed.call.down_extras + offset;
      if (count == kPlanes * W) {
        CATS_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          const int64_t i = p * W;
          Vector zero = Base::broadcast(static_cast<float>(f.zero)), shift = Base::broadcast(0.0f);
          if (has_zeros) zero = widen_some<Base>(zeros + i);
          if (has_shifts) shift = Base::widen(shifts + i);
          Base::store(out + output + i, added(Base::load(out + output + i), in_order[p], Base::widen(scales + i), zero, shift));
        }
        return;
      }
      float values[kPlanes * W];
      CATS_UNROLL
      for (int p = 0; p < kPlanes; ++p) Base::store(values + p * W, in_order[p]);
      for (int64_t i = 0; i < count; ++i) {
        const float zero = has_zeros ? zeros[i] : static_cast<float>(f.zero);
        out[output + i] += (values[i] * scale_ - zero * sum_) * to_float(scales[i]) + (has_shifts ? to_float(shifts[i]) * sum_ : 0.0f);
      }
    });
  }

  // total + (sums * scale_ - zero * sum_) * scale + shift * sum_
  Vector added(Vector total, Vector sums, Vector scale, Vector zero, Vector shift) const {
    const Vector sum = Base::broadcast(sum_), nothing = Base::broadcast(0.0f);
    const Vector centred = Base::subtract_product(Base::multiply_add(sums, Base::broadcast(scale_), nothing), zero, sum);
    return Base::multiply_add(centred, scale, Base::multiply_add(shift, sum, total));
  }

  float scale_ = 0, sum_ = 0;
  int64_t fours_ = 0;
  int32_t high_[kFours], low_[kFours];
};

}  // namespace
}  // namespace cats
