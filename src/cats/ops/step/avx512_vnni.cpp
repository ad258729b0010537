// The step with AVX-512 and its dot products of bytes.
#include "cpu/avx512.h"
#include "step/step_kernel.h"
#include "step/vnni.h"

namespace cats {
namespace {

struct Avx512VnniSet {
  using Base = Avx512;
  using Bytes = VnniBytes;
  template <class T>
  using Dense = WideningLanes<Avx512, T>;
  static constexpr bool kHasIntegers = true;
};

}  // namespace
}  // namespace cats

void cats::step_avx512_vnni(Plan& plan) { take_part<Avx512VnniSet>(plan); }
