// The end of a token: the likeliest of its logits, and what the next step reads. The first of equals is taken, NaN counts
// as the largest, and a row that has ended gets padding.
//
// Each block finds the best of its share of the logits. The block that arrives last finds the best of all blocks.
//
// The loader defines DTYPE, of the logits: float32.
#include "best.cuh"
#include "trace.cuh"

typedef long long int64;

struct Arguments : Traced {
    const float* logits;      // [count]
    float* values;            // [blocks], the best of each block
    int* indices;             // [blocks], and where it is
    unsigned* arrived;        // zero between calls
    int64* token;             // the choice, as the next step reads it
    int64* position;          // gets 1 more, like the slot and the step
    int64* slot;
    int64* step;
    unsigned char* finished;  // whether the row has ended
    const int64* ends;        // [end_count], tokens that end a row
    int64* chosen;            // [steps], the choice of each step, as the host reads it
    int64 padding;
    int count;
    int end_count;
    float softcap;  // 0 for none
};

__device__ void finish(const Arguments& a, int best) {
    int64 position = *a.position, slot = *a.slot, step = *a.step;
    int64 token = *a.finished ? a.padding : best;
    for (int i = 0; i < a.end_count; ++i)
        if (token == a.ends[i]) *a.finished = 1;
    *a.position = position + 1, *a.slot = slot + 1, *a.step = step + 1;
    *a.token = a.chosen[step] = token;
    *a.arrived = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose(const __grid_constant__ Arguments a) {
    wait_for_previous_kernel();
    int best;
    if (find_best(a.logits, a.count, a.softcap, a.values, a.indices, a.arrived, best)) finish(a, best);
}
