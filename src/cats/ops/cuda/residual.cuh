// The residual stream of one token, float32, and the norms on the way into a branch of a layer.
//
// A branch reads norm(base + delta). Every block computes it for itself, which costs less than a launch. `delta` is the
// output of the previous branch, where it goes through a norm of its own: that needs a sum over all columns, so that the
// output cannot be added row by row. One block writes base + delta for later kernels, into a buffer that this launch does
// not read.
#pragma once
#include "primitives.cuh"

struct Residual {
    const float* base;         // [D]
    const float* delta;        // [D] or null
    const char* delta_weight;  // [D], weights of the norm of delta
    float* sum;                // [D], gets base + delta; null without delta
    const char* weight;        // [D], weights of the norm into the branch
    float epsilon;
    float weight_offset;  // 1 where a model stores its weights less 1
};

// Threads that share a sum: a barrier of their own, one slot in shared memory for each of their warps.
struct Team {
    float* slots;
    int warp, warps, barrier;

    __device__ float sum(float value) const {
        float values[1] = {value};
        value = warp_sums(values);
        if (threadIdx.x % 32 == 0) slots[warp] = value;
        wait();
        value = 0.f;
        for (int i = 0; i < warps; ++i) value += slots[i];
        wait();
        return value;
    }
    __device__ void wait() const { named_barrier(barrier, warps * 32); }
};

// The vectors of VECTOR columns that one thread of a team owns, of SIZE columns: thread, thread + TEAM, ...
template <int SIZE, int TEAM>
struct Columns {
    static constexpr int ALL = SIZE / VECTOR, COUNT = (ALL + TEAM - 1) / TEAM, OWNED = COUNT * VECTOR;
    const int thread;

    __device__ int first(int v) const { return (v * TEAM + thread) * VECTOR; }
    __device__ bool owns(int v) const { return ALL % TEAM == 0 || v * TEAM + thread < ALL; }

    __device__ void load(const char* from, uint4 (&words)[COUNT]) const {
#pragma unroll
        for (int v = 0; v < COUNT; ++v)
            words[v] = owns(v) ? load_from_l2(from + first(v) * ELEMENT_BYTES) : make_uint4(0, 0, 0, 0);
    }
    __device__ void load(const float* from, float (&values)[OWNED]) const {
#pragma unroll
        for (int v = 0; v < COUNT; ++v)
#pragma unroll
            for (int i = 0; i < VECTOR; i += 4) {
                float* to = &values[v * VECTOR + i];
                if (owns(v)) load_floats_from_l2(from + first(v) + i, to);
                else to[0] = to[1] = to[2] = to[3] = 0.f;
            }
    }
    __device__ void store(float* to, const float (&values)[OWNED]) const {
#pragma unroll
        for (int v = 0; v < COUNT; ++v)
#pragma unroll
            for (int i = 0; i < VECTOR; i += 4)
                if (owns(v)) store_four(to + first(v) + i, &values[v * VECTOR + i]);
    }
};

// values *= weights / their root mean square.
template <int SIZE, int TEAM, int COUNT>
__device__ __forceinline__ void apply_norm(float (&values)[COUNT * VECTOR], const uint4 (&weights)[COUNT],
                                           const Residual& r, const Team& team) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < COUNT * VECTOR; ++i) squares = fmaf(values[i], values[i], squares);
    float scale = rsqrtf(team.sum(squares) / SIZE + r.epsilon);
#pragma unroll
    for (int v = 0; v < COUNT; ++v) {
        float w[VECTOR];
        unpack(weights[v], w);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) values[v * VECTOR + i] *= scale * (w[i] + r.weight_offset);
    }
}

// x = norm(base + delta), in the columns of this thread. Waits for the previous kernel. With `early`, requests weights before
// that.
template <int SIZE, int TEAM>
__device__ __forceinline__ void load_normed(const Residual& r, const Columns<SIZE, TEAM>& columns, const Team& team,
                                            bool early, bool keeps_sum,
                                            float (&x)[Columns<SIZE, TEAM>::OWNED]) {
    constexpr int COUNT = Columns<SIZE, TEAM>::COUNT;
    uint4 weights[COUNT];
    if (!early) wait_for_previous_kernel();
    columns.load(r.weight, weights);
    if (early) wait_for_previous_kernel();
    columns.load(r.base, x);
    if (r.delta) {
        float delta[COUNT * VECTOR];
        uint4 delta_weights[COUNT];
        columns.load(r.delta_weight, delta_weights);
        columns.load(r.delta, delta);
        apply_norm<SIZE, TEAM>(delta, delta_weights, r, team);
#pragma unroll
        for (int i = 0; i < COUNT * VECTOR; ++i) x[i] += delta[i];
        if (keeps_sum) columns.store(r.sum, x);
    }
    apply_norm<SIZE, TEAM>(x, weights, r, team);
}
