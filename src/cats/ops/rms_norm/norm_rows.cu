// The norms on the way into a branch of a layer, for several rows: x = norm(base + norm(delta)) in the type of the weights.
// Within kernels of one token, every block computes it for itself (residual.cuh). For several rows that would be more to read
// than their weights.
//
// A block takes a row. The next kernel may start at once: until its own wait it reads only weights.
//
// The loader defines DTYPE, WIDTH and WARPS.
#include "residual.cuh"
#include "trace.cuh"

struct Arguments : Traced {
    Residual residual;  // base, delta and sum are [rows, WIDTH]
    char* out;          // [rows, WIDTH]
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) norm_rows(const __grid_constant__ Arguments a) {
    constexpr int TEAM = WARPS * 32;
    __shared__ float slots[WARPS];
    a.stamp(START);
    allow_next_kernel();
    const size_t first = (size_t)blockIdx.x * WIDTH;
    Residual r = a.residual;
    r.base += first, r.sum += first;
    if (r.delta) r.delta += first;
    Columns<WIDTH, TEAM> columns{static_cast<int>(threadIdx.x)};
    Team team{slots, static_cast<int>(threadIdx.x / 32), WARPS, 1};
    float x[columns.OWNED];
    load_normed(r, columns, team, true, true, x);
    a.stamp(INPUT);
#pragma unroll
    for (int v = 0; v < columns.COUNT; ++v)
        if (columns.owns(v))
            *reinterpret_cast<uint4*>(a.out + (first + columns.first(v)) * ELEMENT_BYTES) = pack(&x[v * VECTOR]);
    a.stamp(END);
}
