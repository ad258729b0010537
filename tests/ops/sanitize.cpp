// Runs each kernel of the CPU backend on exactly sized memory, against a plain loop, under sanitizers (sanitize.sh).
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/threads.h"
#include "linear/linear.h"
#include "mlp/cpu/gated_mlp.h"

using cats::Activation;
using cats::BFloat16;
using cats::GatedMlpCall;
using cats::LinearCall;
using cats::LinearPart;

namespace {

// so few that small matrices are shared
constexpr int64_t kBytesEach = 1024;

// the calling thread takes part, as in torch
void start_threads(int64_t count, cats::Threads::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < count; ++i) threads.emplace_back(body, i, i + 1, context);
  body(0, 1, context);
  for (auto& thread : threads) thread.join();
}

void run_in_threads(int64_t count, cats::Threads::Body body, void* context) {
  // starting a thread takes longer than this work: one for each call, or most calls would run alone
  cats::Helpers().run(count, body, context, start_threads);
}

// What `Helpers` decides, at made-up times; returns the number of wrong decisions.
int helpers_failures() {
  using std::chrono::microseconds;
  const cats::Helpers::Clock::time_point now{std::chrono::hours(1)};
  int wrong = 0;
  const auto expect = [&](bool right, const char* what) {
    if (!right) std::printf("helpers: wrong, %s\n", what);
    wrong += !right;
  };
  cats::Helpers helpers;
  expect(!helpers.are_paused(now), "they take part at first");
  helpers.note(2, microseconds(100), microseconds(90), now);
  expect(!helpers.are_paused(now), "a wait that is shorter than the work saved is no reason");
  helpers.note(2, microseconds(100), microseconds(500), now);
  expect(helpers.are_paused(now + microseconds(9999)), "late threads are left out for a while");
  expect(!helpers.are_paused(now + microseconds(10001)), "and are tried again");
  helpers.note(8, microseconds(100), microseconds(500), now + microseconds(20000));
  expect(!helpers.are_paused(now + microseconds(20001)), "eight threads save more than that wait");
  helpers.note(2, microseconds(100), std::chrono::seconds(60), now);
  expect(!helpers.are_paused(now + std::chrono::seconds(11)), "no pause is longer than ten seconds");
  // alone, one call of the body does all the work, in the calling thread
  cats::Helpers paused;
  paused.note(2, microseconds(0), std::chrono::seconds(60), cats::Helpers::Clock::now());
  int calls = 0;
  paused.run(2, [](int64_t, int64_t, void* calls) { ++*static_cast<int*>(calls); }, &calls, start_threads);
  expect(calls == 1, "a call alone is one call of the body");
  return wrong;
}

// Values in the type of the weights and, for the plain loop, as that type rounds them. No spare capacity: a read past the
// end is a read of someone else's memory.
struct Values {
  std::vector<float> exact;
  std::unique_ptr<BFloat16[]> narrow;

  Values(size_t size, float scale, std::mt19937& random) : exact(size), narrow(new BFloat16[size]) {
    std::normal_distribution<float> normal(0, scale);
    for (size_t i = 0; i < size; ++i) {
      const float value = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      bits &= 0xffff0000u;
      narrow[i].bits = static_cast<uint16_t>(bits >> 16);
      std::memcpy(&exact[i], &bits, sizeof bits);
    }
  }
  const void* data(bool bfloat16) const {
    return bfloat16 ? static_cast<const void*>(narrow.get()) : static_cast<const void*>(exact.data());
  }
};

// What a kernel writes, in either type.
struct Output {
  std::vector<float> wide;
  std::unique_ptr<BFloat16[]> narrow;

  explicit Output(size_t size) : wide(size), narrow(new BFloat16[size]) {}

  void* data(bool bfloat16) { return bfloat16 ? static_cast<void*>(narrow.get()) : static_cast<void*>(wide.data()); }

  // the difference from what is exact, relative to the tolerance
  double error_at(size_t i, double expected, bool bfloat16) const {
    float actual = wide[i];
    if (bfloat16) {
      const uint32_t bits = static_cast<uint32_t>(narrow[i].bits) << 16;
      std::memcpy(&actual, &bits, sizeof bits);
    }
    const double allowed = bfloat16 ? 1e-2 * std::fabs(expected) + 1e-4 : 1e-5 * std::fabs(expected) + 1e-5;
    return std::fabs(actual - expected) / allowed;
  }
};

double dot(const std::vector<float>& matrix, int64_t row, const std::vector<float>& x, int64_t token, int64_t D) {
  double total = 0;
  for (int64_t i = 0; i < D; ++i) total += double(matrix[row * D + i]) * x[token * D + i];
  return total;
}

// The largest difference between a kernel and a plain loop, relative to the tolerance.
double error_of(cats::GatedMlpKernel kernel, int64_t B, int64_t D, int64_t F, bool bfloat16, float threshold, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(B * 1000003 + D * 1009 + F));
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const Values x(B * D, 1, random), gate(F * D, scale, random), up(F * D, scale, random);
  const Values down(F * D, 1 / std::sqrt(static_cast<float>(F)), random), up_bias(F, 1, random), down_bias(D, 1, random);
  const std::vector<float> thresholds(F, threshold);
  Output out(B * D);

  GatedMlpCall call{};
  call.B = B;
  call.D = D;
  call.F = F;
  call.bfloat16 = bfloat16;
  call.x = x.data(bfloat16);
  call.gate = gate.data(bfloat16);
  call.up = up.data(bfloat16);
  call.down = down.data(bfloat16);
  call.thresholds = thresholds.data();
  call.up_bias = up_bias.data(bfloat16);
  call.down_bias = down_bias.data(bfloat16);
  call.activation = Activation::kSilu;
  call.gate_is_router = true;
  call.out = out.data(bfloat16);
  kernel(call, cats::Threads{threads, run_in_threads, kBytesEach});

  double worst = 0;
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> expected(down_bias.exact.begin(), down_bias.exact.end());
    for (int64_t j = 0; j < F; ++j) {
      const double g = dot(gate.exact, j, x.exact, b, D), a = g / (1 + std::exp(-g));
      if (std::fabs(a) < threshold) continue;
      const double h = a * (dot(up.exact, j, x.exact, b, D) + up_bias.exact[j]);
      for (int64_t i = 0; i < D; ++i) expected[i] += h * down.exact[j * D + i];
    }
    for (int64_t i = 0; i < D; ++i) {
      worst = std::max(worst, out.error_at(b * D + i, expected[i], bfloat16));
    }
  }
  return worst;
}

// The same for two linear layers in one call, of N and 1 outputs, the first with a bias.
double linear_error_of(cats::LinearKernel kernel, int64_t B, int64_t D, int64_t N, bool bfloat16, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(B * 1000003 + D * 1009 + N));
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const Values x(B * D, 1, random), weight(N * D, scale, random), other(D, scale, random), bias(N, 1, random);
  Output out(B * N), other_out(B);
  const LinearPart parts[] = {
      {N, weight.data(bfloat16), bias.data(bfloat16), out.data(bfloat16)},
      {1, other.data(bfloat16), nullptr, other_out.data(bfloat16)},
  };
  kernel(LinearCall{B, D, bfloat16, x.data(bfloat16), parts, 2}, cats::Threads{threads, run_in_threads, kBytesEach});

  double worst = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t j = 0; j < N; ++j) {
      const double expected = dot(weight.exact, j, x.exact, b, D) + bias.exact[j];
      worst = std::max(worst, out.error_at(b * N + j, expected, bfloat16));
    }
    worst = std::max(worst, other_out.error_at(b, dot(other.exact, 0, x.exact, b, D), bfloat16));
  }
  return worst;
}

}  // namespace

int main() {
  struct Set {
    const char* name;
    bool is_supported;
    cats::GatedMlpKernel gated_mlp;
    cats::LinearKernel linear;
  };
  const Set sets[] = {
      {"generic", true, cats::gated_mlp_generic, cats::linear_generic},
#if defined(__x86_64__)
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), cats::gated_mlp_avx2,
       cats::linear_avx2},
      {"avx512", __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"), cats::gated_mlp_avx512,
       cats::linear_avx512},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0, cats::gated_mlp_avx512_bf16,
       cats::linear_avx512_bf16},
#endif
  };
  const int64_t shapes[][2] = {{1, 1}, {3, 1}, {1, 5}, {37, 61}, {131, 257}, {1030, 67}, {2100, 33}};
  int failures = helpers_failures();
  for (const Set& set : sets) {
    if (!set.is_supported) {
      std::printf("%s: not on this processor\n", set.name);
      continue;
    }
    double worst = 0;
    for (const auto& [D, F] : shapes)
      for (int64_t B = 1; B <= cats::kMaxBatch; ++B)
        for (const bool bfloat16 : {false, true})
          for (const float threshold : {0.0f, 0.1234567f, std::numeric_limits<float>::infinity()})
            for (const int64_t threads : {1, 3}) {
              const double error = error_of(set.gated_mlp, B, D, F, bfloat16, threshold, threads);
              worst = std::max(worst, error);
              if (error <= 1) continue;
              std::printf("%s: wrong by %g of the tolerance for B %lld, D %lld, F %lld, bfloat16 %d, threshold %g\n",
                          set.name, error, static_cast<long long>(B), static_cast<long long>(D),
                          static_cast<long long>(F), bfloat16, static_cast<double>(threshold));
              ++failures;
            }
    for (const auto& [D, N] : shapes)
      for (int64_t B = 1; B <= cats::kMaxBatch; ++B)
        for (const bool bfloat16 : {false, true})
          for (const int64_t threads : {1, 3}) {
            const double error = linear_error_of(set.linear, B, D, N, bfloat16, threads);
            worst = std::max(worst, error);
            if (error <= 1) continue;
            std::printf("%s: linear wrong by %g of the tolerance for B %lld, D %lld, N %lld, bfloat16 %d\n", set.name,
                        error, static_cast<long long>(B), static_cast<long long>(D), static_cast<long long>(N), bfloat16);
            ++failures;
          }
    std::printf("%s: largest error %.2f of the tolerance\n", set.name, worst);
  }
  return failures ? 1 : 0;
}
