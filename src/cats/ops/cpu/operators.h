// What the operators of this backend (gated_mlp.cpp and so on) and their registration (library.cpp) share: torch's
// functions, found by name, and helpers that call them.
#pragma once

#include <stdexcept>
#include <string>

#include "mlp/cpu/gated_mlp.h"
#include "linear/linear.h"
#include "packed_linear/packed_linear.h"
#include "packed_mlp/packed_mlp.h"
#include "step/plan.h"
#include "cpu/threads.h"
#include "cpu/torch_abi.h"

namespace cats {

struct Torch {
#define CATS_MEMBER(result, name, parameters) result(*name) parameters;
  CATS_TORCH_FUNCTIONS(CATS_MEMBER)
#undef CATS_MEMBER
};

extern Torch torch;

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
  GatedMlpKernel gated_mlp;
  LinearKernel linear;
  PackedLinearKernel packed_linear;
  PackedMlpKernel packed_mlp;
  Plan::Work step;
};

// The instruction set in use.
const InstructionSet& instruction_set();

// The operators as torch's dispatcher calls them.
void gated_mlp(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void linear(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void packed_linear(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void packed_gated_mlp(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void dequantise_rows(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void dequantise_columns(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void rms_norm(StableIValue* stack, uint64_t inputs, uint64_t outputs);
void rotary(StableIValue* stack, uint64_t inputs, uint64_t outputs);

inline void check(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(std::string("cats: torch failed to ") + what);
}

inline AtenTensorHandle tensor_of(StableIValue value) { return reinterpret_cast<AtenTensorHandle>(value); }

// null where there is none
inline AtenTensorHandle optional_tensor_of(StableIValue value) {
  const auto* inner = reinterpret_cast<const StableIValue*>(value);
  return inner ? tensor_of(*inner) : nullptr;
}

// A kernel owns what is on the stack.
inline void release_tensor(StableIValue value) { torch.aoti_torch_delete_tensor_object(tensor_of(value)); }

inline void release_optional_tensor(StableIValue value) {
  if (!value) return;
  torch.aoti_torch_delete_tensor_object(optional_tensor_of(value));
  delete reinterpret_cast<StableIValue*>(value);
}

// The end of a boxed kernel: what it computes takes the place of its arguments, which are released also if it throws.
template <typename Compute, typename Release>
void return_tensor(StableIValue* stack, Compute compute, Release release) {
  AtenTensorHandle out;
  try {
    out = compute();
  } catch (...) {
    release(stack);
    throw;
  }
  release(stack);
  stack[0] = reinterpret_cast<StableIValue>(out);
}

inline int32_t dtype_of(AtenTensorHandle tensor) {
  int32_t dtype;
  check(torch.aoti_torch_get_dtype(tensor, &dtype), "get a dtype");
  return dtype;
}

inline int64_t dim_of(AtenTensorHandle tensor) {
  int64_t dim;
  check(torch.aoti_torch_get_dim(tensor, &dim), "get a dimension");
  return dim;
}

inline const int64_t* sizes_of(AtenTensorHandle tensor) {
  int64_t* sizes;
  check(torch.aoti_torch_get_sizes(tensor, &sizes), "get sizes");
  return sizes;
}

inline void* data_of(AtenTensorHandle tensor) {
  void* data;
  check(torch.aoti_torch_get_data_ptr(tensor, &data), "get data");
  return data;
}

inline const int64_t* strides_of(AtenTensorHandle tensor) {
  int64_t* strides;
  check(torch.aoti_torch_get_strides(tensor, &strides), "get strides");
  return strides;
}

inline bool is_contiguous(AtenTensorHandle tensor) {
  const int64_t *sizes = sizes_of(tensor), *strides = strides_of(tensor);
  int64_t expected = 1;
  for (int64_t i = dim_of(tensor) - 1; i >= 0; --i) {
    // the stride of a dimension of size 1 does not matter
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

inline AtenTensorHandle empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle out;
  check(torch.aoti_torch_empty_strided(dim, sizes, strides, dtype, torch.aoti_torch_device_type_cpu(), 0, &out),
        "allocate the output");
  return out;
}

inline void run_in_torch(int64_t count, Threads::Body body, void* context) {
  check(torch.torch_parallel_for(0, count, 1, body, context), "run threads");
}

inline void run_in_threads(int64_t count, Threads::Body body, void* context) {
  // one per process, like the threads
  static Helpers helpers;
  helpers.run(count, body, context, run_in_torch);
}

inline Threads threads_of_torch() {
  uint32_t count;
  check(torch.torch_get_num_threads(&count), "count threads");
  return Threads{count, run_in_threads};
}

}  // namespace cats
