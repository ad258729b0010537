// Products of tensor cores for weights of 16 bits, in PTX. tensor_cores.cuh says what each lane holds of an operand.
//
// The loader defines DTYPE.
#pragma once
#include "primitives.cuh"

static_assert(ELEMENT_BYTES == 2, "tensor cores multiply 16-bit weights");

#if DTYPE == FLOAT16
#define PRODUCT_TYPES "f32.f16.f16.f32"
#else
#define PRODUCT_TYPES "f32.bf16.bf16.f32"
#endif

// c += A B: A [16, 16], B [16, 8], both of the weights' type.
__device__ __forceinline__ void multiply_pairs(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                               uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col." PRODUCT_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Reads the left operand of a product from shared memory, where it lies transposed. Each lane gives the address of eight
// elements, which are 16 bytes: lanes 0 to 7 of depths 0 to 7 and rows 0 to 7, lanes 8 to 15 of the same depths and rows 8 to
// 15, the upper half of the warp of depths 8 to 15.
__device__ __forceinline__ void load_transposed(const char* from, uint32 (&a)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(shared_address(from)) : "memory");
}

// Adds a float, in any order with the additions of other threads.
__device__ __forceinline__ void add_one_to_global(float* target, float value) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target), "f"(value) : "memory");
}
