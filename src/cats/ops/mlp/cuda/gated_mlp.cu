// The gated MLP of one or two tokens as one launch: out = down @ (keep(act(gate @ x)) * (up @ x)).
//
// The "router" is the matrix that is read whole and compared with the thresholds (gate, or up), the "other" matrix
// and `down` are read where a neuron is kept. A neuron's weights are one contiguous row of each of the three.
//
// A block is GROUPS groups. A group is one scheduler warp and WARPS worker warps around a ring of CHUNKS chunks of ROWS
// rows in shared memory, and works on its own share of the router rows:
//
//   scheduler   fills free chunks: requests the down rows of neurons whose product is known, else the other rows of
//               kept neurons, else further router rows; adds up the workers' partial dot products, applies activation
//               and threshold, and queues what was kept
//   worker      owns a slice of the columns: keeps its slice of x and of the output in registers, and takes part in
//               every row, so that there is neither a copy of x nor a sum of outputs for each warp
//
// Chunks are filled, worked on and evaluated in ring order, each in its turn even when there is nothing to put into it.
// `full` says that a chunk's rows arrived, `done` that all workers have read them. At the end each warp adds its slice
// of the output to global memory; the last one to arrive there converts the sums and leaves the workspace as it found
// it, zero.
//
// Weights depend on nothing, so where the kernel before this one is known to write none, the ring is filled before that
// kernel has ended. All else waits for its end.
//
// In a chain of launches that is a whole token (RESIDUAL), x is the norm of the residual stream and the output is added
// to it: no sums to convert, no workspace to clean.
//
// The loader defines DTYPE, HIDDEN (D), BATCH (B), ACTIVATION, GROUPS, ROWS, CHUNKS, WARPS, COPIES, SHARED_BYTES and
// RESIDUAL.
#include "primitives.cuh"
#include "residual.cuh"
#include "trace.cuh"

#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define RELU 3

constexpr int ROW_BYTES = HIDDEN * ELEMENT_BYTES;
constexpr int ROW_VECTORS = ROW_BYTES / 16;
constexpr int WORKERS = WARPS * 32, GROUP_THREADS = WORKERS + 32;
// 16-byte vectors of a row that one worker thread owns: tid, tid + WORKERS, ...
constexpr int VECTORS = (ROW_VECTORS + WORKERS - 1) / WORKERS;
constexpr int OWNED = VECTORS * VECTOR;
// Never more wait in a queue than the ring holds and two chunks more, because what waits is requested first. A power of
// two, for a cheap modulo.
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

// What a chunk holds: rows to multiply with x, down rows, nothing for now, nothing any more.
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
    int fixed_runs;                    // runs of ROWS router rows that each group takes before it asks for more
    int long_tickets;                  // answers that are worth ROWS rows; later ones are worth fewer
    int short_rows;
    int gate_is_router;
    int request_early;                 // the kernel before this one writes no weights
    Residual residual;                 // in place of x, for RESIDUAL; then `out` is null, and `sums` [D] is added to
};

// Counters: the next run of router rows, then arrivals of blocks, one counter a warp and a team of TEAM blocks.
constexpr int TICKET = 0, ALL_ARRIVED = 32, TEAM_ARRIVED = 64, TEAM = 16, MAX_WARPS = 32;
static_assert(GROUPS * WARPS <= MAX_WARPS);

struct __align__(128) Group {
    char rows[CHUNKS][ROWS][ROW_BYTES];
    uint64 full[CHUNKS], done[CHUNKS];
    int kind[CHUNKS];
    float dots[CHUNKS][WARPS][BATCH][ROWS];  // partial dot products, from the workers
    float factor[CHUNKS][BATCH][ROWS];       // what down rows are multiplied with, from the scheduler
    // first-in, first-out queues of the scheduler: neurons that wait for their other row, and for their down row
    int neuron[2][QUEUE];
    float value[2][BATCH][QUEUE];  // the router's value, and the product
};
constexpr int OTHERS = 0, DOWNS = 1;
static_assert(GROUPS * sizeof(Group) <= SHARED_BYTES, "the loader asks for too little shared memory");

__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == SILU
    return __fdividef(x, 1.f + expf(-x));
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

// One lane handles one row of a chunk. The loop over the ring is unrolled, so that what is known of the rows in flight
// stays in registers. A single warp does all this for a stream of many gigabytes a second: count instructions here.
struct Scheduler {
    const Arguments& a;
    Group& shared;
    const int first_run, run_step;  // this group's runs of router rows, before it asks for more
    const int lane = threadIdx.x % 32;

    // of this lane's row in each chunk; limit and bias are still on their way from memory when they are set
    bool is_router[CHUNKS], is_other[CHUNKS];
    int neuron[CHUNKS];
    float routed[CHUNKS][BATCH], limit[CHUNKS];
    uint32 bias[CHUNKS];

    // the same in every lane: entries of the queues that were written, and read
    int others_in = 0, others_out = 0, downs_in = 0, downs_out = 0;
    Kind holds[CHUNKS];
    int dots_in_flight = 0, downs_in_flight = 0;  // chunks
    // rows [row, row_end) of the current run of router rows are not requested yet
    int row = 0, row_end = 0, runs_taken = 0;
    bool router_left = true, may_ask = false;
    int next_ticket = 0;  // in lane 0 alone: asked for one run ahead, because the answer takes long

    __device__ Scheduler(const Arguments& a, Group& shared, int group)
        : a(a), shared(shared), first_run(group * gridDim.x + blockIdx.x), run_step(GROUPS * gridDim.x) {}

    __device__ void run() {
        if (!a.request_early) wait_for_previous_kernel();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            // one chunk after the other: more requests would delay the last sums of the kernel before this one
            if (a.request_early && chunk > 0 && holds[chunk - 1] == DOT) barrier_wait(&shared.full[chunk - 1], 0);
            if (fill(chunk) == STOP) return;
        }
        if (a.request_early) wait_for_previous_kernel();
        may_ask = true;
        ask();
        for (int parity = 0;; parity ^= 1) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                barrier_wait(&shared.done[chunk], parity);
                if (holds[chunk] == DOT) evaluate(chunk);
                if (holds[chunk] == DOWN) --downs_in_flight;
                if (fill(chunk) == STOP) return;
                // Only after our own wait, so that the next kernel knows that all kernels before this one are complete;
                // and only when all rows are requested, because its own requests would delay them.
                if (!router_left && dots_in_flight == 0 && queued() == 0) allow_next_kernel();
            }
        }
    }

    __device__ int queued() { return others_in - others_out + downs_in - downs_out; }

    __device__ void ask() {
        if (lane == 0) next_ticket = take_ticket(a.counters + TICKET);
    }

    // The next run: by this group's index at first, and by asking at the end, so that groups that kept few rows take
    // more of them. The last answers are short, so that all groups end together.
    __device__ void take_run() {
        int rows = ROWS;
        if (runs_taken < a.fixed_runs) {
            row = (runs_taken * run_step + first_run) * ROWS;
        } else {
            if (!may_ask) return;
            int ticket = __shfl_sync(~0u, next_ticket, 0);
            ask();
            int first = a.fixed_runs * run_step * ROWS;
            row = first + min(ticket, a.long_tickets) * ROWS + max(ticket - a.long_tickets, 0) * a.short_rows;
            if (ticket >= a.long_tickets) rows = a.short_rows;
        }
        ++runs_taken;
        row = min(row, a.neurons);
        row_end = min(row + rows, a.neurons);
        router_left = row < row_end;
    }

    // Turns the dot products of a chunk into kept neurons (router rows) and products (other rows).
    __device__ void evaluate(int chunk) {
        bool used = is_router[chunk] || is_other[chunk], needed = false;
        float value[BATCH];
        float bias_value[2];
        unpack_word(bias[chunk], bias_value);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            float dot = bias_value[0];
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) dot += shared.dots[chunk][warp][b][lane % ROWS];
            value[b] = is_router[chunk] == bool(a.gate_is_router) ? activate(dot) : dot;
            // a dropped token stays exactly 0, whatever the other branch holds
            if (is_other[chunk]) value[b] = routed[chunk][b] == 0.f ? 0.f : routed[chunk][b] * value[b];
            if (dropped(value[b], limit[chunk])) value[b] = 0.f;
            needed |= value[b] != 0.f;
        }
        needed &= used;
        uint32 keeps = __ballot_sync(~0u, needed && is_router[chunk]);
        uint32 products = __ballot_sync(~0u, needed && is_other[chunk]);
        if (needed) {
            int queue = is_router[chunk] ? OTHERS : DOWNS;
            uint32 before = (is_router[chunk] ? keeps : products) & (1u << lane) - 1;
            int at = (is_router[chunk] ? others_in : downs_in) + __popc(before) & QUEUE - 1;
            shared.neuron[queue][at] = neuron[chunk];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) shared.value[queue][b][at] = value[b];
        }
        others_in += __popc(keeps);
        downs_in += __popc(products);
        --dots_in_flight;
        __syncwarp();
    }

    // Requests into a free chunk what is most urgent: down rows, else other rows, else further router rows.
    __device__ Kind fill(int chunk) {
        if (row == row_end && router_left) take_run();
        int down_rows = min(downs_in - downs_out, ROWS);
        int other_rows = min(others_in - others_out, ROWS), router_rows = min(ROWS - other_rows, row_end - row);
        bool down = down_rows == ROWS || other_rows + router_rows == 0;
        int queued_rows = down ? down_rows : other_rows, rows = down ? down_rows : other_rows + router_rows;
        bool queued = lane < queued_rows;
        uint64* full = &shared.full[chunk];
        holds[chunk] = rows == 0 ? NOTHING : down ? DOWN : DOT;
        if (rows == 0) {
            bool finished = !router_left && dots_in_flight + downs_in_flight == 0;
            if (lane == 0) shared.kind[chunk] = finished ? STOP : NOTHING;
            __syncwarp();
            copy_rows<ROW_BYTES>(shared.rows[chunk][0], a.router, 0, full);
            warp_arrive(full);
            return finished ? STOP : NOTHING;
        }
        (down ? downs_in_flight : dots_in_flight) += 1;
        is_other[chunk] = queued && !down;
        is_router[chunk] = !queued && lane < rows;

        int queue = down ? DOWNS : OTHERS, at = (down ? downs_out : others_out) + lane & QUEUE - 1;
        int n = queued ? shared.neuron[queue][at] : row + lane - queued_rows;
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            float value = queued ? shared.value[queue][b][at] : 0.f;
            routed[chunk][b] = value;
            if (down && lane < ROWS) shared.factor[chunk][b][lane] = value;
        }
        neuron[chunk] = n;
        (down ? downs_out : others_out) += queued_rows;
        if (!down) row += router_rows;

        if (lane == 0) {
            shared.kind[chunk] = holds[chunk];
            expect_bytes(full, rows * ROW_BYTES);
        }
        __syncwarp();
        const char* matrix = down ? a.down : queued ? a.other : a.router;
        copy_rows<ROW_BYTES>(shared.rows[chunk][lane % ROWS], matrix + (size_t)n * ROW_BYTES, rows, full);
        warp_arrive(full);

        limit[chunk] = 0.f;
        bias[chunk] = 0;
        if (!down && lane < rows) {
            const float* limits = queued ? a.product_thresholds : a.thresholds;
            const char* biases = queued ? a.other_bias : a.router_bias;
            if (limits) limit[chunk] = load_float_from_l2(limits + n);
            if (biases) bias[chunk] = load_element_from_l2(biases + (size_t)n * ELEMENT_BYTES);
        }
        return holds[chunk];
    }
};

// One thread of the workers: the columns of its vectors, of every row.
struct Worker {
    const Arguments& a;
    Group& shared;
    const int group, thread, lane = threadIdx.x % 32, warp;  // thread and warp within the group
    float x[BATCH][OWNED], y[BATCH][OWNED];

    __device__ int vector(int v) { return v * WORKERS + thread; }
    __device__ bool owns(int v) { return ROW_VECTORS % WORKERS == 0 || vector(v) < ROW_VECTORS; }

    __device__ Worker(const Arguments& a, Group& shared)
        : a(a), shared(shared), group(threadIdx.x / GROUP_THREADS), thread(threadIdx.x % GROUP_THREADS),
          warp(thread / 32) {}

    __device__ void run() {
        if (RESIDUAL) {
            load_residual();
        } else {
            wait_for_previous_kernel();
            load_x();
        }
        a.stamp(INPUT);
        for (int chunk = 0, parity = 0;; chunk = chunk + 1 == CHUNKS ? (parity ^= 1, 0) : chunk + 1) {
            barrier_wait(&shared.full[chunk], parity);
            int kind = shared.kind[chunk];
            if (kind == STOP) break;
            constexpr int AT_ONCE = rows_at_once();
#pragma unroll
            for (int first = 0; first < ROWS && kind != NOTHING; first += AT_ONCE) {
                uint4 rows[AT_ONCE][VECTORS];
                load_rows(rows, chunk, first);
                if (kind == DOWN) add_down(rows, chunk, first);
                else dot(rows, chunk, first);
            }
            __syncwarp();
            warp_arrive(&shared.done[chunk]);
        }
        a.stamp(LAST);
        if (GROUPS > 1) share_sums();
        // a group that shares no vector has nothing to add
        if (group >= VECTORS) return;
        if (RESIDUAL) each_four(true, [&](int at, float* v) { add_to_global(a.sums + at, v); });
        else if (a.partials) finish_in_order();
        else finish();
        a.stamp(END);
    }

    // Adds up the groups of the block: each is left with the sums of its own share of the vectors.
    __device__ void share_sums() {
        Group* groups = &shared - group;
        static_assert(GROUPS == 1 || sizeof(shared.rows) >= BATCH * HIDDEN * sizeof(float));
        // the rings are free by now
        float* sums = reinterpret_cast<float*>(shared.rows);
        each_four(false, [&](int at, float* v) { store_four(sums + at, v); });
        named_barrier(1, GROUPS * WORKERS);
        for (int other = 0; other < GROUPS; ++other) {
            if (other == group) continue;
            const float* sums = reinterpret_cast<const float*>(groups[other].rows);
            each_four(true, [&](int at, float* v) {
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] += sums[at + i];
            });
        }
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

    __device__ void load_residual() {
#if RESIDUAL
        static_assert(BATCH == 1 && COPIES == 1);
        // no dot product is there yet
        Team team{&shared.dots[0][0][0][0], warp, WARPS, 2 + group};
        Columns<HIDDEN, WORKERS> columns{thread};
        load_normed(a.residual, columns, team, a.request_early, blockIdx.x == 0 && group == 0, x[0]);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            // as the layers of a model see it
            unpack(pack(&x[0][v * VECTOR]), &x[0][v * VECTOR]);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) y[0][v * VECTOR + i] = 0.f;
        }
#endif
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

    // Calls f(offset in a [B, D] array, the four floats of y there) for all vectors, or for this group's share of them.
    template <class F>
    __device__ void each_four(bool shared_out, F f) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
#pragma unroll
                for (int i = 0; i < VECTOR; i += 4)
                    if (owns(v) && (!shared_out || v % GROUPS == group))
                        f(b * HIDDEN + vector(v) * VECTOR + i, &y[b][v * VECTOR + i]);
    }

    // True in the warp that is the last of `count` to come; it then sees what the others wrote before they came.
    __device__ bool last_to_arrive(int counter, int count) {
        unsigned before = 0;
        __syncwarp();
        if (lane == 0) before = arrive_in_global(a.counters + counter + group * WARPS + warp);
        __syncwarp();
        if (__shfl_sync(~0u, before, 0) != count - 1) return false;
        if (lane == 0) a.counters[counter + group * WARPS + warp] = 0;
        return true;
    }

    // Copies of the sums, because many additions to one address wait for each other.
    __device__ void finish() {
        float* copy = a.sums + blockIdx.x % COPIES * (BATCH * HIDDEN);
        each_four(true, [&](int at, float* v) { add_to_global(copy + at, v); });
        if (!last_to_arrive(ALL_ARRIVED, gridDim.x)) return;
        each_four(true, [&](int at, float* v) {
            float part[COPIES][4], zeros[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int c = 0; c < COPIES; ++c) load_floats_from_l2(a.sums + c * (BATCH * HIDDEN) + at, part[c]);
#pragma unroll
            for (int c = 0; c < COPIES; ++c) store_four(a.sums + c * (BATCH * HIDDEN) + at, zeros);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i] = 0.f;
#pragma unroll
                for (int c = 0; c < COPIES; ++c) v[i] += part[c][i];
            }
        });
        write_out();
    }

    // The same sums in an order that does not depend on who comes when: first over teams of blocks, then over teams.
    __device__ void finish_in_order() {
        int team = blockIdx.x / TEAM, first = team * TEAM;
        int teams = (gridDim.x + TEAM - 1) / TEAM, members = min(TEAM, gridDim.x - first);
        store_partial(blockIdx.x);
        if (!last_to_arrive(TEAM_ARRIVED + team * MAX_WARPS, members)) return;
        sum_partials(first, members, 1);
        store_partial(first);
        if (!last_to_arrive(ALL_ARRIVED, teams)) return;
        sum_partials(0, teams, TEAM);
        write_out();
    }

    __device__ void store_partial(int block) {
        float* partial = a.partials + (size_t)block * BATCH * HIDDEN;
        each_four(true, [&](int at, float* v) { store_four(partial + at, v); });
    }

    __device__ void sum_partials(int first, int count, int step) {
        each_four(true, [&](int at, float* v) {
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
                if (!owns(v) || v % GROUPS != group) continue;
                if (a.down_bias) {
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) {
                        float bias[2];
                        unpack_word(load_element_from_l2(a.down_bias + vector(v) * 16 + i * ELEMENT_BYTES), bias);
                        y[b][v * VECTOR + i] += bias[0];
                    }
                }
                *reinterpret_cast<uint4*>(a.out + b * ROW_BYTES + vector(v) * 16) = pack(&y[b][v * VECTOR]);
            }
    }
};

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
