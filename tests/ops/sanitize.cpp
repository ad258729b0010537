// Runs each kernel of the CPU backend on exactly sized memory, against a plain loop, under sanitizers (sanitize.sh).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/threads.h"
#include "linear/linear.h"
#include "mlp/cpu/gated_mlp.h"
#include "packed_linear/packed_linear.h"
#include "packed_mlp/packed_mlp.h"

using cats::Activation;
using cats::BFloat16;
using cats::GatedMlpCall;
using cats::LinearCall;
using cats::LinearPart;
using cats::Number;
using cats::PackedLinearCall;
using cats::PackedMlpCall;
using cats::RowFormat;
using cats::ZeroMode;

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

// The largest difference between a kernel and a plain loop, relative to the tolerance. A router that drops inputs is [D, F].
double error_of(cats::GatedMlpKernel kernel, int64_t B, int64_t D, int64_t F, bool bfloat16, float threshold, bool drops_inputs,
                int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(B * 1000003 + D * 1009 + F));
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const Values x(B * D, 1, random), gate(F * D, scale, random), up(F * D, scale, random);
  const Values down(F * D, 1 / std::sqrt(static_cast<float>(F)), random), up_bias(F, 1, random), down_bias(D, 1, random);
  const std::vector<float> thresholds(F, threshold), input_thresholds(D, 0.5f);
  Output out(B * D);

  GatedMlpCall call{};
  if (drops_inputs) call.input_thresholds = input_thresholds.data();
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
      double g = drops_inputs ? 0 : dot(gate.exact, j, x.exact, b, D);
      for (int64_t i = 0; drops_inputs && i < D; ++i) {
        const double value = x.exact[b * D + i];
        if (!(std::fabs(value) < 0.5)) g += gate.exact[i * F + j] * value;
      }
      const double a = g / (1 + std::exp(-g));
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

// Writes a number that all three types hold exactly.
void store_number(uint8_t* out, Number type, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffff;
  const auto half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (magnitude ? (magnitude >> 13) - (112 << 10) : 0));
  const auto brain = static_cast<uint16_t>(bits >> 16);
  if (type == Number::kFloat32) std::memcpy(out, &bits, 4);
  if (type == Number::kFloat16) std::memcpy(out, &half, 2);
  if (type == Number::kBFloat16) std::memcpy(out, &brain, 2);
}

struct PackedKind {
  int64_t bits, group;
  Number scale;
  ZeroMode mode;

  int64_t zero() const { return mode == ZeroMode::kZeros ? 0 : 5; }
};

// A quantised matrix: numbers and, for kernels, codes with the scales, zero points and shifts of their groups.
struct PackedMatrix {
  PackedKind kind;
  int64_t rows, columns, groups;
  std::vector<uint8_t> codes;            // [rows, columns]
  std::vector<float> scales, extras;     // [rows, groups]

  PackedMatrix(int64_t row_count, int64_t column_count, const PackedKind& matrix_kind, std::mt19937& random)
      : kind(matrix_kind), rows(row_count), columns(column_count),
        groups(kind.group ? (columns + kind.group - 1) / kind.group : 1), codes(rows * columns), scales(rows * groups),
        extras(rows * groups) {
    const float size = std::exp2(std::round(-std::log2(std::sqrt(static_cast<float>(columns)))) - static_cast<float>(kind.bits) + 1);
    for (auto& code : codes) code = static_cast<uint8_t>(random() & ((1u << kind.bits) - 1));
    for (auto& scale : scales) scale = size * (1 + static_cast<float>(random() % 8) / 8);
    for (auto& extra : extras)
      extra = kind.mode == ZeroMode::kZeros ? static_cast<float>(random() & ((1u << kind.bits) - 1))
                                            : -size * (1 + static_cast<float>(random() % 8) / 8);
  }

  double number(int64_t row, int64_t column) const {
    const int64_t i = row * groups + (kind.group ? column / kind.group : 0);
    const double zero = kind.mode == ZeroMode::kZeros ? extras[i] : static_cast<double>(kind.zero());
    return (codes[row * columns + column] - zero) * scales[i] + (kind.mode == ZeroMode::kShifts ? extras[i] : 0);
  }

  void store_extra(uint8_t* out, int64_t i) const {
    if (kind.mode == ZeroMode::kZeros) *out = static_cast<uint8_t>(extras[i]);
    if (kind.mode == ZeroMode::kShifts) store_number(out, kind.scale, extras[i]);
  }
  int64_t extra_size() const {
    return kind.mode == ZeroMode::kConstant ? 0 : kind.mode == ZeroMode::kZeros ? 1 : size_of(kind.scale);
  }

  RowFormat row_format() const {
    RowFormat format(kind.bits, columns, kind.group, kind.scale, kind.mode, kind.zero(), 0);
    // as little padding as possible: a read past a row is a read past the last one
    format.pitch = (format.used_bytes + 3) / 4 * 4;
    return format;
  }

  // The layout of ops/quantised/rows.py.
  std::unique_ptr<uint8_t[]> packed_rows() const {
    const RowFormat f = row_format();
    std::unique_ptr<uint8_t[]> out(new uint8_t[rows * f.pitch]());
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* row = out.get() + r * f.pitch;
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t unit = c / f.unit, q = c % f.unit / 32, h = c / 16 % 2, t = c / 4 % 4, b = c % 4;
        const int64_t w = kind.bits == 8 ? 2 * q + h : 2 * (q / 2) + h;
        row[64 * unit + 16 * t + 4 * w + b] |= static_cast<uint8_t>(codes[r * columns + c] << (kind.bits == 4 ? q % 2 * 4 : 0));
      }
      for (int64_t g = 0; g < groups; ++g) {
        store_number(row + f.code_bytes + g * size_of(kind.scale), kind.scale, scales[r * groups + g]);
        store_extra(row + f.extras_offset + g * extra_size(), r * groups + g);
      }
    }
    return out;
  }

  cats::ColumnFormat column_format() const {
    cats::ColumnFormat format{kind.bits, rows, kind.group, kind.scale, kind.mode, kind.zero(), 0};
    format.pitch = format.used_bytes();
    return format;
  }

  // The layout of ops/quantised/columns.py; tables are [groups, rows].
  std::unique_ptr<uint8_t[]> packed_columns() const {
    const auto f = column_format();
    std::unique_ptr<uint8_t[]> out(new uint8_t[columns * f.pitch]());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        out[c * f.pitch + r * kind.bits / 8] |= static_cast<uint8_t>(codes[r * columns + c] << (kind.bits == 4 ? r % 2 * 4 : 0));
    return out;
  }
  std::unique_ptr<uint8_t[]> table(bool of_scales) const {
    const int64_t size = of_scales ? size_of(kind.scale) : extra_size();
    std::unique_ptr<uint8_t[]> out(new uint8_t[groups * rows * size]);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* place = out.get() + (g * rows + r) * size;
        if (of_scales)
          store_number(place, kind.scale, scales[r * groups + g]);
        else
          store_extra(place, r * groups + g);
      }
    return out;
  }

  double dot(int64_t row, const std::vector<float>& x, int64_t token) const {
    double total = 0;
    for (int64_t c = 0; c < columns; ++c) total += number(row, c) * x[token * columns + c];
    return total;
  }
};

std::vector<PackedKind> packed_kinds() {
  std::vector<PackedKind> kinds;
  int64_t count = 0;
  for (const int64_t bits : {4, 8})
    for (const int64_t group : {0, 32, 64, 128})
      for (const ZeroMode mode : {ZeroMode::kConstant, ZeroMode::kZeros, ZeroMode::kShifts})
        // each dtype with each mode
        kinds.push_back({bits, group, static_cast<Number>((count / 3 + count % 3) % 3), mode}), ++count;
  return kinds;
}

// The same for a linear layer over packed rows.
double packed_linear_error_of(cats::PackedLinearKernel kernel, int64_t B, int64_t D, int64_t N, const PackedKind& kind,
                              bool bfloat16, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(B * 1000003 + D * 1009 + N));
  const Values x(B * D, 1, random), bias(N, 1, random);
  const PackedMatrix matrix(N, D, kind, random);
  const auto rows = matrix.packed_rows();
  Output out(B * N);
  const Number dtype = bfloat16 ? Number::kBFloat16 : Number::kFloat32;
  const PackedLinearCall call{B, N, matrix.row_format(), dtype, x.data(bfloat16), rows.get(), bias.data(bfloat16), out.data(bfloat16)};
  kernel(call, cats::Threads{threads, run_in_threads, kBytesEach});

  double worst = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j < N; ++j)
      worst = std::max(worst, out.error_at(b * N + j, matrix.dot(j, x.exact, b) + bias.exact[j], bfloat16));
  return worst;
}

// The same for a gated MLP over packed codes.
double packed_mlp_error_of(cats::PackedMlpKernel kernel, int64_t B, int64_t D, int64_t F, const PackedKind& kind, bool bfloat16,
                           float threshold, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(B * 1000003 + D * 1009 + F));
  const Values x(B * D, 1, random), up_bias(F, 1, random), down_bias(D, 1, random);
  const PackedMatrix gate(F, D, kind, random), up(F, D, kind, random), down(D, F, kind, random);
  const auto gate_rows = gate.packed_rows(), up_rows = up.packed_rows(), down_columns = down.packed_columns();
  const auto scales = down.table(true), extras = down.table(false);
  const std::vector<float> thresholds(F, threshold);
  Output out(B * D);

  PackedMlpCall call{};
  call.B = B;
  call.F = F;
  call.rows = gate.row_format();
  call.columns = down.column_format();
  call.dtype = bfloat16 ? Number::kBFloat16 : Number::kFloat32;
  call.x = x.data(bfloat16);
  call.gate = gate_rows.get();
  call.up = up_rows.get();
  call.down = down_columns.get();
  call.down_scales = scales.get();
  call.down_extras = extras.get();
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
      const double g = gate.dot(j, x.exact, b), a = g / (1 + std::exp(-g));
      if (std::fabs(a) < threshold) continue;
      const double h = a * (up.dot(j, x.exact, b) + up_bias.exact[j]);
      for (int64_t i = 0; i < D; ++i) expected[i] += h * down.number(i, j);
    }
    for (int64_t i = 0; i < D; ++i) worst = std::max(worst, out.error_at(b * D + i, expected[i], bfloat16));
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
    cats::PackedLinearKernel packed_linear;
    cats::PackedMlpKernel packed_mlp;
  };
  const Set sets[] = {
      {"generic", true, cats::gated_mlp_generic, cats::linear_generic, cats::packed_linear_generic, cats::packed_mlp_generic},
#if defined(__x86_64__)
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), cats::gated_mlp_avx2,
       cats::linear_avx2, cats::packed_linear_avx2, cats::packed_mlp_avx2},
      {"avx512", __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"), cats::gated_mlp_avx512,
       cats::linear_avx512, cats::packed_linear_avx512, cats::packed_mlp_avx512},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0, cats::gated_mlp_avx512_bf16,
       cats::linear_avx512_bf16, cats::packed_linear_avx512, cats::packed_mlp_avx512},
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
              const double error = std::max(error_of(set.gated_mlp, B, D, F, bfloat16, threshold, false, threads),
                                            error_of(set.gated_mlp, B, D, F, bfloat16, threshold, true, threads));
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
    for (const auto& [D, N] : {std::pair<int64_t, int64_t>{4, 1}, {36, 61}, {132, 37}, {2052, 9}})
      for (const int64_t B : {1, 2, 3, 5, 8})
        for (const PackedKind& kind : packed_kinds())
          for (const bool bfloat16 : {false, true})
            for (const int64_t threads : {1, 3}) {
              const double errors[] = {
                  packed_linear_error_of(set.packed_linear, B, D, N, kind, bfloat16, threads),
                  packed_mlp_error_of(set.packed_mlp, B, D, N, kind, bfloat16, 0.0f, threads),
                  packed_mlp_error_of(set.packed_mlp, B, D, N, kind, bfloat16, 0.1234567f, threads),
              };
              const double error = *std::max_element(std::begin(errors), std::end(errors));
              worst = std::max(worst, error);
              if (error <= 1) continue;
              std::printf("%s: packed codes wrong by %g, %g and %g of the tolerance for B %lld, D %lld, N %lld, int%lld, "
                          "groups of %lld, mode %d, bfloat16 %d\n",
                          set.name, errors[0], errors[1], errors[2], static_cast<long long>(B), static_cast<long long>(D),
                          static_cast<long long>(N), static_cast<long long>(kind.bits), static_cast<long long>(kind.group),
                          static_cast<int>(kind.mode), bfloat16);
              ++failures;
            }
    std::printf("%s: largest error %.2f of the tolerance\n", set.name, worst);
  }
  return failures ? 1 : 0;
}
