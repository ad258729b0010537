// Dot products of rows of 16-bit weights with the vectors of up to 16 tokens, by products of tensor cores: rows of weights are
// the left operand, tokens the columns of the right one.
//
// A row is cut into PARTS parts. A chunk is one part of up to ROWS rows in shared memory. A worker warp owns every WARPS-th unit
// of 32 columns of each part, and keeps what the tokens have there in registers, as right operands. Lane 4 g + t reads 16 bytes
// of row g: eight columns, which are two depths of each half of two products.
//
// The loader defines DTYPE, WIDTH (columns), TOKENS (1, 2, 4, 8 or 16), WARPS, ROWS (8 or 16) and PARTS.
#pragma once
#include "rows_tensor.cuh"

static_assert(ROWS == 8 || ROWS == 16);
constexpr int TILES = (TOKENS + 7) / 8;  // of eight tokens, the columns of a product
constexpr int ROW_BYTES = WIDTH * ELEMENT_BYTES, ROW_VECTORS = ROW_BYTES / 16;
constexpr int ALL_UNITS = (ROW_VECTORS + 3) / 4, PART_UNITS = (ALL_UNITS + PARTS - 1) / PARTS;
constexpr int PART_BYTES = PART_UNITS * 64, LAST_BYTES = ROW_BYTES - (PARTS - 1) * PART_BYTES;
static_assert(LAST_BYTES > 0);
// From one row of a chunk to the next: eight lanes read 64 bytes of two rows, which must lie in different banks.
constexpr int PITCH = PART_BYTES + (PART_BYTES % 128 == 64 ? 0 : 64);
constexpr int CHUNK_BYTES = ROWS * PITCH;
constexpr int UNITS = (PART_UNITS + WARPS - 1) / WARPS;  // of a warp and a part

// Requests one part of up to ROWS rows. A whole warp calls it, and arrives at `full`. Lane i below `count` gives the start of
// row i.
__device__ __forceinline__ void copy_part(char* chunk, const char* row, int part, int count, uint64* full) {
    const bool last = part == PARTS - 1;
    if (threadIdx.x % 32 == 0) expect_bytes(full, count * (last ? LAST_BYTES : PART_BYTES));
    __syncwarp();
    char* to = chunk + threadIdx.x % ROWS * PITCH;
    if (last) copy_rows<LAST_BYTES>(to, row + (PARTS - 1) * PART_BYTES, count, full);
    else copy_rows<PART_BYTES>(to, row + part * PART_BYTES, count, full);
    warp_arrive(full);
}

// The dot products of one run of rows, so far. Two sums of each, because a product waits for the product before it in its sum.
struct Dots {
    float sums[TILES][2][4] = {};
};

struct TokensInput {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32 x[PARTS][UNITS][TILES][4];  // of token g of each tile

    __device__ int unit_of(int i) const { return i * WARPS + warp; }
    // Whether unit i of the warp lies in the part, and whether this lane's columns of it lie in the row.
    __device__ bool owns(int i) const { return PART_UNITS % WARPS == 0 || unit_of(i) < PART_UNITS; }
    __device__ bool has_columns(int part, int i) const {
        return ROW_VECTORS == PARTS * PART_UNITS * 4 || (part * PART_UNITS + unit_of(i)) * 4 + t < ROW_VECTORS;
    }

    // Takes the vectors of all tokens, [TOKENS, WIDTH].
    __device__ void load(const char* from) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < UNITS; ++i)
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    const int token = tile * 8 + g;
                    const char* at = from + (size_t)token * ROW_BYTES + part * PART_BYTES + unit_of(i) * 64 + t * 16;
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if (token < TOKENS && owns(i) && has_columns(part, i)) v = load_from_l2(at);
                    uint32(&words)[4] = x[part][i][tile];
                    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
                }
    }

    // Adds the products of this warp's columns of a part. What a chunk holds after its last row changes only dots of such rows.
    __device__ void add(Dots& dots, int part, const char* chunk) const {
        const char* const rows = chunk + g * PITCH + t * 16;
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            if (!owns(i)) continue;
            uint4 low = make_uint4(0, 0, 0, 0), high = low;
            // columns after the row's end must not be read: 0 * NaN is NaN
            if (has_columns(part, i)) {
                low = *reinterpret_cast<const uint4*>(rows + unit_of(i) * 64);
                if (ROWS == 16) high = *reinterpret_cast<const uint4*>(rows + 8 * PITCH + unit_of(i) * 64);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint32(&words)[4] = x[part][i][tile];
                multiply_pairs(dots.sums[tile][0], low.x, high.x, low.y, high.y, words[0], words[1]);
                multiply_pairs(dots.sums[tile][1], low.z, high.z, low.w, high.w, words[2], words[3]);
            }
        }
    }

    // Calls put(row, token, dot) in one lane for each row of the run and each token.
    template <class F>
    __device__ void each(const Dots& dots, F put) const {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < ROWS / 4; ++i) {
                const int token = tile * 8 + 2 * t + i % 2;
                if (token < TOKENS) put(g + i / 2 * 8, token, dots.sums[tile][0][i] + dots.sums[tile][1][i]);
            }
    }
};
