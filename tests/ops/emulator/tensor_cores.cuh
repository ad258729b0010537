// Replaces the kernels' own tensor_cores.cuh: the same functions without PTX.
#pragma once
#include "hardware.cuh"

// An operand of a product: the words of all lanes, [lane, word].
template <int WORDS>
struct Operand {
    uint32 words[32][WORDS];

    template <class... T>
    explicit Operand(T... mine) {
        const uint32 own[WORDS] = {mine...};
        for (int i = 0; i < WORDS; ++i) {
            const uint64_t* slots = exchange(uint64_t(own[i]));
            for (int lane = 0; lane < 32; ++lane) words[lane][i] = uint32(slots[lane]);
        }
    }
};

// c += A B: the part of one lane. `a` and `b` give one of the ELEMENTS of a word.
template <int ELEMENTS, int HALVES, class Sum, class A, class B>
void multiply(Sum (&c)[4], const Operand<2 * HALVES>& left, const Operand<HALVES>& right, A a, B b) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        auto sum = decltype(a(0u, 0) * b(0u, 0))(c[i]);
        for (int k = 0; k < 4 * ELEMENTS * HALVES; ++k) {
            const int half = k / (4 * ELEMENTS), lane = k / ELEMENTS % 4, element = k % ELEMENTS;
            sum += a(left.words[row % 8 * 4 + lane][row / 8 + 2 * half], element) *
                   b(right.words[column * 4 + lane][half], element);
        }
        c[i] = Sum(sum);
    }
}

inline int byte_of(uint32 word, int i) { return int(word >> 8 * i & 0xff); }
inline int signed_byte_of(uint32 word, int i) { return int(int8_t(word >> 8 * i & 0xff)); }
inline double half_of(uint32 word, int i) { return half_to_float(word >> 16 * i & 0xffff); }

inline void multiply_bytes(int (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    multiply<4, 2>(c, Operand<4>(a0, a1, a2, a3), Operand<2>(b0, b1), byte_of, signed_byte_of);
}
inline void multiply_halves(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
    multiply<2, 2>(c, Operand<4>(a0, a1, a2, a3), Operand<2>(b0, b1), half_of, half_of);
}
inline void multiply_halves(float (&c)[4], uint32 a0, uint32 a1, uint32 b0) {
    multiply<2, 1>(c, Operand<2>(a0, a1), Operand<1>(b0), half_of, half_of);
}

inline uint32 permute_bytes(uint32 a, uint32 b, uint32 selector) {
    const uint64 both = uint64(b) << 32 | a;
    uint32 out = 0;
    for (int i = 0; i < 4; ++i) out |= uint32(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
}
inline uint32 and_or(uint32 a, uint32 mask, uint32 bits) { return (a & mask) | bits; }
inline int add_bytes(int sum, uint32 word) {
    for (int i = 0; i < 4; ++i) sum += signed_byte_of(word, i);
    return sum;
}
inline int round_to_int(float value) { return int(std::nearbyint(value)); }
