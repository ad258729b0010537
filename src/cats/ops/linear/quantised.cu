// A linear layer of one token whose weights are packed rows of 4- or 8-bit codes: out[n] = dot(row n, x), where x is the norm
// of the residual stream (NORMED) or a vector of the model's type. linear.cu is the same for weights of 16 or 32 bits.
//
// The rows of up to three matrices of one layout are one list: q, k and v are one launch. A block has WARPS workers, a copier
// and a reducer around a ring of CHUNKS chunks of ROWS rows in shared memory. The copier only requests runs of rows. A worker
// owns columns: it keeps its part of x in registers, and adds up its columns of each row of a chunk. The reducer adds up the
// workers' sums and writes them.
//
// Weights depend on nothing, so the copier fills the ring before the kernel before this one has ended. Until then, only
// EARLY_CHUNKS are on their way at once: reads and sums of that kernel would wait for more of them.
//
// The loader defines DTYPE (of x, of the norm's weights and of biases), INPUTS (columns without padding), NORMED, CHUNKS,
// EARLY_CHUNKS and SHARED_BYTES, and the macros of integer_dot.cuh.
#include "normed_input.cuh"
#include "runs.cuh"
#include "trace.cuh"

constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 64, MATRICES = 3;

struct Arguments : Traced {
    Residual residual;             // for NORMED
    const char* x;                 // [INPUTS] otherwise
    const char* rows[MATRICES];    // [rows of the matrix, PITCH]
    const char* biases[MATRICES];  // [rows of the matrix] or null
    const float* add;              // [rows] or null: out = add + W x
    float* out;                    // [rows]
    float* copy;                   // [rows] or null: also gets the output, or 0 where there is no `add`
    Deal deal;                     // of runs; none has rows of two matrices
    int ends[MATRICES];            // rows up to the end of each matrix
    int run_ends[MATRICES];        // runs
    int request_early;             // the kernel before this one writes no weights
};

struct __align__(128) Shared {
    char rows[CHUNKS][ROWS * PITCH];
    float dots[CHUNKS][WARPS][ROWS];
    uint64 full[CHUNKS], done[CHUNKS], reduced[CHUNKS], input_there;
    int row[CHUNKS], count[CHUNKS];  // of the list of all rows; a count of -1 ends the list
    float slots[WARPS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES);

__device__ __forceinline__ int matrix_of(const int (&ends)[MATRICES], int i) { return (i >= ends[0]) + (i >= ends[1]); }

__device__ __forceinline__ int start_of(const int (&ends)[MATRICES], int matrix) { return matrix ? ends[matrix - 1] : 0; }

struct Copier {
    const Arguments& a;
    Shared& shared;
    Runs runs;
    const int lane = threadIdx.x % 32;

    __device__ Copier(const Arguments& a, Shared& shared) : a(a), shared(shared), runs(a.deal) {}

    // Requests the run that was taken, or marks the end of the list.
    __device__ bool request(int slot, bool more) {
        const int matrix = more ? matrix_of(a.run_ends, runs.first / 2) : 0;
        const int start = start_of(a.ends, matrix);
        const int row = (runs.first - 2 * start_of(a.run_ends, matrix)) * (ROWS / 2);
        // the second half of the last run of a matrix may be empty
        const int count = more ? max(0, min(runs.halves * (ROWS / 2), a.ends[matrix] - start - row)) : -1;
        if (lane == 0) shared.row[slot] = start + row, shared.count[slot] = count;
        __syncwarp();
        copy_run(shared.rows[slot], a.rows[matrix] + (size_t)row * ROW_BYTES, max(0, count), &shared.full[slot]);
        return more;
    }

    // Returns when the chunk has arrived, or the input has.
    __device__ void wait_for_chunk(int slot) {
        while (!barrier_test(&shared.full[slot], 0) && !barrier_test(&shared.input_there, 0)) {}
    }

    __device__ void run() {
        if (!a.request_early) wait_for_previous_kernel();
        int slot = 0, parity = 1;
        bool more = true;
        for (; slot < min(a.deal.fixed, CHUNKS) && more; ++slot) {
            if (a.request_early && slot >= EARLY_CHUNKS) wait_for_chunk(slot - EARLY_CHUNKS);
            more = request(slot, runs.take_fixed());
        }
        wait_for_previous_kernel();
        runs.ask();
        auto free_slot = [&] {
            if (slot == CHUNKS) slot = 0, parity ^= 1;
            // the reducer reads sums of a chunk after the workers have used its rows
            if (runs.taken >= CHUNKS) barrier_wait(&shared.reduced[slot], parity);
        };
        while (more && runs.taken < a.deal.fixed) {
            free_slot();
            more = request(slot++, runs.take_fixed());
        }
        // in the order in which they were taken: after the first ticket without a run, no ticket has one
        while (more)
#pragma unroll
            for (int i = 0; i < TICKETS_AHEAD && more; ++i) {
                free_slot();
                more = request(slot++, runs.take(i));
            }
        wait_for_own_copies();
    }
};

struct Worker {
    const Arguments& a;
    Shared& shared;
    const int warp = threadIdx.x / 32;
    IntegerInput input;

    __device__ Worker(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void load_input() {
#if NORMED
        NormedInput{input, a.residual, shared.slots}.load(a.request_early);
#else
        wait_for_previous_kernel();
        // each word is used twice; those of long rows do not fit into registers, and are read twice
        constexpr bool KEPT = IntegerInput::WORDS * ELEMENT_BYTES <= 64;
        uint32 words[IntegerInput::WORDS][ELEMENT_BYTES];  // of four elements
#pragma unroll
        for (int i = 0; KEPT && i < IntegerInput::WORDS; ++i) load_four(i, words[i]);
        input.load_from([&](int i, float(&values)[4]) {
            if (!KEPT) load_four(i, words[i]);
#pragma unroll
            for (int w = 0; w < ELEMENT_BYTES; ++w) unpack_word(words[i][w], &values[w * 4 / ELEMENT_BYTES]);
        });
#endif
    }

    __device__ void load_four(int i, uint32 (&words)[ELEMENT_BYTES]) {
        const int column = input.column_of(i);
        const char* from = a.x + (size_t)column * ELEMENT_BYTES;
#pragma unroll
        for (int w = 0; w < ELEMENT_BYTES; ++w) words[w] = 0;
        if (!input.owns(i)) return;
        if (column + 4 <= INPUTS) {
#pragma unroll
            for (int w = 0; w < ELEMENT_BYTES; w += 2) load_two_words_from_l2(from + 4 * w, &words[w]);
        } else {
            constexpr int PER_WORD = 4 / ELEMENT_BYTES;
#pragma unroll
            for (int j = 0; j < 3; ++j)
                if (column + j < INPUTS)
                    words[j / PER_WORD] |= load_element_from_l2(from + j * ELEMENT_BYTES) << j % PER_WORD * 16;
        }
    }

    __device__ void run() {
        load_input();
        // after our own wait, so that the next kernel knows that all kernels before this one are complete
        allow_next_kernel();
        __syncwarp();
        warp_arrive(&shared.input_there);
        a.stamp(INPUT);
        for (int slot = 0, parity = 0;;) {
            barrier_wait(&shared.full[slot], parity);
            const int count = shared.count[slot];
            if (count < 0) break;
            float* dots = shared.dots[slot][warp];
            if (count) input.dot(shared.rows[slot], [&](int row, float sum) { dots[row] = sum; });
            __syncwarp();
            warp_arrive(&shared.done[slot]);
            if (++slot == CHUNKS) slot = 0, parity ^= 1;
        }
        a.stamp(END);
    }
};

struct Reducer {
    const Arguments& a;
    Shared& shared;
    const int lane = threadIdx.x % 32;

    __device__ Reducer(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void run() {
        wait_for_previous_kernel();
        for (int slot = 0, parity = 0;;) {
            barrier_wait(&shared.full[slot], parity);
            const int row = shared.row[slot] + lane, count = shared.count[slot];
            if (count < 0) break;
            // requested before the workers are done, so that it has arrived by then
            const float added = lane < count ? added_to(row) : 0.f;
            barrier_wait(&shared.done[slot], parity);
            float sum = 0.f;
#pragma unroll
            for (int warp = lane / ROWS; warp < WARPS; warp += 32 / ROWS) sum += shared.dots[slot][warp][lane % ROWS];
#pragma unroll
            for (int distance = ROWS; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            __syncwarp();
            warp_arrive(&shared.reduced[slot]);
            if (lane < count) write(row, sum + added);
            if (++slot == CHUNKS) slot = 0, parity ^= 1;
        }
        a.stamp(END);
    }

    // What is added to the product of a row.
    __device__ float added_to(int row) {
        float value = a.add ? load_float_from_l2(a.add + row) : 0.f;
        const int matrix = matrix_of(a.ends, row);
        if (const char* biases = a.biases[matrix]) {
            float bias[2];
            unpack_word(load_element_from_l2(biases + (size_t)(row - start_of(a.ends, matrix)) * ELEMENT_BYTES), bias);
            value += bias[0];
        }
        return value;
    }

    __device__ void write(int row, float value) {
        a.out[row] = value;
        if (a.copy) a.copy[row] = a.add ? value : 0.f;
    }
};

// Few enough registers that a block of attention fits beside this one; rows of more than 4,096 columns need more.
extern "C" __global__ void __maxnreg__(IntegerInput::WORDS <= 8 ? 80 : 168) quantised(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    a.stamp(START);
    if (threadIdx.x < CHUNKS) {
        barrier_init(&shared.full[threadIdx.x], ARRIVALS_OF_WARP + COPY_ARRIVALS);
        barrier_init(&shared.done[threadIdx.x], WARPS * ARRIVALS_OF_WARP);
        barrier_init(&shared.reduced[threadIdx.x], ARRIVALS_OF_WARP);
    }
    if (threadIdx.x == WORKERS) barrier_init(&shared.input_there, WARPS * ARRIVALS_OF_WARP);
    barrier_init_visible();
    __syncthreads();
    if (threadIdx.x < WORKERS) Worker(a, shared).run();
    else if (threadIdx.x < WORKERS + 32) Copier(a, shared).run();
    else Reducer(a, shared).run();
}
