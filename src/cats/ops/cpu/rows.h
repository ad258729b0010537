// What the kernels are made of, for all instruction sets: dot products with rows of weights, and threads that share the rows
// of a call. The time of a decode step is that of reading weights, so everything here serves one aim: many loads of the right
// rows in flight.
//
// `Lanes`, a template parameter, is what an instruction set does with weights of one type:
//
//   Weight, Input, Vector         types: stored weights; x as `dot` reads it; kWidth floats
//   load, store, broadcast, add, multiply_add, sum, widen (kWidth weights to floats)
//   kDotStep, load_dot, dot       a dot product of kDotStep weights with as many inputs, added to a Vector
//   kAccumulators                 Vectors that fit in registers beside the operands
//
// Each file that includes this is compiled for another instruction set, so all of this has internal linkage: the linker must
// not merge two versions of one function.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(_MSC_VER)
#include <xmmintrin.h>
#endif

#include "cpu/common.h"

namespace cats {
namespace {

constexpr int64_t kLineBytes = 64;

// into the second-level cache, since a group of rows does not fit into the first
inline void prefetch(const void* address) {
#if defined(_MSC_VER)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1);
#else
  __builtin_prefetch(address, 0, 2);
#endif
}

template <class T>
T* at_least(std::vector<T>& memory, int64_t count) {
  if (memory.size() < static_cast<size_t>(count)) memory.resize(count);
  return memory.data();
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float to_float(Float16 value) {
  constexpr uint32_t kExponent = 0x7c00u << 13;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, exponent = magnitude & kExponent;
  // the exponent is larger by 112; infinity and NaN have the largest, and numbers below 2**-14 have no leading 1
  uint32_t bits = magnitude + (112u << 23);
  if (exponent == kExponent) bits += 112u << 23;
  float wide;
  if (exponent == 0) {
    bits += 1u << 23;
    std::memcpy(&wide, &bits, sizeof wide);
    wide -= 6.103515625e-5f;
    std::memcpy(&bits, &wide, sizeof wide);
  }
  bits |= (value.bits & 0x8000u) << 16;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// All round to the nearest, ties to even.
inline void round_to(float value, float& out) { out = value; }

inline void round_to(float value, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_nan = value != value;
  out.bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void round_to(float value, Float16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    magnitude = 0x7c00;  // 65520 and more: infinity
  } else if (magnitude < 0x38800000u) {
    // below 2**-14: the last bit of a float16 is that of a sum with 0.5
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&magnitude, &shifted, sizeof shifted);
    magnitude -= 0x3f000000u;
  } else {
    magnitude = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | magnitude);
}

// --- dot products with rows of weights

// Lanes for an instruction set without dot-product instructions: weights are widened, x is float32.
template <class Instructions, class WeightType>
struct WideningLanes : Instructions {
  using Weight = WeightType;
  using Input = float;
  using Vector = typename Instructions::Vector;
  static constexpr int64_t kDotStep = Instructions::kWidth;

  static Vector load_dot(const Weight* p) { return Instructions::widen(p); }
  static Vector dot(Vector weights, const float* x, Vector sum) {
    return Instructions::multiply_add(weights, Instructions::load(x), sum);
  }
};

// Rows that are read at once, so that many loads are in flight; limited by the registers for sums.
template <class Lanes, int B>
constexpr int rows_at_once() {
  int rows = 8;
  while (rows > 1 && rows * B > Lanes::kAccumulators) rows /= 2;
  return rows;
}

// out[r][b] = the dot product of rows[r] and x[b], both of length D; prefetches next[r].
template <class Lanes, int R, int B>
void dot(const typename Lanes::Weight* const (&rows)[R], const typename Lanes::Weight* const (&next)[R],
         const typename Lanes::Input* x, int64_t D, float (&out)[R][B]) {
  using Vector = typename Lanes::Vector;
  constexpr int64_t kLine = kLineBytes / sizeof(typename Lanes::Weight);
  // a chain of dependent additions must not be slower than memory
  constexpr int kChains = R * B < 8 ? 8 / (R * B) : 1;
  Vector sums[kChains][R][B];
  for (auto& chain : sums)
    for (auto& row : chain)
      for (auto& sum : row) sum = Lanes::broadcast(0.0f);

  const auto add_line = [&](Vector(&into)[R][B], int64_t i) {
    for (int r = 0; r < R; ++r) prefetch(next[r] + i);
    for (int64_t k = i; k < i + kLine; k += Lanes::kDotStep)
      for (int r = 0; r < R; ++r) {
        const auto weights = Lanes::load_dot(rows[r] + k);
        for (int b = 0; b < B; ++b) into[r][b] = Lanes::dot(weights, x + b * D + k, into[r][b]);
      }
  };
  int64_t i = 0;
  for (; i + kChains * kLine <= D; i += kChains * kLine)
    for (int c = 0; c < kChains; ++c) add_line(sums[c], i + c * kLine);
  for (; i + kLine <= D; i += kLine) add_line(sums[0], i);

  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      for (int c = 1; c < kChains; ++c) sums[0][r][b] = Lanes::add(sums[0][r][b], sums[c][r][b]);
      float total = Lanes::sum(sums[0][r][b]);
      for (int64_t k = i; k < D; ++k) total += to_float(rows[r][k]) * to_float(x[b * D + k]);
      out[r][b] = total;
    }
}

// out[i] = the dot products of row(i) and each x[b], for i < count; R rows at once.
template <class Lanes, int R, int B, class Row>
void dot_rows(const Row& row, int64_t count, const typename Lanes::Input* x, int64_t D, float (*out)[B]) {
  for (int64_t i = 0; i < count; i += R) {
    // past the end, a group repeats the last row, which is in the cache; its result is not copied
    const typename Lanes::Weight *rows[R], *next[R];
    for (int r = 0; r < R; ++r) {
      rows[r] = row(std::min(i + r, count - 1));
      next[r] = row(std::min(i + R + r, count - 1));
    }
    float values[R][B];
    dot<Lanes, R, B>(rows, next, x, D, values);
    std::copy_n(values[0], std::min<int64_t>(R, count - i) * B, out[i]);
  }
}

// Whether rows are shorter than a page. Short rows that follow each other are read one after the other, as one stream, which
// the hardware prefetches better than several streams.
template <class Weight>
bool are_short(int64_t D) {
  return D * static_cast<int64_t>(sizeof(Weight)) < 4096;
}

// x as `dot` reads it: x itself, or its float32 copy in `memory`.
template <class Lanes>
const typename Lanes::Input* inputs_of(const void* x, int64_t count, std::vector<float>& memory) {
  const auto* stored = static_cast<const typename Lanes::Weight*>(x);
  if constexpr (std::is_same_v<typename Lanes::Input, typename Lanes::Weight>) {
    return stored;
  } else {
    float* wide = at_least(memory, count);
    for (int64_t i = 0; i < count; ++i) wide[i] = to_float(stored[i]);
    return wide;
  }
}

// --- the work of a call, in threads

inline int64_t workers_for(int64_t bytes, const Threads& threads) {
  return std::max<int64_t>(1, std::min(threads.count, bytes / threads.bytes_each));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(i) once for each i < count, from up to `workers` threads; a free thread takes the next i.
template <class Body>
void for_each(const Threads& threads, int64_t workers, int64_t count, const Body& body) {
  struct Context {
    const Body& body;
    const int64_t count;
    std::atomic<int64_t> next;
  } context{body, count, {0}};
  const auto work = [](int64_t, int64_t, void* pointer) {
    auto& shared = *static_cast<Context*>(pointer);
    for (;;) {
      const int64_t i = shared.next.fetch_add(1, std::memory_order_relaxed);
      if (i >= shared.count) break;
      shared.body(i);
    }
  };
  workers = std::min(workers, count);
  if (workers <= 1)
    work(0, 1, &context);
  else
    threads.run(workers, work, &context);
}

// Runs the kernel for the batch of a call.
template <template <class, int> class Kernel, class Lanes, class Call>
void run_batch(const Call& call, const Threads& threads) {
  switch (call.B) {
    case 1: return Kernel<Lanes, 1>::run(call, threads);
    case 2: return Kernel<Lanes, 2>::run(call, threads);
    case 3: return Kernel<Lanes, 3>::run(call, threads);
    case 4: return Kernel<Lanes, 4>::run(call, threads);
    case 5: return Kernel<Lanes, 5>::run(call, threads);
    case 6: return Kernel<Lanes, 6>::run(call, threads);
    case 7: return Kernel<Lanes, 7>::run(call, threads);
    case 8: return Kernel<Lanes, 8>::run(call, threads);
  }
}

template <template <class, int> class Kernel, class FloatLanes, class BFloat16Lanes, class Call>
void run_dtype(const Call& call, const Threads& threads) {
  if (call.bfloat16)
    run_batch<Kernel, BFloat16Lanes>(call, threads);
  else
    run_batch<Kernel, FloatLanes>(call, threads);
}

}  // namespace
}  // namespace cats
