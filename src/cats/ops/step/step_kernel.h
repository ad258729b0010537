// What a thread does with a token: for each part, it copies the inputs, then claims pieces, computes and writes them.
#pragma once

#include <chrono>

#include "step/attention.h"
#include "step/down.h"
#include "step/matrix_inputs.h"
#include "step/neurons.h"
#include "step/pause.h"

namespace cats {
namespace {

// Memory of a thread, for all plans.
template <class Set>
struct StepMemory {
  MatrixInputs<Set> inputs;
  std::vector<float> shared;  // copies of what other threads have written
  std::vector<float> x;       // the input of the part
  std::vector<float> stream;  // the residual stream that belongs to it
  std::vector<float> out;     // a piece's results
  std::vector<float> attention;
  DownMemory<Set> down;
};

// One part of a token in one thread.
template <class Set>
class PartWork {
 public:
  PartWork(Plan& plan, StepMemory<Set>& memory, uint64_t part, int64_t place)
      : plan_(plan),
        m_(plan.model),
        memory_(memory),
        part_(part),
        index_(std::min<int64_t>(place / kPartsOfLayer, m_.count - 1)),
        kind_(place / kPartsOfLayer == m_.count ? Part::kHead : static_cast<Part>(place % kPartsOfLayer)),
        layer_(plan.layers[index_]),
        cuts_(plan.cuts[index_]),
        slot_(plan.slot.load(std::memory_order_relaxed)),
        runs_(slot_, layer_.window) {
    switch (kind_) {
      case Part::kProject: pieces = cuts_.q.pieces() + cuts_.k.pieces() + cuts_.v.pieces(); break;
      case Part::kAttend: pieces = m_.key_heads * runs_.runs(); break;
      case Part::kOutput: pieces = cuts_.o.pieces(); break;
      case Part::kNeurons: pieces = cuts_.neurons.pieces(); break;
      case Part::kDown: pieces = cuts_.down.pieces(); break;
      case Part::kHead: pieces = plan.head.pieces(); break;
    }
  }

  int64_t pieces;

  // Copies the inputs and makes what the pieces read; false where the part has ended meanwhile.
  bool prepare() {
    switch (kind_) {
      case Part::kProject: return prepare_projections();
      case Part::kAttend: return copy(plan_.projected, projected_size());
      case Part::kOutput: return prepare_output();
      case Part::kNeurons: return prepare_neurons();
      case Part::kDown: return copy(plan_.products, layer_.gate.rows) && list_products();
      case Part::kHead: return prepare_head();
    }
    return false;
  }

  // Computes a piece, and writes it if no other thread has.
  void run(int64_t piece) {
    switch (kind_) {
      case Part::kProject: return project(piece);
      case Part::kAttend: return attend(piece);
      case Part::kOutput: return multiply_rows(layer_.o, cuts_.formats[3], 0, cuts_.o, piece, plan_.branch.data(), piece);
      case Part::kNeurons: return run_neurons(piece);
      case Part::kDown: return run_down(piece);
      case Part::kHead: return multiply_rows(m_.head, plan_.head_format, 0, plan_.head, piece, plan_.logits(), piece);
    }
  }

 private:
  int64_t projected_size() const { return (m_.heads + 2 * m_.key_heads) * m_.head_size; }

  bool copy(const std::vector<float>& from, int64_t count) {
    copy_shared(from.data(), count, at_least(memory_.shared, count));
    return plan_.claims.is_current(part_);
  }

  // out = stream + what a branch adds, after its norm if it has one
  void add_branch(const float* branch, const void* post_norm, const StepLayer& layer, float* out) {
    const int64_t D = m_.hidden;
    if (!post_norm) {
      for (int64_t i = 0; i < D; ++i) out[i] += branch[i];
      return;
    }
    float* normed = at_least(memory_.x, D);
    norm(branch, post_norm, plan_.number(), D, layer.epsilon, layer.weight_offset, normed);
    for (int64_t i = 0; i < D; ++i) out[i] += normed[i];
  }

  // stream = the residual stream after a layer
  bool read_output_of(int64_t index) {
    const int64_t D = m_.hidden, count = plan_.cuts[index].down.pieces();
    float* stream = at_least(memory_.stream, D);
    copy_shared(plan_.middle.data(), D, stream);
    if (!copy(plan_.sums, count * D)) return false;
    float* sums = memory_.shared.data();
    for (int64_t p = 1; p < count; ++p)
      for (int64_t i = 0; i < D; ++i) sums[i] += sums[p * D + i];
    add_branch(sums, plan_.layers[index].mlp_post_norm, plan_.layers[index], stream);
    return true;
  }

  bool read_embedding() {
    const int64_t D = m_.hidden, token = plan_.token.load(std::memory_order_relaxed);
    float* stream = at_least(memory_.stream, D);
    read_row(m_.embedding, plan_.embedding_format, plan_.number(), token, stream);
    for (int64_t i = 0; i < D; ++i) stream[i] *= static_cast<float>(m_.embedding_scale);
    return plan_.claims.is_current(part_);
  }

  bool read_stream() {
    float* stream = at_least(memory_.stream, m_.hidden);
    if (plan_.is_alone.load(std::memory_order_relaxed)) {
      copy_shared(plan_.residual.data(), m_.hidden, stream);
      return plan_.claims.is_current(part_);
    }
    return index_ == 0 ? read_embedding() : read_output_of(index_ - 1);
  }

  const float* norm_stream(const void* weight, double epsilon, double offset) {
    float* x = at_least(memory_.x, m_.hidden);
    norm(memory_.stream.data(), weight, plan_.number(), m_.hidden, epsilon, offset, x);
    return x;
  }

  bool prepare_projections() {
    if (!read_stream()) return false;
    memory_.inputs.begin(norm_stream(layer_.attention_norm, layer_.epsilon, layer_.weight_offset), m_.hidden);
    const StepMatrix* matrices[3] = {&layer_.q, &layer_.k, &layer_.v};
    for (int i = 0; i < 3; ++i) inputs_[i] = memory_.inputs.prepare(*matrices[i], cuts_.formats[i], plan_.number());
    return true;
  }

  bool prepare_output() {
    const int64_t heads = m_.heads, size = m_.head_size;
    if (!copy(plan_.attended, runs_.runs() * heads * (size + 2))) return false;
    float* x = at_least(memory_.x, heads * size);
    join_runs(memory_.shared.data(), runs_.runs(), heads, size, x);
    memory_.inputs.begin(x, heads * size);
    inputs_[0] = memory_.inputs.prepare(layer_.o, cuts_.formats[3], plan_.number());
    return true;
  }

  bool prepare_neurons() {
    const int64_t D = m_.hidden;
    copy_shared(plan_.residual.data(), D, at_least(memory_.stream, D));
    if (!copy(plan_.branch, D)) return false;
    add_branch(memory_.shared.data(), layer_.attention_post_norm, layer_, memory_.stream.data());
    memory_.inputs.begin(norm_stream(layer_.mlp_norm, layer_.epsilon, layer_.weight_offset), D);
    inputs_[0] = memory_.inputs.prepare(layer_.gate, cuts_.formats[4], plan_.number());
    inputs_[1] = memory_.inputs.prepare(layer_.up, cuts_.formats[5], plan_.number());
    return true;
  }

  bool prepare_head() {
    if (!read_output_of(m_.count - 1)) return false;
    memory_.inputs.begin(norm_stream(m_.norm, m_.epsilon, m_.weight_offset), m_.hidden);
    inputs_[0] = memory_.inputs.prepare(m_.head, plan_.head_format, plan_.number());
    return true;
  }

  bool list_products() {
    memory_.down.list(memory_.shared.data(), layer_.gate.rows);
    return true;
  }

  // Writes a piece's results, unless another thread has; `more` writes what else belongs to the piece.
  template <class More>
  void write(int64_t piece, const float* results, int64_t count, float* to, const More& more) {
    if (!plan_.claims.begin_commit(part_, piece)) return;
    share(results, count, to);
    more();
    plan_.claims.end_commit(part_, piece);
  }

  // Rows of the matrix's piece `local`, which is `piece` of the part.
  void multiply_rows(const StepMatrix& matrix, const RowFormat& format, int matrix_index, const Cut& cut, int64_t local,
                     float* to, int64_t piece) {
    const int64_t first = cut.first(local), count = cut.last(local) - first;
    float* out = at_least(memory_.out, kMaxRows + 2 * kMaxNeurons);
    const auto row = [&](int64_t i) { return first + i; };
    memory_.inputs.multiply(matrix, format, plan_.number(), inputs_[matrix_index], row, count, out);
    write(piece, out, count, to + first, [&] {
      // the stream that this part has read is that of a later part too
      if (kind_ == Part::kProject && piece == 0) share(memory_.stream.data(), m_.hidden, plan_.residual.data());
    });
  }

  void project(int64_t piece) {
    const StepMatrix* matrices[3] = {&layer_.q, &layer_.k, &layer_.v};
    const Cut* cuts[3] = {&cuts_.q, &cuts_.k, &cuts_.v};
    float* to = plan_.projected.data();
    int64_t local = piece;
    int i = 0;
    for (; local >= cuts[i]->pieces(); ++i) {
      local -= cuts[i]->pieces();
      to += cuts[i]->total;
    }
    multiply_rows(*matrices[i], cuts_.formats[i], i, *cuts[i], local, to, piece);
  }

  void attend(int64_t piece) {
    const int64_t size = m_.head_size, group = m_.heads / m_.key_heads, count = group * (size + 2);
    const int64_t run = piece / m_.key_heads, key_head = piece % m_.key_heads;
    float *out = at_least(memory_.out, count + 2 * size), *fresh = out + count;
    Attention<typename Set::Base> attention(plan_, layer_, memory_.shared.data(), slot_, memory_.attention);
    attention.run(key_head, runs_, run, out, fresh);
    write(piece, out, count, plan_.attended.data() + (run * m_.heads + key_head * group) * (size + 2), [&] {
      if (run == runs_.runs() - 1) attention.store(key_head, fresh);
    });
  }

  void run_neurons(int64_t piece) {
    const int64_t first = cuts_.neurons.first(piece), count = cuts_.neurons.last(piece) - first;
    float* out = at_least(memory_.out, kMaxRows + 2 * kMaxNeurons);
    compute_products(memory_.inputs, layer_, cuts_, plan_.number(), inputs_[0], inputs_[1], first, count, out);
    write(piece, out, count, plan_.products.data() + first, [&] {
      if (piece == 0) share(memory_.stream.data(), m_.hidden, plan_.middle.data());
    });
  }

  void run_down(int64_t piece) {
    const int64_t first = cuts_.down.first(piece), last = cuts_.down.last(piece);
    const float* sums = memory_.down.add(layer_, cuts_, m_, first, last);
    write(piece, sums, m_.hidden, plan_.sums.data() + piece * m_.hidden, [] {});
  }

  Plan& plan_;
  const StepModel& m_;
  StepMemory<Set>& memory_;
  const uint64_t part_;
  const int64_t index_;
  const Part kind_;
  const StepLayer& layer_;
  const LayerCuts& cuts_;
  const int64_t slot_;
  const SlotRuns runs_;
  int64_t inputs_[3] = {0, 0, 0};
};

// Takes part in a token until it ends.
template <class Set>
void take_part(Plan& plan) {
  using Clock = std::chrono::steady_clock;
  static thread_local StepMemory<Set> memory;
  // How long a thread waits for the pieces that others have taken, before it computes them itself: they take about as long as
  // its own last one, unless their threads are stopped.
  constexpr Clock::duration kLeast = std::chrono::microseconds(3), kMost = std::chrono::microseconds(100);
  Clock::duration usual = kLeast;
  Claims& claims = plan.claims;
  for (;;) {
    const uint64_t part = claims.part();
    const int64_t place = plan.part_of_token(part);
    if (place < 0) return;
    PartWork<Set> work(plan, memory, part, place);
    bool is_prepared = false;
    const auto prepare = [&] { return is_prepared || (is_prepared = work.prepare()); };

    Clock::time_point start = Clock::now();
    if (!claims.is_all_claimed(part, work.pieces) && prepare()) {
      start = Clock::now();
      int64_t pieces = 0;
      for (int64_t piece; (piece = claims.claim(part, work.pieces)) >= 0; ++pieces) work.run(piece);
      if (pieces) {
        const Clock::time_point end = Clock::now();
        usual = std::clamp<Clock::duration>((end - start) * 2 / pieces, kLeast, kMost);
        start = end;
      }
    }
    int64_t open = 0;
    while ((open = claims.first_open(part, open, work.pieces)) < work.pieces) {
      pause_briefly();
      if (Clock::now() - start < usual) continue;
      if (!claims.is_unwritten(part, open)) continue;
      if (!prepare()) break;
      work.run(open);
      start = Clock::now();
    }
    if (open >= work.pieces) claims.advance(part, plan.after(part));
  }
}

}  // namespace
}  // namespace cats
