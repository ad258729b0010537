// How the rows of a launch are dealt out to its blocks, in runs of as many rows as a chunk has.
//
// The first runs of a block follow from its index, so they can be requested before the kernel before this one has ended. The
// other runs go to the block that asks first, because multiprocessors that do the same work differ in speed. The last ones are
// dealt out in halves. A block asks for a ticket three runs ahead: an answer takes up to a microsecond when the memory is busy.
#pragma once
#include "hardware.cuh"

struct Deal {
    uint32* counter;   // zero at first; null where all runs are dealt out by index
    int runs;          // all of them
    int fixed;         // by index, for each block
    int long_tickets;  // tickets for a whole run; later tickets are for half a run
};

constexpr int TICKETS_AHEAD = 3;

struct Runs {
    const Deal& deal;
    int taken = 0;
    int tickets[TICKETS_AHEAD] = {};  // in lane 0; loops over them are unrolled, so that each is waited for at its turn
    int first = 0, halves = 0;        // of the run taken, in half runs; `halves` is 0 after the last run

    __device__ explicit Runs(const Deal& deal) : deal(deal) {}

    // Only after the kernel before this one has ended: it may use the same counter.
    __device__ void ask() {
#pragma unroll
        for (int i = 0; i < TICKETS_AHEAD; ++i) ask(i);
    }
    __device__ void ask(int i) {
        if (deal.counter && threadIdx.x % 32 == 0) tickets[i] = take_ticket<0x7fffffff>(deal.counter);
    }

    // Takes the next run by index; false where none is left.
    __device__ bool take_fixed() { return set(2 * (taken * gridDim.x + blockIdx.x), 2); }

    // Takes the run of ticket i, and asks for another ticket if the block has room for its run; false where none is left.
    __device__ bool take(int i, bool has_room = true) {
        if (!deal.counter) return set(2 * deal.runs, 2);
        const int ticket = __shfl_sync(~0u, tickets[i], 0);
        if (has_room) ask(i);
        else tickets[i] = 1 << 28;
        const int whole = deal.fixed * gridDim.x + min(ticket, deal.long_tickets);
        return set(2 * whole + max(ticket - deal.long_tickets, 0), ticket < deal.long_tickets ? 2 : 1);
    }

    __device__ bool set(int half, int count) {
        ++taken;
        first = half, halves = half < 2 * deal.runs ? count : 0;
        return halves > 0;
    }
};
