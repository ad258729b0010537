// A linear layer of one token as a stream of rows: out[n] = dot(row n, x), where x is the norm of the residual stream
// (NORMED) or a vector of the weights' type.
//
// The rows of up to three matrices are one list: q, k and v are one launch. Each warp takes rows by its index and owns a
// ring of STAGES parts of rows in shared memory. It asks for a part again as soon as its lanes have read it, so that the
// ring stays full, and asks for the first before the kernel in front has ended: weights depend on nothing.
//
// The loader defines DTYPE, WIDTH (columns), NORMED, WARPS, STAGES and PARTS (of a row).
#include "ahead.cuh"
#include "primitives.cuh"
#include "residual.cuh"

constexpr int THREADS = WARPS * 32, MATRICES = 3;
constexpr int ROW_VECTORS = WIDTH / VECTOR, PART_VECTORS = (ROW_VECTORS + PARTS - 1) / PARTS;
constexpr int ROW_BYTES = ROW_VECTORS * 16, PART_BYTES = PART_VECTORS * 16;

struct Arguments {
    Residual residual;              // for NORMED
    const char* x;                  // [WIDTH] otherwise
    const char* weights[MATRICES];  // [rows of the matrix, WIDTH]
    const char* biases[MATRICES];   // [rows of the matrix] or null
    const float* add;               // [rows] or null: out = add + W x
    float* out;                     // [rows]
    float* copy;                    // [rows] or null: also gets the output, or 0 where there is no `add`
    Ahead ahead;                    // each warp is a worker
    int ends[MATRICES];             // rows up to the end of each matrix; the last is their number
    int request_early;              // the kernel before this one writes no weights
};

struct __align__(128) Shared {
    char parts[WARPS][STAGES][PART_BYTES];
    uint4 x[ROW_VECTORS];
    uint64 full[WARPS][STAGES];
    float slots[WARPS];
};

__device__ __forceinline__ int matrix_of(const Arguments& a, int row) { return (row >= a.ends[0]) + (row >= a.ends[1]); }

__device__ __forceinline__ int first_row(const Arguments& a, int matrix) { return matrix ? a.ends[matrix - 1] : 0; }

struct Warp {
    const Arguments& a;
    Shared& shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int step = gridDim.x * WARPS;
    int row = warp * gridDim.x + blockIdx.x, part = 0;  // what is asked for next
    bool asked_ahead = false;

    __device__ Warp(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void request(int stage) {
        if (row >= a.ends[MATRICES - 1]) {
            if (!asked_ahead) a.ahead.ask(warp * gridDim.x + blockIdx.x);
            asked_ahead = true;
            return;
        }
        int matrix = matrix_of(a, row), bytes = min(PART_BYTES, ROW_BYTES - part * PART_BYTES);
        const char* from =
            a.weights[matrix] + (size_t)(row - first_row(a, matrix)) * ROW_BYTES + part * PART_BYTES;
        uint64* full = &shared.full[warp][stage];
        if (lane == 0) expect_bytes(full, bytes);
        __syncwarp();
        copy_bytes(shared.parts[warp][stage], from, bytes, full);
        warp_arrive(full);
        if (++part == PARTS) part = 0, row += step;
    }

    __device__ float dot(int stage, int part) {
        const uint4* w = reinterpret_cast<const uint4*>(shared.parts[warp][stage]);
        const uint4* x = shared.x + part * PART_VECTORS;
        constexpr int SUMS = 4;
        float sums[SUMS] = {};
#pragma unroll
        for (int v = 0; v < (PART_VECTORS + 31) / 32; ++v) {
            int i = v * 32 + lane;
            bool there = PART_VECTORS % 32 == 0 && ROW_VECTORS % PART_VECTORS == 0;
            if (!there && i >= min(PART_VECTORS, ROW_VECTORS - part * PART_VECTORS)) continue;
            float a[VECTOR], b[VECTOR];
            unpack(w[i], a);
            unpack(x[i], b);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sums[j % SUMS] = fmaf(a[j], b[j], sums[j % SUMS]);
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    __device__ void run() {
        float sum = 0.f;
        int of_part = 0, stage = 0, parity = 0;
        for (int n = warp * gridDim.x + blockIdx.x; n < a.ends[MATRICES - 1];) {
            barrier_wait(&shared.full[warp][stage], parity);
            sum += dot(stage, of_part);
            __syncwarp();
            request(stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (++of_part < PARTS) continue;
            write(n, sum);
            sum = 0.f, of_part = 0, n += step;
        }
    }

    __device__ void write(int n, float sum) {
        float values[1] = {sum};
        float value = warp_sums(values);
        if (lane) return;
        int matrix = matrix_of(a, n);
        if (const char* biases = a.biases[matrix]) {
            float bias[2];
            unpack_word(load_element_from_l2(biases + (size_t)(n - first_row(a, matrix)) * ELEMENT_BYTES), bias);
            value += bias[0];
        }
        if (a.add) value += load_float_from_l2(a.add + n);
        a.out[n] = value;
        if (a.copy) a.copy[n] = a.add ? value : 0.f;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Warp warp(a, shared);
    if (warp.lane < STAGES) {
        barrier_init(&shared.full[warp.warp][warp.lane], ARRIVALS_OF_WARP + COPY_ARRIVALS);
        barrier_init_visible();
    }
    __syncwarp();
    if (!a.request_early) wait_for_previous_kernel();
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) warp.request(stage);

    Columns<WIDTH, THREADS> columns{static_cast<int>(threadIdx.x)};
#if NORMED
    float x[columns.OWNED];
    load_normed(a.residual, columns, Team{shared.slots, warp.warp, WARPS, 0}, a.request_early, blockIdx.x == 0, x);
#pragma unroll
    for (int v = 0; v < columns.COUNT; ++v)
        if (columns.owns(v)) shared.x[columns.first(v) / VECTOR] = pack(&x[v * VECTOR]);
#else
    wait_for_previous_kernel();
    uint4 x[columns.COUNT];
    columns.load(a.x, x);
#pragma unroll
    for (int v = 0; v < columns.COUNT; ++v)
        if (columns.owns(v)) shared.x[columns.first(v) / VECTOR] = x[v];
#endif
    // after our own wait, so that the next kernel knows that all kernels before this one are complete
    allow_next_kernel();
    __syncthreads();
    warp.run();
}
