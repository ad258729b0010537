// The likeliest of logits: the first of equals is taken, and NaN counts as the largest.
#pragma once
#include "primitives.cuh"

constexpr int WARPS = 8, THREADS = WARPS * 32;

struct Best {
    float value = __int_as_float(0xff800000);  // -inf
    int index = 0x7fffffff;

    __device__ void take(float v, int i) {
        bool equal = v == value || (isnan(v) && isnan(value));
        if (equal ? i < index : isnan(v) || v > value) value = v, index = i;
    }
    __device__ void over_warp() {
#pragma unroll
        for (int distance = 16; distance; distance /= 2) {
            float v = __shfl_xor_sync(~0u, value, distance);
            int i = __shfl_xor_sync(~0u, index, distance);
            take(v, i);
        }
    }
};

// The best of a row, in lane 0 of the first warp of the block that arrives last; false elsewhere. The blocks of the first
// dimension of the grid share the row. `values` and `indices` have one place for each of them, `arrived` is zero at first.
__device__ __forceinline__ bool find_best(const float* logits, int count, float softcap, float* values, int* indices,
                                          unsigned* arrived, int& found) {
    __shared__ float values_of_warps[WARPS];
    __shared__ int indices_of_warps[WARPS];
    __shared__ bool last;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Best best;
#pragma unroll 8
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
        float v = load_float_from_l2(logits + i);
        best.take(softcap ? softcap * tanhf(v / softcap) : v, i);
    }
    best.over_warp();
    if (lane == 0) values_of_warps[warp] = best.value, indices_of_warps[warp] = best.index;
    __syncthreads();
    if (warp) return false;
    Best of_block;
    if (lane < WARPS) of_block.take(values_of_warps[lane], indices_of_warps[lane]);
    of_block.over_warp();
    if (lane == 0) {
        values[blockIdx.x] = of_block.value, indices[blockIdx.x] = of_block.index;
        last = arrive_in_global(arrived) == gridDim.x - 1;
    }
    __syncwarp();
    if (!last) return false;
    Best of_all;
    for (int i = lane; i < gridDim.x; i += 32)
        of_all.take(load_float_from_l2(values + i), __float_as_int(load_float_from_l2((const float*)indices + i)));
    of_all.over_warp();
    found = of_all.index;
    return lane == 0;
}
