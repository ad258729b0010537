// What the operator (operator.cpp) and the kernels of each instruction set share.
#pragma once

#include <cstdint>

namespace cats {

struct BFloat16 {
  uint16_t bits;
};

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// The arguments of cats::gated_mlp, checked. Every matrix is [F, D], row-major: `down` is stored column-major, so the
// weights of one neuron are one row here. Weights, biases, x and out have one type: BFloat16 or float.
struct Call {
  int64_t B, D, F;
  bool bfloat16;
  const void* x;     // [B, D]
  const void* gate;  // [F, D]
  const void* up;    // [F, D]
  const void* down;  // [F, D]
  const float* thresholds;          // [F]
  const float* product_thresholds;  // [F], or null
  const void* gate_bias;            // [F], or null
  const void* up_bias;              // [F], or null
  const void* down_bias;            // [D], or null
  Activation activation;
  bool gate_is_router;  // else `up` is
  void* out;            // [B, D]
};

constexpr int64_t kMaxBatch = 8;

// The thread pool of torch: `run` calls `body(begin, end, context)` on parts of [0, count) and waits for all of them.
struct Threads {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int64_t count;
  void (*run)(int64_t count, Body body, void* context);
};

using Kernel = void (*)(const Call&, const Threads&);

// One implementation for each instruction set, from the same source, kernel.h.
void gated_mlp_generic(const Call&, const Threads&);
void gated_mlp_avx2(const Call&, const Threads&);
void gated_mlp_avx512(const Call&, const Threads&);
void gated_mlp_avx512_bf16(const Call&, const Threads&);

}  // namespace cats
