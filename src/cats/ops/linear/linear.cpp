// cats::linear for CPU tensors: takes the arguments from torch's dispatcher and calls the kernel of the best instruction set.
// What it does not take (another dtype or layout, more than eight tokens, shapes that do not fit) goes to aten::linear.
#include <vector>

#include "cpu/operators.h"

namespace cats {
namespace {

enum Argument { kX, kWeight, kBias };

// The tokens of x [..., D]; 0 where the kernel does not take the call.
int64_t tokens_of(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias) {
  const int32_t dtype = dtype_of(x);
  if (dtype != torch.aoti_torch_dtype_float32() && dtype != torch.aoti_torch_dtype_bfloat16()) return 0;
  if (dim_of(x) < 1 || dim_of(weight) != 2 || dtype_of(weight) != dtype) return 0;
  const int64_t N = sizes_of(weight)[0], D = sizes_of(weight)[1];
  if (N < 1 || D < 1 || sizes_of(x)[dim_of(x) - 1] != D || !is_contiguous(x) || !is_contiguous(weight)) return 0;
  if (bias && (dtype_of(bias) != dtype || dim_of(bias) != 1 || sizes_of(bias)[0] != N || !is_contiguous(bias))) return 0;
  int64_t tokens = 1;
  for (int64_t i = 0; i < dim_of(x) - 1; ++i) tokens *= sizes_of(x)[i];
  return tokens <= kMaxBatch ? tokens : 0;
}

AtenTensorHandle compute(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias, int64_t tokens) {
  const int64_t dim = dim_of(x), N = sizes_of(weight)[0], D = sizes_of(weight)[1];
  std::vector<int64_t> sizes(sizes_of(x), sizes_of(x) + dim), strides(dim, 1);
  sizes[dim - 1] = N;
  for (int64_t i = dim - 2; i >= 0; --i) strides[i] = strides[i + 1] * sizes[i + 1];
  const int32_t dtype = dtype_of(x);
  const AtenTensorHandle out = empty(dim, sizes.data(), strides.data(), dtype);
  const LinearPart part{N, data_of(weight), bias ? data_of(bias) : nullptr, data_of(out)};
  const bool bfloat16 = dtype == torch.aoti_torch_dtype_bfloat16();
  instruction_set().linear(LinearCall{tokens, D, bfloat16, data_of(x), &part, 1}, threads_of_torch());
  return out;
}

void release(StableIValue* stack) {
  release_tensor(stack[kX]);
  release_tensor(stack[kWeight]);
  release_optional_tensor(stack[kBias]);
}

}  // namespace

void linear(StableIValue* stack, uint64_t, uint64_t) {
  const AtenTensorHandle x = tensor_of(stack[kX]), weight = tensor_of(stack[kWeight]);
  const AtenTensorHandle bias = optional_tensor_of(stack[kBias]);
  const int64_t tokens = tokens_of(x, weight, bias);
  if (tokens == 0) {
    check(torch.torch_call_dispatcher("aten::linear", "", stack, kTorchVersion), "run aten::linear");
    return;
  }
  return_tensor(stack, [&] { return compute(x, weight, bias, tokens); }, release);
}

}  // namespace cats
