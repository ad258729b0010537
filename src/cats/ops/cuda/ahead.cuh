// The first weights of a later launch, asked for by this one when it has nothing left to ask for.
//
// A launch fills the shared memory, so that the next one starts when it has ended, and for some microseconds nothing
// would be read. What is brought into the L2 cache meanwhile, the next launch finds there.
#pragma once
#include "primitives.cuh"

struct Ahead {
    const char* weights;  // null where nothing follows
    uint64 bytes;         // of each worker, which are numbered from 0; a multiple of 16

    // Called by a whole warp.
    __device__ void ask(int worker) const {
        if (!weights) return;
        const char* from = weights + worker * bytes;
        int lane = threadIdx.x % 32;
#if HAS_BULK_COPY
        if (lane == 0)
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"((uint32)bytes) : "memory");
#else
        constexpr int LINE = 128;
        for (int byte = lane * LINE; byte < bytes; byte += 32 * LINE)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(from + byte) : "memory");
#endif
    }
};
