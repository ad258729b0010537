// AVX-512 with bfloat16 dot products: half the instructions of a router row, and x stays bfloat16.
#pragma once

#include "cpu/avx512.h"

namespace cats {
namespace {

struct BFloat16DotLanes : Avx512 {
  using Weight = BFloat16;
  using Input = BFloat16;
  static constexpr int64_t kDotStep = 32;

  static __m512bh load_dot(const BFloat16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    __m512bh pairs;
    std::memcpy(&pairs, &bits, sizeof pairs);
    return pairs;
  }
  static Vector dot(__m512bh weights, const BFloat16* x, Vector sum) {
    return _mm512_dpbf16_ps(sum, weights, load_dot(x));
  }
};

}  // namespace
}  // namespace cats
