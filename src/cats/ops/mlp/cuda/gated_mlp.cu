// The gated MLP of one or two tokens as one launch: out = down @ (keep(act(gate @ x)) * (up @ x)).
//
// The "router" is the matrix whose outputs are compared with the thresholds (gate, or up). All its rows are read. Rows of
// the "other" matrix and of `down` are read where a neuron is kept. Each neuron has one contiguous row in each of the three.
//
// A block is GROUPS groups. A group is one scheduler warp (scheduler.cuh) and WARPS worker warps (worker.cuh) around a ring
// of CHUNKS chunks of ROWS rows in shared memory. It works on its own share of the router rows:
//
//   scheduler   fills free chunks: requests the down rows of neurons whose product is known, else the other rows of
//               kept neurons, else further router rows; adds up the workers' partial dot products, applies activation
//               and threshold, and queues the kept neurons
//   worker      owns a slice of the columns: holds its slice of x and of the output in registers, and takes part in
//               every row, so that no warp needs its own copy of x or its own sum of outputs
//
// Chunks are filled, worked on and evaluated in the order of the ring, even where there is nothing to put into a chunk.
// `full` says that the rows of a chunk have arrived, `done` that all workers have read them. At the end, each warp adds its
// slice of the output to global memory. The last warp to arrive there converts the sums and sets the workspace back to zero.
//
// Weights do not depend on the previous kernel. Where that kernel is known to write no weights, the ring is filled before it
// has ended. Everything else waits for its end.
//
// In the chain of launches of a token (RESIDUAL), x is the norm of the residual stream, and the output is added to the
// stream: there are no sums to convert and no workspace to reset.
//
// The loader defines DTYPE, HIDDEN (D), BATCH (B), ACTIVATION, GROUPS, ROWS, CHUNKS, WARPS, COPIES, SHARED_BYTES and
// RESIDUAL.
#include "primitives.cuh"
#include "residual.cuh"
#include "trace.cuh"

constexpr int ROW_BYTES = HIDDEN * ELEMENT_BYTES;
constexpr int ROW_VECTORS = ROW_BYTES / 16;
constexpr int WORKERS = WARPS * 32, GROUP_THREADS = WORKERS + 32;
// 16-byte vectors of a row that one worker thread owns: tid, tid + WORKERS, ...
constexpr int VECTORS = (ROW_VECTORS + WORKERS - 1) / WORKERS;
constexpr int OWNED = VECTORS * VECTOR;
// No more neurons wait in a queue than the ring and two more chunks hold, because they are requested first. A power of two,
// for a cheap modulo.
__device__ constexpr int queue_size() {
    int size = 1;
    while (size < (CHUNKS + 2) * ROWS) size *= 2;
    return size;
}
constexpr int QUEUE = queue_size();

__device__ constexpr int rows_at_once() {
    int rows = 1;
    while (rows < ROWS && rows * 2 * VECTORS <= 8) rows *= 2;
    return rows;
}

// What a chunk holds: rows to multiply by x, down rows, nothing this time, or nothing until the end.
enum Kind { DOT, DOWN, NOTHING, STOP };

struct Arguments : Traced {
    const char* x;                     // [B, D]
    const char* router;                // [F, D]
    const char* other;                 // [F, D]
    const char* down;                  // [F, D]: the columns of down
    const float* thresholds;           // [F]
    const float* product_thresholds;   // [F] or null
    const char* router_bias;           // [F] or null
    const char* other_bias;            // [F] or null
    const char* down_bias;             // [D] or null
    char* out;                         // [B, D]
    float* sums;                       // [COPIES, B, D], zero between calls
    float* partials;                   // [blocks, B, D] for sums in a fixed order, else null
    unsigned* counters;                // COUNTERS of them, zero between calls
    int neurons;                       // F
    int fixed_runs;                    // runs of ROWS router rows that each group takes before it takes tickets
    int long_tickets;                  // tickets that stand for ROWS rows; later ones stand for `short_rows`
    int short_rows;
    int gate_is_router;
    int request_early;                 // the previous kernel writes no weights
    Residual residual;                 // for RESIDUAL, instead of x; then `out` is null, and `sums` [D] is added to
};

// Counters: the next ticket, then arrivals of blocks. For each warp: one for all blocks, one per team of TEAM blocks.
constexpr int TICKET = 0, ALL_ARRIVED = 32, TEAM_ARRIVED = 64, TEAM = 16, MAX_WARPS = 32;
static_assert(GROUPS * WARPS <= MAX_WARPS);

struct __align__(128) Group {
    char rows[CHUNKS][ROWS][ROW_BYTES];
    uint64 full[CHUNKS], done[CHUNKS];
    int kind[CHUNKS];
    float dots[CHUNKS][WARPS][BATCH][ROWS];  // partial dot products, from the workers
    float factor[CHUNKS][BATCH][ROWS];       // what down rows are multiplied by, from the scheduler
    // first-in, first-out queues of the scheduler: neurons that wait for their other row, and for their down row
    int neuron[2][QUEUE];
    float value[2][BATCH][QUEUE];  // the router's value, and the product
};
constexpr int OTHERS = 0, DOWNS = 1;
static_assert(GROUPS * sizeof(Group) <= SHARED_BYTES, "the loader asks for too little shared memory");

#include "scheduler.cuh"
#include "worker.cuh"

extern "C" __global__ void __launch_bounds__(GROUPS * GROUP_THREADS, 1)
    gated_mlp(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    int group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
    Group& shared = reinterpret_cast<Group*>(memory)[group];
    a.stamp(START);
    if (thread < CHUNKS) {
        barrier_init(&shared.full[thread], ARRIVALS_OF_WARP + COPY_ARRIVALS);
        barrier_init(&shared.done[thread], WARPS * ARRIVALS_OF_WARP);
        barrier_init_visible();
    }
    __syncthreads();
    if (thread < WORKERS) {
        Worker(a, shared).run();
    } else {
        Scheduler(a, shared, group).run();
        wait_for_own_copies();
    }
}
