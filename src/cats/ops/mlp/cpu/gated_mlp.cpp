// cats::gated_mlp for CPU tensors: takes the arguments from torch's dispatcher, checks them and calls the kernel of the
// best instruction set. What it does not take (another dtype, a larger batch, a backend by name) goes to the same operator in
// Python, cats::_gated_mlp.
#include <stdexcept>
#include <string>

#include "cpu/operators.h"

namespace cats {
namespace {

enum Argument {
  kX, kGate, kUp, kDown, kThresholds, kActivation, kRouter, kGateBias, kUpBias, kDownBias, kProductThresholds,
  kInputThresholds, kBackend,
  kArguments
};

// The arguments as the dispatcher gives them. `release` frees them: the kernel owns what is on the stack.
struct Arguments {
  StableIValue* stack;

  AtenTensorHandle tensor(Argument i) const { return tensor_of(stack[i]); }
  AtenTensorHandle optional(Argument i) const { return optional_tensor_of(stack[i]); }
  std::string string(Argument i) const {
    const char* text;
    check(torch.torch_string_c_str(reinterpret_cast<StringHandle>(stack[i]), &text), "read a string");
    return text;
  }
  void release() {
    for (Argument i : {kX, kGate, kUp, kDown, kThresholds}) release_tensor(stack[i]);
    for (Argument i : {kGateBias, kUpBias, kDownBias, kProductThresholds, kInputThresholds})
      release_optional_tensor(stack[i]);
    for (Argument i : {kActivation, kRouter, kBackend})
      torch.torch_delete_string(reinterpret_cast<StringHandle>(stack[i]));
  }
};

// The data of a tensor of this dtype, with `dim` sizes and strides; the stride of a dimension of size 1 does not matter.
const void* data_with_layout(AtenTensorHandle tensor, const char* name, int32_t dtype, int64_t dim,
                             const int64_t* sizes, const int64_t* strides) {
  bool fits = dtype_of(tensor) == dtype && dim_of(tensor) == dim;
  if (fits) {
    const int64_t* actual = strides_of(tensor);
    for (int64_t i = 0; i < dim; ++i)
      fits &= sizes_of(tensor)[i] == sizes[i] && (sizes[i] == 1 || actual[i] == strides[i]);
  }
  if (!fits) throw std::runtime_error(std::string("cats::gated_mlp: shape, dtype or layout of ") + name);
  return data_of(tensor);
}

Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  throw std::runtime_error("cats::gated_mlp: unknown activation " + name);
}

bool gate_routes(const std::string& router) {
  if (router != "gate" && router != "up") throw std::runtime_error("cats::gated_mlp: unknown router " + router);
  return router == "gate";
}

// Mirrors refuses() in __init__.py.
bool is_taken(const Arguments& arguments, const std::string& backend) {
  if (backend == "cpu") return true;
  if (backend != "auto") return false;
  const AtenTensorHandle x = arguments.tensor(kX), gate = arguments.tensor(kGate);
  const int32_t dtype = dtype_of(x);
  if (dtype != torch.aoti_torch_dtype_float32() && dtype != torch.aoti_torch_dtype_bfloat16()) return false;
  if (dim_of(x) != 2 || dim_of(gate) != 2) return false;
  const int64_t batch = sizes_of(x)[0];
  return batch >= 1 && batch <= kMaxBatch && sizes_of(gate)[0] > 0 && sizes_of(gate)[1] > 0;
}

GatedMlpCall checked(const Arguments& arguments) {
  const AtenTensorHandle x = arguments.tensor(kX), gate = arguments.tensor(kGate);
  const int32_t dtype = dtype_of(x), float32 = torch.aoti_torch_dtype_float32();
  const bool bfloat16 = dtype == torch.aoti_torch_dtype_bfloat16();
  if (!bfloat16 && dtype != float32) throw std::runtime_error("cats::gated_mlp: expected float32 or bfloat16");
  if (dim_of(x) != 2 || dim_of(gate) != 2) throw std::runtime_error("cats::gated_mlp: expected x and gate of 2 dimensions");
  const int64_t B = sizes_of(x)[0], F = sizes_of(gate)[0], D = sizes_of(gate)[1];
  if (B < 1 || B > kMaxBatch || F < 1 || D < 1) throw std::runtime_error("cats::gated_mlp: expected a batch of 1 to 8");

  const auto matrix = [&](Argument i, const char* name, int64_t rows, int64_t columns, int64_t down, int64_t right) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {down, right};
    return data_with_layout(arguments.tensor(i), name, dtype, 2, sizes, strides);
  };
  const auto vector = [&](AtenTensorHandle tensor, const char* name, int32_t type, int64_t size) {
    const int64_t stride = 1;
    return tensor ? data_with_layout(tensor, name, type, 1, &size, &stride) : nullptr;
  };
  GatedMlpCall call;
  call.B = B;
  call.D = D;
  call.F = F;
  call.bfloat16 = bfloat16;
  call.x = matrix(kX, "x", B, D, D, 1);
  call.gate_is_router = gate_routes(arguments.string(kRouter));
  call.input_thresholds =
      static_cast<const float*>(vector(arguments.optional(kInputThresholds), "input_thresholds", float32, D));
  const bool drops_inputs = call.input_thresholds != nullptr;
  // columns of the router are contiguous where it skips some of them
  const bool gate_columns = drops_inputs && call.gate_is_router, up_columns = drops_inputs && !call.gate_is_router;
  call.gate = matrix(kGate, "gate", F, D, gate_columns ? 1 : D, gate_columns ? F : 1);
  call.up = matrix(kUp, "up", F, D, up_columns ? 1 : D, up_columns ? F : 1);
  call.down = matrix(kDown, "down", D, F, 1, D);
  call.thresholds = static_cast<const float*>(vector(arguments.tensor(kThresholds), "thresholds", float32, F));
  call.product_thresholds =
      static_cast<const float*>(vector(arguments.optional(kProductThresholds), "product_thresholds", float32, F));
  call.gate_bias = vector(arguments.optional(kGateBias), "gate_bias", dtype, F);
  call.up_bias = vector(arguments.optional(kUpBias), "up_bias", dtype, F);
  call.down_bias = vector(arguments.optional(kDownBias), "down_bias", dtype, D);
  call.activation = activation_named(arguments.string(kActivation));
  call.out = nullptr;
  return call;
}

AtenTensorHandle compute(const Arguments& arguments) {
  GatedMlpCall call = checked(arguments);
  const int64_t sizes[2] = {call.B, call.D}, strides[2] = {call.D, 1};
  const AtenTensorHandle out = empty(2, sizes, strides, dtype_of(arguments.tensor(kX)));
  call.out = data_of(out);
  instruction_set().gated_mlp(call, threads_of_torch());
  return out;
}

}  // namespace

void gated_mlp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments{stack};
  if (!is_taken(arguments, arguments.string(kBackend))) {
    check(torch.torch_call_dispatcher("cats::_gated_mlp", "", stack, kTorchVersion), "run cats::_gated_mlp");
    return;
  }
  return_tensor(stack, [&] { return compute(arguments); }, [&](const StableIValue*) { arguments.release(); });
}

}  // namespace cats
