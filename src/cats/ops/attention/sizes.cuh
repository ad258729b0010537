// Sizes of attention, and what the threads of a block share: a part of attention.cu and attention_rows.cu.
#pragma once
#include "primitives.cuh"

typedef long long int64;

constexpr int WARPS = 8, THREADS = WARPS * 32, UNROLL = 4;
static_assert(HEADS <= WARPS);
constexpr int HEAD_VECTORS = HEAD / VECTOR, PARTS = (QUERIES + HEADS - 1) / HEADS;

__device__ constexpr int lanes_of_a_slot() {
    int lanes = 1;
    while (lanes < HEAD_VECTORS && lanes < 32) lanes *= 2;
    return lanes;
}
constexpr int LANES = lanes_of_a_slot(), SLOTS = 32 / LANES, VECTORS = (HEAD_VECTORS + LANES - 1) / LANES;
constexpr int OWNED = VECTORS * VECTOR, EACH = (HEAD + 31) / 32, ROW_BYTES = HEAD * ELEMENT_BYTES;

// Of the slots and heads of a turn, a lane ends with HELD_SLOTS and HELD_HEADS. Each halving uses one bit of the lane's index
// in its team, the highest bit first.
__device__ constexpr int halvings(int count, int lanes) {
    return count % 2 || lanes < 2 ? 0 : 1 + halvings(count / 2, lanes / 2);
}
constexpr int SLOT_BITS = halvings(UNROLL, LANES), HEAD_BITS = halvings(HEADS, LANES >> SLOT_BITS);
constexpr int HELD_SLOTS = UNROLL >> SLOT_BITS, HELD_HEADS = HEADS >> HEAD_BITS;

constexpr float LOG2_E = 1.4426950408889634f;
// LOWEST is the peak before the first score: far below the scores of a model, so that no comparison needs a special case.
// NONE stands for a score that does not exist, and is below LOWEST.
constexpr float LOWEST = -1e30f, NONE = -3.402823466e38f;

struct Shared {
    float queries[HEADS][HEAD];
    float key[HEAD];
    uint4 new_key[HEAD_VECTORS], new_value[HEAD_VECTORS];
    float peak[WARPS][HEADS], total[WARPS][HEADS];
    float sums[WARPS][HEADS][HEAD];
    float factors[HEADS][MAX_SPLITS], norms[HEADS];  // of the splits, for the block that arrives last
    bool last;
};

// Keys or values of one turn of a lane, while they are loaded.
struct Fetched {
    uint4 vectors[UNROLL][VECTORS];
};

// Scores are logarithms to the base of 2.
__device__ __forceinline__ float factor_of(float score, float peak) { return exp2f(score - peak); }

// Softmax and the weighted sum of values, so far.
struct Running {
    float peak, total;
    float sums[OWNED];

    __device__ void merge(int distance) {
        float other = __shfl_xor_sync(~0u, peak, distance), highest = fmaxf(peak, other);
        float mine = factor_of(peak, highest), theirs = factor_of(other, highest);
        total = total * mine + __shfl_xor_sync(~0u, total, distance) * theirs;
#pragma unroll
        for (int i = 0; i < OWNED; ++i) sums[i] = sums[i] * mine + __shfl_xor_sync(~0u, sums[i], distance) * theirs;
        peak = highest;
    }
};
