// Runs whole tokens of small random models in several threads, some of which are stopped now and then, against plain loops, under
// sanitizers (sanitize.sh). Memory is exactly sized: a read past the end is a read of someone else's memory.
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "packed_linear/packed_inputs.h"
#include "step/plan.h"

using namespace cats;

namespace {

std::mt19937 random_bits(1);

float normal(float scale) { return std::normal_distribution<float>(0, scale)(random_bits); }

struct Sizes {
  int64_t hidden, neurons, layers, heads, key_heads, head_size, capacity, vocabulary, bits, group;
  ZeroMode mode;
};

// A matrix with all of its memory, and its numbers.
struct Matrix {
  std::vector<std::unique_ptr<uint8_t[]>> memory;
  std::vector<float> numbers;
  StepMatrix rows{};
  StepColumns columns{};

  uint8_t* bytes(int64_t count) {
    memory.emplace_back(new uint8_t[count]());
    return memory.back().get();
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(count * sizeof(float))); }
};

void make_dense(Matrix& m, int64_t rows, int64_t columns) {
  float* data = m.floats(rows * columns);
  m.numbers.resize(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) m.numbers[i] = data[i] = normal(1 / std::sqrt(static_cast<float>(columns)));
  const int64_t pitch = columns * sizeof(float);
  m.rows = StepMatrix{data, nullptr, rows, columns, 0, 0, 0, 0, 0, pitch};
  m.columns = StepColumns{data, nullptr, nullptr, 0, 0, 0, 0, 0, pitch};
}

void make_rows(Matrix& m, const Sizes& s, int64_t rows, int64_t columns) {
  if (!s.bits) return make_dense(m, rows, columns);
  const int64_t zero = s.mode == ZeroMode::kZeros ? 0 : s.bits == 4 ? 8 : 128;
  RowFormat format(s.bits, columns, s.group, Number::kFloat32, s.mode, zero, 0);
  const int64_t pitch = (format.used_bytes + 31) / 32 * 32;
  format.pitch = pitch;
  uint8_t* data = m.bytes(rows * pitch);
  m.numbers.resize(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = data + r * pitch;
    for (int64_t i = 0; i < format.code_bytes; ++i) row[i] = static_cast<uint8_t>(random_bits());
    for (int64_t g = 0; g < format.groups; ++g) {
      const float scale = (0.5f + (random_bits() % 100) * 0.01f) * (s.bits == 4 ? 0.25f : 0.015f) / std::sqrt(static_cast<float>(columns));
      const float shift = normal(scale);
      std::memcpy(row + format.code_bytes + 4 * g, &scale, 4);
      if (s.mode == ZeroMode::kZeros) row[format.extras_offset + g] = static_cast<uint8_t>(random_bits() % (s.bits == 4 ? 16 : 256));
      if (s.mode == ZeroMode::kShifts) std::memcpy(row + format.extras_offset + 4 * g, &shift, 4);
    }
    std::vector<float> unit(columns);
    for (int64_t c = 0; c < columns; ++c) {
      unit[c] = 1;
      m.numbers[r * columns + c] = plain_dot(format, row, unit.data());
      unit[c] = 0;
    }
  }
  m.rows = StepMatrix{data, nullptr, rows, columns, s.bits, s.group, 2, static_cast<int64_t>(s.mode), zero, pitch};
}

// `numbers` are those of each neuron in turn.
void make_columns(Matrix& m, const Sizes& s) {
  if (!s.bits) return make_dense(m, s.neurons, s.hidden);
  const int64_t zero = s.mode == ZeroMode::kZeros ? 0 : s.bits == 4 ? 8 : 128, D = s.hidden;
  const int64_t groups = s.group ? (s.neurons + s.group - 1) / s.group : 1;
  const int64_t pitch = (D * s.bits / 8 + 15) / 16 * 16 + 16;
  uint8_t *data = m.bytes(s.neurons * pitch), *zeros = m.bytes(groups * D);
  float *scales = m.floats(groups * D), *shifts = m.floats(groups * D);
  for (int64_t i = 0; i < s.neurons * pitch; ++i) data[i] = static_cast<uint8_t>(random_bits());
  for (int64_t i = 0; i < groups * D; ++i) {
    scales[i] = (0.5f + (random_bits() % 100) * 0.01f) * (s.bits == 4 ? 0.25f : 0.015f) / std::sqrt(static_cast<float>(s.neurons));
    shifts[i] = normal(scales[i]);
    zeros[i] = static_cast<uint8_t>(random_bits() % (s.bits == 4 ? 16 : 256));
  }
  m.numbers.resize(s.neurons * D);
  for (int64_t j = 0; j < s.neurons; ++j)
    for (int64_t d = 0; d < D; ++d) {
      const int64_t place = (s.group ? j / s.group : 0) * D + d;
      const uint8_t byte = data[j * pitch + (s.bits == 8 ? d : d / 2)];
      const int64_t code = s.bits == 8 ? byte : d % 2 ? byte >> 4 : byte & 15;
      const float z = s.mode == ZeroMode::kZeros ? zeros[place] : static_cast<float>(zero);
      m.numbers[j * D + d] = (code - z) * scales[place] + (s.mode == ZeroMode::kShifts ? shifts[place] : 0.0f);
    }
  const void* extras = s.mode == ZeroMode::kZeros ? static_cast<const void*>(zeros)
                       : s.mode == ZeroMode::kShifts ? static_cast<const void*>(shifts) : nullptr;
  m.columns = StepColumns{data, scales, extras, s.bits, s.group, 2, static_cast<int64_t>(s.mode), zero, pitch};
}

struct Layer {
  Matrix q, k, v, o, gate, up, down, rest;
  float *norm, *mlp_norm, *thresholds;
};

struct Model {
  Sizes sizes;
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<StepLayer> described;
  Matrix head, rest;
  float *embedding, *norm, *logits;
  StepModel model{};

  explicit Model(const Sizes& s) : sizes(s) {
    const int64_t D = s.hidden, size = s.head_size, keys = s.key_heads * size;
    const auto filled = [&](Matrix& owner, int64_t count, float mean, float scale) {
      float* data = owner.floats(count);
      for (int64_t i = 0; i < count; ++i) data[i] = mean + normal(scale);
      return data;
    };
    float *cosines = rest.floats(s.capacity * size), *sines = rest.floats(s.capacity * size);
    for (int64_t p = 0; p < s.capacity; ++p)
      for (int64_t i = 0; i < size; ++i) {
        const float angle = p * std::pow(10000.0f, -2.0f * (i % (size / 2)) / size);
        cosines[p * size + i] = std::cos(angle);
        sines[p * size + i] = std::sin(angle);
      }
    for (int64_t n = 0; n < s.layers; ++n) {
      layers.emplace_back(new Layer);
      Layer& l = *layers.back();
      make_rows(l.q, s, s.heads * size, D);
      make_rows(l.k, s, keys, D);
      make_rows(l.v, s, keys, D);
      make_rows(l.o, s, D, s.heads * size);
      make_rows(l.gate, s, s.neurons, D);
      make_rows(l.up, s, s.neurons, D);
      make_columns(l.down, s);
      l.norm = filled(l.rest, D, 1, 0.1f);
      l.mlp_norm = filled(l.rest, D, 1, 0.1f);
      l.thresholds = l.rest.floats(s.neurons);
      std::fill_n(l.thresholds, s.neurons, n % 2 ? 0.2f : 0.0f);
      StepLayer d{};
      d.q = l.q.rows, d.k = l.k.rows, d.v = l.v.rows, d.o = l.o.rows, d.gate = l.gate.rows, d.up = l.up.rows;
      d.down = l.down.columns;
      d.attention_norm = l.norm, d.mlp_norm = l.mlp_norm, d.thresholds = l.thresholds;
      d.cosines = cosines, d.sines = sines;
      d.keys = l.rest.floats(keys * s.capacity), d.values = l.rest.floats(keys * s.capacity);
      d.activation = 0, d.gate_is_router = 1, d.window = 1 << 30, d.rotated = size;
      d.scale = 1 / std::sqrt(static_cast<double>(size)), d.epsilon = 1e-5;
      described.push_back(d);
    }
    make_rows(head, s, s.vocabulary, D);
    embedding = filled(rest, s.vocabulary * D, 0, 1);
    norm = filled(rest, D, 1, 0.1f);
    logits = rest.floats(s.vocabulary);
    model.layers = described.data(), model.count = s.layers, model.norm = norm;
    model.embedding = StepMatrix{embedding, nullptr, s.vocabulary, D, 0, 0, 0, 0, 0, D * 4};
    model.head = head.rows, model.logits = logits, model.number = 2, model.hidden = D, model.neurons = s.neurons;
    model.heads = s.heads, model.key_heads = s.key_heads, model.head_size = size, model.capacity = s.capacity;
    model.vocabulary = s.vocabulary, model.threads = 4, model.embedding_scale = 1, model.epsilon = 1e-5;
  }
};

std::vector<double> normed(const std::vector<double>& x, const float* weight) {
  double squares = 0;
  for (const double v : x) squares += v * v;
  const double scale = 1 / std::sqrt(squares / x.size() + 1e-5);
  std::vector<double> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * weight[i];
  return out;
}

std::vector<double> product(const Matrix& m, const std::vector<double>& x) {
  std::vector<double> out(m.numbers.size() / x.size());
  for (size_t r = 0; r < out.size(); ++r)
    for (size_t c = 0; c < x.size(); ++c) out[r] += m.numbers[r * x.size() + c] * x[c];
  return out;
}

// The logits of each token of a text, by plain loops.
std::vector<std::vector<double>> plain_logits(const Model& m, const std::vector<int64_t>& tokens) {
  const Sizes& s = m.sizes;
  const int64_t size = s.head_size, group = s.heads / s.key_heads;
  std::vector<std::vector<std::vector<double>>> keys(s.layers), values(s.layers);
  std::vector<std::vector<double>> result;
  for (size_t p = 0; p < tokens.size(); ++p) {
    std::vector<double> stream(m.embedding + tokens[p] * s.hidden, m.embedding + (tokens[p] + 1) * s.hidden);
    for (int64_t n = 0; n < s.layers; ++n) {
      const Layer& l = *m.layers[n];
      const auto* cosines = static_cast<const float*>(m.described[n].cosines) + p * size;
      const auto* sines = static_cast<const float*>(m.described[n].sines) + p * size;
      const std::vector<double> x = normed(stream, l.norm);
      std::vector<double> q = product(l.q, x), k = product(l.k, x), v = product(l.v, x);
      for (auto* heads : {&q, &k})
        for (size_t h = 0; h < heads->size(); h += size)
          for (int64_t i = 0; i < size / 2; ++i) {
            double &a = (*heads)[h + i], &b = (*heads)[h + i + size / 2];
            const double first = a, second = b;
            a = first * cosines[i] - second * sines[i];
            b = second * cosines[i] + first * sines[i];
          }
      keys[n].push_back(k);
      values[n].push_back(v);
      std::vector<double> attended(s.heads * size);
      for (int64_t h = 0; h < s.heads; ++h) {
        std::vector<double> weights(p + 1);
        double total = 0;
        for (size_t t = 0; t <= p; ++t) {
          double score = 0;
          for (int64_t i = 0; i < size; ++i) score += q[h * size + i] * keys[n][t][h / group * size + i];
          total += weights[t] = std::exp(score / std::sqrt(static_cast<double>(size)));
        }
        for (size_t t = 0; t <= p; ++t)
          for (int64_t i = 0; i < size; ++i) attended[h * size + i] += weights[t] / total * values[n][t][h / group * size + i];
      }
      const std::vector<double> output = product(l.o, attended);
      for (int64_t i = 0; i < s.hidden; ++i) stream[i] += output[i];
      const std::vector<double> y = normed(stream, l.mlp_norm), gate = product(l.gate, y), up = product(l.up, y);
      for (int64_t j = 0; j < s.neurons; ++j) {
        const double a = gate[j] / (1 + std::exp(-gate[j]));
        if (std::fabs(a) < l.thresholds[j]) continue;
        for (int64_t i = 0; i < s.hidden; ++i) stream[i] += a * up[j] * l.down.numbers[j * s.hidden + i];
      }
    }
    result.push_back(product(m.head, normed(stream, m.norm)));
  }
  return result;
}

void stop_for_a_while(int) { usleep(3000); }

// A signal to one of this process's threads, by chance.
void stop_some_thread() {
  static std::mt19937 which(2);
  std::vector<pid_t> threads;
  DIR* folder = opendir("/proc/self/task");
  while (const dirent* entry = folder ? readdir(folder) : nullptr)
    if (entry->d_name[0] != '.') threads.push_back(std::atoi(entry->d_name));
  if (folder) closedir(folder);
  if (!threads.empty()) syscall(SYS_tgkill, getpid(), threads[which() % threads.size()], SIGUSR1);
}

double worst(const float* actual, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(error / size);
}

using Logits = std::vector<std::vector<float>>;

// The logits of each token of a text.
Logits run_text(Model& m, Plan& plan, const std::vector<int64_t>& tokens, int64_t helpers, Plan::Work work) {
  Logits result;
  // the new text overwrites keys that a stopped thread may still read
  plan.settle();
  for (size_t p = 0; p < tokens.size(); ++p) {
    plan.slot = static_cast<int64_t>(p);
    plan.token = tokens[p];
    plan.run(0, plan.parts(), helpers, work);
    result.emplace_back(m.logits, m.logits + m.sizes.vocabulary);
  }
  return result;
}

// The median over tokens: a rounding can move a neuron over its threshold, for few of them.
double error_of(const Logits& actual, const std::vector<std::vector<double>>& expected) {
  std::vector<double> errors;
  for (size_t p = 0; p < actual.size(); ++p) errors.push_back(worst(actual[p].data(), expected[p]));
  std::sort(errors.begin(), errors.end());
  return errors[errors.size() / 2];
}

}  // namespace

int main() {
  struct Named {
    const char* name;
    Plan::Work work;
    bool supported;
  };
  const Named sets[] = {
#if defined(CATS_X86)
      {"avx512_bf16", step_avx512_bf16, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
      {"avx512_vnni", step_avx512_vnni, __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")},
      {"avx512", step_avx512, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
      {"avx2", step_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"generic", step_generic, true},
  };
  const Sizes shapes[] = {
      {36, 70, 2, 3, 1, 8, 12, 41, 0, 0, ZeroMode::kConstant},
      {64, 131, 2, 4, 2, 16, 12, 67, 4, 32, ZeroMode::kConstant},
      {132, 97, 2, 4, 2, 10, 12, 67, 4, 64, ZeroMode::kShifts},
      {68, 65, 2, 2, 2, 32, 12, 67, 8, 32, ZeroMode::kZeros},
      {100, 40, 2, 2, 1, 14, 12, 67, 8, 0, ZeroMode::kConstant},
  };
  struct sigaction action {};
  action.sa_handler = stop_for_a_while;
  sigaction(SIGUSR1, &action, nullptr);
  int wrong = 0;
  for (const Sizes& shape : shapes) {
    Model model(shape), other(shape);
    std::vector<int64_t> tokens;
    for (int i = 0; i < 10; ++i) tokens.push_back(random_bits() % shape.vocabulary);
    const auto expected = plain_logits(model, tokens), of_other = plain_logits(other, tokens);
    for (const Named& set : sets) {
      if (!set.supported) continue;
      Plan plan(model.model), second(other.model);
      const Logits alone = run_text(model, plan, tokens, 0, set.work), other_alone = run_text(other, second, tokens, 0, set.work);
      const double error = std::fmax(error_of(alone, expected), error_of(other_alone, of_other));
      // two conversations at once, whose callers are stopped now and then, and so are helpers
      std::atomic<bool> is_over{false};
      std::thread stopper([&] {
        sigset_t none;
        sigemptyset(&none);
        sigaddset(&none, SIGUSR1);
        pthread_sigmask(SIG_BLOCK, &none, nullptr);
        while (!is_over) {
          usleep(400);
          stop_some_thread();
        }
      });
      bool is_same = true, is_other_same = true;
      std::thread neighbour([&] {
        for (int i = 0; i < 4; ++i) is_other_same &= run_text(other, second, tokens, 3, set.work) == other_alone;
      });
      for (int i = 0; i < 4; ++i) is_same &= run_text(model, plan, tokens, 3, set.work) == alone;
      neighbour.join();
      is_over = true;
      stopper.join();
      const bool is_right = error < (shape.bits ? 2e-3 : 1e-4) && is_same && is_other_same;
      wrong += !is_right;
      std::printf("step %s, %lld bits: error %.1e, with stopped threads %s%s\n", set.name, static_cast<long long>(shape.bits), error,
                  is_same && is_other_same ? "the same" : "different", is_right ? "" : ", WRONG");
    }
  }
#if !defined(__SANITIZE_THREAD__)
  // the thread sanitizer does not follow threads that a forked process starts
  Model model(shapes[1]);
  const std::vector<int64_t> tokens{1, 2, 3};
  Plan plan(model.model);
  const Logits expected = run_text(model, plan, tokens, 3, step_generic);
  const pid_t child = fork();
  if (!child) {
    const bool is_right = team_size() == 0 && run_text(model, plan, tokens, 3, step_generic) == expected && team_size() == 3;
    _exit(is_right ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  std::printf("a forked process: %s\n", status ? "WRONG" : "right");
  wrong += status != 0;
#endif
  return wrong ? 1 : 0;
}
