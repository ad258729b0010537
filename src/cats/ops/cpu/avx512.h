// 512-bit vectors: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "mlp/cpu/gated_mlp_kernel.h"
#include "linear/linear_kernel.h"

namespace cats {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int64_t kWidth = 16;
  static constexpr int kAccumulators = 16;

  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  static Vector widen(const float* p) { return load(p); }
  static Vector widen(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace
}  // namespace cats
