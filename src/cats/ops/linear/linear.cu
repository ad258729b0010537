// A linear layer of one token as a stream of rows: out[n] = dot(row n, x), where x is the norm of the residual stream
// (NORMED) or a vector of the weights' type.
//
// The rows of up to three matrices are one list: q, k and v are one launch. Each worker warp takes rows by its index, and
// owns a ring of STAGES parts of rows in shared memory. As soon as its lanes have read a part, it requests the next one into
// the same stage, so that the ring stays full.
//
// One more warp fills the rings for the first time. It does so before the previous kernel has ended, since weights do not
// depend on it. Few parts are in flight at once, because they delay what that kernel still reads and adds.
//
// The loader defines DTYPE, WIDTH (columns), NORMED, WARPS (workers), STAGES, PARTS (per row) and EARLY_PARTS (in flight
// before the input has arrived).
#include "primitives.cuh"
#include "residual.cuh"
#include "trace.cuh"

constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 32, MATRICES = 3;
constexpr int ROW_VECTORS = WIDTH / VECTOR, PART_VECTORS = (ROW_VECTORS + PARTS - 1) / PARTS;
constexpr int ROW_BYTES = ROW_VECTORS * 16, PART_BYTES = PART_VECTORS * 16;

struct Arguments : Traced {
    Residual residual;              // for NORMED
    const char* x;                  // [WIDTH] otherwise
    const char* weights[MATRICES];  // [rows of the matrix, WIDTH]
    const char* biases[MATRICES];   // [rows of the matrix] or null
    const float* add;               // [rows] or null: out = add + W x
    float* out;                     // [rows]
    float* copy;                    // [rows] or null: also gets the output, or 0 without `add`
    int ends[MATRICES];             // rows up to the end of each matrix; the last is the number of rows
    int request_early;              // the previous kernel writes no weights
};

struct __align__(128) Shared {
    char parts[WARPS][STAGES][PART_BYTES];
    uint4 x[ROW_VECTORS];
    uint64 full[WARPS][STAGES], input_there;
    float slots[WARPS];
};

__device__ __forceinline__ int matrix_of(const Arguments& a, int row) { return (row >= a.ends[0]) + (row >= a.ends[1]); }

__device__ __forceinline__ int first_row(const Arguments& a, int matrix) { return matrix ? a.ends[matrix - 1] : 0; }

// A worker's parts of rows are numbered from 0. Part n goes into stage n % STAGES.
struct Warp {
    const Arguments& a;
    Shared& shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rows = a.ends[MATRICES - 1], step = gridDim.x * WARPS;

    __device__ Warp(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ int row_of(int worker, int n) { return worker * gridDim.x + blockIdx.x + n / PARTS * step; }

    static __device__ int bytes_of(int part) { return min(PART_BYTES, ROW_BYTES - part * PART_BYTES); }

    __device__ const char* source_of(int row, int part) {
        int matrix = matrix_of(a, row);
        return a.weights[matrix] + (size_t)(row - first_row(a, matrix)) * ROW_BYTES + part * PART_BYTES;
    }

    __device__ void request(int worker, int n, int stage) {
        int row = row_of(worker, n), part = n % PARTS;
        if (row >= rows) return;
        copy_by_warp(shared.parts[worker][stage], source_of(row, part), bytes_of(part), &shared.full[worker][stage]);
    }

    // Part i is number i / WARPS of worker i % WARPS. Each lane requests one part, since a single lane that requests all of
    // them is slower than the memory. The warp requests half of the parts that may be in flight: one half arrives while the
    // other is requested. Parts arrive about in order, so a half has arrived when its last part has.
    __device__ void fill_rings() {
        if (!a.request_early) wait_for_previous_kernel();
        constexpr int ALL = WARPS * STAGES, AT_ONCE = EARLY_PARTS < 2 ? 1 : EARLY_PARTS < 64 ? EARLY_PARTS / 2 : 32;
        for (int first = 0; first < ALL; first += AT_ONCE) {
            if (a.request_early && first + AT_ONCE > EARLY_PARTS) wait_for_part(first + AT_ONCE - 1 - EARLY_PARTS);
            int i = first + lane, worker = i % WARPS, n = i / WARPS, row = row_of(worker, n), part = n % PARTS;
            bool there = lane < AT_ONCE && i < ALL && row < rows;
            int stage = there ? n : 0;
            const char* from = source_of(there ? row : 0, part);
            copy_by_lane(shared.parts[worker][stage], from, bytes_of(part), &shared.full[worker][stage], there);
        }
        wait_for_own_copies();
    }

    // Until the part or the input has arrived.
    __device__ void wait_for_part(int i) {
        if (row_of(i % WARPS, i / WARPS) >= rows) return;
        while (!barrier_test(&shared.full[i % WARPS][i / WARPS], 0) && !barrier_test(&shared.input_there, 0)) {}
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
        float sum = 0.f, added = 0.f;
        int stage = 0, parity = 0;
        for (int n = 0, row; (row = row_of(warp, n)) < rows; ++n) {
            // of the next 32 rows, one row per lane: a read before each write would be waited for each time
            if (n % (32 * PARTS) == 0) added = added_to(row_of(warp, n + lane * PARTS));
            barrier_wait(&shared.full[warp][stage], parity);
            sum += dot(stage, n % PARTS);
            __syncwarp();
            request(warp, n + STAGES, stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (n % PARTS < PARTS - 1) continue;
            write(row, sum, __shfl_sync(~0u, added, n / PARTS % 32));
            sum = 0.f;
        }
    }

    // What a row gets besides its product.
    __device__ float added_to(int row) {
        if (row >= rows) return 0.f;
        float value = a.add ? load_float_from_l2(a.add + row) : 0.f;
        int matrix = matrix_of(a, row);
        if (const char* biases = a.biases[matrix]) {
            float bias[2];
            unpack_word(load_element_from_l2(biases + (size_t)(row - first_row(a, matrix)) * ELEMENT_BYTES), bias);
            value += bias[0];
        }
        return value;
    }

    __device__ void write(int row, float sum, float added) {
        float values[1] = {sum};
        float value = warp_sums(values) + added;
        if (lane) return;
        a.out[row] = value;
        if (a.copy) a.copy[row] = a.add ? value : 0.f;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Warp warp(a, shared);
    a.stamp(START);
    if (warp.warp < WARPS && warp.lane < STAGES)
        barrier_init(&shared.full[warp.warp][warp.lane], ARRIVALS_OF_WARP + COPY_ARRIVALS);
    if (threadIdx.x == WORKERS) barrier_init(&shared.input_there, WARPS * ARRIVALS_OF_WARP);
    barrier_init_visible();
    __syncthreads();
    if (warp.warp == WARPS) {
        warp.fill_rings();
        return;
    }
    Columns<WIDTH, WORKERS> columns{static_cast<int>(threadIdx.x)};
#if NORMED
    float x[columns.OWNED];
    Team team{shared.slots, warp.warp, WARPS, 1};
    load_normed(a.residual, columns, team, a.request_early, blockIdx.x == 0, x);
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
    __syncwarp();
    warp_arrive(&shared.input_there);
    barrier_wait(&shared.input_there, 0);
    a.stamp(INPUT);
    warp.run();
    a.stamp(END);
}
