// A linear layer for a few tokens: rows of one or several matrices, in the order of memory, each read once for all tokens.
#pragma once

#include "linear/linear.h"
#include "cpu/rows.h"

namespace cats {
namespace {

template <class Lanes, int B>
struct Linear {
  using Weight = typename Lanes::Weight;
  using Input = typename Lanes::Input;

  static constexpr int kRows = rows_at_once<Lanes, B>();
  static constexpr int64_t kMaxChunk = 64;

  // out[:, first:last] of one matrix
  static void run_rows(const LinearPart& part, int64_t D, const Input* x, int64_t first, int64_t last) {
    const Weight* matrix = static_cast<const Weight*>(part.weight);
    const Weight* bias = static_cast<const Weight*>(part.bias);
    Weight* out = static_cast<Weight*>(part.out);
    const auto row = [&](int64_t i) { return matrix + (first + i) * D; };
    float sums[kMaxChunk][B];
    if (are_short<Weight>(D))
      dot_rows<Lanes, 1, B>(row, last - first, x, D, sums);
    else
      dot_rows<Lanes, kRows, B>(row, last - first, x, D, sums);
    for (int64_t j = first; j < last; ++j)
      for (int b = 0; b < B; ++b)
        round_to(sums[j - first][b] + (bias ? to_float(bias[j]) : 0.0f), out[b * part.N + j]);
  }

  static void run(const LinearCall& call, const Threads& threads) {
    static thread_local std::vector<float> memory;
    const int64_t D = call.D;
    const Input* x = inputs_of<Lanes>(call.x, B * D, memory);
    int64_t rows = 0;
    for (int64_t p = 0; p < call.count; ++p) rows += call.parts[p].N;
    const int64_t workers = workers_for(rows * D * static_cast<int64_t>(sizeof(Weight)), threads);
    const int64_t chunk = std::clamp<int64_t>(rows / (workers * 8), 8, kMaxChunk);

    // no chunk reaches from one matrix into the next
    int64_t chunks = 0;
    for (int64_t p = 0; p < call.count; ++p) chunks += ceil_div(call.parts[p].N, chunk);
    for_each(threads, workers, chunks, [&](int64_t c) {
      const LinearPart* part = call.parts;
      for (; c >= ceil_div(part->N, chunk); ++part) c -= ceil_div(part->N, chunk);
      run_rows(*part, D, x, c * chunk, std::min((c + 1) * chunk, part->N));
    });
  }
};

}  // namespace
}  // namespace cats
