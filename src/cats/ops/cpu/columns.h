// Sums of some columns of a matrix, each times a number of each token: a matrix times inputs of which most are dropped. A
// column is contiguous in memory, so it is called a row of the stored matrix here.
//
// The distances between kept rows are random, which no hardware prefetcher follows. So, while a group of rows is read, the
// same line of each row of the next group is prefetched into the second-level cache.
#pragma once

#include <cmath>

#include "cpu/rows.h"

namespace cats {
namespace {

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

// Memory of such sums. The calling thread keeps it for its next call.
struct ListedColumns {
  std::vector<int64_t> listed;      // the rows to read
  std::vector<float> values;        // [listed, B]: what they are multiplied with
  std::vector<float> accumulators;  // [pieces, B, length]; the result is the first piece

  // Lists the entries of x [B, D] that some token keeps; returns how many there are.
  template <class Weight, int B>
  int64_t keep(const void* x, const float* thresholds, int64_t D) {
    const Weight* inputs = static_cast<const Weight*>(x);
    at_least(listed, D);
    at_least(values, D * B);
    int64_t count = 0;
    for (int64_t d = 0; d < D; ++d) {
      bool any = false;
      for (int b = 0; b < B; ++b) {
        float value = to_float(inputs[b * D + d]);
        // an exact zero contributes nothing: it is not read
        if (!keeps(value, thresholds[d])) value = 0.0f;
        values[count * B + b] = value;
        any |= value != 0.0f;
      }
      // without a branch, which the processor could not predict
      listed[count] = d;
      count += any;
    }
    return count;
  }
};

// sums[b][begin:end] += values of the listed rows times these rows, of `length` weights each
template <class Lanes, int B>
void add_rows(const typename Lanes::Weight* matrix, int64_t length, const int64_t* listed, const float* values,
              int64_t count, int64_t begin, int64_t end, float* sums) {
  using Weight = typename Lanes::Weight;
  int64_t i = 0;
  const auto add_groups = [&](auto group) {
    constexpr int R = decltype(group)::value;
    for (; i + R <= count; i += R) {
      const Weight *rows[R], *next[R];
      for (int r = 0; r < R; ++r) {
        rows[r] = matrix + listed[i + r] * length;
        next[r] = matrix + listed[std::min(i + r + 8, count - 1)] * length;
      }
      add_scaled<Lanes, R, B>(rows, next, values + i * B, begin, end, length, sums);
    }
  };
  if (!are_short<Weight>(length)) add_groups(std::integral_constant<int, 8>{});
  add_groups(std::integral_constant<int, 4>{});
  add_groups(std::integral_constant<int, 1>{});
}

// memory.accumulators[b][:length] = the sum of the `count` listed rows times their values. A task is a piece of the output and
// a piece of the list, with its own accumulator, and these are added in a fixed order: which thread runs a task does not change
// the result.
template <class Lanes, int B>
void sum_columns(const typename Lanes::Weight* matrix, int64_t length, int64_t count, ListedColumns& memory, int64_t workers,
                 const Threads& threads) {
  // at most 32 KiB of accumulators, in whole lines of weights: long pieces of rows, and sums in the first-level cache
  constexpr int64_t kColumns = 8192 / B / 32 * 32;
  const int64_t blocks = ceil_div(length, kColumns);
  const int64_t tasks = workers == 1 ? 1 : 4 * workers;
  const int64_t pieces = ceil_div(tasks, blocks);
  const int64_t piece = ceil_div(std::max<int64_t>(count, 1), pieces);
  float* accumulators = at_least(memory.accumulators, pieces * B * length);
  for_each(threads, workers, blocks * pieces, [&](int64_t task) {
    const int64_t p = task / blocks, begin = task % blocks * kColumns, end = std::min(begin + kColumns, length);
    float* sums = accumulators + p * B * length;
    for (int b = 0; b < B; ++b) std::fill(sums + b * length + begin, sums + b * length + end, 0.0f);
    const int64_t first = std::min(p * piece, count), last = std::min(first + piece, count);
    add_rows<Lanes, B>(matrix, length, memory.listed.data() + first, memory.values.data() + first * B, last - first, begin,
                       end, sums);
  });
  for (int64_t p = 1; p < pieces; ++p)
    for (int64_t i = 0; i < B * length; ++i) accumulators[i] += accumulators[p * B * length + i];
}

}  // namespace
}  // namespace cats
