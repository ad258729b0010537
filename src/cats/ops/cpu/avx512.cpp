#include "avx512.h"

void cats::gated_mlp_avx512(const Call& call, const Threads& threads) {
  run_dtype<WideningLanes<Avx512, float>, WideningLanes<Avx512, BFloat16>>(call, threads);
}
