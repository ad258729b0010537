// A token of one conversation: its parts, and the memory through which threads pass on what they compute.
//
// A layer has five parts:
//
//   kProject  norm, then rows of q, k and v               -> projected
//   kAttend   rotary, attention of a head over some slots -> attended (sums of each run of slots)
//   kOutput   rows of o                                   -> branch
//   kNeurons  norm, then rows of gate and up              -> products (0 for a dropped neuron)
//   kDown     rows of down of some neurons                -> sums (of each run of neurons)
//
// and the head follows the last one. Norms and sums over runs are computed by every thread for itself: this takes less time
// than one more part.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "packed_mlp/packed_mlp.h"
#include "step/claims.h"
#include "step/description.h"
#include "step/team.h"

namespace cats {

enum class Part : int64_t { kProject, kAttend, kOutput, kNeurons, kDown, kHead };

constexpr int64_t kPartsOfLayer = 5;
// Rows of a piece: their results are in the thread's own memory.
constexpr int64_t kMaxRows = 512;
// Neurons of a piece, and the unit in which those of `down` are dealt: the groups of packed columns.
constexpr int64_t kMaxNeurons = 64, kNeuronUnit = 32;
// Slots that one piece of attention reads at least, and runs of slots at most.
constexpr int64_t kMinSlots = 64, kMaxRuns = 16;

// Rows of `total` that pieces of `size` share: piece `i` has [first(i), last(i)).
struct Cut {
  int64_t total = 0, size = 1;

  int64_t pieces() const { return (total + size - 1) / size; }
  int64_t first(int64_t piece) const { return piece * size; }
  int64_t last(int64_t piece) const { return std::min(total, (piece + 1) * size); }
};

// What follows from a layer's description, once.
struct LayerCuts {
  RowFormat formats[6];  // of q, k, v, o, gate and up, where they are packed
  ColumnFormat columns;
  Cut q, k, v, o, neurons, down;
};

class Plan final : public Shared {
 public:
  using Work = void (*)(Plan&);

  // The description's arrays are copied; what they point to must live as long as the plan.
  explicit Plan(const StepModel& model);

  // Runs parts [first, last) in the calling thread and up to `helpers` others. They see what the caller has written before.
  void run(int64_t first, int64_t last, int64_t helpers, Work work);
  // Waits until no thread reads what earlier tokens have read, such as keys that a new text is going to overwrite.
  void settle() const { membership_.settle(); }
  void take_part() override { work_.load()(*this); }

  // --- what threads read and write; all memory is that of the caller while nothing runs

  StepModel model;
  std::vector<StepLayer> layers;
  std::vector<LayerCuts> cuts;
  RowFormat embedding_format, head_format;
  Cut head;
  Claims claims;

  // of the token that runs
  std::atomic<int64_t> slot{0}, token{0};
  std::atomic<bool> is_alone{false};  // the first layer that runs reads `residual`

  std::vector<float> residual;   // [D], at the start of a layer
  std::vector<float> projected;  // [(heads + 2 * key heads) * head size]
  std::vector<float> attended;   // [runs, heads, head size + 2]: sums, then largest score and sum of weights
  std::vector<float> branch;     // [D]: the output of attention
  std::vector<float> middle;     // [D]: the residual stream between attention and MLP
  std::vector<float> products;   // [F]
  std::vector<float> sums;       // [pieces, D]

  // the logits of the head, [V]
  float* logits() const { return static_cast<float*>(model.logits); }

  int64_t parts() const { return static_cast<int64_t>(layers.size()) * kPartsOfLayer + 1; }
  Number number() const { return static_cast<Number>(model.number); }

  // The part of a token by its number over all tokens, or -1 where none runs.
  int64_t part_of_token(uint64_t part) const {
    const int64_t place = static_cast<int64_t>(part % (parts() + 1));
    return place == parts() ? -1 : place;
  }
  uint64_t after(uint64_t part) const {
    const bool is_last = part_of_token(part) + 1 == last_.load(std::memory_order_relaxed);
    return is_last ? part / (parts() + 1) * (parts() + 1) + parts() : part + 1;
  }

 private:
  std::atomic<int64_t> last_{0};
  std::atomic<Work> work_{nullptr};
  // last: its end waits for threads that use the rest
  Membership membership_;
};

// The slots that a query at `slot` reads, in runs: run `i` has [first(i), last(i)), and the last one ends with the query's own.
struct SlotRuns {
  int64_t begin, end, size;

  SlotRuns(int64_t slot, int64_t window) : begin(std::max<int64_t>(0, slot + 1 - window)), end(slot + 1) {
    const int64_t each = (end - begin + kMaxRuns - 1) / kMaxRuns;
    size = std::max(kMinSlots, (each + kMinSlots - 1) / kMinSlots * kMinSlots);
  }
  int64_t runs() const { return (end - begin + size - 1) / size; }
  int64_t first(int64_t run) const { return begin + run * size; }
  int64_t last(int64_t run) const { return std::min(end, begin + (run + 1) * size); }
};

// One implementation for each instruction set, from the same source, step_kernel.h.
void step_generic(Plan&);
void step_avx2(Plan&);
void step_avx512(Plan&);
void step_avx512_vnni(Plan&);
void step_avx512_bf16(Plan&);

}  // namespace cats
