// The sparse gated MLP.
//
//   1. Neurons are dealt to threads in chunks. For a chunk, read the router's rows one after the other, list the neurons
//      that some token keeps, then read the listed rows of the other branch, several at once.
//   2. Read the rows of `down` of all neurons that some token needs. A task is a piece of the output (columns) and a piece
//      of the list, with its own accumulator: which thread runs a task does not change the result.
//   3. Add the accumulators in a fixed order.
//
// The distances between kept rows are random, which no hardware prefetcher follows. So, while a group of rows is read, the
// same line of each row of the next group is prefetched into the second-level cache.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>

#include "mlp/cpu/gated_mlp.h"
#include "cpu/rows.h"

namespace cats {
namespace {

// --- activations, over arrays, so that the compiler vectorises them

// exp to 2 ulp: 2**n * exp(r), |r| <= ln(2) / 2, with the polynomial of the Cephes library.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer, in the low bits
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const float inside = p * scale;
  return x > 88.0f ? std::numeric_limits<float>::infinity() : (x < -87.0f ? 0.0f : inside);
}

inline void activate(Activation activation, float* values, int64_t count) {
  switch (activation) {
    case Activation::kSilu:
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] / (1.0f + exponential(-values[i]));
      break;
    case Activation::kGelu:
      for (int64_t i = 0; i < count; ++i)
        values[i] = values[i] * 0.5f * (1.0f + std::erf(values[i] * 0.70710678f));
      break;
    case Activation::kGeluTanh:
      // x * (1 + tanh(y)) / 2 = x / (1 + exp(-2 * y))
      for (int64_t i = 0; i < count; ++i) {
        const float x = values[i];
        const float y = 0.79788456f * (x + 0.044715f * x * x * x);
        values[i] = x / (1.0f + exponential(-2.0f * y));
      }
      break;
    case Activation::kRelu:
      // NaN stays NaN
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
      break;
  }
}

// The rule of cats.functional.keep_mask: NaN is kept.
inline bool keeps(float value, float threshold) { return !(std::fabs(value) < threshold); }

// sums[b][i] += h[r][b] * rows[r][i] for all r and for i in [begin, end); prefetches next[r]. `sums` has rows of length D.
template <class Lanes, int R, int B>
void add_scaled(const typename Lanes::Weight* const (&rows)[R], const typename Lanes::Weight* const (&next)[R],
                const float* h, int64_t begin, int64_t end, int64_t D, float* sums) {
  constexpr int64_t kLine = kLineBytes / sizeof(typename Lanes::Weight);
  int64_t i = begin;
  for (; i + kLine <= end; i += kLine) {
    for (int r = 0; r < R; ++r) prefetch(next[r] + i);
    for (int64_t k = i; k < i + kLine; k += Lanes::kWidth) {
      typename Lanes::Vector weights[R];
      for (int r = 0; r < R; ++r) weights[r] = Lanes::widen(rows[r] + k);
      for (int b = 0; b < B; ++b) {
        auto sum = Lanes::load(sums + b * D + k);
        for (int r = 0; r < R; ++r) sum = Lanes::multiply_add(weights[r], Lanes::broadcast(h[r * B + b]), sum);
        Lanes::store(sums + b * D + k, sum);
      }
    }
  }
  for (; i < end; ++i)
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < R; ++r) sums[b * D + i] += h[r * B + b] * to_float(rows[r][i]);
}

// --- the steps

// Memory of a call. The calling thread keeps it for its next call.
struct Workspace {
  std::vector<float> inputs;        // [B, D]: x in float32, where the kernel reads it so
  std::vector<int64_t> counts;      // [chunks]
  std::vector<int64_t> neurons;     // [F]: the needed ones, first at the start of each chunk, then packed
  std::vector<float> products;      // [F, B]: act(gate) * up of these neurons
  std::vector<float> accumulators;  // [pieces, B, D]
};

template <class Lanes, int B>
struct GatedMlp {
  using Weight = typename Lanes::Weight;
  using Input = typename Lanes::Input;

  static constexpr int kRows = rows_at_once<Lanes, B>();
  static constexpr int64_t kMaxChunk = 64;
  // at most 32 KiB of accumulators, in whole lines of weights: long pieces of rows, and sums in the first-level cache
  static constexpr int64_t kColumns = 8192 / B / 32 * 32;

  const GatedMlpCall& call;
  const Input* x;

  static const Weight* weights(const void* pointer) { return static_cast<const Weight*>(pointer); }

  // out[i][b] = bias + row listed[i] of the matrix times x[b]. The list has `count` of `total` rows that follow each other.
  void dot_listed(const Weight* matrix, const Weight* bias, const int64_t* listed, int64_t count, int64_t total,
                  float (*out)[B]) const {
    const auto row = [&](int64_t i) { return matrix + listed[i] * call.D; };
    if (are_short<Weight>(call.D) && count * 8 >= total * 7)
      dot_rows<Lanes, 1, B>(row, count, x, call.D, out);
    else
      dot_rows<Lanes, kRows, B>(row, count, x, call.D, out);
    if (!bias) return;
    for (int64_t i = 0; i < count; ++i)
      for (float& value : out[i]) value += to_float(bias[listed[i]]);
  }

  // Writes the chunk's needed neurons and their products; returns how many there are.
  int64_t route(int64_t first, int64_t last, int64_t* neurons, float* products) const {
    const int64_t D = call.D;
    const bool gate_is_router = call.gate_is_router;
    const Weight* router = weights(gate_is_router ? call.gate : call.up);
    const Weight* router_bias = weights(gate_is_router ? call.gate_bias : call.up_bias);
    const Weight* other = weights(gate_is_router ? call.up : call.gate);
    const Weight* other_bias = weights(gate_is_router ? call.up_bias : call.gate_bias);

    const int64_t size = last - first;

    int64_t listed[kMaxChunk];
    std::iota(listed, listed + size, first);
    float routed[kMaxChunk][B];
    dot_listed(router, router_bias, listed, size, size, routed);
    if (gate_is_router) activate(call.activation, routed[0], size * B);

    int64_t count = 0;
    for (int64_t j = first; j < last; ++j) {
      bool any = false;
      for (float& value : routed[j - first]) {
        // an exact zero contributes nothing: it is not read
        if (!keeps(value, call.thresholds[j])) value = 0.0f;
        any |= value != 0.0f;
      }
      // without a branch, which the processor could not predict
      listed[count] = j;
      count += any;
    }
    float others[kMaxChunk][B];
    dot_listed(other, other_bias, listed, count, size, others);
    if (!gate_is_router) activate(call.activation, others[0], count * B);

    int64_t needed = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = listed[i];
      bool any = false;
      for (int b = 0; b < B; ++b) {
        const float value = routed[j - first][b];
        // a dropped neuron stays 0 even where the other branch is infinite
        float product = value == 0.0f ? 0.0f : value * others[i][b];
        if (call.product_thresholds && !keeps(product, call.product_thresholds[j])) product = 0.0f;
        products[needed * B + b] = product;
        any |= product != 0.0f;
      }
      neurons[needed] = j;
      needed += any;
    }
    return needed;
  }

  // sums[b][begin:end] += products of the neurons times their rows of down
  void accumulate(const int64_t* neurons, const float* products, int64_t count, int64_t begin, int64_t end,
                  float* sums) const {
    const int64_t D = call.D;
    const Weight* down = weights(call.down);
    int64_t i = 0;
    const auto add_groups = [&](auto group) {
      constexpr int R = decltype(group)::value;
      for (; i + R <= count; i += R) {
        const Weight *rows[R], *next[R];
        for (int r = 0; r < R; ++r) {
          rows[r] = down + neurons[i + r] * D;
          next[r] = down + neurons[std::min(i + r + 8, count - 1)] * D;
        }
        add_scaled<Lanes, R, B>(rows, next, products + i * B, begin, end, D, sums);
      }
    };
    if (!are_short<Weight>(call.D)) add_groups(std::integral_constant<int, 8>{});
    add_groups(std::integral_constant<int, 4>{});
    add_groups(std::integral_constant<int, 1>{});
  }

  static void run(const GatedMlpCall& call, const Threads& threads) {
    static thread_local Workspace memory;
    const int64_t D = call.D, F = call.F;

    const GatedMlp mlp{call, inputs_of<Lanes>(call.x, B * D, memory.inputs)};
    const int64_t workers = workers_for(F * D * static_cast<int64_t>(sizeof(Weight)), threads);

    const int64_t chunk = std::clamp<int64_t>(F / (workers * 8), 8, kMaxChunk);
    const int64_t chunks = ceil_div(F, chunk);
    int64_t* counts = at_least(memory.counts, chunks);
    int64_t* neurons = at_least(memory.neurons, F);
    float* products = at_least(memory.products, F * B);
    for_each(threads, workers, chunks, [&](int64_t c) {
      const int64_t first = c * chunk;
      counts[c] = mlp.route(first, std::min(first + chunk, F), neurons + first, products + first * B);
    });
    int64_t needed = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      std::copy_n(neurons + c * chunk, counts[c], neurons + needed);
      std::copy_n(products + c * chunk * B, counts[c] * B, products + needed * B);
      needed += counts[c];
    }

    const int64_t blocks = ceil_div(D, kColumns);
    const int64_t tasks = workers == 1 ? 1 : 4 * workers;
    const int64_t pieces = ceil_div(tasks, blocks);
    const int64_t piece = ceil_div(std::max<int64_t>(needed, 1), pieces);
    float* accumulators = at_least(memory.accumulators, pieces * B * D);
    for_each(threads, workers, blocks * pieces, [&](int64_t task) {
      const int64_t p = task / blocks, begin = task % blocks * kColumns, end = std::min(begin + kColumns, D);
      float* sums = accumulators + p * B * D;
      for (int b = 0; b < B; ++b) std::fill(sums + b * D + begin, sums + b * D + end, 0.0f);
      const int64_t first = std::min(p * piece, needed), last = std::min(first + piece, needed);
      mlp.accumulate(neurons + first, products + first * B, last - first, begin, end, sums);
    });

    Weight* out = static_cast<Weight*>(call.out);
    const Weight* bias = weights(call.down_bias);
    for (int64_t p = 1; p < pieces; ++p)
      for (int64_t i = 0; i < B * D; ++i) accumulators[i] += accumulators[p * B * D + i];
    for (int b = 0; b < B; ++b)
      for (int64_t i = 0; i < D; ++i)
        round_to(accumulators[b * D + i] + (bias ? to_float(bias[i]) : 0.0f), out[b * D + i]);
  }
};

}  // namespace
}  // namespace cats
