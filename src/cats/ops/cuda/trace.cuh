// The times at which a warp reaches points of its kernel, for measurements. Does nothing unless the loader defines TRACE.
#pragma once
#include "hardware.cuh"

#ifndef TRACE
#define TRACE 0
#endif

// A warp starts, has the input of its kernel, has worked on its last weights, has sent its last result (which may arrive
// later). The resolution of the clock differs between GPUs.
enum Event { START, INPUT, LAST, END, EVENTS };
constexpr int TRACED_WARPS = 32;

// The first members of the arguments of a kernel.
struct Traced {
#if TRACE
    uint64* stamps;  // [blocks, TRACED_WARPS, EVENTS], nanoseconds

    __device__ void stamp(Event event) const {
        if (threadIdx.x % 32) return;
        unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
        stamps[((size_t)block * TRACED_WARPS + threadIdx.x / 32) * EVENTS + event] = nanoseconds();
    }
#else
    __device__ void stamp(Event) const {}
#endif
};
