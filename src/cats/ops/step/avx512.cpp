// The step with AVX-512.
#include "cpu/avx512.h"
#include "step/step_kernel.h"

namespace cats {
namespace {

struct Avx512Set {
  using Base = Avx512;
  template <class T>
  using Dense = WideningLanes<Avx512, T>;
  static constexpr bool kHasIntegers = false;
};

}  // namespace
}  // namespace cats

void cats::step_avx512(Plan& plan) { take_part<Avx512Set>(plan); }
