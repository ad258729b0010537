// A worker warp's part of `down`, whose weights are packed columns of 4- or 8-bit codes (ops/quantised/columns.py).
//
// A column is a neuron: one code per output. In the products of tensor cores, neurons are the depth and outputs are the rows.
// With one token, all 8 columns of a product would be the same. So 8 tiles of outputs share one set of sums: in tile p, only
// column p of the right operand is not zero.
//
// A mask makes float16 numbers of codes: 1024 + code, or 1024 + 16 * code for the upper half of a byte. What is too much is
// subtracted when the scales are applied, once for each group of neurons.
#pragma once
#include "tensor_cores.cuh"

constexpr int DOWN_ROWS = DOWN_BITS == 4 ? 16 : 8;  // neurons of a chunk
constexpr int OUTPUTS_OF_SET = 128, SETS_OF_ALL = (INPUTS + OUTPUTS_OF_SET - 1) / OUTPUTS_OF_SET;
constexpr int SETS = (SETS_OF_ALL + WARPS - 1) / WARPS;  // of a warp; 16 outputs of a set for each g
constexpr int SET_BYTES = OUTPUTS_OF_SET * DOWN_BITS / 8;
constexpr int DOWN_BYTES = (SETS_OF_ALL * SET_BYTES + 31) / 32 * 32;
// Four rows are read at once, 32 bytes of each: they must lie in different banks.
constexpr int DOWN_PITCH = DOWN_BYTES + (DOWN_BYTES % 64 == 0 ? 32 : 0);
constexpr int DOWN_SCALE_BYTES = DOWN_SCALE == 2 ? 4 : 2;
constexpr float OFFSET = 1024.f;
constexpr uint32 MAGIC = 0x64006400, ONES = 0x3c003c00;

// Scales, and zero points or shifts, of the four consecutive outputs that a lane owns of each set.
struct DownScales {
    uint32 scales[SETS][DOWN_SCALE_BYTES], extras[SETS][DOWN_ZERO_MODE == 2 ? DOWN_SCALE_BYTES : 1];
};

struct Down {
    const Arguments& a;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sums[SETS][4];     // products of the group: outputs 0, 2, 1, 3 of the lane's four
    float totals[SETS][4];   // the same outputs, with scales
    float factor = 0.f;      // sum of the group's products
    float by = 0.f;          // the power of two that products were multiplied by; 0 before the first
    int group = -1;          // of neurons; -1 before the first
    DownScales tables;

    __device__ explicit Down(const Arguments& a) : a(a) {
#pragma unroll
        for (int i = 0; i < SETS * 4; ++i) (&sums[0][0])[i] = (&totals[0][0])[i] = 0.f;
    }

    __device__ bool owns(int set) const { return SETS * WARPS == SETS_OF_ALL || warp * SETS + set < SETS_OF_ALL; }
    __device__ int first_output(int set) const { return (warp * SETS + set) * OUTPUTS_OF_SET + g * 16 + t * 4; }
    __device__ bool has_outputs(int set) const {
        return owns(set) && (INPUTS % OUTPUTS_OF_SET == 0 || first_output(set) < INPUTS);
    }

    // Products become float16. They are multiplied by a power of two. The first one brings the largest product to about 2^9; a
    // smaller one follows when a product would be more than 2^15.
    __device__ void make_room(float largest) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        if (by != 0.f && largest * by <= 32768.f) return;
        // infinite products stay infinite, and NaN is never the largest
        const int exponent = min(max(int(__float_as_uint(largest) >> 23), 30), 254);
        const float smaller = __uint_as_float((127 + 9 + 127 - exponent) << 23);
        const float ratio = by == 0.f ? 1.f : smaller / by;
        by = smaller, factor *= ratio;
#pragma unroll
        for (int i = 0; i < SETS * 4; ++i) (&sums[0][0])[i] *= ratio;
    }

    // Adds neurons of one group: `count` rows of a chunk, times their products.
    __device__ void add(const char* chunk, const float* products, int count, int their_group) {
        if (their_group != group) {
            apply_scales();
            group = their_group;
            load_scales();
        }
        if (DOWN_ROWS == 16 && count <= 8) add_rows<2>(chunk, products, count);
        else add_rows<DOWN_ROWS / 4>(chunk, products, count);
    }

    // EACH neurons of each lane t: half of a chunk is half of the work.
    template <int EACH>
    __device__ void add_rows(const char* chunk, const float* products, int count) {
        // neurons t and t + 4 (and t + 8, t + 12) are depths 2 t and 2 t + 1 (and 2 t + 8, 2 t + 9)
        constexpr int RIGHT = EACH / 2;
        float z[EACH];
        uint32 right[RIGHT];
#pragma unroll
        for (int j = 0; j < EACH; ++j) z[j] = t + 4 * j < count ? products[t + 4 * j] : 0.f;
        float largest = 0.f;
#pragma unroll
        for (int j = 0; j < EACH; ++j) largest = fmaxf(largest, fabsf(z[j]));
        make_room(largest);
#pragma unroll
        for (int j = 0; j < EACH; ++j) z[j] *= by;
#pragma unroll
        for (int j = 0; j < RIGHT; ++j) right[j] = float_to_float16(&z[2 * j]);
        float all[4] = {};
        multiply(all, ONES, ONES, right, right);
        factor += all[0];
        const char* rows = chunk + t * DOWN_PITCH + g * (SET_BYTES / 8);
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            if (!owns(set)) continue;
            const char* from = rows + (warp * SETS + set) * SET_BYTES;
#if DOWN_BITS == 4
            uint2 words[EACH];
#pragma unroll
            for (int j = 0; j < EACH; ++j) words[j] = *reinterpret_cast<const uint2*>(from + 4 * j * DOWN_PITCH);
#pragma unroll
            for (int p = 0; p < 8; p += 2) {
                // outputs 2 p to 2 p + 3 of the 16
                uint32 pairs[RIGHT], later[RIGHT];
#pragma unroll
                for (int j = 0; j < RIGHT; ++j) {
                    const uint32 one = p < 4 ? words[2 * j].x : words[2 * j].y;
                    const uint32 two = p < 4 ? words[2 * j + 1].x : words[2 * j + 1].y;
                    pairs[j] = permute_bytes(one, two, p % 4 ? 0x7632 : 0x5410);
                    later[j] = pairs[j] >> 8;
                }
                multiply_tile(sums[set], p, pairs, right);
                multiply_tile(sums[set], p + 1, later, right);
            }
#else
            const uint4 first = *reinterpret_cast<const uint4*>(from);
            const uint4 second = *reinterpret_cast<const uint4*>(from + 4 * DOWN_PITCH);
            const uint32 one[4] = {first.x, first.y, first.z, first.w}, two[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
            for (int p = 0; p < 8; ++p) {
                const uint32 pairs[1] = {permute_bytes(one[p / 2], two[p / 2], p % 2 ? 0x7362 : 0x5140)};
                multiply_tile(sums[set], p, pairs, right);
            }
#endif
        }
    }

    // Two outputs of a tile: the first in row g, the second in row g + 8.
    template <int RIGHT>
    __device__ void multiply_tile(float (&c)[4], int tile, const uint32 (&pairs)[RIGHT], const uint32 (&right)[RIGHT]) {
        uint32 own[RIGHT], first[RIGHT], second[RIGHT];
#pragma unroll
        for (int j = 0; j < RIGHT; ++j) {
            own[j] = g == tile ? right[j] : 0;
#if DOWN_BITS == 4
            first[j] = and_or(pairs[j], 0x000f000f, MAGIC), second[j] = and_or(pairs[j], 0x00f000f0, MAGIC);
#else
            first[j] = permute_bytes(pairs[j], MAGIC, 0x5150), second[j] = permute_bytes(pairs[j], MAGIC, 0x5352);
#endif
        }
        multiply(c, first[0], second[0], own, first, second);
    }

    static __device__ void multiply(float (&c)[4], uint32 a0, uint32 a1, const uint32 (&b)[1], const uint32 (&)[1],
                                    const uint32 (&)[1]) {
        multiply_halves(c, a0, a1, b[0]);
    }
    static __device__ void multiply(float (&c)[4], uint32 a0, uint32 a1, const uint32 (&b)[2], const uint32 (&first)[2],
                                    const uint32 (&second)[2]) {
        multiply_halves(c, a0, a1, first[1], second[1], b[0], b[1]);
    }
    static __device__ void multiply(float (&c)[4], uint32 a0, uint32 a1, const uint32 (&b)[1], const uint32 (&)[1]) {
        multiply_halves(c, a0, a1, b[0]);
    }
    static __device__ void multiply(float (&c)[4], uint32 a0, uint32 a1, const uint32 (&b)[2], const uint32 (&)[2]) {
        multiply_halves(c, a0, a1, a0, a1, b[0], b[1]);
    }

    // Requests the scales of a group, which arrive while its neurons are added.
    __device__ void load_scales() {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            if (!has_outputs(set)) continue;
            const size_t at = (size_t)group * INPUTS + first_output(set);
            load_four(a.down_scales + at * DOWN_SCALE_BYTES, tables.scales[set]);
#if DOWN_ZERO_MODE == 1
            tables.extras[set][0] = load_word_from_l2(a.down_extras + at);
#elif DOWN_ZERO_MODE == 2
            load_four(a.down_extras + at * DOWN_SCALE_BYTES, tables.extras[set]);
#endif
        }
    }
    static __device__ void load_four(const char* from, uint32 (&words)[DOWN_SCALE_BYTES]) {
#pragma unroll
        for (int w = 0; w < DOWN_SCALE_BYTES; w += 2) load_two_words_from_l2(from + 4 * w, &words[w]);
    }
    static __device__ float value_of(const uint32 (&words)[DOWN_SCALE_BYTES], int i) {
#if DOWN_SCALE == 2
        return __uint_as_float(words[i]);
#else
        const uint32 half = words[i / 2] >> i % 2 * 16 & 0xffff;
#if DOWN_SCALE == 1
        return __uint_as_float(half << 16);
#else
        float values[2];
        float16_to_float(half, values);
        return values[0];
#endif
#endif
    }

    // Ends a group: adds its sums, times the scales, to the totals.
    __device__ void apply_scales() {
        if (group >= 0) {
            const float back = 1.f / by;
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
                if (!has_outputs(set)) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // output i is in row g + 8 where it is odd; there the upper half of a byte counts 16 times
                    float sum = sums[set][i % 2 * 2 + i / 2] - OFFSET * factor;
                    if (DOWN_BITS == 4 && i % 2) sum *= 1.f / 16;
                    float zero = DOWN_CONSTANT_ZERO;
                    if (DOWN_ZERO_MODE == 1) zero = float(tables.extras[set][0] >> 8 * i & 0xff);
                    totals[set][i] = fmaf(value_of(tables.scales[set], i), (sum - zero * factor) * back, totals[set][i]);
#if DOWN_ZERO_MODE == 2
                    totals[set][i] = fmaf(value_of(tables.extras[set], i), factor * back, totals[set][i]);
#endif
                }
            }
        }
        factor = 0.f;
#pragma unroll
        for (int i = 0; i < SETS * 4; ++i) (&sums[0][0])[i] = 0.f;
    }

    // Adds this block's part to the sums of all blocks.
    __device__ void finish() {
        apply_scales();
        if (group < 0) return;
#pragma unroll
        for (int set = 0; set < SETS; ++set)
            if (has_outputs(set)) add_to_global(a.sums + first_output(set), totals[set]);
    }
};
