// What the operator cats::linear (linear.cpp) and its kernels for each instruction set share.
#pragma once

#include "cpu/common.h"

namespace cats {

// One matrix of a call: out = x @ weight.t() + bias.
struct LinearPart {
  int64_t N;
  const void* weight;  // [N, D], row-major
  const void* bias;    // [N], or null
  void* out;           // [B, N]
};

// The arguments of cats::linear, checked: several matrices that read the same x. All have one type: BFloat16 or float.
struct LinearCall {
  int64_t B, D;
  bool bfloat16;
  const void* x;  // [B, D]
  const LinearPart* parts;
  int64_t count;
};

using LinearKernel = void (*)(const LinearCall&, const Threads&);

// One implementation for each instruction set, from the same source, linear_kernel.h.
void linear_generic(const LinearCall&, const Threads&);
void linear_avx2(const LinearCall&, const Threads&);
void linear_avx512(const LinearCall&, const Threads&);
void linear_avx512_bf16(const LinearCall&, const Threads&);

}  // namespace cats
