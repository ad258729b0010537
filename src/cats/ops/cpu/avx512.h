// 512-bit vectors: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "cpu/rows.h"

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
  static Vector widen(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  using Codes = __m512i;
  static Vector subtract_product(Vector c, Vector a, Vector b) { return _mm512_fnmadd_ps(a, b, c); }
  static Codes load_codes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vector whole(Codes codes) { return _mm512_cvtepi32_ps(codes); }
  // a table of 16 numbers, of which the low four bits choose
  static Vector low(Codes codes) {
    return _mm512_permutexvar_ps(codes, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static Vector high(Codes codes) { return low(_mm512_srli_epi32(codes, 4)); }
  static Vector halves(float a, float b) { return _mm512_mask_mov_ps(_mm512_set1_ps(a), 0xff00, _mm512_set1_ps(b)); }
  static Vector quarters(float a, float b, float c, float d) {
    const __m128 four = _mm_setr_ps(a, b, c, d);
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(places, _mm512_castps128_ps512(four));
  }
  static void deinterleave(Vector a, Vector b, Vector& even, Vector& odd) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, places, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(places, _mm512_set1_epi32(1)), b);
  }
};

}  // namespace
}  // namespace cats
