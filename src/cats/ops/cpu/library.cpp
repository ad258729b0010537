// The library: finds torch's functions, chooses an instruction set, and registers the operators.
#include <atomic>
#include <cstring>
#include <string>
#include <utility>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

#include "cpu/operators.h"

#if defined(_WIN32)
#define CATS_EXPORT extern "C" __declspec(dllexport)
#else
#define CATS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace cats {

Torch torch;

namespace {

// --- torch's functions, by name

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
bool has_avx512_vnni() { return has_avx512() && has_leaf_7(0, 2, 1 << 11, 0xe6); }
bool has_avx512_bf16() { return has_avx512_vnni() && has_leaf_7(1, 0, 1 << 5, 0xe6); }
#else
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif
bool always() { return true; }

constexpr InstructionSet kInstructionSets[] = {
#if defined(CATS_X86)
    {"avx512_bf16", has_avx512_bf16, gated_mlp_avx512_bf16, linear_avx512_bf16, packed_linear_avx512, packed_mlp_avx512,
     step_avx512_bf16},
    {"avx512_vnni", has_avx512_vnni, gated_mlp_avx512, linear_avx512, packed_linear_avx512, packed_mlp_avx512, step_avx512_vnni},
    {"avx512", has_avx512, gated_mlp_avx512, linear_avx512, packed_linear_avx512, packed_mlp_avx512, step_avx512},
    {"avx2", has_avx2, gated_mlp_avx2, linear_avx2, packed_linear_avx2, packed_mlp_avx2, step_avx2},
#endif
    {"generic", always, gated_mlp_generic, linear_generic, packed_linear_generic, packed_mlp_generic, step_generic},
};

std::atomic<const InstructionSet*> selected{nullptr};

}  // namespace

const InstructionSet& instruction_set() { return *selected.load(); }

}  // namespace cats

// --- what __init__.py calls

// Makes the kernels the CPU implementations of their operators. Returns null, or why it cannot.
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
  if (cats::torch.aoti_torch_library_init_impl("cats", "CPU", __FILE__, __LINE__, &handle))
    return "torch refuses the registration of kernels";
  const std::pair<const char*, BoxedKernel> operators[] = {
      {"gated_mlp", cats::gated_mlp},
      {"linear", cats::linear},
      {"_packed_linear_cpu", cats::packed_linear},
      {"_packed_gated_mlp_cpu", cats::packed_gated_mlp},
      {"_dequantise_rows_cpu", cats::dequantise_rows},
      {"_dequantise_columns_cpu", cats::dequantise_columns},
      {"rms_norm", cats::rms_norm},
      {"rotary", cats::rotary},
  };
  for (const auto& [name, kernel] : operators)
    if (cats::torch.torch_library_impl(handle, name, kernel, kTorchVersion))
      return (error = std::string("torch refuses the registration of cats::") + name).c_str();
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
