// 256-bit vectors: AVX2 and FMA.
#include <immintrin.h>

#include "mlp/cpu/gated_mlp_kernel.h"
#include "linear/linear_kernel.h"

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
};

}  // namespace
}  // namespace cats

void cats::gated_mlp_avx2(const GatedMlpCall& call, const Threads& threads) {
  run_dtype<GatedMlp, WideningLanes<Avx2, float>, WideningLanes<Avx2, BFloat16>>(call, threads);
}

void cats::linear_avx2(const LinearCall& call, const Threads& threads) {
  run_dtype<Linear, WideningLanes<Avx2, float>, WideningLanes<Avx2, BFloat16>>(call, threads);
}
