// The operators with bfloat16 dot products.
#include "cpu/avx512_bf16.h"
#include "linear/linear_kernel.h"
#include "mlp/cpu/gated_mlp_kernel.h"

void cats::gated_mlp_avx512_bf16(const GatedMlpCall& call, const Threads& threads) {
  if (call.bfloat16)
    run_batch<GatedMlp, BFloat16DotLanes>(call, threads);
  else
    gated_mlp_avx512(call, threads);
}

void cats::linear_avx512_bf16(const LinearCall& call, const Threads& threads) {
  if (call.bfloat16)
    run_batch<Linear, BFloat16DotLanes>(call, threads);
  else
    linear_avx512(call, threads);
}
