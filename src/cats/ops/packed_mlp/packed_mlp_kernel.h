// The sparse gated MLP over packed codes: the steps of gated_mlp_kernel.h, with dot products of packed_rows.h and sums of
// packed_columns.h.
#pragma once

#include "mlp/cpu/gated_mlp_kernel.h"
#include "packed_mlp/packed_columns.h"

namespace cats {
namespace {

// Memory of a call. The calling thread keeps it for its next call.
struct PackedMlpMemory {
  std::vector<float> inputs;
  std::vector<int64_t> counts;   // [chunks]
  std::vector<int64_t> neurons;  // [F]: the needed ones, first at the start of each chunk, then packed
  std::vector<float> products;   // [F, B]: act(gate) * up of these neurons
  std::vector<float> totals;     // [pieces, B, planes, places]
};

template <class Lanes>
struct PackedMlp {
  static constexpr int64_t kMaxChunk = 64;

  const PackedMlpCall& call;
  const PackedInputs& x;

  // out[i][b] = bias + row listed[i] of the matrix times token b
  void dot_listed(const uint8_t* matrix, const void* bias, const int64_t* listed, int64_t count, float* out) const {
    if (count == 0) return;
    dot_packed_rows<Lanes>(call.rows, [&](int64_t i) { return matrix + listed[i] * call.rows.pitch; }, count, x, out);
    if (!bias) return;
    for (int64_t i = 0; i < count; ++i) {
      const float added = number_at(bias, call.dtype, listed[i]);
      for (int64_t b = 0; b < call.B; ++b) out[i * call.B + b] += added;
    }
  }

  // Writes the chunk's needed neurons and their products; returns how many there are.
  int64_t route(int64_t first, int64_t last, int64_t* neurons, float* products) const {
    const int64_t B = call.B, size = last - first;
    const bool gate_is_router = call.gate_is_router;

    int64_t listed[kMaxChunk];
    std::iota(listed, listed + size, first);
    float routed[kMaxChunk * kMaxBatch], others[kMaxChunk * kMaxBatch];
    if (gate_is_router)
      dot_listed(call.gate, call.gate_bias, listed, size, routed);
    else
      dot_listed(call.up, call.up_bias, listed, size, routed);
    if (gate_is_router) activate(call.activation, routed, size * B);

    int64_t count = 0;
    for (int64_t j = first; j < last; ++j) {
      bool any = false;
      for (int64_t b = 0; b < B; ++b) {
        float& value = routed[(j - first) * B + b];
        // an exact zero contributes nothing: it is not read
        if (!keeps(value, call.thresholds[j])) value = 0.0f;
        any |= value != 0.0f;
      }
      // without a branch, which the processor could not predict
      listed[count] = j;
      count += any;
    }
    if (gate_is_router)
      dot_listed(call.up, call.up_bias, listed, count, others);
    else
      dot_listed(call.gate, call.gate_bias, listed, count, others);
    if (!gate_is_router) activate(call.activation, others, count * B);

    int64_t needed = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = listed[i];
      bool any = false;
      for (int64_t b = 0; b < B; ++b) {
        const float value = routed[(j - first) * B + b];
        // a dropped neuron stays 0 even where the other branch is infinite
        float product = value == 0.0f ? 0.0f : value * others[i * B + b];
        if (call.product_thresholds && !keeps(product, call.product_thresholds[j])) product = 0.0f;
        products[needed * B + b] = product;
        any |= product != 0.0f;
      }
      neurons[needed] = j;
      needed += any;
    }
    return needed;
  }

  // The output, from its sums in planes.
  void write(const NeededColumns& needed, int64_t count, const float* totals) const {
    const ColumnFormat& format = call.columns;
    const int64_t planes = 8 / format.bits, plane_size = format.used_bytes(), D = format.outputs;
    for (int64_t b = 0; b < call.B; ++b) {
      bool has_nan = false;
      for (int64_t i = 0; i < count; ++i) has_nan |= needed.products[i * call.B + b] != needed.products[i * call.B + b];
      with_type(call.dtype, [&](auto number) {
        const auto* bias = static_cast<const decltype(number)*>(call.down_bias);
        auto* out = static_cast<decltype(number)*>(call.out) + b * D;
        for (int64_t i = 0; i < D; ++i) {
          float total = totals[(b * planes + i % planes) * plane_size + i / planes];
          if (!is_finite(total) && !has_nan) total = plain_output(needed, count, b, i);
          round_to(total + (bias ? to_float(bias[i]) : 0.0f), out[i]);
        }
      });
    }
  }

  static void run(const PackedMlpCall& call, const Threads& threads) {
    static thread_local PackedMlpMemory memory;
    const int64_t B = call.B, F = call.F;
    const PackedInputs x = packed_inputs<Lanes>(call.rows, call.x, call.dtype, B, memory.inputs);
    const PackedMlp mlp{call, x};
    // a code takes about as long as a byte of other weights, whatever its bits
    const int64_t workers = workers_for(F * call.rows.columns, threads);

    const int64_t chunk = std::clamp<int64_t>(F / (workers * 8), 8, kMaxChunk);
    const int64_t chunks = ceil_div(F, chunk);
    int64_t* counts = at_least(memory.counts, chunks);
    int64_t* neurons = at_least(memory.neurons, F);
    float* products = at_least(memory.products, F * B);
    for_each(threads, workers, chunks, [&](int64_t c) {
      const int64_t first = c * chunk;
      counts[c] = mlp.route(first, std::min(first + chunk, F), neurons + first, products + first * B);
    });
    int64_t count = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      std::copy_n(neurons + c * chunk, counts[c], neurons + count);
      std::copy_n(products + c * chunk * B, counts[c] * B, products + count * B);
      count += counts[c];
    }

    const NeededColumns needed{call, neurons, products};
    const int64_t size = B * (8 / call.columns.bits) * call.columns.used_bytes();
    const int64_t pieces = workers == 1 ? 1 : 4 * workers, piece = ceil_div(std::max<int64_t>(count, 1), pieces);
    float* totals = at_least(memory.totals, pieces * size);
    for_each(threads, workers, pieces, [&](int64_t p) {
      std::fill_n(totals + p * size, size, 0.0f);
      const int64_t first = std::min(p * piece, count), last = std::min(first + piece, count);
      add_columns<Lanes>(needed, first, last, totals + p * size);
    });
    for (int64_t p = 1; p < pieces; ++p)
      for (int64_t i = 0; i < size; ++i) totals[i] += totals[p * size + i];
    mlp.write(needed, count, totals);
  }
};

template <class Lanes>
void run_packed_mlp(const PackedMlpCall& call, const Threads& threads) {
  PackedMlp<Lanes>::run(call, threads);
}

}  // namespace
}  // namespace cats
