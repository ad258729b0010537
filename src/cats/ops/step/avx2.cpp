// The step with AVX2 and FMA.
#include "cpu/avx2.h"
#include "step/step_kernel.h"

namespace cats {
namespace {

struct Avx2Set {
  using Base = Avx2;
  template <class T>
  using Dense = WideningLanes<Avx2, T>;
  static constexpr bool kHasIntegers = false;
};

}  // namespace
}  // namespace cats

void cats::step_avx2(Plan& plan) { take_part<Avx2Set>(plan); }
