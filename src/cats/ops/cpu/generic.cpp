// Plain C++ for every processor: fixed-length loops, which the compiler turns into vector instructions (SSE2, NEON, ...).
#include "kernel.h"

namespace cats {
namespace {

struct Generic {
  static constexpr int64_t kWidth = 8;
  static constexpr int kAccumulators = 4;
  struct Vector {
    float lanes[kWidth];
  };

  template <class Function>
  static Vector each(const Function& lane) {
    Vector v;
    for (int i = 0; i < kWidth; ++i) v.lanes[i] = lane(i);
    return v;
  }
  static Vector load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, const Vector& v) {
    for (int i = 0; i < kWidth; ++i) p[i] = v.lanes[i];
  }
  static Vector broadcast(float value) {
    return each([&](int) { return value; });
  }
  static Vector add(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.lanes[i] + b.lanes[i]; });
  }
  static Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
    return each([&](int i) { return a.lanes[i] * b.lanes[i] + c.lanes[i]; });
  }
  static float sum(const Vector& v) {
    float total = 0.0f;
    for (float lane : v.lanes) total += lane;
    return total;
  }
  template <class Weight>
  static Vector widen(const Weight* p) {
    return each([&](int i) { return to_float(p[i]); });
  }
};

}  // namespace
}  // namespace cats

void cats::gated_mlp_generic(const Call& call, const Threads& threads) {
  run_dtype<WideningLanes<Generic, float>, WideningLanes<Generic, BFloat16>>(call, threads);
}
