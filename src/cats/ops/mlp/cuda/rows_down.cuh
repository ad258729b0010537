// A worker warp's part of `down` for up to 16 tokens, with weights of 16 bits: a part of mlp_rows.cu.
//
// A neuron's column of `down` is contiguous, one weight per output. In the products of tensor cores, outputs are the rows,
// neurons the depth and tokens the columns. The sums of all outputs do not fit into registers, so outputs are taken in PASSES:
// a pass reads its part of the columns of all kept neurons, and adds its sums to the residual streams.
//
// What a neuron is multiplied by becomes two numbers of the weights' type, its rounded value and the rest: about as exact as
// float32 is here.
#pragma once
#include "rows_tensor.cuh"

constexpr int DEPTH = 16;  // neurons of a product, and of a chunk
constexpr int ALL_OUTPUT_TILES = (WIDTH + 15) / 16, PASS_TILES = (ALL_OUTPUT_TILES + PASSES - 1) / PASSES;
constexpr int PASS_BYTES = PASS_TILES * 16 * ELEMENT_BYTES, LAST_PASS_BYTES = ROW_BYTES - (PASSES - 1) * PASS_BYTES;
static_assert(LAST_PASS_BYTES > 0);
// From one neuron of a chunk to the next: eight rows of 16 bytes must lie in different banks.
constexpr int DOWN_PITCH = PASS_BYTES + 16;
constexpr int OUTPUT_TILES = (PASS_TILES + WARPS - 1) / WARPS;  // of a warp and a pass

// Requests the part of a pass of up to DEPTH columns. A whole warp calls it, and arrives at `full`. Lane i below `count` gives
// the start of column i.
__device__ __forceinline__ void copy_columns(char* chunk, const char* column, int pass, int count, uint64* full) {
    const bool last = pass == PASSES - 1;
    if (threadIdx.x % 32 == 0) expect_bytes(full, count * (last ? LAST_PASS_BYTES : PASS_BYTES));
    __syncwarp();
    char* to = chunk + threadIdx.x % DEPTH * DOWN_PITCH;
    if (last) copy_rows<LAST_PASS_BYTES>(to, column + (PASSES - 1) * PASS_BYTES, count, full);
    else copy_rows<PASS_BYTES>(to, column + pass * PASS_BYTES, count, full);
    warp_arrive(full);
}

struct Outputs {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sums[OUTPUT_TILES][TILES][4] = {};

    __device__ int tile_of(int i) const { return i * WARPS + warp; }
    __device__ bool owns(int i) const { return PASS_TILES % WARPS == 0 || tile_of(i) < PASS_TILES; }

    // Adds up to DEPTH neurons. Their products are [neurons, TOKENS]; `zeros` are 16 bytes of shared memory.
    __device__ void add(const char* chunk, const float* products, int count, const uint4* zeros) {
        uint32 value[TILES][2], rest[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float both[2], rests[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int neuron = half * 8 + 2 * t + i, token = tile * 8 + g;
                    both[i] = neuron < count && token < TOKENS ? products[neuron * TOKENS + token] : 0.f;
                }
                value[tile][half] = pack_word(both);
                unpack_word(value[tile][half], rests);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    rests[i] = both[i] - rests[i];
                    // what is not finite has no rest
                    if (!(fabsf(rests[i]) < 3.402823466e38f)) rests[i] = 0.f;
                }
                rest[tile][half] = pack_word(rests);
            }
        // the neuron and the half of a tile whose address this lane gives; places without a neuron hold anything, even NaN
        const int neuron = lane / 16 * 8 + lane % 8;
        const bool there = neuron < count;
        const char* from = there ? chunk + neuron * DOWN_PITCH + lane / 8 % 2 * 16 + warp * 32 : reinterpret_cast<const char*>(zeros);
        const int step = there ? WARPS * 32 : 0;
#pragma unroll
        for (int i = 0; i < OUTPUT_TILES; ++i) {
            if (!owns(i)) continue;
            uint32 a[4];
            load_transposed(from + i * step, a);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                multiply_pairs(sums[i][tile], a[0], a[1], a[2], a[3], value[tile][0], value[tile][1]);
                multiply_pairs(sums[i][tile], a[0], a[1], a[2], a[3], rest[tile][0], rest[tile][1]);
            }
        }
    }

    // Adds the sums of a pass to those of all blocks, [TOKENS, WIDTH].
    __device__ void finish(float* target, int pass) const {
#pragma unroll
        for (int i = 0; i < OUTPUT_TILES; ++i)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int output = (pass * PASS_TILES + tile_of(i)) * 16 + g + j / 2 * 8, token = tile * 8 + 2 * t + j % 2;
                    if (owns(i) && output < WIDTH && token < TOKENS)
                        add_one_to_global(target + (size_t)token * WIDTH + output, sums[i][tile][j]);
                }
    }
};
