// The step in plain C++.
#include "cpu/generic.h"
#include "step/step_kernel.h"

namespace cats {
namespace {

struct GenericSet {
  using Base = Generic;
  template <class T>
  using Dense = WideningLanes<Generic, T>;
  static constexpr bool kHasIntegers = false;
};

}  // namespace
}  // namespace cats

void cats::step_generic(Plan& plan) { take_part<GenericSet>(plan); }
