// What __init__.py calls: a token of a conversation, in one call.
#include <algorithm>
#include <cmath>

#include "cpu/operators.h"
#include "step/plan.h"

#if defined(_WIN32)
#define CATS_EXPORT extern "C" __declspec(dllexport)
#else
#define CATS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace cats {
namespace {

int64_t& number_at(void* pointer) { return *static_cast<int64_t*>(pointer); }

// The first of the largest; NaN counts as the largest, as in torch.argmax.
int64_t likeliest(const float* logits, int64_t count) {
  // the largest of each of some lanes, so that the compiler vectorises it
  constexpr int64_t kLanes = 16;
  float largest[kLanes];
  std::fill_n(largest, kLanes, -INFINITY);
  bool has_nan = false;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = logits[i + lane];
      has_nan |= value != value;
      largest[lane] = value > largest[lane] ? value : largest[lane];
    }
  for (; i < count; ++i) {
    has_nan |= logits[i] != logits[i];
    largest[0] = logits[i] > largest[0] ? logits[i] : largest[0];
  }
  if (has_nan) return std::find_if(logits, logits + count, [](float value) { return value != value; }) - logits;
  const float best = *std::max_element(largest, largest + kLanes);
  return std::find(logits, logits + count, best) - logits;
}

// What ops/choice/choose.cu does: the token of the next step, its place among the choices, and where it is.
void move_on(const StepModel& m, int64_t token, int64_t padding) {
  auto& finished = *static_cast<bool*>(m.finished);
  if (finished) token = padding;
  const auto* ends = static_cast<const int64_t*>(m.ends);
  finished |= std::find(ends, ends + m.end_count, token) != ends + m.end_count;
  number_at(m.token) = static_cast<int64_t*>(m.chosen)[number_at(m.step)] = token;
  ++number_at(m.position);
  ++number_at(m.slot);
  ++number_at(m.step);
}

int64_t helpers() {
  uint32_t threads;
  check(torch.torch_get_num_threads(&threads), "count threads");
  return std::min<int64_t>(threads, available_processors()) - 1;
}

// Whether the newest token is one that the plan can run; says nothing of the weights.
bool fits(const StepModel& m) {
  const int64_t slot = number_at(m.slot), token = number_at(m.token), step = number_at(m.step);
  return slot >= 0 && slot < m.capacity && token >= 0 && token < m.vocabulary && step >= 0 && step < m.capacity;
}

}  // namespace
}  // namespace cats

// A plan, or null without memory. Its pointers are those of tensors that live as long as it does.
CATS_EXPORT void* cats_step_make(const cats::StepModel* model) {
  try {
    return new cats::Plan(*model);
  } catch (...) {
    return nullptr;
  }
}

CATS_EXPORT void cats_step_end(void* plan) { delete static_cast<cats::Plan*>(plan); }

// Waits until no thread reads the cache any more: it may be written then.
CATS_EXPORT void cats_step_settle(void* plan) { static_cast<cats::Plan*>(plan)->settle(); }

// Runs the newest token, whose logits are written; with `chooses`, also takes the likeliest next token and moves on. Returns 0,
// 1 where slot, token or step are out of range, or 2 where the system refused.
CATS_EXPORT int cats_step_run(void* pointer, int chooses, int64_t padding) {
  cats::Plan& plan = *static_cast<cats::Plan*>(pointer);
  const cats::StepModel& m = plan.model;
  if (!cats::fits(m)) return 1;
  try {
    plan.slot.store(cats::number_at(m.slot), std::memory_order_relaxed);
    plan.token.store(cats::number_at(m.token), std::memory_order_relaxed);
    plan.is_alone.store(false, std::memory_order_relaxed);
    plan.run(0, plan.parts(), cats::helpers(), cats::instruction_set().step);
    if (chooses) cats::move_on(m, cats::likeliest(plan.logits(), m.head.rows), padding);
  } catch (...) {
    return 2;
  }
  return 0;
}

// Runs one layer: `x` [D] is the residual stream before it, and `out` [D] what the layer adds to `middle` [D], the stream before
// its MLP. Returns as cats_step_run.
CATS_EXPORT int cats_step_run_layer(void* pointer, int64_t index, const float* x, float* middle, float* out) {
  cats::Plan& plan = *static_cast<cats::Plan*>(pointer);
  const cats::StepModel& m = plan.model;
  if (!cats::fits(m) || index < 0 || index >= m.count) return 1;
  try {
    plan.slot.store(cats::number_at(m.slot), std::memory_order_relaxed);
    plan.is_alone.store(true, std::memory_order_relaxed);
    cats::share(x, m.hidden, plan.residual.data());
    const int64_t first = index * cats::kPartsOfLayer;
    plan.run(first, first + cats::kPartsOfLayer, cats::helpers(), cats::instruction_set().step);
    std::copy_n(plan.middle.data(), m.hidden, middle);
    std::fill_n(out, m.hidden, 0.0f);
    for (int64_t p = 0; p < plan.cuts[index].down.pieces(); ++p)
      for (int64_t i = 0; i < m.hidden; ++i) out[i] += plan.sums[p * m.hidden + i];
  } catch (...) {
    return 2;
  }
  return 0;
}

// The size of the description's structs, for a check.
CATS_EXPORT int64_t cats_step_sizes() { return sizeof(cats::StepModel) * 100000 + sizeof(cats::StepLayer); }

// How many threads the team has beside those that call, and how many this process may run.
CATS_EXPORT int64_t cats_step_team() { return cats::team_size(); }
CATS_EXPORT int64_t cats_step_processors() { return cats::available_processors(); }
CATS_EXPORT void cats_step_pretend_processors(int64_t count) { cats::pretend_processors(count); }
