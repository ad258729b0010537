// The operators with AVX2 and FMA.
#include "cpu/avx2.h"
#include "mlp/cpu/gated_mlp_kernel.h"
#include "linear/linear_kernel.h"
#include "packed_linear/packed_linear_kernel.h"
#include "packed_mlp/packed_mlp_kernel.h"

void cats::gated_mlp_avx2(const GatedMlpCall& call, const Threads& threads) {
  run_dtype<GatedMlp, WideningLanes<Avx2, float>, WideningLanes<Avx2, BFloat16>>(call, threads);
}

void cats::linear_avx2(const LinearCall& call, const Threads& threads) {
  run_dtype<Linear, WideningLanes<Avx2, float>, WideningLanes<Avx2, BFloat16>>(call, threads);
}

void cats::packed_linear_avx2(const PackedLinearCall& call, const Threads& threads) {
  run_packed_linear<Avx2>(call, threads);
}

void cats::packed_mlp_avx2(const PackedMlpCall& call, const Threads& threads) { run_packed_mlp<Avx2>(call, threads); }
