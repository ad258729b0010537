// The end of a token of several rows: the likeliest of each row's logits, and what the next step reads.
//
// The grid is [blocks, rows]. Rows that are not active choose nothing. The choice of row i goes to the token of its line, and to
// place i of the current step's choices; its position moves on by 1. The last row that ends moves the step on.
//
// The loader defines DTYPE, of the logits: float32.
#include "best.cuh"
#include "trace.cuh"

typedef long long int64;

struct Arguments : Traced {
    const float* logits;    // [rows, count]
    float* values;          // [rows, blocks], the best of each block
    int* indices;           // [rows, blocks], and where it is
    unsigned* arrived;      // [rows], zero between calls
    unsigned* rows_ended;   // zero between calls
    const int64* lines;     // [rows]
    const int* active;      // [rows]
    int64* positions;       // [rows]
    int64* tokens;          // [lines], the newest token of each line
    int64* step;            // the number of this step
    int64* chosen;          // [steps, stride], used in turn
    int steps;
    int stride;
    int count;
    float softcap;  // 0 for none
};

extern "C" __global__ void __launch_bounds__(THREADS) choose_rows(const __grid_constant__ Arguments a) {
    const int row = blockIdx.y, rows = gridDim.y;
    wait_for_previous_kernel();
    if (a.active[row]) {
        const size_t places = (size_t)row * gridDim.x;
        int best;
        if (!find_best(a.logits + (size_t)row * a.count, a.count, a.softcap, a.values + places, a.indices + places,
                       a.arrived + row, best))
            return;
        a.arrived[row] = 0;
        a.tokens[a.lines[row]] = best;
        a.chosen[*a.step % a.steps * a.stride + row] = best;
        ++a.positions[row];
    } else if (blockIdx.x || threadIdx.x) {
        return;
    }
    // one thread of each row
    if (arrive_in_global(a.rows_ended) == rows - 1) {
        *a.rows_ended = 0;
        ++*a.step;
    }
}
