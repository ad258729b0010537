// The sparse gated MLP.
//
//   1. Neurons are dealt to threads in chunks. For a chunk, read the router's rows one after the other, list the neurons
//      that some token keeps, then read the listed rows of the other branch, several at once.
//   2. Read the rows of `down` of all neurons that some token needs (cpu/columns.h).
//
// Where the router drops inputs, its columns are contiguous, and those of kept inputs are summed before step 1, in the same
// way as those of `down`.
#pragma once

#include <limits>
#include <numeric>

#include "mlp/cpu/gated_mlp.h"
#include "cpu/columns.h"

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

// --- the steps

// Memory of a call. The calling thread keeps it for its next call.
struct Workspace {
  std::vector<float> inputs;        // [B, D]: x in float32, where the kernel reads it so
  std::vector<float> routed;        // [B, F]: outputs of a router that drops inputs
  std::vector<int64_t> counts;      // [chunks]
  std::vector<int64_t> neurons;     // [F]: the needed ones, at the start of each chunk
  std::vector<float> products;      // [F, B]: act(gate) * up of these neurons
  ListedColumns sums;
};

template <class Lanes, int B>
struct GatedMlp {
  using Weight = typename Lanes::Weight;
  using Input = typename Lanes::Input;

  static constexpr int kRows = rows_at_once<Lanes, B>();
  static constexpr int64_t kMaxChunk = 64;

  const GatedMlpCall& call;
  const Input* x;
  const float* routed_before;  // [B, F]: outputs of the router, or null where they are still to be computed

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
    const bool gate_is_router = call.gate_is_router;
    const Weight* router = weights(gate_is_router ? call.gate : call.up);
    const Weight* router_bias = weights(gate_is_router ? call.gate_bias : call.up_bias);
    const Weight* other = weights(gate_is_router ? call.up : call.gate);
    const Weight* other_bias = weights(gate_is_router ? call.up_bias : call.gate_bias);

    const int64_t size = last - first;

    int64_t listed[kMaxChunk];
    std::iota(listed, listed + size, first);
    float routed[kMaxChunk][B];
    if (routed_before) {
      for (int64_t j = first; j < last; ++j)
        for (int b = 0; b < B; ++b)
          routed[j - first][b] = routed_before[b * call.F + j] + (router_bias ? to_float(router_bias[j]) : 0.0f);
    } else {
      dot_listed(router, router_bias, listed, size, size, routed);
    }
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

  static void run(const GatedMlpCall& call, const Threads& threads) {
    static thread_local Workspace memory;
    const int64_t D = call.D, F = call.F;

    const int64_t workers = workers_for(F * D * static_cast<int64_t>(sizeof(Weight)), threads);
    const float* routed = nullptr;
    if (call.input_thresholds) {
      const int64_t kept = memory.sums.template keep<Weight, B>(call.x, call.input_thresholds, D);
      sum_columns<Lanes, B>(weights(call.gate_is_router ? call.gate : call.up), F, kept, memory.sums, workers, threads);
      // these sums stay, while the next ones are added up elsewhere
      memory.routed.swap(memory.sums.accumulators);
      routed = memory.routed.data();
    }
    const GatedMlp mlp{call, inputs_of<Lanes>(call.x, B * D, memory.inputs), routed};

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
    int64_t* listed = at_least(memory.sums.listed, F);
    float* values = at_least(memory.sums.values, F * B);
    for (int64_t c = 0; c < chunks; ++c) {
      std::copy_n(neurons + c * chunk, counts[c], listed + needed);
      std::copy_n(products + c * chunk * B, counts[c] * B, values + needed * B);
      needed += counts[c];
    }
    sum_columns<Lanes, B>(weights(call.down), D, needed, memory.sums, workers, threads);

    Weight* out = static_cast<Weight*>(call.out);
    const Weight* bias = weights(call.down_bias);
    const float* accumulators = memory.sums.accumulators.data();
    for (int b = 0; b < B; ++b)
      for (int64_t i = 0; i < D; ++i)
        round_to(accumulators[b * D + i] + (bias ? to_float(bias[i]) : 0.0f), out[b * D + i]);
  }
};

}  // namespace
}  // namespace cats
