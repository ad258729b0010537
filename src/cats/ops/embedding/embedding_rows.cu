// The start of a token of several rows: the embedding of each row's newest token as its residual stream, in float32.
//
// The grid is [blocks, rows]. Rows that are not active get zeros. It is launched in the ordinary way, like embedding.cu: all
// earlier work on the stream is complete when it runs.
//
// The loader defines DTYPE and WIDTH.
#include "primitives.cuh"
#include "trace.cuh"

typedef long long int64;

struct Arguments : Traced {
    const char* table;     // [V, WIDTH]
    const int64* tokens;   // [lines], the newest token of each line
    const int64* lines;    // [rows], the line of each row
    const int* active;     // [rows]
    float* residual;       // [rows, WIDTH]
    float scale;           // of the embedding
};

extern "C" __global__ void embedding_rows(const __grid_constant__ Arguments a) {
    allow_next_kernel();
    const int row = blockIdx.y;
    const bool active = a.active[row];
    const char* from = a.table + (active ? (size_t)a.tokens[a.lines[row]] * WIDTH * ELEMENT_BYTES : 0);
    float* to = a.residual + (size_t)row * WIDTH;
    for (int v = blockIdx.x * blockDim.x + threadIdx.x; v < WIDTH / VECTOR; v += gridDim.x * blockDim.x) {
        float values[VECTOR] = {};
        if (active) unpack(load_from_l2(from + v * 16), values);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) values[i] *= a.scale;
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) store_four(to + v * VECTOR + i, values + i);
    }
}
