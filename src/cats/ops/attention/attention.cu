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
// sizes.cuh holds sizes and types, block.cuh the steps of a block. attention_rows.cu is the same for several tokens.
#include "sizes.cuh"
#include "trace.cuh"

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

#include "block.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    Block block(a, shared, blockIdx.y);
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
