// The gated MLP of one or two tokens as one launch: out = down @ (keep(act(gate @ x)) * (up @ x)).
//
// The "router" is the matrix that is read whole and compared with the thresholds (gate, or up), the "other" matrix
// and `down` are read where a neuron is kept. A neuron's weights are one contiguous row of each of the three.
//
// A block is one scheduler warp and WARPS worker warps around a ring of CHUNKS chunks of ROWS rows in shared memory:
//
//   scheduler   fills free chunks: requests the down rows of neurons whose product is coming, else the other rows of
//               kept neurons, else further router rows; adds up the workers' partial dot products, applies activation
//               and threshold, and queues what was kept
//   worker      owns a slice of the columns: keeps its slice of x and of the output in registers, and takes part in
//               every row, so that blocks need neither a copy of x nor a reduction of outputs between warps
//
// Chunks are filled, worked on and evaluated in ring order. `full` says that a chunk's rows arrived, `done` that
// all workers have read them. At the end each warp adds its slice of the output to global memory; the last one to
// arrive there converts the sums and leaves the workspace as it found it, zero.
//
// The loader defines DTYPE, HIDDEN (D), BATCH (B), ACTIVATION, ROWS, CHUNKS, WARPS, MIN_BLOCKS
// and SHARED_BYTES.
#include "primitives.cuh"

#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define RELU 3

constexpr int ROW_BYTES = HIDDEN * ELEMENT_BYTES;
constexpr int ROW_VECTORS = ROW_BYTES / 16;
constexpr int WORKERS = WARPS * 32;
// 16-byte vectors of a row that one worker thread owns: tid, tid + WORKERS, ...
constexpr int VECTORS = (ROW_VECTORS + WORKERS - 1) / WORKERS;
constexpr int OWNED = VECTORS * VECTOR;
// Kept neurons on their way: never more than the rows of the ring and one chunk.
constexpr int QUEUE = 2 * CHUNKS * ROWS;

__device__ constexpr int rows_at_once() {
    int rows = 1;
    while (rows < ROWS && rows * 2 * VECTORS <= 8) rows *= 2;
    return rows;
}

enum Kind { DOT, DOWN, STOP };

struct Arguments {
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
    float* sums;                       // [B, D], zero between calls
    float* partials;                   // [blocks, B, D] for sums in a fixed order, else null
    unsigned* counters;                // COUNTERS of them, zero between calls
    int neurons;                       // F
    int fixed_runs;                    // runs of ROWS router rows that each block takes before it asks for more
    int gate_is_router;
    int request_early;                 // the kernel before this one writes no weights
    int prefetch_runs;
};

// Counters: the next run of router rows, then arrivals of blocks, one counter a warp and a group of GROUP blocks.
constexpr int TICKET = 0, ALL_ARRIVED = 32, GROUP_ARRIVED = 64, GROUP = 16, MAX_WARPS = 16;
static_assert(WARPS <= MAX_WARPS);

struct Shared {
    char rows[CHUNKS][ROWS][ROW_BYTES];
    uint64 full[CHUNKS], done[CHUNKS];
    int kind[CHUNKS];
    int products_before[CHUNKS];  // of a down chunk: its factors are known once `evaluated` is here
    float dots[CHUNKS][WARPS][BATCH][ROWS];  // partial dot products, from the workers
    float factor[CHUNKS][BATCH][ROWS];       // what down rows are multiplied with, from the scheduler
    // what the scheduler keeps for each row of a dot chunk
    float limit[CHUNKS][ROWS];
    uint32 bias[CHUNKS][ROWS];
    int neuron[CHUNKS][ROWS];
    int ticket[CHUNKS][ROWS];  // of an other row or a down row; NEW for a router row, NONE for an empty place
    // kept neurons, by ticket modulo QUEUE: router value, replaced by the product
    int kept_neuron[QUEUE];
    float kept_value[QUEUE][BATCH];
    int down_queue[QUEUE];  // tickets whose down row may be requested
};
constexpr int NEW = -1, NONE = -2;
static_assert(sizeof(Shared) <= SHARED_BYTES, "the loader asks for too little shared memory");

__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == SILU
    return x / (1.f + expf(-x));
#elif ACTIVATION == GELU
    return .5f * x * (1.f + erff(x * .70710678118654752f));
#elif ACTIVATION == GELU_TANH
    return .5f * x * (1.f + tanhf(.79788456080286536f * (x + .044715f * x * x * x)));
#else
    return x < 0.f ? 0.f : x;
#endif
}

// NaN is kept.
__device__ __forceinline__ bool dropped(float value, float threshold) { return fabsf(value) < threshold; }

// One lane handles one row of a chunk; all members are the same in every lane, unless said otherwise.
struct Scheduler {
    const Arguments& a;
    Shared& shared;
    const int lane = threadIdx.x % 32;
    const bool late_down;  // the product decides whether the down row is read

    // positions in the ring, counted from the start: evaluated <= released <= filled <= evaluated + CHUNKS
    int evaluated = 0, released = 0, filled = 0;
    // tickets created, and those whose other row was requested; entries of down_queue written, and requested
    int kept = 0, others = 0, downs_queued = 0, downs = 0;
    int downs_settled = 0;  // entries of down_queue whose other row is not in the chunk that was filled last
    // rows [row, row_end) of the current run of router rows are not requested yet
    int row = 0, row_end = 0, runs_taken = 0;
    int next_run = 0;  // in lane 0 alone: asked for one run ahead, because the answer takes long
    bool router_left = true;

    __device__ Scheduler(const Arguments& a, Shared& shared)
        : a(a), shared(shared), late_down(a.product_thresholds || (ACTIVATION == RELU && !a.gate_is_router)) {}

    __device__ void run() {
        if (!a.request_early) wait_for_previous_kernel();
        while (filled < CHUNKS && runs_taken < a.fixed_runs && fill()) {}
        if (a.request_early) {
            prefetch_fixed_runs();
            wait_for_previous_kernel();
        }
        ask_for_run();
        while (filled < CHUNKS && fill()) {}
        while (evaluated < filled) {
            // only after our own wait: the next kernel then knows that all kernels before this one are complete
            if (!router_left) allow_next_kernel();
            int chunk = evaluated % CHUNKS;
            int ticket = lane < ROWS ? shared.ticket[chunk][lane] : NONE;
            int neuron = lane < ROWS ? shared.neuron[chunk][lane] : 0;
            bool is_dot = shared.kind[chunk] == DOT;
            barrier_wait(&shared.done[chunk], evaluated / CHUNKS & 1);
            if (is_dot) evaluate(chunk, ticket, neuron);
            ++evaluated;
            release();
            while (filled < evaluated + CHUNKS && fill()) {}
        }
        post(STOP, NONE, 0, nullptr, nullptr, nullptr);
    }

    __device__ void ask_for_run() {
        if (lane == 0) next_run = atomicAdd(a.counters + TICKET, 1u);
    }

    __device__ int fixed_run(int i) { return i * gridDim.x + blockIdx.x; }

    __device__ void take_run() {
        int run;
        if (runs_taken < a.fixed_runs) {
            run = fixed_run(runs_taken);
        } else {
            run = a.fixed_runs * gridDim.x + __shfl_sync(~0u, next_run, 0);
            ask_for_run();
        }
        ++runs_taken;
        row = min(run * ROWS, a.neurons);
        row_end = min(row + ROWS, a.neurons);
        router_left = row < row_end;
    }

    __device__ void prefetch_fixed_runs() {
        int i = runs_taken + lane;
        if (lane >= a.prefetch_runs || i >= a.fixed_runs) return;
        int first = fixed_run(i) * ROWS, rows = min(ROWS, a.neurons - first);
        if (rows > 0) prefetch_to_l2(a.router + (size_t)first * ROW_BYTES, rows * ROW_BYTES);
    }

    // Fills the next chunk with what is most urgent. False where there is nothing to request.
    __device__ bool fill() {
        if (router_left && row == row_end) take_run();
        int other_rows = min(kept - others, ROWS), router_rows = min(ROWS - other_rows, row_end - row);
        bool only_downs = other_rows + router_rows == 0;
        // down rows right behind their other rows would make the workers wait for the products in between
        int down_rows = min((only_downs || late_down ? downs_queued : downs_settled) - downs, ROWS);
        if (down_rows == ROWS || (only_downs && down_rows > 0)) {
            int ticket = lane < down_rows ? shared.down_queue[(downs + lane) % QUEUE] : NONE;
            downs += down_rows;
            downs_settled = downs_queued;
            shared.products_before[filled % CHUNKS] = late_down ? 0 : only_downs ? filled : filled - 1;
            post(DOWN, ticket, ticket == NONE ? 0 : shared.kept_neuron[ticket % QUEUE], a.down, nullptr, nullptr);
            if (released == filled - 1) release();
            return true;
        }
        if (only_downs) return false;
        bool is_other = lane < other_rows, is_router = !is_other && lane < other_rows + router_rows;
        int ticket = is_other ? others + lane : is_router ? NEW : NONE;
        int neuron = is_other ? shared.kept_neuron[ticket % QUEUE] : row + lane - other_rows;
        if (is_other && !late_down) shared.down_queue[(downs_queued + lane) % QUEUE] = ticket;
        post(DOT, ticket, neuron, is_other ? a.other : a.router,
             is_other ? a.product_thresholds : a.thresholds, is_other ? a.other_bias : a.router_bias);
        downs_settled = downs_queued;
        if (!late_down) downs_queued += other_rows;
        others += other_rows;
        row += router_rows;
        return true;
    }

    // Requests each lane's row into the next chunk, with the row's threshold and bias where there are such.
    __device__ void post(Kind kind, int ticket, int neuron, const char* rows, const float* limits, const char* biases) {
        int chunk = filled % CHUNKS;
        uint64* full = &shared.full[chunk];
        bool used = ticket != NONE;
        int count = __popc(__ballot_sync(~0u, used));
        if (lane == 0) {
            shared.kind[chunk] = kind;
            expect_bytes(full, count * ROW_BYTES);
        }
        __syncwarp();
        copy_rows<ROW_BYTES>(shared.rows[chunk][lane % ROWS], rows + (size_t)neuron * ROW_BYTES, count, full);
        if (lane < ROWS) {
            shared.ticket[chunk][lane] = ticket;
            shared.neuron[chunk][lane] = neuron;
        }
        if (used && limits) copy_word(&shared.limit[chunk][lane], limits + neuron);
        if (used && biases) copy_word(&shared.bias[chunk][lane], biases + (size_t)neuron * ELEMENT_BYTES);
        arrive_after_copies(full);
        // the workers wait for a down chunk until release() knows its factors
        if (lane == 0 && kind != DOWN) barrier_arrive(full);
        ++filled;
    }

    // Gives the workers the factors of down rows, chunk by chunk, as far as their products are evaluated.
    __device__ void release() {
        for (; released < filled; ++released) {
            int chunk = released % CHUNKS;
            if (shared.kind[chunk] != DOWN) continue;
            if (shared.products_before[chunk] > evaluated) return;
            if (lane < ROWS) {
                int ticket = shared.ticket[chunk][lane];
                for (int b = 0; b < BATCH; ++b)
                    shared.factor[chunk][b][lane] = ticket == NONE ? 0.f : shared.kept_value[ticket % QUEUE][b];
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.full[chunk]);
        }
    }

    // Turns the dot products of a chunk into kept neurons (router rows) and products (other rows).
    __device__ void evaluate(int chunk, int ticket, int neuron) {
        float value[BATCH];
        bool needed = false;
        if (ticket != NONE) {
            const char* biases = ticket == NEW ? a.router_bias : a.other_bias;
            float bias = biases ? element(shared.bias[chunk][lane], biases + (size_t)neuron * ELEMENT_BYTES) : 0.f;
            float limit = ticket == NEW || a.product_thresholds ? shared.limit[chunk][lane] : 0.f;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                float dot = bias;
#pragma unroll
                for (int warp = 0; warp < WARPS; ++warp) dot += shared.dots[chunk][warp][b][lane];
                float branch = (ticket == NEW) == bool(a.gate_is_router) ? activate(dot) : dot;
                // a dropped token stays exactly 0, whatever the other branch holds
                float routed = ticket == NEW ? 1.f : shared.kept_value[ticket % QUEUE][b];
                value[b] = routed == 0.f ? 0.f : routed * branch;
                if (dropped(value[b], limit)) value[b] = 0.f;
                needed |= value[b] != 0.f;
            }
        }
        uint32 below = (1u << lane) - 1;
        bool is_kept = ticket == NEW && needed, is_wanted = ticket >= 0 && needed && late_down;
        uint32 keeps = __ballot_sync(~0u, is_kept);
        if (is_kept) {
            ticket = kept + __popc(keeps & below);
            shared.kept_neuron[ticket % QUEUE] = neuron;
        }
        if (ticket >= 0)
            for (int b = 0; b < BATCH; ++b) shared.kept_value[ticket % QUEUE][b] = value[b];
        kept += __popc(keeps);
        if (late_down) {
            uint32 wanted = __ballot_sync(~0u, is_wanted);
            if (is_wanted) shared.down_queue[(downs_queued + __popc(wanted & below)) % QUEUE] = ticket;
            downs_queued += __popc(wanted);
        }
        __syncwarp();
    }
};

// One thread of the workers: the columns of its vectors, of every row.
struct Worker {
    const Arguments& a;
    Shared& shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float x[BATCH][OWNED], y[BATCH][OWNED];

    __device__ int vector(int v) { return v * WORKERS + threadIdx.x; }
    __device__ bool owns(int v) { return ROW_VECTORS % WORKERS == 0 || vector(v) < ROW_VECTORS; }

    __device__ Worker(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void run() {
        wait_for_previous_kernel();
        load_x();
        for (int position = 0;; ++position) {
            int chunk = position % CHUNKS;
            barrier_wait(&shared.full[chunk], position / CHUNKS & 1);
            int kind = shared.kind[chunk];
            if (kind == STOP) break;
            constexpr int AT_ONCE = rows_at_once();
#pragma unroll
            for (int first = 0; first < ROWS; first += AT_ONCE) {
                uint4 rows[AT_ONCE][VECTORS];
                load_rows(rows, chunk, first);
                if (kind == DOWN) add_down(rows, chunk, first);
                else dot(rows, chunk, first);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.done[chunk]);
        }
        if (a.partials) finish_in_order();
        else finish();
    }

    __device__ void load_x() {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                uint4 words = make_uint4(0, 0, 0, 0);
                if (owns(v)) words = load_from_l2(a.x + b * ROW_BYTES + vector(v) * 16);
                unpack(words, &x[b][v * VECTOR]);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) y[b][v * VECTOR + i] = 0.f;
            }
    }

    template <int N>
    __device__ void load_rows(uint4 (&rows)[N][VECTORS], int chunk, int first) {
#pragma unroll
        for (int r = 0; r < N; ++r)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                rows[r][v] = make_uint4(0, 0, 0, 0);
                if (owns(v))
                    rows[r][v] = *reinterpret_cast<const uint4*>(shared.rows[chunk][first + r] + vector(v) * 16);
            }
    }

    // Places of a chunk that hold no row give sums that nobody reads.
    template <int N>
    __device__ void dot(const uint4 (&rows)[N][VECTORS], int chunk, int first) {
        float sums[N * BATCH];
#pragma unroll
        for (int r = 0; r < N; ++r) {
#pragma unroll
            for (int b = 0; b < BATCH; ++b) sums[r * BATCH + b] = 0.f;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float w[VECTOR];
                unpack(rows[r][v], w);
#pragma unroll
                for (int b = 0; b < BATCH; ++b)
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i)
                        sums[r * BATCH + b] = fmaf(w[i], x[b][v * VECTOR + i], sums[r * BATCH + b]);
            }
        }
        float sum = warp_sums(sums);
        constexpr int LANES = 32 / (N * BATCH);
        int i = lane / LANES;
        if (lane % LANES == 0) shared.dots[chunk][warp][i % BATCH][first + i / BATCH] = sum;
    }

    // A column that no token needs is left out: 0 * inf must not become NaN.
    template <int N>
    __device__ void add_down(const uint4 (&rows)[N][VECTORS], int chunk, int first) {
#pragma unroll
        for (int r = 0; r < N; ++r) {
            float factor[BATCH];
            bool needed = false;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                factor[b] = shared.factor[chunk][b][first + r];
                needed |= factor[b] != 0.f;
            }
            if (!needed) continue;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float w[VECTOR];
                unpack(rows[r][v], w);
#pragma unroll
                for (int b = 0; b < BATCH; ++b)
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i)
                        y[b][v * VECTOR + i] = fmaf(w[i], factor[b], y[b][v * VECTOR + i]);
            }
        }
    }

    // Calls f(offset in a [B, D] array, the four floats of y there) for all that this thread owns.
    template <class F>
    __device__ void each_four(F f) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
#pragma unroll
                for (int i = 0; i < VECTOR; i += 4)
                    if (owns(v)) f(b * HIDDEN + vector(v) * VECTOR + i, &y[b][v * VECTOR + i]);
    }

    // True in the warp that is the last of `count` to come; it then sees what the others wrote before they came.
    __device__ bool last_to_arrive(int counter, int count) {
        __threadfence();
        __syncwarp();
        unsigned before = 0;
        if (lane == 0) before = atomicAdd(a.counters + counter + warp, 1u);
        if (__shfl_sync(~0u, before, 0) != count - 1) return false;
        __threadfence();
        if (lane == 0) a.counters[counter + warp] = 0;
        return true;
    }

    __device__ void finish() {
        each_four([&](int at, float* v) { add_to_global(a.sums + at, v); });
        if (!last_to_arrive(ALL_ARRIVED, gridDim.x)) return;
        each_four([&](int at, float* v) {
            load_floats_from_l2(a.sums + at, v);
            *reinterpret_cast<float4*>(a.sums + at) = make_float4(0.f, 0.f, 0.f, 0.f);
        });
        write_out();
    }

    // The same sums in an order that does not depend on who comes when: first over groups of blocks, then over groups.
    __device__ void finish_in_order() {
        int group = blockIdx.x / GROUP, first = group * GROUP;
        int groups = (gridDim.x + GROUP - 1) / GROUP, members = min(GROUP, gridDim.x - first);
        store_partial(blockIdx.x);
        if (!last_to_arrive(GROUP_ARRIVED + group * MAX_WARPS, members)) return;
        sum_partials(first, members, 1);
        store_partial(first);
        if (!last_to_arrive(ALL_ARRIVED, groups)) return;
        sum_partials(0, groups, GROUP);
        write_out();
    }

    __device__ void store_partial(int block) {
        float* partial = a.partials + (size_t)block * BATCH * HIDDEN;
        each_four([&](int at, float* v) {
            *reinterpret_cast<float4*>(partial + at) = make_float4(v[0], v[1], v[2], v[3]);
        });
    }

    __device__ void sum_partials(int first, int count, int step) {
        each_four([&](int at, float* v) {
            for (int i = 0; i < 4; ++i) v[i] = 0.f;
#pragma unroll 8
            for (int i = 0; i < count; ++i) {
                float part[4];
                load_floats_from_l2(a.partials + (size_t)(first + i * step) * BATCH * HIDDEN + at, part);
                for (int j = 0; j < 4; ++j) v[j] += part[j];
            }
        });
    }

    __device__ void write_out() {
        // every block has its last ticket before its first warp arrives
        if (threadIdx.x == 0) a.counters[TICKET] = 0;
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                if (!owns(v)) continue;
                if (a.down_bias) {
                    float bias[VECTOR];
                    unpack(*reinterpret_cast<const uint4*>(a.down_bias + vector(v) * 16), bias);
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) y[b][v * VECTOR + i] += bias[i];
                }
                *reinterpret_cast<uint4*>(a.out + b * ROW_BYTES + vector(v) * 16) = pack(&y[b][v * VECTOR]);
            }
    }
};

extern "C" __global__ void __launch_bounds__(WORKERS + 32, MIN_BLOCKS) gated_mlp(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x < CHUNKS) {
        // one arrival of the scheduler, and one of each of its lanes when its copies are complete
        barrier_init(&shared.full[threadIdx.x], 1 + 32);
        barrier_init(&shared.done[threadIdx.x], WARPS);
        barrier_init_visible();
    }
    __syncthreads();
    if (threadIdx.x < WORKERS) Worker(a, shared).run();
    else Scheduler(a, shared).run();
}
