// What the operator (packed_mlp.cpp) and its kernels for each instruction set share.
#pragma once

#include "mlp/cpu/gated_mlp.h"
#include "packed_linear/formats.h"

namespace cats {

// Packed columns of `down`, as ops/quantised/columns.py lays them out: one row of codes per neuron, in the order of outputs.
// With 4 bits, the low half of a byte is the even output.
struct ColumnFormat {
  int64_t bits, outputs;
  int64_t group;  // neurons; 0 where all share a scale per output
  Number scale;
  ZeroMode mode;
  int64_t zero;   // the constant zero point
  int64_t pitch;  // bytes from one column to the next

  int64_t groups(int64_t neurons) const { return group ? (neurons + group - 1) / group : 1; }
  int64_t group_of(int64_t neuron) const { return group ? neuron / group : 0; }
  // Bytes of a column that kernels read: whole vectors.
  int64_t used_bytes() const { return (outputs * bits / 8 + 15) / 16 * 16; }
};

// The arguments of cats::packed_gated_mlp, checked.
struct PackedMlpCall {
  int64_t B, F;
  RowFormat rows;
  ColumnFormat columns;
  Number dtype;                     // of x, biases and out
  const void* x;                    // [B, D]
  const uint8_t* gate;              // [F, rows.pitch]
  const uint8_t* up;                // [F, rows.pitch]
  const uint8_t* down;              // [F, columns.pitch]
  const uint8_t* down_scales;       // [groups, D]
  const uint8_t* down_extras;       // [groups, D]: zero points or shifts, or null
  const float* thresholds;          // [F]
  const float* product_thresholds;  // [F], or null
  const void* gate_bias;            // [F], or null
  const void* up_bias;              // [F], or null
  const void* down_bias;            // [D], or null
  Activation activation;
  bool gate_is_router;  // else `up` is
  void* out;            // [B, D]
};

using PackedMlpKernel = void (*)(const PackedMlpCall&, const Threads&);

// One implementation for each instruction set, from the same source, packed_mlp_kernel.h.
void packed_mlp_generic(const PackedMlpCall&, const Threads&);
void packed_mlp_avx2(const PackedMlpCall&, const Threads&);
void packed_mlp_avx512(const PackedMlpCall&, const Threads&);

}  // namespace cats
