// In the place of the kernels' own hardware.cuh: the same functions without PTX.
#pragma once
#include <immintrin.h>

#include <chrono>

typedef unsigned int uint32;
typedef unsigned long long uint64;
static_assert(sizeof(uint64) == sizeof(uint64_t));

inline uint64 nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

// ---- barriers in shared memory: the phase's parity, arrivals of a phase, those still to come, bytes still to come

struct Barrier {
    uint64 parity : 1, count : 15, pending : 16;
    int64_t bytes : 32;
};
static_assert(sizeof(Barrier) == sizeof(uint64));

inline Barrier& barrier_of(uint64* barrier) { return *reinterpret_cast<Barrier*>(barrier); }

inline void complete(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.parity ^= 1, barrier.pending = barrier.count, progress = true;
}

inline void barrier_init(uint64* barrier, uint32 arrivals) { barrier_of(barrier) = {0, arrivals, arrivals, 0}; }
inline void barrier_init_visible() {}
inline void barrier_arrive(uint64* barrier) {
    --barrier_of(barrier).pending;
    complete(barrier_of(barrier));
}

constexpr int ARRIVALS_OF_WARP = 1;
inline void warp_arrive(uint64* barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
inline bool barrier_test(uint64* barrier, uint32 parity) {
    if (barrier_of(barrier).parity != parity) return true;
    yield();
    return barrier_of(barrier).parity != parity;
}
inline void barrier_wait(uint64* barrier, uint32 parity) {
    while (!barrier_test(barrier, parity)) {}
}
inline void named_barrier(int barrier, int threads) { meet(named[barrier], threads); }

// ---- copies from global to shared memory

inline void expect_bytes(uint64* barrier, uint32 bytes) { barrier_of(barrier).bytes += bytes; }
void copy_done(uint64_t* barrier, unsigned bytes) {
    Barrier& to = *reinterpret_cast<Barrier*>(barrier);
    to.bytes -= bytes;
    complete(to);
}

constexpr int COPY_ARRIVALS = 0;

inline void start_copy(char* target, const char* source, unsigned bytes, uint64* barrier) {
    copies.push_back({target, source, bytes, reinterpret_cast<uint64_t*>(barrier)});
}
template <int BYTES>
void copy_rows(char* target, const char* source, int count, uint64* barrier) {
    if (int(threadIdx.x % 32) < count) start_copy(target, source, BYTES, barrier);
}
inline void copy_bytes(char* target, const char* source, int bytes, uint64* barrier) {
    if (threadIdx.x % 32 == 0) start_copy(target, source, bytes, barrier);
}
inline void copy_by_lane(char* target, const char* source, int bytes, uint64* barrier, bool takes_part) {
    if (!takes_part) return;
    expect_bytes(barrier, bytes);
    start_copy(target, source, bytes, barrier);
    barrier_arrive(barrier);
}
inline void wait_for_own_copies() {}
inline void prefetch_to_l2(const char* source, int bytes) {
    if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(source) % 16) __builtin_trap();
}

// ---- dependent launch: launches run one after another

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

// ---- global memory

template <class T>
T load(const void* source) { T value; std::memcpy(&value, source, sizeof value); return value; }
inline uint4 load_from_l2(const void* source) { return load<uint4>(source); }
inline float load_float_from_l2(const float* source) { return *source; }
inline uint32 load_word_from_l2(const void* source) { return load<uint32>(source); }
inline uint32 load_half_from_l2(const void* source) { return load<uint16_t>(source); }
inline void store_half(void* target, uint32 word) { uint16_t half = word; std::memcpy(target, &half, sizeof half); }
inline uint32 take_ticket(uint32* counter) { return (*counter)++; }
inline uint32 arrive_in_global(uint32* counter) { return (*counter)++; }
inline void add_to_global(float* target, const float* v) {
    for (int i = 0; i < 4; ++i) target[i] += v[i];
}

// ---- 16-bit floats

inline void float16_to_float(uint32 word, float* out) {
    out[0] = _cvtsh_ss(word & 0xffff), out[1] = _cvtsh_ss(word >> 16);
}
inline uint32 float_to_float16(const float* in) { return _cvtss_sh(in[0], 0) | uint32(_cvtss_sh(in[1], 0)) << 16; }
inline uint32 round_to_bfloat16(float value) {
    uint32 word = __float_as_uint(value);
    return value != value ? 0x7fffu : (word + 0x7fffu + (word >> 16 & 1)) >> 16;
}
inline uint32 float_to_bfloat16(const float* in) { return round_to_bfloat16(in[0]) | round_to_bfloat16(in[1]) << 16; }
