// The gated MLP of several tokens as one launch: sums += down @ (keep(act(gate @ x)) * (up @ x)) for up to 16 tokens, each a row
// of a batch. gated_mlp.cu is the same for one or two tokens.
//
// Each token has its own mask. Up rows and down columns are read for the neurons that some active token keeps, once for all
// tokens. Products of a token with neurons that it drops are zero.
//
// A block takes a share of the neurons, in runs of ROWS. It reads through one ring of CHUNKS chunks: first all gate rows of its
// neurons, then the up rows of the neurons that are kept, then their down columns. So only the first up rows wait for a result.
//
//   copier     requests rows in that order
//   worker     owns columns of gate and up (rows_input.cuh), and outputs of down (rows_down.cuh)
//   evaluator  adds up the workers' sums of a run (rows_evaluator.cuh)
//
// The loader defines ACTIVATION, PASSES, CHUNKS, EARLY_CHUNKS, NEXT_EARLY (whether the next kernel may start before all weights
// are requested), LIST (how many neurons a block can keep), BLOCKS (that should fit on a multiprocessor), SHARED_BYTES and the
// macros of rows_input.cuh.
#include "rows_input.cuh"
#include "rows_down.cuh"
#include "runs.cuh"
#include "trace.cuh"

constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 64;
// Runs that may be announced and not yet evaluated: all that a ring holds, and one more.
constexpr int RUNS = (CHUNKS + PARTS - 1) / PARTS + 1;
constexpr int PLACE_BYTES = CHUNK_BYTES > DEPTH * DOWN_PITCH ? CHUNK_BYTES : DEPTH * DOWN_PITCH;

struct Arguments : Traced {
    const char* x;            // [TOKENS, D]
    const char* gate;         // [F, D]
    const char* up;           // [F, D]
    const char* down;         // [F, D]: the columns of down
    const float* thresholds;  // [F]
    const char* gate_bias;    // [F] or null
    const char* up_bias;      // [F] or null
    const int* active;        // [TOKENS], 0 where a token keeps no neuron; or null
    float* sums;              // [TOKENS, D], added to
    Deal deal;                // of gate rows, in runs of ROWS
    int neurons;              // F
    int request_early;        // the kernel before this one writes no weights
};

enum Kind { GATE, UP, DOWN };

struct __align__(128) Shared {
    char chunks[CHUNKS][(PLACE_BYTES + 127) / 128 * 128];
    uint4 zeros;
    float dots[RUNS][WARPS][TOKENS][ROWS];
    // kept neurons in order, and the values of their gates; later the products
    int neuron[LIST];
    float value[LIST][TOKENS];
    uint64 full[CHUNKS], done[CHUNKS], announced[RUNS], dotted[RUNS], evaluated[RUNS], input_there;
    int kind[RUNS], count[RUNS];
    int at[RUNS];                      // gate: the first neuron; otherwise the place in the list
    int kept, gates, products;         // neurons; evaluated runs of gate rows; neurons whose products are in the list
};
static_assert(sizeof(Shared) <= SHARED_BYTES);

#include "rows_evaluator.cuh"

struct Copier {
    const Arguments& a;
    Shared& shared;
    Runs runs;
    const int lane = threadIdx.x % 32;
    int chunk = 0, slot = 0, parity = 1;
    int run = 0, place = 0, place_parity = 1;

    __device__ Copier(const Arguments& a, Shared& shared) : a(a), shared(shared), runs(a.deal) {}

    __device__ void announce(Kind kind, int count, int at) {
        if (run >= RUNS) barrier_wait(&shared.evaluated[place], place_parity);
        if (lane == 0) shared.kind[place] = kind, shared.count[place] = count, shared.at[place] = at;
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
    __device__ void advance() {
        ++chunk;
        if (++slot == CHUNKS) slot = 0, parity ^= 1;
    }

    // Requests a run of rows of gate or up; `row` is that of this lane.
    __device__ void request(Kind kind, const char* matrix, int row, int count, int at) {
        announce(kind, count, at);
        const char* from = matrix + (size_t)row * ROW_BYTES;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            wait_for_room();
            copy_part(shared.chunks[slot], from, part, count, &shared.full[slot]);
            advance();
        }
    }

    // Requests the run of gate rows that was taken; false where there is none.
    __device__ bool request_gates(bool more) {
        if (!more) return false;
        const int row = runs.first * (ROWS / 2), count = min(runs.halves * (ROWS / 2), a.neurons - row);
        // the second half of the last run may be empty
        if (count > 0) request(GATE, a.gate, row + lane % ROWS, count, row);
        return true;
    }

    __device__ void run_all() {
        if (!a.request_early) wait_for_previous_kernel();
        bool more = true;
        while (more && runs.taken < a.deal.fixed && chunk < CHUNKS) more = request_gates(runs.take_fixed());
        wait_for_previous_kernel();
        if (NEXT_EARLY) allow_next_kernel();
        runs.ask();
        while (more && runs.taken < a.deal.fixed) more = request_gates(runs.take_fixed());
        more = a.deal.counter;
        while (more)
#pragma unroll
            for (int i = 0; i < TICKETS_AHEAD && more; ++i)
                more = request_gates(runs.take(i, (runs.taken + TICKETS_AHEAD + 1) * ROWS <= LIST));
        const int gate_runs = run;
        int at = 0, kept;
        for (;;) {
            int gates;
            do {
                gates = load_acquire(&shared.gates);
                kept = load_acquire(&shared.kept);
            } while (kept - at < ROWS && gates < gate_runs);
            if (at == kept) break;
            const int count = min(ROWS, kept - at);
            request(UP, a.up, lane < count ? shared.neuron[at + lane] : 0, count, at);
            at += count;
        }
        announce(DOWN, kept, 0);
        for (int pass = 0; pass < PASSES; ++pass)
            for (int from = 0; from < kept; from += DEPTH) {
                const int count = min(DEPTH, kept - from), neuron = lane < count ? shared.neuron[from + lane] : 0;
                wait_for_room();
                copy_columns(shared.chunks[slot], a.down + (size_t)neuron * ROW_BYTES, pass, count, &shared.full[slot]);
                advance();
            }
        // after our own wait, so that the next kernel knows that all kernels before this one are complete
        if (!NEXT_EARLY) allow_next_kernel();
        wait_for_own_copies();
    }
};

struct Worker {
    const Arguments& a;
    Shared& shared;
    const int warp = threadIdx.x / 32;
    int slot = 0, parity = 0, kept = 0;

    __device__ Worker(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void wait_for_chunk() { barrier_wait(&shared.full[slot], parity); }
    __device__ void release_chunk() {
        __syncwarp();
        warp_arrive(&shared.done[slot]);
        if (++slot == CHUNKS) slot = 0, parity ^= 1;
    }

    __device__ void run() {
        dot_rows();
        a.stamp(LAST);
        for (int pass = 0; pass < PASSES; ++pass) {
            Outputs outputs;
            for (int from = 0; from < kept; from += DEPTH) {
                const int count = min(DEPTH, kept - from);
                wait_for_chunk();
                // nearly always there already
                while (load_acquire(&shared.products) < from + count) {}
                outputs.add(shared.chunks[slot], shared.value[from], count, &shared.zeros);
                release_chunk();
            }
            if (kept) outputs.finish(a.sums, pass);
        }
        a.stamp(END);
    }

    // All rows of gate and up. The input and the outputs are not in registers at the same time.
    __device__ void dot_rows() {
        TokensInput input;
        wait_for_previous_kernel();
        input.load(a.x);
        __syncwarp();
        warp_arrive(&shared.input_there);
        a.stamp(INPUT);
        for (int place = 0, place_parity = 0;;) {
            barrier_wait(&shared.announced[place], place_parity);
            if (shared.kind[place] == DOWN) {
                kept = shared.count[place];
                return;
            }
            Dots dots;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                wait_for_chunk();
                input.add(dots, part, shared.chunks[slot]);
                release_chunk();
            }
            auto& to = shared.dots[place][warp];
            input.each(dots, [&](int row, int token, float dot) { to[token][row] = dot; });
            __syncwarp();
            warp_arrive(&shared.dotted[place]);
            if (++place == RUNS) place = 0, place_parity ^= 1;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) mlp_rows(const __grid_constant__ Arguments a) {
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
        barrier_init(&shared.evaluated[threadIdx.x], ARRIVALS_OF_WARP);
    }
    if (threadIdx.x == WORKERS) {
        barrier_init(&shared.input_there, WARPS * ARRIVALS_OF_WARP);
        shared.kept = shared.gates = shared.products = 0;
        shared.zeros = make_uint4(0, 0, 0, 0);
    }
    barrier_init_visible();
    __syncthreads();
    if (threadIdx.x < WORKERS) Worker(a, shared).run();
    else if (threadIdx.x < WORKERS + 32) Copier(a, shared).run_all();
    else Evaluator(a, shared).run();
}
