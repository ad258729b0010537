// Replaces the kernels' own rows_tensor.cuh: the same functions without PTX.
#pragma once
#include "primitives.cuh"
#include "tensor_cores.cuh"

inline double element_of(uint32 word, int i) {
    float values[2];
    unpack_word(word, values);
    return values[i];
}

inline void multiply_pairs(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    multiply<2, 2>(c, Operand<4>(a0, a1, a2, a3), Operand<2>(b0, b1), element_of, element_of);
}

inline void load_transposed(const char* from, uint32 (&a)[4]) {
    if (reinterpret_cast<uintptr_t>(from) % 16) __builtin_trap();
    const uint64_t* slots = exchange(from);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int matrix = 0; matrix < 4; ++matrix)
        for (int i = 0; i < 2; ++i) {
            const char* row;
            std::memcpy(&row, &slots[matrix * 8 + 2 * t + i], sizeof row);
            const uint32 element = load_half_from_l2(row + 2 * g);
            a[matrix] = i ? a[matrix] | element << 16 : element;
        }
}

inline void add_one_to_global(float* target, float value) { *target += value; }
