// The operators in plain C++.
#include "cpu/generic.h"
#include "mlp/cpu/gated_mlp_kernel.h"
#include "linear/linear_kernel.h"
#include "packed_linear/packed_linear_kernel.h"
#include "packed_mlp/packed_mlp_kernel.h"

void cats::gated_mlp_generic(const GatedMlpCall& call, const Threads& threads) {
  run_dtype<GatedMlp, WideningLanes<Generic, float>, WideningLanes<Generic, BFloat16>>(call, threads);
}

void cats::linear_generic(const LinearCall& call, const Threads& threads) {
  run_dtype<Linear, WideningLanes<Generic, float>, WideningLanes<Generic, BFloat16>>(call, threads);
}

void cats::packed_linear_generic(const PackedLinearCall& call, const Threads& threads) {
  run_packed_linear<Generic>(call, threads);
}

void cats::packed_mlp_generic(const PackedMlpCall& call, const Threads& threads) { run_packed_mlp<Generic>(call, threads); }
