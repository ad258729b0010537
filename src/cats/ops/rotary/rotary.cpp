// cats::rotary for CPU tensors: a rotary embedding as transformers computes it, in one operator instead of seven, with the
// same roundings.
#include <cstring>

#include "cpu/operators.h"
#include "cpu/rows.h"

namespace cats {
namespace {

enum Argument { kX, kCos, kSin };

// x [B, H, T, D]; the angles are [B or 1, 1, T, D]
struct Shape {
  int64_t B, H, T, D, angle_rows;
};

// out = x * cos + concat(-second half of x, first half of x) * sin, rounded after each step
template <class T>
void rotate(const Shape& shape, const T* x, const T* cos, const T* sin, T* out) {
  const int64_t D = shape.D, half = D / 2;
  for (int64_t row = 0; row < shape.B * shape.H * shape.T; ++row) {
    const int64_t b = row / (shape.H * shape.T), t = row % shape.T;
    const int64_t angle = (b * shape.T + t) % shape.angle_rows * D;
    const auto put = [&](int64_t i, float other) {
      T straight, turned;
      round_to(to_float(x[row * D + i]) * to_float(cos[angle + i]), straight);
      round_to(other * to_float(sin[angle + i]), turned);
      round_to(to_float(straight) + to_float(turned), out[row * D + i]);
    };
    for (int64_t i = 0; i < half; ++i) put(i, -to_float(x[row * D + i + half]));
    for (int64_t i = half; i < D; ++i) put(i, to_float(x[row * D + i - half]));
  }
}

bool are_angles(AtenTensorHandle tensor, AtenTensorHandle x) {
  if (dtype_of(tensor) != dtype_of(x) || dim_of(tensor) != 4 || !is_contiguous(tensor)) return false;
  const int64_t *sizes = sizes_of(tensor), *of_x = sizes_of(x);
  return (sizes[0] == 1 || sizes[0] == of_x[0]) && sizes[1] == 1 && sizes[2] == of_x[2] && sizes[3] == of_x[3];
}

AtenTensorHandle compute(AtenTensorHandle x, AtenTensorHandle cos, AtenTensorHandle sin) {
  const int32_t dtype = dtype_of(x);
  const bool bfloat16 = dtype == torch.aoti_torch_dtype_bfloat16();
  if ((!bfloat16 && dtype != torch.aoti_torch_dtype_float32()) || dim_of(x) != 4 || sizes_of(x)[3] % 2 ||
      !is_contiguous(x) || !are_angles(cos, x) || !are_angles(sin, x) || sizes_of(cos)[0] != sizes_of(sin)[0])
    throw std::runtime_error(
        "cats::rotary: expected contiguous x [B, heads, T, even] and angles [B, 1, T, even], all float32 or bfloat16");
  const int64_t* sizes = sizes_of(x);
  const AtenTensorHandle out = empty(4, sizes, strides_of(x), dtype);
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes_of(cos)[0] * sizes[2]};
  const auto run = [&](auto type) {
    using T = decltype(type);
    rotate(shape, static_cast<const T*>(data_of(x)), static_cast<const T*>(data_of(cos)),
           static_cast<const T*>(data_of(sin)), static_cast<T*>(data_of(out)));
  };
  if (bfloat16)
    run(BFloat16{});
  else
    run(float{});
  return out;
}

}  // namespace

void rotary(StableIValue* stack, uint64_t, uint64_t) {
  const auto release = [stack] {
    for (Argument i : {kX, kCos, kSin}) release_tensor(stack[i]);
  };
  AtenTensorHandle out;
  try {
    out = compute(tensor_of(stack[kX]), tensor_of(stack[kCos]), tensor_of(stack[kSin]));
  } catch (...) {
    release();
    throw;
  }
  release();
  stack[0] = reinterpret_cast<StableIValue>(out);
}

}  // namespace cats
