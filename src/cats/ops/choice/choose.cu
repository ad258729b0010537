// The end of a token: the likeliest of its logits, and what the next step reads. The first of equals is taken, NaN counts
// as the largest, and a row that has ended gets padding.
//
// Each block finds the best of its share of the logits. The block that arrives last finds the best of all blocks.
//
// The loader defines DTYPE, of the logits: float32.
#include "primitives.cuh"
#include "trace.cuh"

typedef long long int64;

constexpr int WARPS = 8, THREADS = WARPS * 32;

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
    __shared__ float values[WARPS];
    __shared__ int indices[WARPS];
    __shared__ bool last;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_previous_kernel();
    Best best;
#pragma unroll 8
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < a.count; i += gridDim.x * THREADS) {
        float v = load_float_from_l2(a.logits + i);
        best.take(a.softcap ? a.softcap * tanhf(v / a.softcap) : v, i);
    }
    best.over_warp();
    if (lane == 0) values[warp] = best.value, indices[warp] = best.index;
    __syncthreads();
    if (warp) return;
    Best of_block;
    if (lane < WARPS) of_block.take(values[lane], indices[lane]);
    of_block.over_warp();
    if (lane == 0) {
        a.values[blockIdx.x] = of_block.value, a.indices[blockIdx.x] = of_block.index;
        last = arrive_in_global(a.arrived) == gridDim.x - 1;
    }
    __syncwarp();
    if (!last) return;
    Best of_all;
    for (int i = lane; i < gridDim.x; i += 32)
        of_all.take(load_float_from_l2(a.values + i), __float_as_int(load_float_from_l2((const float*)a.indices + i)));
    of_all.over_warp();
    if (lane == 0) finish(a, of_all.index);
}
