// What a token of one conversation consists of, as description.py writes it: a test compares names, order and types.
#pragma once

#include <cstdint>

namespace cats {

// The rows of a linear layer: dense numbers, or packed codes (packed_linear/formats.h).
struct StepMatrix {
  const void* data;
  const void* bias;  // [rows] in the dtype of the model, or null
  int64_t rows, columns;
  int64_t bits;  // of a code; 0 for dense numbers in the dtype of the model
  int64_t group, scale, mode, zero;
  int64_t pitch;  // bytes from one row to the next
};

// `down`, one row for each neuron: dense numbers, or packed columns (packed_mlp/packed_mlp.h).
struct StepColumns {
  const void* data;
  const void* scales;
  const void* extras;
  int64_t bits, group, scale, mode, zero, pitch;
};

struct StepLayer {
  StepMatrix q, k, v, o, gate, up;
  StepColumns down;
  const void* attention_norm;       // [D], like all norms in the dtype of the model
  const void* attention_post_norm;  // or null
  const void* mlp_norm;
  const void* mlp_post_norm;        // or null
  const void* q_norm;               // [head size], or null
  const void* k_norm;
  const void* thresholds;           // [F], float32
  const void* product_thresholds;   // [F], float32, or null
  const void* cosines;              // [capacity, rotated], float32
  const void* sines;
  void* keys;                       // [key heads, capacity, head size]
  void* values;
  int64_t activation, gate_is_router, window, rotated;
  double scale, softcap, epsilon, weight_offset;
};

struct StepModel {
  const StepLayer* layers;
  StepMatrix embedding;  // [V, D]
  StepMatrix head;       // [V, D]
  const void* norm;      // [D]
  void* logits;     // [V], float32
  void* token;      // one int64 each: what the step reads, and what it leaves for the next one
  void* position;
  void* slot;
  void* step;
  void* chosen;     // [capacity], int64
  void* finished;   // one bool
  const void* ends; // [end_count], int64: tokens that end a row
  int64_t end_count, count, number, hidden, neurons, heads, key_heads, head_size, capacity, vocabulary, threads;
  double embedding_scale, epsilon, weight_offset;
};

}  // namespace cats
