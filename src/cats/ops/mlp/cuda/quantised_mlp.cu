// The gated MLP of one token as one launch, with weights of 4 or 8 bits: sums += down @ (keep(act(gate @ x)) * (up @ x)), where
// x is the norm of the residual stream. gated_mlp.cu is the same for weights of 16 or 32 bits.
//
// A block takes neighbouring neurons, whose number follows from its index. It reads through one ring of CHUNKS chunks: first
// all gate rows of its neurons, then the up rows of the neurons that it keeps, then their down columns. So only the first up
// rows wait for a result, and only the last chunk of each kind may be partly empty. Neighbours share scales of down.
//
//   copier     requests rows in that order (neighbouring gate rows are one copy)
//   worker     owns columns of gate and up (integer_dot.cuh), and outputs of down (quantised_down.cuh)
//   evaluator  adds up the workers' sums of a chunk. Gate: activation, threshold, list of kept neurons. Up: products
//
// The loader defines DTYPE (of the norm's weights and of biases), INPUTS (D), ACTIVATION, CHUNKS, EARLY_CHUNKS, LIST (neurons
// of a block), SHARED_BYTES, the macros of integer_dot.cuh for gate and up, and for down DOWN_BITS, DOWN_GROUP
// (neurons that share scales; 0: all), DOWN_SCALE, DOWN_ZERO_MODE and DOWN_CONSTANT_ZERO.
#include "normed_input.cuh"
#include "trace.cuh"
#include "activation.cuh"

constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 64;

struct Arguments : Traced {
    Residual residual;
    const char* gate;         // [F, PITCH], packed rows
    const char* up;           // [F, PITCH]
    const char* down;         // [F, DOWN_PITCH], packed columns
    const char* down_scales;  // [groups of neurons, D]
    const char* down_extras;  // the same shape: zero points (uint8) or shifts, or null
    const float* thresholds;  // [F]
    const char* gate_bias;    // [F] or null
    const char* up_bias;      // [F] or null
    float* sums;              // [D], added to
    int neurons;              // F
    int neurons_of_block;     // a multiple of ROWS
    int request_early;        // the kernel before this one writes no weights
};

#include "quantised_down.cuh"

enum Kind { GATE, UP, DOWN, STOP };
constexpr int CHUNK_BYTES = ROWS * PITCH > DOWN_ROWS * DOWN_PITCH ? ROWS * PITCH : DOWN_ROWS * DOWN_PITCH;

struct __align__(128) Shared {
    char rows[CHUNKS][(CHUNK_BYTES + 127) / 128 * 128];
    float dots[CHUNKS][WARPS][ROWS];
    // kept neurons in order, and the value of their gate; later the product
    int neuron[LIST];
    float value[LIST];
    uint64 full[CHUNKS], done[CHUNKS], evaluated[CHUNKS], input_there;
    int kind[CHUNKS], count[CHUNKS];
    int at[CHUNKS];                  // gate: the first neuron; otherwise the place in the list
    int group[CHUNKS];               // of down columns
    int kept, gates, products;       // neurons; evaluated chunks of gate rows; neurons whose product is in the list
    float slots[WARPS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES);

struct Copier {
    const Arguments& a;
    Shared& shared;
    const int lane = threadIdx.x % 32;
    int chunk = 0, slot = 0, parity = 1;

    __device__ Copier(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    // Waits until the next place of the ring is free, and describes its chunk.
    __device__ void begin(Kind kind, int count, int at, int group = 0) {
        if (chunk >= CHUNKS) {
            barrier_wait(&shared.done[slot], parity);
            barrier_wait(&shared.evaluated[slot], parity);
        }
        if (lane == 0) shared.kind[slot] = kind, shared.count[slot] = count, shared.at[slot] = at, shared.group[slot] = group;
        __syncwarp();
    }
    __device__ void end() {
        ++chunk;
        if (++slot == CHUNKS) slot = 0, parity ^= 1;
    }

    __device__ void request_gates(int row, int count) {
        begin(GATE, count, row);
        copy_run(shared.rows[slot], a.gate + (size_t)row * PITCH, count, &shared.full[slot]);
        end();
    }

    template <int BYTES>
    __device__ void request_listed(const char* matrix, int at, int count) {
        if (lane == 0) expect_bytes(&shared.full[slot], count * BYTES);
        __syncwarp();
        const int neuron = lane < count ? shared.neuron[at + lane] : 0;
        constexpr int MOST = BYTES == DOWN_PITCH ? DOWN_ROWS : ROWS;
        copy_rows<BYTES>(shared.rows[slot] + lane % MOST * BYTES, matrix + (size_t)neuron * BYTES, count, &shared.full[slot]);
        warp_arrive(&shared.full[slot]);
        end();
    }

    // How many neurons of the list, from `at` on, share scales of down: at most a chunk.
    __device__ int count_of_group(int at, int kept) {
        const int most = min(DOWN_ROWS, kept - at);
        if (DOWN_GROUP == 0) return most;
        constexpr int SIZE = DOWN_GROUP ? DOWN_GROUP : 1;
        const int group = lane < most ? shared.neuron[at + lane] / SIZE : -1;
        const uint32 others = __ballot_sync(~0u, group != __shfl_sync(~0u, group, 0));
        return others ? __ffs(others) - 1 : most;
    }

    __device__ void run() {
        if (!a.request_early) wait_for_previous_kernel();
        const int first = blockIdx.x * a.neurons_of_block, end = min(first + a.neurons_of_block, a.neurons);
        int row = first;
        for (; row < end && chunk < CHUNKS; row += ROWS) {
            if (a.request_early && chunk >= EARLY_CHUNKS) wait_for_chunk(chunk - EARLY_CHUNKS);
            request_gates(row, min(ROWS, end - row));
        }
        wait_for_previous_kernel();
        for (; row < end; row += ROWS) request_gates(row, min(ROWS, end - row));
        const int gate_chunks = chunk;
        int at = 0, kept;
        for (;;) {
            int gates;
            do {
                gates = load_acquire(&shared.gates);
                kept = load_acquire(&shared.kept);
            } while (kept - at < ROWS && gates < gate_chunks);
            if (at == kept) break;
            const int count = min(ROWS, kept - at);
            begin(UP, count, at);
            request_listed<PITCH>(a.up, at, count);
            at += count;
        }
        // After our own wait, so that the next kernel knows that all kernels before this one are complete. Earlier, its requests
        // would get in the way of ours; later, it would not be there when a block ends.
        allow_next_kernel();
        for (int from = 0, count; from < kept; from += count) {
            count = count_of_group(from, kept);
            const int group = DOWN_GROUP ? shared.neuron[from] / (DOWN_GROUP ? DOWN_GROUP : 1) : 0;
            begin(DOWN, count, from, group);
            request_listed<DOWN_PITCH>(a.down, from, count);
        }
        begin(STOP, 0, 0);
        copy_run(shared.rows[slot], a.gate, 0, &shared.full[slot]);
        wait_for_own_copies();
    }

    // Returns when the chunk has arrived, or the input has.
    __device__ void wait_for_chunk(int i) {
        while (!barrier_test(&shared.full[i], 0) && !barrier_test(&shared.input_there, 0)) {}
    }
};

struct Evaluator {
    const Arguments& a;
    Shared& shared;
    const int lane = threadIdx.x % 32;
    int kept = 0, gates = 0;

    __device__ Evaluator(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void run() {
        wait_for_previous_kernel();
        for (int slot = 0, parity = 0;;) {
            barrier_wait(&shared.full[slot], parity);
            const int kind = shared.kind[slot];
            if (kind <= UP) evaluate(slot, parity, kind == GATE);
            if (kind == STOP) break;
            __syncwarp();
            warp_arrive(&shared.evaluated[slot]);
            if (++slot == CHUNKS) slot = 0, parity ^= 1;
        }
    }

    __device__ void evaluate(int slot, int parity, bool is_gate) {
        const int at = shared.at[slot] + lane;
        const bool used = lane < shared.count[slot];
        const int neuron = !used ? 0 : is_gate ? at : shared.neuron[at];
        // requested before the workers are done, so that they have arrived by then
        const float threshold = is_gate && used ? load_float_from_l2(a.thresholds + neuron) : 0.f;
        const char* biases = is_gate ? a.gate_bias : a.up_bias;
        float bias[2] = {0.f, 0.f};
        if (biases && used) unpack_word(load_element_from_l2(biases + (size_t)neuron * ELEMENT_BYTES), bias);
        barrier_wait(&shared.done[slot], parity);
        float sum = 0.f;
#pragma unroll
        for (int warp = lane / ROWS; warp < WARPS; warp += 32 / ROWS) sum += shared.dots[slot][warp][lane % ROWS];
#pragma unroll
        for (int distance = ROWS; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        sum += bias[0];
        if (is_gate) {
            sum = activate(sum);
            const bool needed = used && !dropped(sum, threshold) && sum != 0.f;
            const uint32 votes = __ballot_sync(~0u, needed);
            if (needed) {
                const int place = kept + __popc(votes & (1u << lane) - 1);
                shared.neuron[place] = neuron, shared.value[place] = sum;
            }
            kept += __popc(votes);
            ++gates;
            __syncwarp();
            if (lane == 0) store_release(&shared.kept, kept), store_release(&shared.gates, gates);
        } else {
            if (used) shared.value[at] *= sum;
            __syncwarp();
            if (lane == 0) store_release(&shared.products, at + shared.count[slot]);
        }
    }
};

struct Worker {
    const Arguments& a;
    Shared& shared;
    const int warp = threadIdx.x / 32;
    IntegerInput input;

    __device__ Worker(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ void run() {
        NormedInput{input, a.residual, shared.slots}.load(a.request_early);
        __syncwarp();
        warp_arrive(&shared.input_there);
        a.stamp(INPUT);
        Down down(a);
        for (int slot = 0, parity = 0;;) {
            barrier_wait(&shared.full[slot], parity);
            const int kind = shared.kind[slot], count = shared.count[slot];
            if (kind == STOP) break;
            if (kind <= UP) {
                float* dots = shared.dots[slot][warp];
                if (count) input.dot(shared.rows[slot], [&](int row, float sum) { dots[row] = sum; });
            } else {
                const int at = shared.at[slot];
                // nearly always there already
                while (load_acquire(&shared.products) < at + count) {}
                down.add(shared.rows[slot], shared.value + at, count, shared.group[slot]);
            }
            __syncwarp();
            warp_arrive(&shared.done[slot]);
            if (++slot == CHUNKS) slot = 0, parity ^= 1;
        }
        a.stamp(LAST);
        down.finish();
        a.stamp(END);
    }
};

// Few enough registers that a block of the next linear layer fits beside this one, where their rings do: not with rows of more
// than 4,096 columns.
extern "C" __global__ void __maxnreg__(IntegerInput::WORDS <= 8 ? 120 : 168) quantised_mlp(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    a.stamp(START);
    if (threadIdx.x < CHUNKS) {
        barrier_init(&shared.full[threadIdx.x], ARRIVALS_OF_WARP + COPY_ARRIVALS);
        barrier_init(&shared.done[threadIdx.x], WARPS * ARRIVALS_OF_WARP);
        barrier_init(&shared.evaluated[threadIdx.x], ARRIVALS_OF_WARP);
    }
    if (threadIdx.x == WORKERS) {
        barrier_init(&shared.input_there, WARPS * ARRIVALS_OF_WARP);
        shared.kept = shared.gates = shared.products = 0;
    }
    barrier_init_visible();
    __syncthreads();
    if (threadIdx.x < WORKERS) Worker(a, shared).run();
    else if (threadIdx.x < WORKERS + 32) Copier(a, shared).run();
    else Evaluator(a, shared).run();
}
