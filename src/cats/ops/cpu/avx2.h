// 256-bit vectors: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include "cpu/rows.h"

namespace cats {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int64_t kWidth = 8;
  static constexpr int kAccumulators = 8;

  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vector v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static Vector widen(const float* p) { return load(p); }
  static Vector widen(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // as to_float of one
  static Vector widen(const Float16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fff)), 13);
    const __m256i largest = _mm256_set1_epi32(0x7c00 << 13), rebias = _mm256_set1_epi32(112 << 23);
    const __m256i exponent = _mm256_and_si256(magnitude, largest);
    const __m256i is_largest = _mm256_cmpeq_epi32(exponent, largest);
    const __m256i is_small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    __m256i wide = _mm256_add_epi32(magnitude, rebias);
    wide = _mm256_add_epi32(wide, _mm256_and_si256(is_largest, rebias));
    wide = _mm256_add_epi32(wide, _mm256_and_si256(is_small, _mm256_set1_epi32(1 << 23)));
    const __m256 one = _mm256_and_ps(_mm256_castsi256_ps(is_small), _mm256_set1_ps(6.103515625e-5f));
    const __m256 value = _mm256_sub_ps(_mm256_castsi256_ps(wide), one);
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bits, 15), 31);
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
  }

  using Codes = __m256i;
  static Vector subtract_product(Vector c, Vector a, Vector b) { return _mm256_fnmadd_ps(a, b, c); }
  static Codes load_codes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Vector whole(Codes codes) { return _mm256_cvtepi32_ps(codes); }
  static Vector low(Codes codes) { return whole(_mm256_and_si256(codes, _mm256_set1_epi32(15))); }
  static Vector high(Codes codes) { return whole(_mm256_srli_epi32(codes, 4)); }
  static Vector halves(float a, float b) { return _mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a)); }
  static void deinterleave(Vector a, Vector b, Vector& even, Vector& odd) {
    const auto in_order = [](__m256 v) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
    };
    even = in_order(_mm256_shuffle_ps(a, b, 0x88));
    odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
  }
};

}  // namespace
}  // namespace cats
