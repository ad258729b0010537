// The norm of the residual stream as the input of kernels of quantised weights.
//
// The loader defines INPUTS (columns without padding), and what integer_dot.cuh wants.
#pragma once
#include "integer_dot.cuh"
#include "primitives.cuh"
#include "residual.cuh"

// Gives each worker its part of the norm of the residual stream; called by all workers. `x` is [WIDTH], and `slots` one float
// per worker warp, in shared memory. A template, so that it is compiled for kernels that use it alone.
template <int SIZE = INPUTS>
__device__ __forceinline__ void load_normed_input(IntegerInput& input, const Residual& residual, bool early, float* x,
                                                  float* slots) {
    constexpr int WORKERS = WARPS * 32;
    Columns<SIZE, WORKERS> columns{static_cast<int>(threadIdx.x)};
    float values[columns.OWNED];
    Team team{slots, static_cast<int>(threadIdx.x / 32), WARPS, 1};
    load_normed(residual, columns, team, early, blockIdx.x == 0, values);
    columns.store(x, values);
    for (int i = SIZE + threadIdx.x; i < WIDTH; i += WORKERS) x[i] = 0.f;
    team.wait();
    input.load(x);
}
