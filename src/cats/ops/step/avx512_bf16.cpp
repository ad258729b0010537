// The step with AVX-512 and its dot products of bytes and of bfloat16.
#include "cpu/avx512_bf16.h"
#include "step/step_kernel.h"
#include "step/vnni.h"

namespace cats {
namespace {

// The lanes of a type: bfloat16 has instructions of its own.
template <class T>
struct DotLanes {
  using Lanes = WideningLanes<Avx512, T>;
};
template <>
struct DotLanes<BFloat16> {
  using Lanes = BFloat16DotLanes;
};

struct Avx512BFloat16Set {
  using Base = Avx512;
  using Bytes = VnniBytes;
  template <class T>
  using Dense = typename DotLanes<T>::Lanes;
  static constexpr bool kHasIntegers = true;
};

}  // namespace
}  // namespace cats

void cats::step_avx512_bf16(Plan& plan) { take_part<Avx512BFloat16Set>(plan); }
