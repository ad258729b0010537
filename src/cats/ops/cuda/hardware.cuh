// Everything that is written in PTX: copies into shared memory and the barriers that they complete on, dependent launch, loads
// past the L1 cache, atomics, conversions.
//
// sm_90 and later copy whole rows with the bulk copy engine; sm_80 to sm_89 copy 16 bytes per thread (cp.async). Both
// complete on an mbarrier, so the kernel does not know which one ran.
#pragma once

typedef unsigned int uint32;
typedef unsigned long long uint64;

#if __CUDA_ARCH__ >= 900
#define HAS_BULK_COPY 1
#else
#define HAS_BULK_COPY 0
#endif

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// The time of a clock that all multiprocessors share.
__device__ __forceinline__ uint64 nanoseconds() {
    uint64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

// ---- barriers in shared memory

__device__ __forceinline__ void barrier_init(uint64* barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_visible() {
#if HAS_BULK_COPY
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint64* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
                 : "memory");
}

// One lane arrives for its warp, after a __syncwarp() where other lanes have read or written. The race checker of
// compute-sanitizer follows arrivals lane by lane, and does not see that __syncwarp() orders the lanes. Only for it, every
// lane arrives.
#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
constexpr int ARRIVALS_OF_WARP = EVERY_LANE_ARRIVES ? 32 : 1;

__device__ __forceinline__ void warp_arrive(uint64* barrier) {
    if (EVERY_LANE_ARRIVES || threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Whether the phase of this parity is complete.
__device__ __forceinline__ bool barrier_test(uint64* barrier, uint32 parity) {
    uint32 complete;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(complete) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    return complete;
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint64* barrier, uint32 parity) {
#if HAS_BULK_COPY
    // the thread sleeps between tests
    uint32 address = shared_address(barrier), complete = 0;
    while (!complete)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(complete) : "r"(address), "r"(parity) : "memory");
#else
    while (!barrier_test(barrier, parity)) {}
#endif
}

// Waits until this number of threads of the block have come to the barrier of this index.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- copies from global to shared memory, called by a whole warp

// Announces the bytes that bulk copies will bring, before they are requested; called by one lane.
__device__ __forceinline__ void expect_bytes(uint64* barrier, uint32 bytes) {
#if HAS_BULK_COPY
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// How many arrivals a copy adds at the barrier.
constexpr int COPY_ARRIVALS = HAS_BULK_COPY ? 0 : 32;

#if HAS_BULK_COPY
// By one lane. Weights are read once per token: other data in the L2 cache is more likely to be read again.
__device__ __forceinline__ void bulk_copy(char* target, const char* source, uint32 bytes, uint64* barrier) {
    asm volatile(
        "{ .reg .b64 policy;"
        "  createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
        "  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;"
        "}" ::"r"(shared_address(target)), "l"(source), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}
#else
// By all lanes, 16 bytes each at a time.
__device__ __forceinline__ void async_copy(uint32 target, const char* source, int bytes) {
    for (int byte = threadIdx.x % 32 * 16; byte < bytes; byte += 32 * 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + byte), "l"(source + byte) : "memory");
}

// Arrives once the copies of this lane are complete.
__device__ __forceinline__ void arrive_behind_copies(uint64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
#endif

// Called before a thread ends whose copies others wait for: its unfinished copies would be undefined.
__device__ __forceinline__ void wait_for_own_copies() {
#if !HAS_BULK_COPY
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Copies a row from `source` of each lane below `count` to its `target`. BYTES is a multiple of 16.
template <int BYTES>
__device__ __forceinline__ void copy_rows(char* target, const char* source, int count, uint64* barrier) {
#if HAS_BULK_COPY
    if (threadIdx.x % 32 < count) bulk_copy(target, source, BYTES, barrier);
#else
    for (int row = 0; row < count; ++row) {
        uint64 from = __shfl_sync(~0u, reinterpret_cast<uint64>(source), row);
        async_copy(__shfl_sync(~0u, shared_address(target), row), reinterpret_cast<const char*>(from), BYTES);
    }
    arrive_behind_copies(barrier);
#endif
}

// Announces and copies `bytes`, a multiple of 16, and arrives for the warp; the arguments are the same in all lanes.
__device__ __forceinline__ void copy_by_warp(char* target, const char* source, int bytes, uint64* barrier) {
    if (threadIdx.x % 32 == 0) expect_bytes(barrier, bytes);
    __syncwarp();
#if HAS_BULK_COPY
    if (threadIdx.x % 32 == 0) bulk_copy(target, source, bytes, barrier);
#else
    async_copy(shared_address(target), source, bytes);
    arrive_behind_copies(barrier);
#endif
    warp_arrive(barrier);
}

// The same, with arguments of its own for each lane that takes part.
__device__ __forceinline__ void copy_by_lane(char* target, const char* source, int bytes, uint64* barrier, bool takes_part) {
#if HAS_BULK_COPY && !EVERY_LANE_ARRIVES
    if (!takes_part) return;
    expect_bytes(barrier, bytes);
    bulk_copy(target, source, bytes, barrier);
    barrier_arrive(barrier);
#else
    for (uint32 lanes = __ballot_sync(~0u, takes_part); lanes; lanes &= lanes - 1) {
        int lane = __ffs(lanes) - 1;
        char* to = reinterpret_cast<char*>(__shfl_sync(~0u, reinterpret_cast<uint64>(target), lane));
        const char* from = reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uint64>(source), lane));
        uint64* full = reinterpret_cast<uint64*>(__shfl_sync(~0u, reinterpret_cast<uint64>(barrier), lane));
        copy_by_warp(to, from, __shfl_sync(~0u, bytes, lane), full);
    }
#endif
}

// Brings bytes, a multiple of 16, to the L2 cache; called by one lane. Nothing where there are no bulk copies.
__device__ __forceinline__ void prefetch_to_l2(const char* source, int bytes) {
#if HAS_BULK_COPY
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
#endif
}

// ---- dependent launch

// Waits until the previous kernel on the stream is complete and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, where it was launched as a dependent and has room.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- words in shared memory that one warp writes and others wait for: what was written before is then visible

__device__ __forceinline__ int load_acquire(const int* source) {
    int value;
    asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(value) : "r"(shared_address(source)) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(int* target, int value) {
    asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(shared_address(target)), "r"(value) : "memory");
}

// ---- global memory past the L1 cache, which may hold old values of what the previous kernel wrote

__device__ __forceinline__ uint4 load_from_l2(const void* source) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(source) : "memory");
    return v;
}

__device__ __forceinline__ float load_float_from_l2(const float* source) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(source) : "memory");
    return v;
}

__device__ __forceinline__ void load_two_words_from_l2(const void* source, uint32* out) {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "l"(source) : "memory");
}

__device__ __forceinline__ uint32 load_word_from_l2(const void* source) {
    uint32 word;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(source) : "memory");
    return word;
}

// 16 bits, in the low half of a word.
__device__ __forceinline__ uint32 load_half_from_l2(const void* source) {
    uint32 word;
    asm volatile("{ .reg .b16 half; ld.global.cg.u16 half, [%1]; cvt.u32.u16 %0, half; }"
                 : "=r"(word) : "l"(source) : "memory");
    return word;
}

__device__ __forceinline__ void store_half(void* target, uint32 word) {
    asm volatile("{ .reg .b16 half; cvt.u16.u32 half, %1; st.global.u16 [%0], half; }" ::"l"(target), "r"(word)
                 : "memory");
}

// Adds 1 and returns what was there. `inc`, because the compiler spreads the result of an `add` over the warp, and so
// waits for it at once. With the bound 0xffffffff it makes such an `add` of `inc` too: in kernels of 16-bit weights that
// was timed, and costs nothing.
template <uint32 BOUND = 0xffffffff>
__device__ __forceinline__ uint32 take_ticket(uint32* counter) {
    uint32 before;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "n"(BOUND) : "memory");
    return before;
}

// Adds 1 and returns the old value. What the caller wrote, or saw written, is visible to later callers.
__device__ __forceinline__ uint32 arrive_in_global(uint32* counter) {
    uint32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Adds four floats, in any order with the additions of other threads.
__device__ __forceinline__ void add_to_global(float* target, const float* v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) atomicAdd(target + i, v[i]);
#endif
}

// ---- 16-bit floats, two in a word, the first in the low half

__device__ __forceinline__ void float16_to_float(uint32 word, float* out) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(out[0]), "=f"(out[1]) : "r"(word));
}

__device__ __forceinline__ uint32 float_to_float16(const float* in) {
    uint32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in[1]), "f"(in[0]));
    return word;
}

__device__ __forceinline__ uint32 float_to_bfloat16(const float* in) {
    uint32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(in[1]), "f"(in[0]));
    return word;
}
