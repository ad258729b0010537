// What the operator cats::gated_mlp (gated_mlp.cpp) and its kernels for each instruction set share.
#pragma once

#include "cpu/common.h"

namespace cats {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// The arguments of cats::gated_mlp, checked. Every matrix is [F, D], row-major: `down` is stored column-major, so the
// weights of one neuron are one row here. Weights, biases, x and out have one type: BFloat16 or float.
struct GatedMlpCall {
  int64_t B, D, F;
  bool bfloat16;
  const void* x;     // [B, D]
  const void* gate;  // [F, D]
  const void* up;    // [F, D]
  const void* down;  // [F, D]
  const float* thresholds;          // [F]
  const float* product_thresholds;  // [F], or null
  const float* input_thresholds;    // [D], of the router, which is [D, F] then; or null
  const void* gate_bias;            // [F], or null
  const void* up_bias;              // [F], or null
  const void* down_bias;            // [D], or null
  Activation activation;
  bool gate_is_router;  // else `up` is
  void* out;            // [B, D]
};

using GatedMlpKernel = void (*)(const GatedMlpCall&, const Threads&);

// One implementation for each instruction set, from the same source, gated_mlp_kernel.h.
void gated_mlp_generic(const GatedMlpCall&, const Threads&);
void gated_mlp_avx2(const GatedMlpCall&, const Threads&);
void gated_mlp_avx512(const GatedMlpCall&, const Threads&);
void gated_mlp_avx512_bf16(const GatedMlpCall&, const Threads&);

}  // namespace cats
