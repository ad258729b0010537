// Products of tensor cores and operations on the bytes of a word, in PTX. Kernels of quantised weights use them.
//
// Of the operands of a product, lane 4 g + t holds
//   A  a0 (row g, first half of the depth)  a1 (row g + 8, same)  a2 (row g, second half)  a3 (row g + 8, same)
//   B  b0 (column g, first half of the depth)  b1 (second half)
//   C  c0, c1 (row g, columns 2 t and 2 t + 1)  c2, c3 (row g + 8, same)
// where a word of A or B holds neighbours along the depth: lane t has the t-th word of each half. Any column of a matrix can
// be any depth, if A and B have the same order.
#pragma once
#include "hardware.cuh"

// c += A B: A unsigned bytes [16, 32], B signed bytes [32, 8].
__device__ __forceinline__ void multiply_bytes(int (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                               uint32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += A B: A float16 [16, 16], B float16 [16, 8].
__device__ __forceinline__ void multiply_halves(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                                uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += A B: A float16 [16, 8], B float16 [8, 8], without the second half.
__device__ __forceinline__ void multiply_halves(float (&c)[4], uint32 a0, uint32 a1, uint32 b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}

// Four bytes of a and b: the i-th half byte of the selector says which byte is byte i of the result (0 to 3 of a, 4 to 7 of b).
__device__ __forceinline__ uint32 permute_bytes(uint32 a, uint32 b, uint32 selector) {
    uint32 out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

// (a & mask) | bits, as one instruction.
__device__ __forceinline__ uint32 and_or(uint32 a, uint32 mask, uint32 bits) {
    uint32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(mask), "r"(bits));
    return out;
}

// The sum and the four signed bytes of a word, added up.
__device__ __forceinline__ int add_bytes(int sum, uint32 word) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(word), "r"(0x01010101));
    return sum;
}

__device__ __forceinline__ int round_to_int(float value) {
    int out;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(out) : "f"(value));
    return out;
}
