// cats::rms_norm for CPU tensors: what transformers' modules do in six to eight operators, with the same roundings. It takes
// little time whatever the instruction set; what it saves are the operators.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/operators.h"
#include "cpu/rows.h"

namespace cats {
namespace {

enum Argument { kX, kWeight, kEps };

// partial sums, so that the compiler vectorises them
float mean_of_squares(const float* x, int64_t D) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  for (; i < D; ++i) sums[0] += x[i] * x[i];
  float total = 0;
  for (const float sum : sums) total += sum;
  return total / static_cast<float>(D);
}

// out = weight * round(x / sqrt(mean(x * x) + eps)), for rows of length D
template <class T>
void normalize(const T* x, const T* weight, float eps, int64_t rows, int64_t D, T* out) {
  static thread_local std::vector<float> memory;
  float* wide = at_least(memory, D);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < D; ++i) wide[i] = to_float(x[r * D + i]);
    const float scale = 1.0f / std::sqrt(mean_of_squares(wide, D) + eps);
    for (int64_t i = 0; i < D; ++i) {
      T scaled;
      round_to(wide[i] * scale, scaled);
      round_to(to_float(weight[i]) * to_float(scaled), out[r * D + i]);
    }
  }
}

AtenTensorHandle compute(AtenTensorHandle x, AtenTensorHandle weight, double eps) {
  const int32_t dtype = dtype_of(x);
  const bool bfloat16 = dtype == torch.aoti_torch_dtype_bfloat16();
  const int64_t dim = dim_of(x);
  if ((!bfloat16 && dtype != torch.aoti_torch_dtype_float32()) || dtype_of(weight) != dtype || dim < 1 ||
      dim_of(weight) != 1 || sizes_of(x)[dim - 1] != sizes_of(weight)[0] || !is_contiguous(x) || !is_contiguous(weight))
    throw std::runtime_error("cats::rms_norm: expected contiguous x [..., D] and weight [D], both float32 or bfloat16");
  const int64_t D = sizes_of(weight)[0];
  const AtenTensorHandle out = empty(dim, sizes_of(x), strides_of(x), dtype);
  int64_t rows = 1;
  for (int64_t i = 0; i < dim - 1; ++i) rows *= sizes_of(x)[i];
  const auto run = [&](auto type) {
    using T = decltype(type);
    normalize(static_cast<const T*>(data_of(x)), static_cast<const T*>(data_of(weight)), static_cast<float>(eps), rows, D,
              static_cast<T*>(data_of(out)));
  };
  if (bfloat16)
    run(BFloat16{});
  else
    run(float{});
  return out;
}

void release(StableIValue* stack) {
  release_tensor(stack[kX]);
  release_tensor(stack[kWeight]);
}

}  // namespace

void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  double eps;
  std::memcpy(&eps, &stack[kEps], sizeof eps);
  return_tensor(stack, [&] { return compute(tensor_of(stack[kX]), tensor_of(stack[kWeight]), eps); }, release);
}

}  // namespace cats
