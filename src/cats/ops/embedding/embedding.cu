// The start of a token: its embedding as the residual stream, in float32, and the counters of its MLPs set to zero.
//
// It is launched in the ordinary way: all earlier work on the stream is complete when it runs, so that later kernels may
// request weights at once.
//
// The loader defines DTYPE and WIDTH.
#include "primitives.cuh"
#include "trace.cuh"

typedef long long int64;

struct Arguments : Traced {
    const char* table;    // [V, WIDTH]
    const int64* token;   // the token
    float* residual;      // [WIDTH]
    unsigned* counters;   // [count]
    int count;
    float scale;  // of the embedding
};

extern "C" __global__ void embedding(const __grid_constant__ Arguments a) {
    allow_next_kernel();
    int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    for (int i = thread; i < a.count; i += threads) a.counters[i] = 0;
    const char* row = a.table + (size_t)*a.token * WIDTH * ELEMENT_BYTES;
    for (int v = thread; v < WIDTH / VECTOR; v += threads) {
        float values[VECTOR];
        unpack(load_from_l2(row + v * 16), values);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) values[i] *= a.scale;
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) store_four(a.residual + v * VECTOR + i, values + i);
    }
}
