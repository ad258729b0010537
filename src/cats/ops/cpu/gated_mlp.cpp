// cats::gated_mlp for CPU tensors: takes the arguments from torch's dispatcher, checks them and calls the kernel of the
// best instruction set. What it does not take (another dtype, a larger batch, a backend by name) goes to the same operator in
// Python, cats::_gated_mlp.
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

#include "gated_mlp.h"
#include "torch_abi.h"

#if defined(_WIN32)
#define CATS_EXPORT extern "C" __declspec(dllexport)
#else
#define CATS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace cats {
namespace {

// --- torch's functions, by name

struct Torch {
#define CATS_MEMBER(result, name, parameters) result(*name) parameters;
  CATS_TORCH_FUNCTIONS(CATS_MEMBER)
#undef CATS_MEMBER
} torch;

void* symbol(void* library, const char* name) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

// torch is loaded already, so this finds that copy
void* open_library(const char* path) {
#if defined(_WIN32)
  return LoadLibraryA(path);
#else
  return dlopen(path, RTLD_LAZY | RTLD_LOCAL);
#endif
}

// The name of the first function that this torch lacks, or null.
const char* find_torch_functions(void* library) {
#define CATS_FIND(result, name, parameters)                                             \
  torch.name = reinterpret_cast<decltype(torch.name)>(symbol(library, #name)); \
  if (!torch.name) return #name;
  CATS_TORCH_FUNCTIONS(CATS_FIND)
#undef CATS_FIND
  return nullptr;
}

void check(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(std::string("cats::gated_mlp: torch failed to ") + what);
}

// --- instruction sets, the best first; setup.py defines CATS_X86 where it compiles those of x86

#if defined(CATS_X86)
#if defined(_MSC_VER)
// Whether the processor and the operating system have all bits of `mask` in a register of CPUID leaf 7.
bool has_leaf_7(int subleaf, int reg, int mask, unsigned long long state) {
  int info[4];
  __cpuid(info, 1);
  const bool xsave = info[2] & (1 << 27), fma = info[2] & (1 << 12);
  if (!xsave || !fma || (_xgetbv(0) & state) != state) return false;
  __cpuidex(info, 7, subleaf);
  return (info[reg] & mask) == mask;
}
bool has_avx2() { return has_leaf_7(0, 1, 1 << 5, 0x6); }
bool has_avx512() { return has_leaf_7(0, 1, 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31, 0xe6); }
bool has_avx512_bf16() { return has_avx512() && has_leaf_7(1, 0, 1 << 5, 0xe6); }
#else
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif
bool always() { return true; }

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
  Kernel kernel;
};

constexpr InstructionSet kInstructionSets[] = {
#if defined(CATS_X86)
    {"avx512_bf16", has_avx512_bf16, gated_mlp_avx512_bf16},
    {"avx512", has_avx512, gated_mlp_avx512},
    {"avx2", has_avx2, gated_mlp_avx2},
#endif
    {"generic", always, gated_mlp_generic},
};

std::atomic<const InstructionSet*> selected{nullptr};

// --- the operator

enum Argument {
  kX, kGate, kUp, kDown, kThresholds, kActivation, kRouter, kGateBias, kUpBias, kDownBias, kProductThresholds, kBackend,
  kArguments
};

// The arguments as the dispatcher gives them. `release` frees them: the kernel owns what is on the stack.
struct Arguments {
  StableIValue* stack;

  AtenTensorHandle tensor(Argument i) const { return reinterpret_cast<AtenTensorHandle>(stack[i]); }
  AtenTensorHandle optional(Argument i) const {
    const auto* value = reinterpret_cast<const StableIValue*>(stack[i]);
    return value ? reinterpret_cast<AtenTensorHandle>(*value) : nullptr;
  }
  std::string string(Argument i) const {
    const char* text;
    check(torch.torch_string_c_str(reinterpret_cast<StringHandle>(stack[i]), &text), "read a string");
    return text;
  }
  void release() {
    for (Argument i : {kX, kGate, kUp, kDown, kThresholds}) torch.aoti_torch_delete_tensor_object(tensor(i));
    for (Argument i : {kGateBias, kUpBias, kDownBias, kProductThresholds})
      if (optional(i)) {
        torch.aoti_torch_delete_tensor_object(optional(i));
        delete reinterpret_cast<StableIValue*>(stack[i]);
      }
    for (Argument i : {kActivation, kRouter, kBackend})
      torch.torch_delete_string(reinterpret_cast<StringHandle>(stack[i]));
  }
};

int32_t dtype_of(AtenTensorHandle tensor) {
  int32_t dtype;
  check(torch.aoti_torch_get_dtype(tensor, &dtype), "get a dtype");
  return dtype;
}

int64_t dim_of(AtenTensorHandle tensor) {
  int64_t dim;
  check(torch.aoti_torch_get_dim(tensor, &dim), "get a dimension");
  return dim;
}

const int64_t* sizes_of(AtenTensorHandle tensor) {
  int64_t* sizes;
  check(torch.aoti_torch_get_sizes(tensor, &sizes), "get sizes");
  return sizes;
}

void* data_of(AtenTensorHandle tensor) {
  void* data;
  check(torch.aoti_torch_get_data_ptr(tensor, &data), "get data");
  return data;
}

// The data of a tensor of this dtype, with `dim` sizes and strides; the stride of a dimension of size 1 does not matter.
const void* data_with_layout(AtenTensorHandle tensor, const char* name, int32_t dtype, int64_t dim,
                             const int64_t* sizes, const int64_t* strides) {
  bool fits = dtype_of(tensor) == dtype && dim_of(tensor) == dim;
  if (fits) {
    int64_t* actual;
    check(torch.aoti_torch_get_strides(tensor, &actual), "get strides");
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

Call checked(const Arguments& arguments) {
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
  Call call;
  call.B = B;
  call.D = D;
  call.F = F;
  call.bfloat16 = bfloat16;
  call.x = matrix(kX, "x", B, D, D, 1);
  call.gate = matrix(kGate, "gate", F, D, D, 1);
  call.up = matrix(kUp, "up", F, D, D, 1);
  call.down = matrix(kDown, "down", D, F, 1, D);
  call.thresholds = static_cast<const float*>(vector(arguments.tensor(kThresholds), "thresholds", float32, F));
  call.product_thresholds =
      static_cast<const float*>(vector(arguments.optional(kProductThresholds), "product_thresholds", float32, F));
  call.gate_bias = vector(arguments.optional(kGateBias), "gate_bias", dtype, F);
  call.up_bias = vector(arguments.optional(kUpBias), "up_bias", dtype, F);
  call.down_bias = vector(arguments.optional(kDownBias), "down_bias", dtype, D);
  call.activation = activation_named(arguments.string(kActivation));
  call.gate_is_router = gate_routes(arguments.string(kRouter));
  call.out = nullptr;
  return call;
}

void run_in_threads(int64_t count, Threads::Body body, void* context) {
  check(torch.torch_parallel_for(0, count, 1, body, context), "run threads");
}

AtenTensorHandle compute(const Arguments& arguments) {
  Call call = checked(arguments);
  const int64_t sizes[2] = {call.B, call.D}, strides[2] = {call.D, 1};
  AtenTensorHandle out;
  check(torch.aoti_torch_empty_strided(2, sizes, strides, dtype_of(arguments.tensor(kX)),
                                       torch.aoti_torch_device_type_cpu(), 0, &out),
        "allocate the output");
  call.out = data_of(out);
  uint32_t threads;
  check(torch.torch_get_num_threads(&threads), "count threads");
  selected.load()->kernel(call, Threads{threads, run_in_threads});
  return out;
}

void gated_mlp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments{stack};
  if (!is_taken(arguments, arguments.string(kBackend))) {
    check(torch.torch_call_dispatcher("cats::_gated_mlp", "", stack, kTorchVersion), "run cats::_gated_mlp");
    return;
  }
  AtenTensorHandle out;
  try {
    out = compute(arguments);
  } catch (...) {
    arguments.release();
    throw;
  }
  arguments.release();
  stack[0] = reinterpret_cast<StableIValue>(out);
}

}  // namespace
}  // namespace cats

// --- what __init__.py calls

// Makes the kernel the CPU implementation of cats::gated_mlp. Returns null, or why it cannot.
CATS_EXPORT const char* cats_register(const char* torch_library) {
  static std::string error;
  void* library = cats::open_library(torch_library);
  if (!library) return (error = std::string("cannot open ") + torch_library).c_str();
  if (const char* name = cats::find_torch_functions(library))
    return (error = std::string("torch lacks ") + name + ": it is older than 2.10").c_str();
  for (const auto& set : cats::kInstructionSets)
    if (!cats::selected.load() && set.is_supported()) cats::selected = &set;
  // lives as long as the process, like the registration
  static TorchLibraryHandle handle;
  if (cats::torch.aoti_torch_library_init_impl("cats", "CPU", __FILE__, __LINE__, &handle) ||
      cats::torch.torch_library_impl(handle, "gated_mlp", cats::gated_mlp, kTorchVersion))
    return "torch refuses the registration of cats::gated_mlp";
  return nullptr;
}

// The name of the i-th instruction set that this processor has, the best first, or null.
CATS_EXPORT const char* cats_instruction_set(int i) {
  for (const auto& set : cats::kInstructionSets)
    if (set.is_supported() && i-- == 0) return set.name;
  return nullptr;
}

// The instruction set in use.
CATS_EXPORT const char* cats_selected() { return cats::selected.load()->name; }

// Uses an instruction set by name; 0 where this processor does not have it.
CATS_EXPORT int cats_select(const char* name) {
  for (const auto& set : cats::kInstructionSets)
    if (!std::strcmp(set.name, name) && set.is_supported()) {
      cats::selected = &set;
      return 1;
    }
  return 0;
}
