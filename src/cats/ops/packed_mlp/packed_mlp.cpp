// The operator cats::_packed_gated_mlp_cpu, which cpu.py calls: takes the arguments from torch's dispatcher, checks them and
// calls the kernel of the best instruction set.
#include "packed_mlp/column_operands.h"

namespace cats {
namespace {

enum Argument {
  kX, kGate, kUp, kDown, kDownScales, kDownExtras, kThresholds, kActivation, kGateIsRouter,
  kGateBias, kUpBias, kDownBias, kProductThresholds, kRows, kColumns = kRows + 6
};

// A number from 0, in the order of `Activation`.
Activation activation_of(StableIValue value) {
  expect(value <= static_cast<StableIValue>(Activation::kRelu), "activation");
  return static_cast<Activation>(value);
}

PackedMlpCall checked(const StableIValue* stack) {
  const auto tensor = [&](Argument i) { return tensor_of(stack[i]); };
  const auto optional = [&](Argument i) { return optional_tensor_of(stack[i]); };
  const int32_t float32 = torch.aoti_torch_dtype_float32(), uint8 = torch.aoti_torch_dtype_uint8();
  PackedMlpCall call;
  call.rows = row_format(stack + kRows, tensor(kGate));
  call.columns = column_format(stack + kColumns, tensor(kDown));
  const int32_t dtype = dtype_of(tensor(kX));
  const int64_t D = call.columns.outputs, F = sizes_of(tensor(kGate))[0], groups = call.columns.groups(F);
  expect(call.rows.columns == D, "gate and down");
  call.B = tokens_of(tensor(kX), D);
  call.F = F;
  call.dtype = number_of(tensor(kX), "x");
  call.x = data_of(tensor(kX));
  const auto codes = [&](Argument i, const char* name, int64_t pitch) {
    return static_cast<const uint8_t*>(data_of_size(tensor(i), name, uint8, {F, pitch}));
  };
  call.gate = codes(kGate, "gate", call.rows.pitch);
  call.up = codes(kUp, "up", call.rows.pitch);
  call.down = codes(kDown, "down", call.columns.pitch);
  const int32_t scale = dtype_of_number(call.columns.scale);
  call.down_scales = static_cast<const uint8_t*>(data_of_size(tensor(kDownScales), "down_scales", scale, {groups, D}));
  expect((call.columns.mode == ZeroMode::kConstant) == !optional(kDownExtras), "down_extras");
  const int32_t extra = call.columns.mode == ZeroMode::kZeros ? uint8 : scale;
  call.down_extras =
      static_cast<const uint8_t*>(optional_data_of_size(optional(kDownExtras), "down_extras", extra, {groups, D}));
  call.thresholds = static_cast<const float*>(data_of_size(tensor(kThresholds), "thresholds", float32, {F}));
  call.product_thresholds =
      static_cast<const float*>(optional_data_of_size(optional(kProductThresholds), "product_thresholds", float32, {F}));
  call.gate_bias = optional_data_of_size(optional(kGateBias), "gate_bias", dtype, {F});
  call.up_bias = optional_data_of_size(optional(kUpBias), "up_bias", dtype, {F});
  call.down_bias = optional_data_of_size(optional(kDownBias), "down_bias", dtype, {D});
  call.activation = activation_of(stack[kActivation]);
  call.gate_is_router = stack[kGateIsRouter] & 1;
  call.out = nullptr;
  return call;
}

AtenTensorHandle compute(const StableIValue* stack) {
  PackedMlpCall call = checked(stack);
  const int64_t D = call.columns.outputs, sizes[2] = {call.B, D}, strides[2] = {D, 1};
  const AtenTensorHandle out = empty(2, sizes, strides, dtype_of_number(call.dtype));
  call.out = data_of(out);
  instruction_set().packed_mlp(call, threads_of_torch());
  return out;
}

void release(const StableIValue* stack) {
  for (const Argument i : {kX, kGate, kUp, kDown, kDownScales, kThresholds}) release_tensor(stack[i]);
  for (const Argument i : {kDownExtras, kGateBias, kUpBias, kDownBias, kProductThresholds}) release_optional_tensor(stack[i]);
}

}  // namespace

void packed_gated_mlp(StableIValue* stack, uint64_t, uint64_t) {
  return_tensor(stack, [&] { return compute(stack); }, release);
}

}  // namespace cats
