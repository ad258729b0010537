// Dot products of packed rows of 4- or 8-bit codes with a vector of floats, by integer products of tensor cores.
//
// Codes are the left operand: unchanged with 8 bits, after one mask with 4 bits. The vector is rounded to 16-bit fixed point,
// relative to the largest value nearby. Each rounded value is two signed bytes, in two columns of the right operand. The sum
// of a group is an exact integer. The zero point is subtracted from it, and the result is multiplied by the group's scale.
//
// The loader defines BITS (4 or 8), WIDTH (columns, padded to units), GROUP (32, 64, 128; 0: one scale per row), SCALE (type of
// scales: 0 float16, 1 bfloat16, 2 float32), ZERO_MODE (0 constant, 1 a zero point per group, 2 a shift per group),
// CONSTANT_ZERO, WARPS (how many share a row), and ROWS_OF_CHUNK (16, 8 or 4; it has a default).
// ops/quantised/rows.py describes a packed row.
#pragma once
#include "tensor_cores.cuh"

constexpr int UNIT = 512 / BITS, UNIT_BYTES = 64;  // columns of a unit: each of four lanes reads 16 bytes of it
constexpr int ALL_UNITS = WIDTH / UNIT;
static_assert(WIDTH % UNIT == 0);

// A row in memory.
constexpr int CODE_BYTES = WIDTH * BITS / 8;
constexpr int SCALE_BYTES = SCALE == 2 ? 4 : 2;
constexpr int GROUPS = GROUP ? (WIDTH + GROUP - 1) / (GROUP ? GROUP : 1) : 1;
constexpr int SCALES_AT = CODE_BYTES, EXTRAS_AT = SCALES_AT + GROUPS * SCALE_BYTES;
constexpr int USED_BYTES = EXTRAS_AT + GROUPS * (ZERO_MODE == 1 ? 1 : ZERO_MODE == 2 ? SCALE_BYTES : 0);
// Bytes from one row to the next. The same in shared and in global memory, so that a run of rows is one copy. Never a multiple
// of 128, because lanes read the same place of two rows at once.
constexpr int PITCH = (USED_BYTES + 31) / 32 * 32 + ((USED_BYTES + 31) / 32 % 4 == 0 ? 32 : 0), ROW_BYTES = PITCH;

// Rows of a chunk.
#ifdef ROWS_OF_CHUNK
constexpr int ROWS = ROWS_OF_CHUNK;
#else
constexpr int ROWS = BITS == 4 ? 16 : 8;
#endif
static_assert(ROWS == 16 || ROWS == 8 || ROWS == 4);

// Units of a warp. Those that share a scale are a segment: their sums are added up as integers. A warp owns whole segments; the
// last warps may own fewer, or none.
__device__ constexpr int up_to_multiple(int value, int step) { return (value + step - 1) / step * step; }
constexpr int UNITS = up_to_multiple((ALL_UNITS + WARPS - 1) / WARPS, GROUP == 128 && BITS == 8 ? 2 : 1);
constexpr int COLUMNS = UNITS * UNIT;  // of a warp

// Copies neighbouring rows into a chunk. A whole warp calls it, and arrives at `full`, also where the count is 0.
__device__ __forceinline__ void copy_run(char* chunk, const char* from, int count, uint64* full) {
    if (count) return copy_by_warp(chunk, from, count * ROW_BYTES, full);
#pragma unroll
    for (int i = 0; i < COPY_ARRIVALS / 32; ++i) barrier_arrive(full);
    warp_arrive(full);
}

__device__ __forceinline__ float scale_at(const char* table, int i) {
    float values[2];
#if SCALE == 0
    float16_to_float(reinterpret_cast<const unsigned short*>(table)[i], values);
#elif SCALE == 1
    values[0] = __uint_as_float(uint32(reinterpret_cast<const unsigned short*>(table)[i]) << 16);
#else
    values[0] = reinterpret_cast<const float*>(table)[i];
#endif
    return values[0];
}

// One warp's part of the vector, in registers. Its columns are SUBSETS runs of PER_SUBSET units. A product has 8 columns: two
// bytes of each subset. It multiplies the codes of one subset with all 8, and only the results of that subset are used: they
// are in lanes with t = subset.
//
// A chunk of fewer than 16 rows folds: the free rows of a product hold the same rows, with the codes of another subset.
struct IntegerInput {
    static constexpr int SUBSETS = 4, FOLDS = 16 / ROWS, STEPS = SUBSETS / FOLDS;
    static constexpr int SEGMENT_OF_GROUP = GROUP == 128 && BITS == 8 ? 2 : 1;
    static constexpr int PER_SUBSET = up_to_multiple((UNITS + SUBSETS - 1) / SUBSETS, SEGMENT_OF_GROUP);
    static constexpr int SEGMENT = GROUP ? SEGMENT_OF_GROUP : PER_SUBSET, SEGMENTS = PER_SUBSET / SEGMENT;
    static constexpr int PRODUCTS = UNIT / 32;  // of a unit, of 32 columns each
    static constexpr int PARTS = GROUP && GROUP < UNIT ? UNIT / GROUP : 1;  // groups of a segment
    // Separate sums of a segment. At least two: a product waits for the product before it in the same sum, and the upper half
    // of a byte with two codes counts 16 times.
    static constexpr int SUMS = PARTS == 1 ? 2 : PRODUCTS;
    static constexpr int RESULTS = ROWS == 16 ? 2 : 1;  // rows of a lane
    static constexpr int FACTOR = BITS == 4 ? 16 : 1;   // by which all sums are too large
    static constexpr int WORDS = PER_SUBSET * 2 * PRODUCTS;

    const int warp = threadIdx.x / 32 % WARPS, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32 x[WORDS];               // column g of the right operands
    int totals[SEGMENTS][PARTS];   // FACTOR * sum of x over the group, for subset t; without groups of the upper bytes
    int lower_total;               // without groups: the same of the lower bytes
    float back;                    // for subset t: from integers to floats

    // The first of the four columns that word i of this lane holds, and whether the vector has it.
    __device__ int column_of(int i) const {
        const int unit = warp * UNITS + g / 2 * PER_SUBSET + i / (2 * PRODUCTS), word = i % (2 * PRODUCTS);
        return unit * UNIT + word * 16 + t * 4;
    }
    __device__ bool owns(int i) const {
        const int unit = g / 2 * PER_SUBSET + i / (2 * PRODUCTS);
        return (PER_SUBSET * SUBSETS == UNITS || unit < UNITS) &&
               (UNITS * WARPS == ALL_UNITS || warp * UNITS + unit < ALL_UNITS);
    }

    // Takes the vector from get(i, values), which gives the four values of word i. It is called twice for each word.
    template <class F>
    __device__ void load_from(F get) {
        const int byte = g % 2;  // 0: the upper one
        uint32 largest = 0;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            float values[4];
            get(i, values);
#pragma unroll
            for (int j = 0; j < 4; ++j) largest = max(largest, __float_as_uint(values[j]) & 0x7fffffffu);
        }
        largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
        // large enough that its inverse does not overflow; if a value is infinite or NaN, `back` is NaN
        const float most = fmaxf(__uint_as_float(largest), 1e-30f), inverse = 32512.f / most;
        const bool finite = largest < 0x7f800000u;
        back = __shfl_sync(~0u, finite ? most * (1.f / 32512 / FACTOR) : __uint_as_float(0x7fffffffu), 8 * t);
        int sums[SEGMENTS][PARTS] = {};
        // After adding 1.5 * 2^23, the low bits of a float are the integer. Its lower byte is signed, so the upper is rounded.
        const uint32 rounding = byte ? 0 : 128, selector = byte ? 0x40 : 0x51;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            float values[4];
            uint32 integers[4];
            get(i, values);
#pragma unroll
            for (int j = 0; j < 4; ++j) integers[j] = __float_as_uint(fmaf(values[j], inverse, 12582912.f)) + rounding;
            const uint32 first = permute_bytes(integers[0], integers[1], selector);
            x[i] = permute_bytes(first, permute_bytes(integers[2], integers[3], selector), 0x5410);
            int& sum = sums[i / (2 * PRODUCTS * SEGMENT)][i / 2 % PRODUCTS * PARTS / PRODUCTS];
            sum = add_bytes(sum, x[i]);
        }
#pragma unroll
        for (int s = 0; s < SEGMENTS; ++s)
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                int sum = FACTOR * sums[s][p];
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                const int upper = __shfl_sync(~0u, sum, 8 * t), lower = __shfl_sync(~0u, sum, 8 * t + 4);
                totals[s][p] = GROUP ? upper * 256 + lower : upper;
                lower_total = lower;
            }
    }

    // The row of the chunk that is row m of the products. Lanes 0 to 7 read two rows, which are 64 bytes apart in the banks.
    static __device__ int row_of(int m) {
        const int row = PITCH % 128 == 64 ? m : (m & 12) | (m & 1) << 1 | (m >> 1 & 1);
        return row & (ROWS - 1);
    }
    // The fold of row g, or of row g + 8.
    __device__ int fold_of(bool further) const { return ROWS == 16 ? 0 : ROWS == 8 ? further : g / 4 + 2 * further; }

    // Where unit u of the warp lies in a row. For one that the warp does not have, another is read: the vector is zero there.
    __device__ int place_of(int u) const {
        const int unit = warp * UNITS + min(u, UNITS - 1);
        return (UNITS * WARPS == ALL_UNITS ? unit : min(unit, ALL_UNITS - 1)) * UNIT_BYTES;
    }

    // Calls put(row, sum) once for each row of the chunk, in one lane: the dot product of this warp's columns.
    template <class F>
    __device__ void dot(const char* rows, F put) const {
        // rows g and g + 8 of the products
        const int folds[2] = {fold_of(false), fold_of(true)};
        const char* const lines[2] = {rows + row_of(g) * PITCH, rows + row_of(g + 8) * PITCH};
        float sums[RESULTS] = {};
#pragma unroll
        for (int segment = 0; segment < SEGMENTS; ++segment) {
            // products with the upper and lower bytes
            int upper[RESULTS][PARTS] = {}, lower[RESULTS][PARTS] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                // units of padding only
                if (step * PER_SUBSET + segment * SEGMENT >= UNITS) continue;
                int products[SUMS][4] = {};
#pragma unroll
                for (int s = 0; s < SEGMENT; ++s) {
                    const int v = segment * SEGMENT + s;
                    uint32 words[2][4];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const int unit = (step + STEPS * folds[r]) * PER_SUBSET + v;
                        const uint4 read = *reinterpret_cast<const uint4*>(lines[r] + place_of(unit) + t * 16);
                        words[r][0] = read.x, words[r][1] = read.y, words[r][2] = read.z, words[r][3] = read.w;
                    }
#pragma unroll
                    for (int q = 0; q < PRODUCTS; ++q) {
                        const int w = BITS == 4 ? q / 2 * 2 : q * 2, i = (v * PRODUCTS + q) * 2;
                        const uint32 mask = BITS == 8 ? 0xffffffffu : q % 2 ? 0xf0f0f0f0u : 0x0f0f0f0fu;
                        multiply_bytes(products[q % SUMS], words[0][w] & mask, words[1][w] & mask, words[0][w + 1] & mask,
                                       words[1][w + 1] & mask, x[i], x[i + 1]);
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (t != step + STEPS * folds[r]) continue;
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        upper[r % RESULTS][part] = sum_of(products, part, 2 * r);
                        lower[r % RESULTS][part] = sum_of(products, part, 2 * r + 1);
                    }
                }
            }
            const int group = GROUP ? place_of(t * PER_SUBSET + segment * SEGMENT) * (UNIT / UNIT_BYTES) / (GROUP ? GROUP : 1) : 0;
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int r = 0; r < RESULTS; ++r)
                    add_group(sums[r], lines[r], group + part, upper[r][part], lower[r][part], totals[segment][part]);
        }
#pragma unroll
        for (int r = 0; r < RESULTS; ++r) sums[r] *= back;
        // subsets are in the four lanes t; with four rows also in lanes with another g
        if (RESULTS == 2) {
            const bool second = t & 1;
            float sum = (second ? sums[RESULTS - 1] : sums[0]) +
                        __shfl_xor_sync(~0u, second ? sums[0] : sums[RESULTS - 1], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (t < 2) put(row_of(g + 8 * t), sum);
        } else {
            float sum = ROWS == 4 && t != folds[0] && t != folds[1] ? 0.f : sums[0];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (ROWS == 4) sum += __shfl_xor_sync(~0u, sum, 16);
            if (t == 0 && g < ROWS) put(row_of(g), sum);
        }
    }

    // The sum of the products of a group with one byte of the vector, times FACTOR.
    static __device__ int sum_of(const int (&products)[SUMS][4], int part, int i) {
        if (PARTS == PRODUCTS) return products[part % SUMS][i] * (BITS == 4 && part % 2 == 0 ? 16 : 1);
        const int first = PARTS == 1 ? 0 : 2 * part;
        return products[first][i] * FACTOR + products[first + 1][i];
    }

    // Adds a group to the sum of a row.
    __device__ void add_group(float& sum, const char* row, int group, int upper, int lower, int total) const {
        int zero = CONSTANT_ZERO;
        if (ZERO_MODE == 1) zero = reinterpret_cast<const unsigned char*>(row + EXTRAS_AT)[group];
        float value, all;
        if (GROUP) {
            // less than 2^31: at most 128 columns of 255 * 2^15, or 16 * 15 * 2^15
            value = float(upper * 256 + lower - zero * total), all = float(total);
        } else {
            value = fmaf(float(upper - zero * total), 256.f, float(lower - zero * lower_total));
            all = fmaf(float(total), 256.f, float(lower_total));
        }
        sum = fmaf(scale_at(row + SCALES_AT, group), value, sum);
        if (ZERO_MODE == 2) sum = fmaf(scale_at(row + EXTRAS_AT, group), all, sum);
    }
};
