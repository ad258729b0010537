// The worker warps of a group: a part of gated_mlp.cu, which defines the sizes, Arguments and Group.
#pragma once

// One thread of the workers. It handles the columns of its vectors, in every row.
struct Worker {
    const Arguments& a;
    Group& shared;
    const int group, thread, lane = threadIdx.x % 32, warp;  // thread and warp within the group
    float x[BATCH][OWNED], y[BATCH][OWNED];

    __device__ int vector(int v) { return v * WORKERS + thread; }
    __device__ bool owns(int v) { return ROW_VECTORS % WORKERS == 0 || vector(v) < ROW_VECTORS; }

    __device__ Worker(const Arguments& a, Group& shared)
        : a(a), shared(shared), group(threadIdx.x / GROUP_THREADS), thread(threadIdx.x % GROUP_THREADS),
          warp(thread / 32) {}

    __device__ void run() {
        if (RESIDUAL) {
            load_residual();
        } else {
            wait_for_previous_kernel();
            load_x();
        }
        a.stamp(INPUT);
        for (int chunk = 0, parity = 0;; chunk = chunk + 1 == CHUNKS ? (parity ^= 1, 0) : chunk + 1) {
            barrier_wait(&shared.full[chunk], parity);
            int kind = shared.kind[chunk];
            if (kind == STOP) break;
            constexpr int AT_ONCE = rows_at_once();
#pragma unroll
            for (int first = 0; first < ROWS && kind != NOTHING; first += AT_ONCE) {
                uint4 rows[AT_ONCE][VECTORS];
                load_rows(rows, chunk, first);
                if (kind == DOWN) add_down(rows, chunk, first);
                else dot(rows, chunk, first);
            }
            __syncwarp();
            warp_arrive(&shared.done[chunk]);
        }
        a.stamp(LAST);
        if (GROUPS > 1) share_sums();
        // a group that shares no vector has nothing to add
        if (group >= VECTORS) return;
        if (RESIDUAL) each_four(true, [&](int at, float* v) { add_to_global(a.sums + at, v); });
        else if (a.partials) finish_in_order();
        else finish();
        a.stamp(END);
    }

    // Adds up the groups of the block. Afterwards, each has the sums of its own share of the vectors.
    __device__ void share_sums() {
        Group* groups = &shared - group;
        static_assert(GROUPS == 1 || sizeof(shared.rows) >= BATCH * HIDDEN * sizeof(float));
        // the rings are free by now
        float* sums = reinterpret_cast<float*>(shared.rows);
        each_four(false, [&](int at, float* v) { store_four(sums + at, v); });
        named_barrier(1, GROUPS * WORKERS);
        for (int other = 0; other < GROUPS; ++other) {
            if (other == group) continue;
            const float* sums = reinterpret_cast<const float*>(groups[other].rows);
            each_four(true, [&](int at, float* v) {
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] += sums[at + i];
            });
        }
    }

    __device__ void load_x() {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                uint4 words = make_uint4(0, 0, 0, 0);
                if (owns(v)) words = load_from_l2(a.x + b * ROW_BYTES + vector(v) * 16);
                unpack(words, &x[b][v * VECTOR]);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) y[b][v * VECTOR + i] = 0.f;
            }
    }

    __device__ void load_residual() {
#if RESIDUAL
        static_assert(BATCH == 1 && COPIES == 1);
        // the slots of dot products are still unused
        Team team{&shared.dots[0][0][0][0], warp, WARPS, 2 + group};
        Columns<HIDDEN, WORKERS> columns{thread};
        load_normed(a.residual, columns, team, a.request_early, blockIdx.x == 0 && group == 0, x[0]);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            // rounded, as the layers of a model read it
            unpack(pack(&x[0][v * VECTOR]), &x[0][v * VECTOR]);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) y[0][v * VECTOR + i] = 0.f;
        }
#endif
    }

    template <int N>
    __device__ void load_rows(uint4 (&rows)[N][VECTORS], int chunk, int first) {
#pragma unroll
        for (int r = 0; r < N; ++r)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                rows[r][v] = make_uint4(0, 0, 0, 0);
                if (owns(v))
                    rows[r][v] = *reinterpret_cast<const uint4*>(shared.rows[chunk][first + r] + vector(v) * 16);
            }
    }

    // Where a chunk holds fewer rows, the other sums are not read.
    template <int N>
    __device__ void dot(const uint4 (&rows)[N][VECTORS], int chunk, int first) {
        float sums[N * BATCH];
#pragma unroll
        for (int r = 0; r < N; ++r) {
#pragma unroll
            for (int b = 0; b < BATCH; ++b) sums[r * BATCH + b] = 0.f;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float w[VECTOR];
                unpack(rows[r][v], w);
#pragma unroll
                for (int b = 0; b < BATCH; ++b)
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i)
                        sums[r * BATCH + b] = fmaf(w[i], x[b][v * VECTOR + i], sums[r * BATCH + b]);
            }
        }
        float sum = warp_sums(sums);
        constexpr int LANES = 32 / (N * BATCH);
        int i = lane / LANES;
        if (lane % LANES == 0) shared.dots[chunk][warp][i % BATCH][first + i / BATCH] = sum;
    }

    // A column that no token needs is left out: 0 * inf must not become NaN.
    template <int N>
    __device__ void add_down(const uint4 (&rows)[N][VECTORS], int chunk, int first) {
#pragma unroll
        for (int r = 0; r < N; ++r) {
            float factor[BATCH];
            bool needed = false;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                factor[b] = shared.factor[chunk][b][first + r];
                needed |= factor[b] != 0.f;
            }
            if (!needed) continue;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                float w[VECTOR];
                unpack(rows[r][v], w);
#pragma unroll
                for (int b = 0; b < BATCH; ++b)
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i)
                        y[b][v * VECTOR + i] = fmaf(w[i], factor[b], y[b][v * VECTOR + i]);
            }
        }
    }

    // Calls f(offset in a [B, D] array, the four floats of y there) for all vectors, or for this group's share of them.
    template <class F>
    __device__ void each_four(bool shared_out, F f) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
#pragma unroll
                for (int i = 0; i < VECTOR; i += 4)
                    if (owns(v) && (!shared_out || v % GROUPS == group))
                        f(b * HIDDEN + vector(v) * VECTOR + i, &y[b][v * VECTOR + i]);
    }

    // True in the last of `count` warps to arrive. It then sees what the others wrote before they arrived.
    __device__ bool last_to_arrive(int counter, int count) {
        unsigned before = 0;
        __syncwarp();
        if (lane == 0) before = arrive_in_global(a.counters + counter + group * WARPS + warp);
        __syncwarp();
        if (__shfl_sync(~0u, before, 0) != count - 1) return false;
        if (lane == 0) a.counters[counter + group * WARPS + warp] = 0;
        return true;
    }

    // Several copies of the sums, because many additions to one address wait for each other.
    __device__ void finish() {
        float* copy = a.sums + blockIdx.x % COPIES * (BATCH * HIDDEN);
        each_four(true, [&](int at, float* v) { add_to_global(copy + at, v); });
        if (!last_to_arrive(ALL_ARRIVED, gridDim.x)) return;
        each_four(true, [&](int at, float* v) {
            float part[COPIES][4], zeros[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int c = 0; c < COPIES; ++c) load_floats_from_l2(a.sums + c * (BATCH * HIDDEN) + at, part[c]);
#pragma unroll
            for (int c = 0; c < COPIES; ++c) store_four(a.sums + c * (BATCH * HIDDEN) + at, zeros);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i] = 0.f;
#pragma unroll
                for (int c = 0; c < COPIES; ++c) v[i] += part[c][i];
            }
        });
        write_out();
    }

    // The same sums in a fixed order: first over the blocks of a team, then over teams.
    __device__ void finish_in_order() {
        int team = blockIdx.x / TEAM, first = team * TEAM;
        int teams = (gridDim.x + TEAM - 1) / TEAM, members = min(TEAM, gridDim.x - first);
        store_partial(blockIdx.x);
        if (!last_to_arrive(TEAM_ARRIVED + team * MAX_WARPS, members)) return;
        sum_partials(first, members, 1);
        store_partial(first);
        if (!last_to_arrive(ALL_ARRIVED, teams)) return;
        sum_partials(0, teams, TEAM);
        write_out();
    }

    __device__ void store_partial(int block) {
        float* partial = a.partials + (size_t)block * BATCH * HIDDEN;
        each_four(true, [&](int at, float* v) { store_four(partial + at, v); });
    }

    __device__ void sum_partials(int first, int count, int step) {
        each_four(true, [&](int at, float* v) {
            for (int i = 0; i < 4; ++i) v[i] = 0.f;
#pragma unroll 8
            for (int i = 0; i < count; ++i) {
                float part[4];
                load_floats_from_l2(a.partials + (size_t)(first + i * step) * BATCH * HIDDEN + at, part);
                for (int j = 0; j < 4; ++j) v[j] += part[j];
            }
        });
    }

    __device__ void write_out() {
        // every block has its last ticket before its first warp arrives
        if (threadIdx.x == 0) a.counters[TICKET] = 0;
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                if (!owns(v) || v % GROUPS != group) continue;
                if (a.down_bias) {
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) {
                        float bias[2];
                        unpack_word(load_element_from_l2(a.down_bias + vector(v) * 16 + i * ELEMENT_BYTES), bias);
                        y[b][v * VECTOR + i] += bias[0];
                    }
                }
                *reinterpret_cast<uint4*>(a.out + b * ROW_BYTES + vector(v) * 16) = pack(&y[b][v * VECTOR]);
            }
    }
};
