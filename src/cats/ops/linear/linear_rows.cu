// A linear layer of several tokens as one stream of rows: out[token, n] = dot(row n, x[token]) for up to 16 tokens, each a row of
// a batch. Every weight is read once. linear.cu is the same for one token.
//
// The rows of up to three matrices are one list: q, k and v are one launch. They are dealt out in runs of ROWS rows (runs.cuh).
// A block has WARPS workers, a copier and a reducer around a ring of CHUNKS chunks in shared memory. The copier only requests
// runs, part by part. A worker owns columns (rows_input.cuh). The reducer adds up the workers' sums of a run and writes them.
//
// The sum of each output is made in the same order whatever the other tokens are and whichever block makes it.
//
// Weights depend on nothing, so the copier fills the ring before the kernel before this one has ended. Until then, only
// EARLY_CHUNKS are on their way at once: reads and sums of that kernel would wait for more of them.
//
// The loader defines CHUNKS, EARLY_CHUNKS, NEXT_EARLY (whether the next kernel may start before the input is there), BLOCKS (that
// should fit on a multiprocessor), SHARED_BYTES and the macros of rows_input.cuh.
#include "rows_input.cuh"
#include "runs.cuh"
#include "trace.cuh"

constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 64, MATRICES = 3;
// Runs that may be announced and not yet written: all that a ring holds, and one more.
constexpr int RUNS = (CHUNKS + PARTS - 1) / PARTS + 1;

struct Arguments : Traced {
    const char* x;                  // [TOKENS, WIDTH]
    const char* weights[MATRICES];  // [rows of the matrix, WIDTH]
    const char* biases[MATRICES];   // [rows of the matrix] or null
    const float* add;               // [TOKENS, rows] or null: out = add + x W^T
    float* out;                     // [TOKENS, rows]
    float* copy;                    // [TOKENS, rows] or null: also gets the output, or 0 where there is no `add`
    Deal deal;                      // of runs; none has rows of two matrices
    int ends[MATRICES];             // rows up to the end of each matrix
    int run_ends[MATRICES];         // runs
    int stride;                     // floats from one token to the next in add, out and copy
    int request_early;              // the kernel before this one writes no weights
};

struct __align__(128) Shared {
    char chunks[CHUNKS][CHUNK_BYTES];
    float dots[RUNS][WARPS][TOKENS][ROWS];
    uint64 full[CHUNKS], done[CHUNKS], announced[RUNS], dotted[RUNS], reduced[RUNS], input_there;
    int row[RUNS], count[RUNS];  // of the list of all rows; a count of -1 ends the list
};
static_assert(sizeof(Shared) <= SHARED_BYTES);

__device__ __forceinline__ int matrix_of(const int (&ends)[MATRICES], int i) { return (i >= ends[0]) + (i >= ends[1]); }

__device__ __forceinline__ int start_of(const int (&ends)[MATRICES], int matrix) { return matrix ? ends[matrix - 1] : 0; }

struct Copier {
    const Arguments& a;
    Shared& shared;
    Runs runs;
    const int lane = threadIdx.x % 32;
    int chunk = 0, slot = 0, parity = 1;
    int run = 0, place = 0, place_parity = 1;

    __device__ Copier(const Arguments& a, Shared& shared) : a(a), shared(shared), runs(a.deal) {}

    // Requests the run that was taken, or announces the end of the list.
    __device__ bool request(bool more) {
        const int matrix = more ? matrix_of(a.run_ends, runs.first / 2) : 0;
        const int start = start_of(a.ends, matrix);
        const int row = (runs.first - 2 * start_of(a.run_ends, matrix)) * (ROWS / 2);
        const int count = more ? min(runs.halves * (ROWS / 2), a.ends[matrix] - start - row) : -1;
        // the second half of the last run of a matrix may be empty
        if (more && count <= 0) return true;
        announce(start + row, count);
        if (!more) return false;
        const char* from = a.weights[matrix] + (size_t)(row + lane % ROWS) * ROW_BYTES;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            wait_for_room();
            copy_part(shared.chunks[slot], from, part, count, &shared.full[slot]);
            ++chunk;
            if (++slot == CHUNKS) slot = 0, parity ^= 1;
        }
        return true;
    }

    __device__ void announce(int row, int count) {
        if (run >= RUNS) barrier_wait(&shared.reduced[place], place_parity);
        if (lane == 0) shared.row[place] = row, shared.count[place] = count;
        __syncwarp();
        warp_arrive(&shared.announced[place]);
        ++run;
        if (++place == RUNS) place = 0, place_parity ^= 1;
    }

    __device__ void wait_for_room() {
        if (chunk >= CHUNKS) return barrier_wait(&shared.done[slot], parity);
        if (!a.request_early || chunk < EARLY_CHUNKS) return;
        // until an earlier chunk has arrived, or the input has
        while (!barrier_test(&shared.full[chunk - EARLY_CHUNKS], 0) && !barrier_test(&shared.input_there, 0)) {}
    }

    __device__ void run_all() {
        if (!a.request_early) wait_for_previous_kernel();
        bool more = true;
        while (more && runs.taken < a.deal.fixed && chunk < CHUNKS) more = request(runs.take_fixed());
        wait_for_previous_kernel();
        if (NEXT_EARLY) allow_next_kernel();
        runs.ask();
        while (more && runs.taken < a.deal.fixed) more = request(runs.take_fixed());
        // in the order in which they were taken: after the first ticket without a run, no ticket has one
        while (more)
#pragma unroll
            for (int i = 0; i < TICKETS_AHEAD && more; ++i) more = request(runs.take(i));
        wait_for_own_copies();
    }
};

struct Worker {
    const Arguments& a;
    Shared& shared;
    TokensInput input;

    __device__ Worker(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void run() {
        wait_for_previous_kernel();
        input.load(a.x);
        // after our own wait, so that the next kernel knows that all kernels before this one are complete
        if (!NEXT_EARLY) allow_next_kernel();
        __syncwarp();
        warp_arrive(&shared.input_there);
        a.stamp(INPUT);
        for (int slot = 0, parity = 0, place = 0, place_parity = 0;;) {
            barrier_wait(&shared.announced[place], place_parity);
            if (shared.count[place] < 0) break;
            Dots dots;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                barrier_wait(&shared.full[slot], parity);
                input.add(dots, part, shared.chunks[slot]);
                __syncwarp();
                warp_arrive(&shared.done[slot]);
                if (++slot == CHUNKS) slot = 0, parity ^= 1;
            }
            auto& to = shared.dots[place][input.warp];
            input.each(dots, [&](int row, int token, float dot) { to[token][row] = dot; });
            __syncwarp();
            warp_arrive(&shared.dotted[place]);
            if (++place == RUNS) place = 0, place_parity ^= 1;
        }
        a.stamp(END);
    }
};

// One lane handles one row of a run, for every STEP-th token.
struct Reducer {
    static constexpr int STEP = 32 / ROWS, EACH = (TOKENS + STEP - 1) / STEP;
    const Arguments& a;
    Shared& shared;
    const int lane = threadIdx.x % 32;

    __device__ Reducer(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ int token_of(int i) const { return i * STEP + lane / ROWS; }

    __device__ void run() {
        wait_for_previous_kernel();
        for (int place = 0, parity = 0;;) {
            barrier_wait(&shared.announced[place], parity);
            const int row = shared.row[place] + lane % ROWS, count = shared.count[place];
            if (count < 0) break;
            const bool used = lane % ROWS < count;
            // requested before the workers are done, so that it has arrived by then
            float values[EACH];
#pragma unroll
            for (int i = 0; i < EACH; ++i) values[i] = used && token_of(i) < TOKENS ? added_to(row, token_of(i)) : 0.f;
            barrier_wait(&shared.dotted[place], parity);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                if (TOKENS % STEP && token_of(i) >= TOKENS) continue;
                float sum = 0.f;
#pragma unroll
                for (int warp = 0; warp < WARPS; ++warp) sum += shared.dots[place][warp][token_of(i)][lane % ROWS];
                values[i] += sum;
            }
            __syncwarp();
            warp_arrive(&shared.reduced[place]);
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (used && token_of(i) < TOKENS) write(row, token_of(i), values[i]);
            if (++place == RUNS) place = 0, parity ^= 1;
        }
        a.stamp(END);
    }

    // What is added to the product of a row.
    __device__ float added_to(int row, int token) {
        float value = a.add ? load_float_from_l2(a.add + (size_t)token * a.stride + row) : 0.f;
        const int matrix = matrix_of(a.ends, row);
        if (const char* biases = a.biases[matrix]) {
            float bias[2];
            unpack_word(load_element_from_l2(biases + (size_t)(row - start_of(a.ends, matrix)) * ELEMENT_BYTES), bias);
            value += bias[0];
        }
        return value;
    }

    __device__ void write(int row, int token, float value) {
        const size_t at = (size_t)token * a.stride + row;
        a.out[at] = value;
        if (a.copy) a.copy[at] = a.add ? value : 0.f;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_rows(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    a.stamp(START);
    if (threadIdx.x < CHUNKS) {
        barrier_init(&shared.full[threadIdx.x], ARRIVALS_OF_WARP + COPY_ARRIVALS);
        barrier_init(&shared.done[threadIdx.x], WARPS * ARRIVALS_OF_WARP);
    }
    if (threadIdx.x < RUNS) {
        barrier_init(&shared.announced[threadIdx.x], ARRIVALS_OF_WARP);
        barrier_init(&shared.dotted[threadIdx.x], WARPS * ARRIVALS_OF_WARP);
        barrier_init(&shared.reduced[threadIdx.x], ARRIVALS_OF_WARP);
    }
    if (threadIdx.x == WORKERS) barrier_init(&shared.input_there, WARPS * ARRIVALS_OF_WARP);
    barrier_init_visible();
    __syncthreads();
    if (threadIdx.x < WORKERS) Worker(a, shared).run();
    else if (threadIdx.x < WORKERS + 32) Copier(a, shared).run_all();
    else Reducer(a, shared).run();
}
