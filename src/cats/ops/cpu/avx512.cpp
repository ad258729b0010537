#include "cpu/avx512.h"
#include "mlp/cpu/gated_mlp_kernel.h"
#include "linear/linear_kernel.h"
#include "packed_linear/packed_linear_kernel.h"
#include "packed_mlp/packed_mlp_kernel.h"

void cats::gated_mlp_avx512(const GatedMlpCall& call, const Threads& threads) {
  run_dtype<GatedMlp, WideningLanes<Avx512, float>, WideningLanes<Avx512, BFloat16>>(call, threads);
}

void cats::linear_avx512(const LinearCall& call, const Threads& threads) {
  run_dtype<Linear, WideningLanes<Avx512, float>, WideningLanes<Avx512, BFloat16>>(call, threads);
}

void cats::packed_linear_avx512(const PackedLinearCall& call, const Threads& threads) {
  run_packed_linear<Avx512>(call, threads);
}

void cats::packed_mlp_avx512(const PackedMlpCall& call, const Threads& threads) { run_packed_mlp<Avx512>(call, threads); }
