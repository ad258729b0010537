// The scheduler warp of a group: a part of gated_mlp.cu, which defines the sizes, Arguments and Group.
#pragma once
#include "activation.cuh"

// One lane handles one row of a chunk. The loop over the ring is unrolled, so that the state of rows in flight stays in
// registers. A single warp does all this for a stream of many gigabytes per second: count instructions here.
struct Scheduler {
    const Arguments& a;
    Group& shared;
    const int first_run, run_step;  // this group's runs of router rows, before it takes tickets
    const int lane = threadIdx.x % 32;

    // of this lane's row in each chunk; the loads of limit and bias are still in flight when these are set
    bool is_router[CHUNKS], is_other[CHUNKS];
    int neuron[CHUNKS];
    float routed[CHUNKS][BATCH], limit[CHUNKS];
    uint32 bias[CHUNKS];

    // the same in every lane: how many entries were written to each queue, and how many were read
    int others_in = 0, others_out = 0, downs_in = 0, downs_out = 0;
    Kind holds[CHUNKS];
    int dots_in_flight = 0, downs_in_flight = 0;  // chunks
    // rows [row, row_end) of the current run are not requested yet
    int row = 0, row_end = 0, runs_taken = 0;
    bool router_left = true, may_ask = false;
    int next_ticket = 0;  // in lane 0 alone: taken one run ahead, because the answer takes long

    __device__ Scheduler(const Arguments& a, Group& shared, int group)
        : a(a), shared(shared), first_run(group * gridDim.x + blockIdx.x), run_step(GROUPS * gridDim.x) {}

    __device__ void run() {
        if (!a.request_early) wait_for_previous_kernel();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            // one chunk after the other: more requests would delay the last sums of the previous kernel
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
                // Only after our own wait, so that the next kernel knows that all kernels before this one are complete.
                // Only when all rows are requested, because the next kernel's requests would delay them.
                if (!router_left && dots_in_flight == 0 && queued() == 0) allow_next_kernel();
            }
        }
    }

    __device__ int queued() { return others_in - others_out + downs_in - downs_out; }

    __device__ void ask() {
        if (lane == 0) next_ticket = take_ticket(a.counters + TICKET);
    }

    // The next run: at first by this group's index, then by tickets, so that groups that kept few rows take more runs.
    // The last runs are short, so that all groups end together.
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

    // Requests the most urgent rows for a free chunk: down rows, else other rows, else further router rows.
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
