// Products of bytes by AVX-512 VNNI, for step/integer_rows.h and step/integer_columns.h.
#pragma once

#include "cpu/avx512.h"

namespace cats {
namespace {

struct VnniBytes {
  using Integers = __m512i;

  static Integers load(const void* p) { return _mm512_loadu_si512(p); }
  // The compiler would load bytes again for each of their halves, and half of the rows lie across two lines.
  static Integers load_once(const void* p) {
    Integers bytes = load(p);
#if defined(__GNUC__)
    __asm__("" : "+v"(bytes));
#endif
    return bytes;
  }
  static Integers low(Integers bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static Integers high(Integers bytes) { return low(_mm512_srli_epi16(bytes, 4)); }
  static Integers zero() { return _mm512_setzero_si512(); }
  static Integers dot(Integers sums, Integers codes, Integers x) { return _mm512_dpbusd_epi32(sums, codes, x); }
  static Integers shift(Integers sums) { return _mm512_slli_epi32(sums, 7); }
  static Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
  static __m512 to_floats(Integers sums) { return _mm512_cvtepi32_ps(sums); }

  using Few = __m128;
  static Few no_numbers() { return _mm_setzero_ps(); }
  static Few multiply(Few a, Few b) { return _mm_mul_ps(a, b); }
  static Few multiply_add(Few a, Few b, Few c) { return _mm_fmadd_ps(a, b, c); }
  static __m512 first(Few numbers) { return _mm512_zextps128_ps512(numbers); }
  template <int n>
  static Few few(const float* p) {
    return n == 4 ? _mm_loadu_ps(p) : _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  template <int n, class Half>
  static __m128i few_halves(const Half* p) {
    if constexpr (n == 4) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    int32_t both;
    std::memcpy(&both, p, sizeof both);
    return _mm_cvtsi32_si128(both);
  }
  template <int n>
  static Few few(const Float16* p) {
    return _mm_maskz_cvtph_ps(0xf, few_halves<n>(p));
  }
  template <int n>
  static Few few(const BFloat16* p) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(few_halves<n>(p)), 16));
  }
  // lanes 0 and 1 of each 16 bytes belong to the first block of a plane, lanes 2 and 3 to the second
  template <int planes>
  static __m512 spread(Few scales, int plane) {
    const int second = planes;
    const __m128i places = _mm_setr_epi32(plane, plane, second + plane, second + plane);
    return _mm512_permutexvar_ps(_mm512_broadcast_i32x4(places), _mm512_castps128_ps512(scales));
  }

  // Four rows of 64 bytes, by fours: lane i of out[v] has the bytes 16 * (i / 4) + 4 * v + i % 4 of the rows.
  static void interleave(const Integers (&rows)[4], Integers (&out)[4]) {
    const Integers low01 = _mm512_unpacklo_epi8(rows[0], rows[1]), low23 = _mm512_unpacklo_epi8(rows[2], rows[3]);
    const Integers high01 = _mm512_unpackhi_epi8(rows[0], rows[1]), high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi16(low01, low23);
    out[1] = _mm512_unpackhi_epi16(low01, low23);
    out[2] = _mm512_unpacklo_epi16(high01, high23);
    out[3] = _mm512_unpackhi_epi16(high01, high23);
  }
  static Integers broadcast(int32_t four_bytes) { return _mm512_set1_epi32(four_bytes); }

  // Undoes the order of `interleave`: out[v] has the lanes of bytes 16 * v to 16 * v + 15.
  static void in_order(const __m512 (&lanes)[4], __m512 (&out)[4]) {
    const __m512 a = _mm512_shuffle_f32x4(lanes[0], lanes[1], 0x44), b = _mm512_shuffle_f32x4(lanes[2], lanes[3], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(lanes[0], lanes[1], 0xee), d = _mm512_shuffle_f32x4(lanes[2], lanes[3], 0xee);
    out[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    out[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
    out[2] = _mm512_shuffle_f32x4(c, d, 0x88);
    out[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }

  // The lanes of even and of odd outputs in turns.
  static void pair(__m512 even, __m512 odd, __m512& first, __m512& second) {
    const __m512i places = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    first = _mm512_permutex2var_ps(even, places, odd);
    second = _mm512_permutex2var_ps(even, _mm512_add_epi32(places, _mm512_set1_epi32(8)), odd);
  }
};

}  // namespace
}  // namespace cats
