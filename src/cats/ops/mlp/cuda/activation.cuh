// What a neuron's gate goes through, and the rule by which it is dropped. The loader defines ACTIVATION.
#pragma once

#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define RELU 3

__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == SILU
    return __fdividef(x, 1.f + expf(-x));
#elif ACTIVATION == GELU
    return .5f * x * (1.f + erff(x * .70710678118654752f));
#elif ACTIVATION == GELU_TANH
    return .5f * x * (1.f + tanhf(.79788456080286536f * (x + .044715f * x * x * x)));
#else
    return x < 0.f ? 0.f : x;
#endif
}

// NaN is kept.
__device__ __forceinline__ bool dropped(float value, float threshold) { return fabsf(value) < threshold; }
