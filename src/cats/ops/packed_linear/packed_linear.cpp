// The operator cats::_packed_linear_cpu, which cpu.py calls: takes the arguments from torch's dispatcher, checks them and calls
// the kernel of the best instruction set.
#include "packed_linear/operands.h"

namespace cats {
namespace {

enum Argument { kX, kRows, kBias, kLayout };

AtenTensorHandle compute(const StableIValue* stack) {
  const AtenTensorHandle x = tensor_of(stack[kX]), rows = tensor_of(stack[kRows]), bias = optional_tensor_of(stack[kBias]);
  PackedLinearCall call;
  call.format = row_format(stack + kLayout, rows);
  call.B = tokens_of(x, call.format.columns);
  call.N = sizes_of(rows)[0];
  call.dtype = number_of(x, "x");
  call.x = data_of(x);
  call.rows = static_cast<const uint8_t*>(
      data_of_size(rows, "rows", torch.aoti_torch_dtype_uint8(), {call.N, call.format.pitch}));
  call.bias = optional_data_of_size(bias, "bias", dtype_of(x), {call.N});
  const int64_t sizes[2] = {call.B, call.N}, strides[2] = {call.N, 1};
  const AtenTensorHandle out = empty(2, sizes, strides, dtype_of(x));
  call.out = data_of(out);
  instruction_set().packed_linear(call, threads_of_torch());
  return out;
}

void release(const StableIValue* stack) {
  release_tensor(stack[kX]);
  release_tensor(stack[kRows]);
  release_optional_tensor(stack[kBias]);
}

}  // namespace

void packed_linear(StableIValue* stack, uint64_t, uint64_t) {
  return_tensor(stack, [&] { return compute(stack); }, release);
}

}  // namespace cats
