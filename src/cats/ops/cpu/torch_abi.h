// The part of torch's stable C interface that the operators use: that of torch 2.10, unchanged since. It is restated, so that
// building does not need torch (an isolated build would download it). The functions are looked up by name in the torch that
// is loaded, so that one binary serves all later versions. A test compiles this file beside torch's own headers.
//
// Source: torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h of PyTorch (BSD-3-Clause).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct AtenTensorOpaque;
struct StringOpaque;
struct TorchLibraryOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using StringHandle = StringOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;

using AOTITorchError = int32_t;  // 0 is success
using StableIValue = uint64_t;   // a tensor or string is its handle, an optional a pointer to a value or null
using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);
using BoxedKernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// X(return type, name, parameters)
#define CATS_TORCH_FUNCTIONS(X)                                                                                         \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                                            \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                                             \
  X(int32_t, aoti_torch_dtype_float16, ())                                                                              \
  X(int32_t, aoti_torch_dtype_float32, ())                                                                              \
  X(int32_t, aoti_torch_dtype_uint8, ())                                                                                \
  X(AOTITorchError, aoti_torch_get_dtype, (AtenTensorHandle, int32_t*))                                                 \
  X(AOTITorchError, aoti_torch_get_dim, (AtenTensorHandle, int64_t*))                                                   \
  X(AOTITorchError, aoti_torch_get_sizes, (AtenTensorHandle, int64_t**))                                                \
  X(AOTITorchError, aoti_torch_get_strides, (AtenTensorHandle, int64_t**))                                              \
  X(AOTITorchError, aoti_torch_get_data_ptr, (AtenTensorHandle, void**))                                                \
  X(AOTITorchError, aoti_torch_empty_strided,                                                                           \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorHandle*))                            \
  X(AOTITorchError, aoti_torch_delete_tensor_object, (AtenTensorHandle))                                                \
  X(AOTITorchError, aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, TorchLibraryHandle*)) \
  X(AOTITorchError, torch_library_impl, (TorchLibraryHandle, const char*, BoxedKernel, uint64_t))                       \
  X(AOTITorchError, torch_call_dispatcher, (const char*, const char*, StableIValue*, uint64_t))                         \
  X(AOTITorchError, torch_string_c_str, (StringHandle, const char**))                                                   \
  X(AOTITorchError, torch_delete_string, (StringHandle))                                                                \
  X(AOTITorchError, torch_get_num_threads, (uint32_t*))                                                                 \
  X(AOTITorchError, torch_parallel_for, (int64_t, int64_t, int64_t, ParallelFunc, void*))

#define CATS_DECLARE(result, name, parameters) result name parameters;
CATS_TORCH_FUNCTIONS(CATS_DECLARE)
#undef CATS_DECLARE

}  // extern "C"

// What torch 2.10 calls TORCH_ABI_VERSION.
constexpr uint64_t kTorchVersion = (2ull << 56) | (10ull << 48);
