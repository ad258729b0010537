// A linear layer over packed rows, for a few tokens: rows in the order of memory, each read once.
#pragma once

#include "packed_linear/packed_linear.h"
#include "packed_linear/packed_rows.h"

namespace cats {
namespace {

// Rows that a thread takes at once, at most.
constexpr int64_t kMaxRows = 64;

template <class Lanes>
void run_packed_linear(const PackedLinearCall& call, const Threads& threads) {
  static thread_local std::vector<float> memory;
  const RowFormat& format = call.format;
  const PackedInputs x = packed_inputs<Lanes>(format, call.x, call.dtype, call.B, memory);
  // a code takes about as long as a byte of other weights, whatever its bits
  const int64_t workers = workers_for(call.N * format.columns, threads);
  const int64_t chunk = std::clamp<int64_t>(call.N / (workers * 8), 8, kMaxRows);
  for_each(threads, workers, ceil_div(call.N, chunk), [&](int64_t c) {
    const int64_t begin = c * chunk, count = std::min(chunk, call.N - begin);
    float sums[kMaxRows * kMaxBatch];
    dot_packed_rows<Lanes>(format, [&](int64_t i) { return call.rows + (begin + i) * format.pitch; }, count, x, sums);
    with_type(call.dtype, [&](auto number) {
      const auto* bias = static_cast<const decltype(number)*>(call.bias);
      auto* out = static_cast<decltype(number)*>(call.out);
      for (int64_t b = 0; b < call.B; ++b)
        for (int64_t i = 0; i < count; ++i) {
          const int64_t j = begin + i;
          round_to(sums[i * call.B + b] + (bias ? to_float(bias[j]) : 0.0f), out[b * call.N + j]);
        }
    });
  });
}

}  // namespace
}  // namespace cats
