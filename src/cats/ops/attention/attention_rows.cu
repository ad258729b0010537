// Attention of one new token of each of several rows: attention.cu, with a group of columns of the grid for each row.
//
// The grid is [splits, rows * key heads * parts]. A row has a position, which is also the slot of its token, and a line of the
// cache. Rows that are not active end at once, and write nothing.
//
// The loader defines what attention.cu wants.
#include "sizes.cuh"
#include "trace.cuh"

struct Arguments : Traced {
    const float* qkv;       // [rows, QH + 2 KH, HEAD]: queries, keys, values of the new tokens
    const float* cosines;   // [capacity, ROTARY]
    const float* sines;     // [capacity, ROTARY]
    const char* q_weight;   // [HEAD], weights of the norm of each query, for HEAD_NORM
    const char* k_weight;   // [HEAD]
    char* keys;             // [lines, KH, capacity, HEAD]
    char* values;           // [lines, KH, capacity, HEAD]
    char* out;              // [rows, QH, HEAD]
    const int64* slot;      // [rows], the slot of the new token
    const int64* position;  // [rows], the position of the new token
    const int64* lines;     // [rows]
    const int* active;      // [rows], 0 where a row is not used
    float* partials;        // [rows, splits, QH, HEAD + 2] for more than one split
    unsigned* counters;     // [rows * key heads * parts], zero between calls
    int key_heads;
    int capacity;
    int window;  // slots in sight, the new one included
    float scale;
    float softcap;
    float epsilon;
    float weight_offset;
};

#include "block.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_rows(const __grid_constant__ Arguments all) {
    __shared__ Shared shared;
    const int columns = all.key_heads * PARTS, row = blockIdx.y / columns;
    // the rows of a step were written before the first launch of its chain had started
    if (!load_word_from_l2(all.active + row)) return;
    const int line = load_word_from_l2(all.lines + row), query_heads = all.key_heads * QUERIES;
    const size_t line_bytes = (size_t)all.key_heads * all.capacity * ROW_BYTES;
    Arguments a = all;
    a.qkv += (size_t)row * (query_heads + 2 * all.key_heads) * HEAD;
    a.keys += line * line_bytes, a.values += line * line_bytes;
    a.out += (size_t)row * query_heads * ROW_BYTES;
    a.slot += row, a.position += row;
    a.partials += (size_t)row * gridDim.x * query_heads * (HEAD + 2);
    a.counters += row * columns;
    Block block(a, shared, blockIdx.y % columns);
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
