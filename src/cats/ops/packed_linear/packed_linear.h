// What the operator (packed_linear.cpp) and its kernels for each instruction set share.
#pragma once

#include "cpu/common.h"
#include "packed_linear/formats.h"

namespace cats {

// A linear layer over packed rows, checked: out = x @ numbers(rows).t() + bias.
struct PackedLinearCall {
  int64_t B, N;
  RowFormat format;
  Number dtype;  // of x, bias and out
  const void* x;        // [B, format.columns]
  const uint8_t* rows;  // [N, format.pitch]
  const void* bias;     // [N], or null
  void* out;            // [B, N]
};

using PackedLinearKernel = void (*)(const PackedLinearCall&, const Threads&);

// One implementation for each instruction set, from the same source, packed_linear_kernel.h.
void packed_linear_generic(const PackedLinearCall&, const Threads&);
void packed_linear_avx2(const PackedLinearCall&, const Threads&);
void packed_linear_avx512(const PackedLinearCall&, const Threads&);

}  // namespace cats
