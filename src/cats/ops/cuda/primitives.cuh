// Sums over a warp, and the unpacking of 16 bytes of weights into floats.
#pragma once
#include "hardware.cuh"

// ---- four floats at once

__device__ __forceinline__ void load_floats_from_l2(const float* source, float* out) {
    uint4 v = load_from_l2(source);
    out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y);
    out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
}

__device__ __forceinline__ void store_four(float* target, const float* v) {
    *reinterpret_cast<float4*>(target) = make_float4(v[0], v[1], v[2], v[3]);
}

// ---- sums

// Of two lanes `distance` apart, the lower one gets the sum of their `first`, the upper one that of their `second`.
__device__ __forceinline__ float exchanged_sum(const float& first, const float& second, int distance) {
    bool upper = threadIdx.x % 32 & distance;
    float mine = upper ? second : first;
    float other = upper ? first : second;
    return mine + __shfl_xor_sync(~0u, other, distance);
}

// Sums each of COUNT values over the lanes of a warp, COUNT a power of two up to 32. Lane i returns the sum of value
// i / (32 / COUNT): exchanging halves takes COUNT - 1 + log2(32 / COUNT) shuffles instead of 5 * COUNT.
template <int COUNT>
__device__ __forceinline__ float warp_sums(float (&values)[COUNT]) {
#pragma unroll
    for (int step = 0; step < 5; ++step) {
        // each step has half as many values, and half the distance between lanes
        int half = COUNT >> (step + 1), distance = 16 >> step;
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            if (i >= half) break;
            values[i] = exchanged_sum(values[i], values[i + half], distance);
        }
    }
#pragma unroll
    for (int distance = 16 / COUNT; distance > 0; distance /= 2)
        values[0] += __shfl_xor_sync(~0u, values[0], distance);
    return values[0];
}

// ---- weight types: 16 bytes hold VECTOR elements

#define BFLOAT16 0
#define FLOAT16 1
#define FLOAT32 2

#if DTYPE == FLOAT32
constexpr int ELEMENT_BYTES = 4;
#else
constexpr int ELEMENT_BYTES = 2;
#endif
constexpr int VECTOR = 16 / ELEMENT_BYTES;

// The two 16-bit elements of a word, or its one float.
__device__ __forceinline__ void unpack_word(uint32 word, float* out) {
#if DTYPE == BFLOAT16
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
#elif DTYPE == FLOAT16
    float16_to_float(word, out);
#else
    out[0] = __uint_as_float(word);
#endif
}

__device__ __forceinline__ void unpack(uint4 words, float* out) {
    constexpr int step = 4 / ELEMENT_BYTES;
    unpack_word(words.x, out);
    unpack_word(words.y, out + step);
    unpack_word(words.z, out + 2 * step);
    unpack_word(words.w, out + 3 * step);
}

__device__ __forceinline__ uint32 pack_word(const float* in) {
#if DTYPE == BFLOAT16
    return float_to_bfloat16(in);
#elif DTYPE == FLOAT16
    return float_to_float16(in);
#else
    return __float_as_uint(in[0]);
#endif
}

__device__ __forceinline__ uint4 pack(const float* in) {
    constexpr int step = 4 / ELEMENT_BYTES;
    return make_uint4(pack_word(in), pack_word(in + step), pack_word(in + 2 * step), pack_word(in + 3 * step));
}

// One element, in the low bits of a word.
__device__ __forceinline__ uint32 load_element_from_l2(const char* source) {
#if DTYPE == FLOAT32
    return load_word_from_l2(source);
#else
    return load_half_from_l2(source);
#endif
}

__device__ __forceinline__ void store_element(char* target, float value) {
    float values[2] = {value, 0.f};
#if DTYPE == FLOAT32
    *reinterpret_cast<float*>(target) = value;
#else
    store_half(target, pack_word(values));
#endif
}
