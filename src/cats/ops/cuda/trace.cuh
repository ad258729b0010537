// When a warp comes to which place of its kernel, for measurements: nothing unless the loader defines TRACE.
#pragma once
#include "hardware.cuh"

#ifndef TRACE
#define TRACE 0
#endif

// Where a warp is: it starts, has the input of its kernel, has worked on its last weights, has sent its last result, which
// may arrive later. The clock's steps differ between GPUs.
enum Event { START, INPUT, LAST, END, EVENTS };
constexpr int TRACED_WARPS = 32;

// What the arguments of a kernel begin with.
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
