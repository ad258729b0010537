// Neurons of a gated MLP: rows of the router, then the rows of the other branch of those that are kept.
#pragma once

#include <numeric>

#include "mlp/cpu/gated_mlp_kernel.h"
#include "step/matrix_inputs.h"

namespace cats {
namespace {

// out[i] = act(gate) * up of neuron first + i, 0 where it is dropped; then memory for 2 * kMaxNeurons numbers.
template <class Set>
void compute_products(const MatrixInputs<Set>& inputs, const StepLayer& layer, const LayerCuts& cuts, Number number,
                      int64_t gate_input, int64_t up_input, int64_t first, int64_t count, float* out) {
  const bool gate_is_router = layer.gate_is_router;
  const auto activation = static_cast<Activation>(layer.activation);
  const auto* thresholds = static_cast<const float*>(layer.thresholds);
  const auto* product_thresholds = static_cast<const float*>(layer.product_thresholds);
  int64_t listed[kMaxNeurons];
  std::iota(listed, listed + count, first);
  const auto row = [&](int64_t i) { return listed[i]; };
  const auto multiply = [&](bool is_gate, int64_t rows, float* results) {
    const StepMatrix& matrix = is_gate ? layer.gate : layer.up;
    inputs.multiply(matrix, cuts.formats[is_gate ? 4 : 5], number, is_gate ? gate_input : up_input, row, rows, results);
    if (is_gate) activate(activation, results, rows);
  };
  float others[kMaxNeurons];
  multiply(gate_is_router, count, out);
  int64_t kept = 0;
  for (int64_t j = first; j < first + count; ++j) {
    float& value = out[j - first];
    // an exact zero contributes nothing: it is not read
    if (!keeps(value, thresholds[j])) value = 0.0f;
    // without a branch, which the processor could not predict
    listed[kept] = j;
    kept += value != 0.0f;
  }
  multiply(!gate_is_router, kept, others);
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t j = listed[i];
    float product = out[j - first] * others[i];
    if (product_thresholds && !keeps(product, product_thresholds[j])) product = 0.0f;
    out[j - first] = product;
  }
}

}  // namespace
}  // namespace cats
