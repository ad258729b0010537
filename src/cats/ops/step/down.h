// Sums of the rows of `down`, one row for each neuron, times the products of the neurons.
#pragma once

#include "packed_mlp/packed_columns.h"
#include "step/integer_columns.h"
#include "step/plan.h"

namespace cats {
namespace {

// Memory of a thread.
template <class Set>
class DownMemory {
 public:
  // Lists the neurons that are needed: those with a product.
  void list(const float* products, int64_t count) {
    int64_t* neurons = at_least(neurons_, count);
    float* kept = at_least(products_, count);
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      neurons[n] = i;
      kept[n] = products[i];
      n += products[i] != 0.0f;
    }
    count_ = n;
  }

  // The sums [D] of the needed neurons in [first, last).
  const float* add(const StepLayer& layer, const LayerCuts& cuts, const StepModel& model, int64_t first, int64_t last) {
    const int64_t* begin = std::lower_bound(neurons_.data(), neurons_.data() + count_, first);
    const int64_t* end = std::lower_bound(begin, static_cast<const int64_t*>(neurons_.data() + count_), last);
    const int64_t offset = begin - neurons_.data(), count = end - begin, D = model.hidden;
    if (layer.down.bits) return add_packed(layer, cuts, D, offset, count);
    float* sums = at_least(sums_, D);
    std::fill_n(sums, D, 0.0f);
    with_type(static_cast<Number>(model.number), [&](auto type) {
      using T = decltype(type);
      add_dense<T>(static_cast<const T*>(layer.down.data), neurons_.data() + offset, products_.data() + offset, count, D, sums);
    });
    return sums;
  }

 private:
  template <class T>
  static void add_dense(const T* down, const int64_t* neurons, const float* products, int64_t count, int64_t D, float* sums) {
    using Lanes = typename Set::template Dense<T>;
    constexpr int64_t kColumns = 8192;
    for (int64_t begin = 0; begin < D; begin += kColumns) {
      const int64_t end = std::min(begin + kColumns, D);
      int64_t i = 0;
      const auto add_groups = [&](auto group) {
        constexpr int R = decltype(group)::value;
        for (; i + R <= count; i += R) {
          const T *rows[R], *next[R];
          for (int r = 0; r < R; ++r) {
            rows[r] = down + neurons[i + r] * D;
            next[r] = down + neurons[std::min(i + r + 8, count - 1)] * D;
          }
          add_scaled<Lanes, R, 1>(rows, next, products + i, begin, end, D, sums);
        }
      };
      if (!are_short<T>(D)) add_groups(std::integral_constant<int, 8>{});
      add_groups(std::integral_constant<int, 4>{});
      add_groups(std::integral_constant<int, 1>{});
    }
  }

  const float* add_packed(const StepLayer& layer, const LayerCuts& cuts, int64_t D, int64_t offset, int64_t count) {
    const ColumnFormat& format = cuts.columns;
    PackedMlpCall call{};
    call.B = 1;
    call.columns = format;
    call.down = static_cast<const uint8_t*>(layer.down.data);
    call.down_scales = static_cast<const uint8_t*>(layer.down.scales);
    call.down_extras = static_cast<const uint8_t*>(layer.down.extras);
    const NeededColumns needed{call, neurons_.data() + offset, products_.data() + offset};
    const int64_t planes = 8 / format.bits, places = format.used_bytes(), size = planes * places;
    float* out = at_least(sums_, D + size);
    bool is_done = false;
    if constexpr (Set::kHasIntegers) is_done = integers_.add(needed, count, out);
    if (!is_done) {
      float* totals = out + D;
      std::fill_n(totals, size, 0.0f);
      add_columns<typename Set::Base>(needed, 0, count, totals);
      for (int64_t i = 0; i < D; ++i) out[i] = totals[i % planes * places + i / planes];
    }
    bool has_nan = false;
    for (int64_t i = 0; i < count; ++i) has_nan |= needed.products[i] != needed.products[i];
    if (has_nan) return out;
    for (int64_t i = 0; i < D; ++i)
      if (!is_finite(out[i])) out[i] = plain_output(needed, count, 0, i);
    return out;
  }

  int64_t count_ = 0;
  std::vector<int64_t> neurons_;
  std::vector<float> products_;
  std::vector<float> sums_;
  IfIntegers<Set, IntegerColumns> integers_;
};

}  // namespace
}  // namespace cats
