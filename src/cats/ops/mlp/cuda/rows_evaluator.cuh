// The evaluator warp of a block: a part of mlp_rows.cu, which defines the sizes, Arguments and Shared.
//
// It adds up the workers' sums of a run. Of gate rows: activation, threshold, and the list of the neurons that some token keeps.
// Of up rows: products.
#pragma once
#include "activation.cuh"

// One lane handles one row of a run, for every STEP-th token.
struct Evaluator {
    static constexpr int STEP = 32 / ROWS, EACH = (TOKENS + STEP - 1) / STEP;
    const Arguments& a;
    Shared& shared;
    const int lane = threadIdx.x % 32, row = lane % ROWS;
    int kept = 0, gates = 0;
    bool active[EACH];

    __device__ Evaluator(const Arguments& a, Shared& shared) : a(a), shared(shared) {}

    __device__ int token_of(int i) const { return i * STEP + lane / ROWS; }

    __device__ void run() {
        wait_for_previous_kernel();
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            active[i] = token_of(i) < TOKENS && (!a.active || load_word_from_l2(a.active + token_of(i)));
        for (int place = 0, parity = 0;;) {
            barrier_wait(&shared.announced[place], parity);
            const int kind = shared.kind[place];
            if (kind == DOWN) break;
            evaluate(place, parity, kind == GATE);
            __syncwarp();
            warp_arrive(&shared.evaluated[place]);
            if (++place == RUNS) place = 0, parity ^= 1;
        }
    }

    __device__ void evaluate(int place, int parity, bool is_gate) {
        const int at = shared.at[place] + row;
        const bool used = row < shared.count[place];
        const int neuron = !used ? 0 : is_gate ? at : shared.neuron[at];
        // requested before the workers are done, so that they have arrived by then
        const float threshold = is_gate && used ? load_float_from_l2(a.thresholds + neuron) : 0.f;
        const char* biases = is_gate ? a.gate_bias : a.up_bias;
        float bias[2] = {0.f, 0.f};
        if (biases && used) unpack_word(load_element_from_l2(biases + (size_t)neuron * ELEMENT_BYTES), bias);
        barrier_wait(&shared.dotted[place], parity);
        float values[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            values[i] = bias[0];
            if (TOKENS % STEP && token_of(i) >= TOKENS) continue;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) values[i] += shared.dots[place][warp][token_of(i)][row];
        }
        if (is_gate) keep(values, used, neuron, threshold);
        else multiply(values, used, at, shared.at[place] + shared.count[place]);
    }

    __device__ void keep(float (&values)[EACH], bool used, int neuron, float threshold) {
        bool needed = false;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            values[i] = activate(values[i]);
            if (!active[i] || dropped(values[i], threshold)) values[i] = 0.f;
            needed |= values[i] != 0.f;
        }
        // a row is in several lanes
        uint32 votes = __ballot_sync(~0u, used && needed);
#pragma unroll
        for (int distance = ROWS; distance < 32; distance *= 2) votes |= votes >> distance;
        votes &= (1u << ROWS) - 1;
        if (votes >> row & 1) {
            const int to = kept + __popc(votes & (1u << row) - 1);
            shared.neuron[to] = neuron;
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (token_of(i) < TOKENS) shared.value[to][token_of(i)] = values[i];
        }
        kept += __popc(votes);
        ++gates;
        __syncwarp();
        if (lane == 0) store_release(&shared.kept, kept), store_release(&shared.gates, gates);
    }

    __device__ void multiply(const float (&values)[EACH], bool used, int at, int products) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (!used || token_of(i) >= TOKENS) continue;
            float& value = shared.value[at][token_of(i)];
            // a dropped token stays exactly 0, whatever the up branch holds
            value = value == 0.f ? 0.f : value * values[i];
        }
        __syncwarp();
        if (lane == 0) store_release(&shared.products, products);
    }
};
