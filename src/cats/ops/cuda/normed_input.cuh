// The norm of the residual stream as the input of kernels of quantised weights.
//
// A lane reads the columns that it keeps, without a detour through shared memory. The root mean square is a factor of all
// columns. So it is found last, and multiplies the results.
//
// The loader defines INPUTS (columns without padding), and what integer_dot.cuh wants.
#pragma once
#include "integer_dot.cuh"
#include "primitives.cuh"
#include "residual.cuh"

// Whether an operator calls the kernel on its own: its input is the base, without a norm.
#ifndef PLAIN_INPUT
#define PLAIN_INPUT 0
#endif

struct NormedInput {
    IntegerInput& input;
    const Residual& residual;
    float* slots;  // one for each worker warp, in shared memory

    __device__ bool owns(int i) const { return input.owns(i) && (INPUTS == WIDTH || input.column_of(i) < INPUTS); }

    // The words of four weights of a norm.
    __device__ void load_weights(const char* weights, int i, uint32 (&words)[ELEMENT_BYTES]) const {
#pragma unroll
        for (int w = 0; w < ELEMENT_BYTES; ++w) words[w] = 0;
        if (!owns(i)) return;
        const char* from = weights + (size_t)input.column_of(i) * ELEMENT_BYTES;
#pragma unroll
        for (int w = 0; w < ELEMENT_BYTES; w += 2) load_two_words_from_l2(from + 4 * w, &words[w]);
    }
    __device__ void load_values(const float* from, int i, float (&values)[4]) const {
        values[0] = values[1] = values[2] = values[3] = 0.f;
        if (owns(i)) load_floats_from_l2(from + input.column_of(i), values);
    }
    __device__ void multiply(float (&values)[4], const uint32 (&weights)[ELEMENT_BYTES], float factor) const {
        float scales[4];
#pragma unroll
        for (int w = 0; w < ELEMENT_BYTES; ++w) unpack_word(weights[w], &scales[w * 4 / ELEMENT_BYTES]);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] *= (scales[j] + residual.weight_offset) * factor;
    }
    static __device__ float with_squares(float sum, const float (&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum = fmaf(values[j], values[j], sum);
        return sum;
    }

    // The sum over all workers is there after a barrier.
    __device__ void put_squares(float squares) const {
        float sums[1] = {input.g % 2 ? 0.f : squares};  // two lanes have each column
        const float sum = warp_sums(sums);
        if (input.lane == 0) slots[input.warp] = sum;
    }
    __device__ float inverse_root() const {
        wait();
        float sum = 0.f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) sum += slots[warp];
        return rsqrtf(sum / INPUTS + residual.epsilon);
    }
    static __device__ void wait() { named_barrier(1, WARPS * 32); }

    // Reads `delta` twice: registers hold the base already.
    __device__ void add_delta(float (&values)[IntegerInput::WORDS][4]) const {
        float squares = 0.f, delta[4];
#pragma unroll
        for (int i = 0; i < IntegerInput::WORDS; ++i) {
            load_values(residual.delta, i, delta);
            squares = with_squares(squares, delta);
        }
        put_squares(squares);
        const float factor = inverse_root();
#pragma unroll
        for (int i = 0; i < IntegerInput::WORDS; ++i) {
            uint32 weights[ELEMENT_BYTES];
            load_weights(residual.delta_weight, i, weights);
            load_values(residual.delta, i, delta);
            multiply(delta, weights, factor);
#pragma unroll
            for (int j = 0; j < 4; ++j) values[i][j] += delta[j];
            if (blockIdx.x == 0 && input.g % 2 == 0 && owns(i)) store_four(residual.sum + input.column_of(i), values[i]);
        }
        // until all have read the slots
        wait();
    }

    // Waits for the previous kernel. With `early`, requests weights of the norm before that.
    __device__ void load(bool early) {
        constexpr int WORDS = IntegerInput::WORDS;
        uint32 weights[WORDS][ELEMENT_BYTES];
        float values[WORDS][4], squares = 0.f;
        if (!early) wait_for_previous_kernel();
#pragma unroll
        for (int i = 0; i < WORDS && !PLAIN_INPUT; ++i) load_weights(residual.weight, i, weights[i]);
        if (early) wait_for_previous_kernel();
#pragma unroll
        for (int i = 0; i < WORDS; ++i) load_values(residual.base, i, values[i]);
        if (residual.delta) add_delta(values);
#pragma unroll
        for (int i = 0; i < WORDS && !PLAIN_INPUT; ++i) {
            squares = with_squares(squares, values[i]);
            multiply(values[i], weights[i], 1.f);
        }
        if (!PLAIN_INPUT) put_squares(squares);
        input.load_from([&](int i, float(&four)[4]) {
#pragma unroll
            for (int j = 0; j < 4; ++j) four[j] = values[i][j];
        });
        if (!PLAIN_INPUT) input.back *= inverse_root();
    }
};
