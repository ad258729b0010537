// Attention of the query heads that share a key head, over a run of slots.
#pragma once

#include "mlp/cpu/gated_mlp_kernel.h"
#include "packed_linear/packed_inputs.h"
#include "step/plan.h"

namespace cats {
namespace {

// partial sums, so that the compiler vectorises them
inline float sum_of_squares(const float* x, int64_t count) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  for (; i < count; ++i) sums[0] += x[i] * x[i];
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

// out = x / sqrt(mean(x * x) + epsilon) * (weight + offset); `out` may be x.
inline void norm(const float* x, const void* weight, Number number, int64_t count, double epsilon, double offset, float* out) {
  const float mean = sum_of_squares(x, count) / static_cast<float>(count);
  const float scale = 1.0f / std::sqrt(mean + static_cast<float>(epsilon));
  const float added = static_cast<float>(offset);
  with_type(number, [&](auto type) {
    const auto* weights = static_cast<const decltype(type)*>(weight);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * scale * (to_float(weights[i]) + added);
  });
}

// Rotates the first `rotated` of a head's numbers, in place: pairs are half of these apart.
inline void rotate(float* x, const float* cosines, const float* sines, int64_t rotated) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i + half] + first * sines[i + half];
  }
}

template <class Base>
class Attention {
 public:
  static constexpr int64_t W = Base::kWidth;

  // `projected`: the thread's own copy. `group`: query heads of a key head.
  Attention(const Plan& plan, const StepLayer& layer, const float* projected, int64_t slot, std::vector<float>& memory)
      : plan_(plan), layer_(layer), projected_(projected), slot_(slot), memory_(memory) {}

  // Sums over the slots of a run: out[query of the group][head size + 2], then the new key and value, rounded, in `fresh`.
  void run(int64_t key_head, const SlotRuns& runs, int64_t run, float* out, float* fresh) {
    const StepModel& m = plan_.model;
    const int64_t size = m.head_size, group = m.heads / m.key_heads, first = runs.first(run), last = runs.last(run);
    const int64_t count = last - first, stride = (count + W - 1) / W * W;
    float* queries = at_least(memory_, group * size + group * stride);
    float* scores = queries + group * size;
    std::copy_n(projected_ + key_head * group * size, group * size, queries);
    for (int64_t q = 0; q < group; ++q) {
      prepare(queries + q * size, layer_.q_norm);
      for (int64_t i = 0; i < size; ++i) queries[q * size + i] *= static_cast<float>(layer_.scale);
    }
    std::copy_n(projected_ + (m.heads + key_head) * size, size, fresh);
    std::copy_n(projected_ + (m.heads + m.key_heads + key_head) * size, size, fresh + size);
    prepare(fresh, layer_.k_norm);
    with_type(plan_.number(), [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < 2 * size; ++i) {
        T rounded;
        round_to(fresh[i], rounded);
        fresh[i] = to_float(rounded);
      }
      const int64_t offset = key_head * m.capacity * size;
      const T* keys = static_cast<const T*>(layer_.keys) + offset;
      const T* values = static_cast<const T*>(layer_.values) + offset;
      // the newest slot is not in memory yet
      const int64_t stored = std::min(last, slot_);
      for (int64_t q = 0; q < group;) {
        const int64_t at_once = std::min<int64_t>(4, group - q);
        const float* x = queries + q * size;
        float *s = scores + q * stride, *sums = out + q * (size + 2);
        switch (at_once) {
          case 1: attend<1>(keys, values, first, stored, x, fresh, last, stride, s, sums); break;
          case 2: attend<2>(keys, values, first, stored, x, fresh, last, stride, s, sums); break;
          case 3: attend<3>(keys, values, first, stored, x, fresh, last, stride, s, sums); break;
          default: attend<4>(keys, values, first, stored, x, fresh, last, stride, s, sums); break;
        }
        q += at_once;
      }
    });
  }

  // Writes the new key and value to their slot.
  void store(int64_t key_head, const float* fresh) const {
    const StepModel& m = plan_.model;
    const int64_t size = m.head_size, offset = (key_head * m.capacity + slot_) * size;
    with_type(plan_.number(), [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < size; ++i) {
        round_to(fresh[i], static_cast<T*>(layer_.keys)[offset + i]);
        round_to(fresh[size + i], static_cast<T*>(layer_.values)[offset + i]);
      }
    });
  }

 private:
  void prepare(float* x, const void* weight) const {
    const int64_t size = plan_.model.head_size;
    if (weight) norm(x, weight, plan_.number(), size, layer_.epsilon, layer_.weight_offset, x);
    const int64_t row = slot_ * layer_.rotated;
    rotate(x, static_cast<const float*>(layer_.cosines) + row, static_cast<const float*>(layer_.sines) + row, layer_.rotated);
  }

  template <int Q, class T>
  void attend(const T* keys, const T* values, int64_t first, int64_t stored, const float* x, const float* fresh, int64_t last,
              int64_t stride, float* scores, float* out) const {
    const int64_t size = plan_.model.head_size, count = last - first;
    for (int64_t p = first; p < stored; ++p) dots<Q>(keys + p * size, x, scores + (p - first), stride);
    if (last > stored) dots<Q>(fresh, x, scores + (stored - first), stride);
    for (int q = 0; q < Q; ++q) {
      float *s = scores + q * stride, *sums = out + q * (size + 2);
      if (const float cap = static_cast<float>(layer_.softcap))
        for (int64_t i = 0; i < count; ++i) s[i] = cap * std::tanh(s[i] / cap);
      float largest = s[0];
      for (int64_t i = 1; i < count; ++i) largest = s[i] > largest ? s[i] : largest;
      for (int64_t i = 0; i < count; ++i) s[i] = exponential(s[i] - largest);
      float total = 0;
      for (int64_t i = 0; i < count; ++i) total += s[i];
      sums[size] = largest;
      sums[size + 1] = total;
    }
    int64_t k = 0;
    for (; k + W <= size; k += W) {
      typename Base::Vector total[Q];
      for (auto& vector : total) vector = Base::broadcast(0.0f);
      for (int64_t p = first; p < stored; ++p) {
        const auto value = Base::widen(values + p * size + k);
        for (int q = 0; q < Q; ++q)
          total[q] = Base::multiply_add(value, Base::broadcast(scores[q * stride + p - first]), total[q]);
      }
      for (int q = 0; q < Q; ++q) {
        if (last > stored)
          total[q] = Base::multiply_add(Base::load(fresh + size + k), Base::broadcast(scores[q * stride + count - 1]), total[q]);
        Base::store(out + q * (size + 2) + k, total[q]);
      }
    }
    for (; k < size; ++k)
      for (int q = 0; q < Q; ++q) {
        float total = last > stored ? scores[q * stride + count - 1] * fresh[size + k] : 0.0f;
        for (int64_t p = first; p < stored; ++p) total += scores[q * stride + p - first] * to_float(values[p * size + k]);
        out[q * (size + 2) + k] = total;
      }
  }

  // scores[q * stride] = the product of a key and query q
  template <int Q, class T>
  void dots(const T* key, const float* x, float* scores, int64_t stride) const {
    const int64_t size = plan_.model.head_size;
    typename Base::Vector total[Q];
    for (auto& vector : total) vector = Base::broadcast(0.0f);
    int64_t k = 0;
    for (; k + W <= size; k += W) {
      const auto numbers = Base::widen(key + k);
      for (int q = 0; q < Q; ++q) total[q] = Base::multiply_add(numbers, Base::load(x + q * size + k), total[q]);
    }
    for (int q = 0; q < Q; ++q) {
      float sum = Base::sum(total[q]);
      for (int64_t i = k; i < size; ++i) sum += to_float(key[i]) * x[q * size + i];
      scores[q * stride] = sum;
    }
  }

  const Plan& plan_;
  const StepLayer& layer_;
  const float* projected_;
  const int64_t slot_;
  std::vector<float>& memory_;
};

// Adds up the sums of all runs: out[heads * head size].
inline void join_runs(const float* attended, int64_t runs, int64_t heads, int64_t size, float* out) {
  for (int64_t h = 0; h < heads; ++h) {
    const auto part = [&](int64_t run) { return attended + (run * heads + h) * (size + 2); };
    float largest = part(0)[size];
    for (int64_t r = 1; r < runs; ++r) largest = part(r)[size] > largest ? part(r)[size] : largest;
    float total = 0;
    float* sums = out + h * size;
    std::fill_n(sums, size, 0.0f);
    for (int64_t r = 0; r < runs; ++r) {
      const float factor = exponential(part(r)[size] - largest);
      total += factor * part(r)[size + 1];
      for (int64_t i = 0; i < size; ++i) sums[i] += factor * part(r)[i];
    }
    for (int64_t i = 0; i < size; ++i) sums[i] /= total;
  }
}

}  // namespace
}  // namespace cats
