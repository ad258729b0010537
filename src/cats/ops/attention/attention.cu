// Attention of one new token: norms of its heads, rotary embedding, write to the cache, and attention over the slots in
// sight, split along their length.
//
// The grid is [splits, key heads * parts]. Blocks that a short context does not need end at once. A block handles up to
// HEADS query heads that share a key head, over its share of the slots. A team of LANES lanes reads a key, 16 bytes per lane,
// and handles UNROLL slots per turn. While the team adds up dot products over its lanes, it divides the slots and heads of
// the turn: each lane ends with the scores of its own slots and heads, and alone computes their exponentials. The next keys
// are requested after the scores, the next values after the sums. Each team has its own running maximum and sums. They are
// merged over the warp, over the block, and, by the block that arrives last, over the splits.
//
// The new key and value are rounded as in the cache, and read from shared memory, so that no block depends on another
// block's write to the cache. Older keys and values, and the slot of the new token, were written by earlier tokens. They are
// read before the previous kernel has ended, the first turn into registers and the next turns into the L2 cache.
//
// The next kernel may start at once. Until its own wait it reads only weights. That wait ends with this kernel, which has
// waited for the previous one.
//
// The loader defines DTYPE, HEAD (size of a head), ROTARY (its rotated columns), QUERIES (query heads per key head), HEADS
// (query heads per block), UNSPLIT_SLOTS (the most slots that one block takes alone), SPLIT_SLOTS (about the slots per block
// beyond that; more where blocks run out), MAX_SPLITS, and the switches HEAD_NORM and SOFTCAP.
//
// block.cuh holds the steps of a block.
#include "primitives.cuh"
#include "trace.cuh"

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

struct Arguments : Traced {
    const float* qkv;       // [QH + 2 KH, HEAD]: queries, keys, values of the new token
    const float* cosines;   // [capacity, ROTARY]
    const float* sines;     // [capacity, ROTARY]
    const char* q_weight;   // [HEAD], weights of the norm of each query, for HEAD_NORM
    const char* k_weight;   // [HEAD]
    char* keys;             // [KH, capacity, HEAD]
    char* values;           // [KH, capacity, HEAD]
    char* out;              // [QH, HEAD]
    const int64* slot;      // the slot of the new token
    const int64* position;  // the position of the new token
    float* partials;        // [splits, QH, HEAD + 2] for more than one split
    unsigned* counters;     // [key heads * parts], zero between calls
    int key_heads;
    int capacity;
    int window;  // slots in sight, the new one included
    float scale;
    float softcap;
    float epsilon;
    float weight_offset;
};

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

#include "block.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    Block block(a, shared);
    if (blockIdx.x >= block.splits) return;
    a.stamp(START);
    Fetched keys, values;
    int at = block.first_slot();
    block.fetch(keys, block.vector_of(a.keys, at), at);
    block.fetch(values, block.vector_of(a.values, at), at);
    block.prefetch_later_turns();
    allow_next_kernel();
    wait_for_previous_kernel();
    a.stamp(INPUT);
    block.prepare_all();
    block.attend(keys, values);
    a.stamp(LAST);
    block.merge_warps();
    if (block.splits > 1) block.merge_splits();
    a.stamp(END);
}
