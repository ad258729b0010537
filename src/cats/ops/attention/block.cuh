// What a block does, step by step: a part of attention.cu and attention_rows.cu, which define Arguments.
#pragma once
#include "sizes.cuh"

struct Block {
    const Arguments& a;
    Shared& shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column;  // which query heads
    const int key_head = column / PARTS, part = column % PARTS;
    const int first_query = key_head * QUERIES + part * HEADS;
    const int heads = min(HEADS, QUERIES - part * HEADS);
    // written by another kernel, for the previous token: not from the L1 cache
    const int newest = load_word_from_l2(a.slot), position = load_word_from_l2(a.position);  // the low halves
    int splits, begin, end;  // slots of this block
    float cosines[EACH], sines[EACH];  // of this lane's columns: lane, lane + 32, ...

    __device__ Block(const Arguments& a, Shared& shared, int column) : a(a), shared(shared), column(column) {
        int first = max(0, newest + 1 - a.window), count = newest + 1 - first;
        splits = count <= UNSPLIT_SLOTS ? 1 : min(gridDim.x, (count + SPLIT_SLOTS - 1) / SPLIT_SLOTS);
        int share = (count + splits - 1) / splits;
        begin = first + blockIdx.x * share;
        end = min(begin + share, newest + 1);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            size_t entry = (size_t)position * ROTARY + i * 32 + lane;
            bool rotated = i * 32 + lane < ROTARY;
            cosines[i] = rotated ? a.cosines[entry] : 1.f;
            sines[i] = rotated ? a.sines[entry] : 0.f;
        }
    }

    // A head of the new token, by one warp: norm, then rotation.
    __device__ void prepare(const float* from, const char* weight, float* to) {
        float values[EACH], squares[1] = {0.f};
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int at = i * 32 + lane;
            values[i] = at < HEAD ? load_float_from_l2(from + at) : 0.f;
            squares[0] = fmaf(values[i], values[i], squares[0]);
        }
        float scale = HEAD_NORM ? rsqrtf(warp_sums(squares) / HEAD + a.epsilon) : 1.f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int at = i * 32 + lane;
            if (at >= HEAD) continue;
            if (HEAD_NORM) {
                float w[2];
                unpack_word(load_element_from_l2(weight + at * ELEMENT_BYTES), w);
                values[i] *= scale * (w[0] + a.weight_offset);
            }
            to[at] = values[i];
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int at = i * 32 + lane;
            if (at >= ROTARY) continue;
            float other = at < ROTARY / 2 ? -to[at + ROTARY / 2] : to[at - ROTARY / 2];
            values[i] = values[i] * cosines[i] + other * sines[i];
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (i * 32 + lane < ROTARY) to[i * 32 + lane] = values[i];
        __syncwarp();
    }

    __device__ void prepare_all() {
        int query_heads = a.key_heads * QUERIES;
        const float* key = a.qkv + (size_t)(query_heads + key_head) * HEAD;
        const float* value = key + (size_t)a.key_heads * HEAD;
        for (int job = warp; job < heads + 2; job += WARPS) {
            if (job < heads) {
                prepare(a.qkv + (size_t)(first_query + job) * HEAD, a.q_weight, shared.queries[job]);
            } else if (job == heads) {
                prepare(key, a.k_weight, shared.key);
                for (int v = lane; v < HEAD_VECTORS; v += 32) shared.new_key[v] = pack(shared.key + v * VECTOR);
            } else {
                for (int v = lane; v < HEAD_VECTORS; v += 32) {
                    float words[VECTOR];
                    for (int i = 0; i < VECTOR; i += 4) load_floats_from_l2(value + v * VECTOR + i, words + i);
                    shared.new_value[v] = pack(words);
                }
            }
        }
        __syncthreads();
        if (part == 0 && end == newest + 1 && begin < end && threadIdx.x < HEAD_VECTORS) {
            size_t at = ((size_t)key_head * a.capacity + newest) * HEAD * ELEMENT_BYTES + threadIdx.x * 16;
            *reinterpret_cast<uint4*>(a.keys + at) = shared.new_key[threadIdx.x];
            *reinterpret_cast<uint4*>(a.values + at) = shared.new_value[threadIdx.x];
        }
    }

    // Slots of a turn of a lane are at + u * STEP.
    static constexpr int STEP = WARPS * SLOTS;
    __device__ int first_slot() { return begin + warp * SLOTS + lane / LANES; }
    // A lane's first vector of a slot.
    __device__ const char* vector_of(const char* from, int at) {
        return from + ((size_t)key_head * a.capacity + at) * ROW_BYTES + lane % LANES * 16;
    }

    // `from` is the vector of slot `at`.
    __device__ void fetch(Fetched& to, const char* from, int at) {
        const int left = min(end, newest) - at;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                bool there = u * STEP < left && v * LANES + lane % LANES < HEAD_VECTORS;
                to.vectors[u][v] = make_uint4(0, 0, 0, 0);
                if (there) to.vectors[u][v] = load_from_l2(from + u * STEP * ROW_BYTES + v * LANES * 16);
            }
    }

    // What the turns after the first one read, up to UNSPLIT_SLOTS slots.
    __device__ void prefetch_later_turns() {
        int at = begin + UNROLL * STEP, count = min(min(end, newest) - at, UNSPLIT_SLOTS);
        if (part > 0 || lane > 0 || warp > 1 || count <= 0) return;
        const char* from = warp ? a.values : a.keys;
        prefetch_to_l2(from + ((size_t)key_head * a.capacity + at) * ROW_BYTES, count * ROW_BYTES);
    }

    __device__ void add_newest(Fetched& to, const uint4* from, int at) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                int vector = v * LANES + lane % LANES;
                if (u * STEP == newest - at && vector < HEAD_VECTORS) to.vectors[u][v] = from[vector];
            }
    }

    // The first slot of the turn that this lane ends with, and the lane of its team that ends with a slot and a head.
    __device__ int first_slot_held() { return lane % LANES / (LANES >> SLOT_BITS) * HELD_SLOTS; }
    __device__ int lane_of(int u, int h) {
        int member = u / HELD_SLOTS * (LANES >> SLOT_BITS) + h / HELD_HEADS * (LANES >> (SLOT_BITS + HEAD_BITS));
        return lane / LANES * LANES + member;
    }

    // Adds up over the lanes of a team. The scores that a lane ends with come first in its array.
    __device__ void share_out(float (&scores)[UNROLL][HEADS]) {
        int distance = LANES / 2;
#pragma unroll
        for (int half = UNROLL / 2; half >= HELD_SLOTS; half /= 2, distance /= 2)
#pragma unroll
            for (int u = 0; u < half; ++u)
#pragma unroll
                for (int h = 0; h < HEADS; ++h)
                    scores[u][h] = exchanged_sum(scores[u][h], scores[u + half][h], distance);
#pragma unroll
        for (int half = HEADS / 2; half >= HELD_HEADS; half /= 2, distance /= 2)
#pragma unroll
            for (int u = 0; u < HELD_SLOTS; ++u)
#pragma unroll
                for (int h = 0; h < half; ++h)
                    scores[u][h] = exchanged_sum(scores[u][h], scores[u][h + half], distance);
#pragma unroll
        for (; distance; distance /= 2)
#pragma unroll
            for (int u = 0; u < HELD_SLOTS; ++u)
#pragma unroll
                for (int h = 0; h < HELD_HEADS; ++h) scores[u][h] += __shfl_xor_sync(~0u, scores[u][h], distance);
    }

    // `keys` and `values` hold the first turn, without the new token.
    __device__ void attend(Fetched& keys, Fetched& values) {
        const int member = lane % LANES;
        const float scale = SOFTCAP ? a.scale : a.scale * LOG2_E;
        float query[HEADS][OWNED], sums[HEADS][OWNED];
        float peak[HELD_HEADS], total[HELD_HEADS];  // of the heads held, total of the slots held
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
#pragma unroll
            for (int i = 0; i < OWNED; ++i) {
                int at = (i / VECTOR * LANES + member) * VECTOR + i % VECTOR;
                query[h][i] = h < heads && at < HEAD ? shared.queries[h][at] * scale : 0.f;
                sums[h][i] = 0.f;
            }
#pragma unroll
        for (int h = 0; h < HELD_HEADS; ++h) peak[h] = LOWEST, total[h] = 0.f;
        int at = first_slot();
        const char *next_keys = vector_of(a.keys, at), *next_values = vector_of(a.values, at);
        // the same number of turns in all lanes of a warp
        while (at - lane / LANES < end) {
            next_keys += UNROLL * STEP * ROW_BYTES, next_values += UNROLL * STEP * ROW_BYTES;
            add_newest(keys, shared.new_key, at);
            float scores[UNROLL][HEADS];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float key[OWNED];
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) unpack(keys.vectors[u][v], &key[v * VECTOR]);
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    scores[u][h] = 0.f;
#pragma unroll
                    for (int i = 0; i < OWNED; ++i) scores[u][h] = fmaf(query[h][i], key[i], scores[u][h]);
                }
            }
            fetch(keys, next_keys, at + UNROLL * STEP);
            share_out(scores);
            weigh(scores, end - at, peak, total, sums);
            add_newest(values, shared.new_value, at);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float value[OWNED];
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) unpack(values.vectors[u][v], &value[v * VECTOR]);
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    float weight = __shfl_sync(~0u, scores[u % HELD_SLOTS][h % HELD_HEADS], lane_of(u, h));
#pragma unroll
                    for (int i = 0; i < OWNED; ++i) sums[h][i] = fmaf(weight, value[i], sums[h][i]);
                }
            }
            at += UNROLL * STEP;
            fetch(values, next_values, at);
        }
#pragma unroll
        for (int h = 0; h < HELD_HEADS; ++h) total[h] = over_slots(total[h], [](float x, float y) { return x + y; });
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            Running running{__shfl_sync(~0u, peak[h % HELD_HEADS], lane_of(0, h)),
                            __shfl_sync(~0u, total[h % HELD_HEADS], lane_of(0, h))};
#pragma unroll
            for (int i = 0; i < OWNED; ++i) running.sums[i] = sums[h][i];
#pragma unroll
            for (int distance = LANES; distance < 32; distance *= 2) running.merge(distance);
            if (lane == 0) shared.peak[warp][h] = running.peak, shared.total[warp][h] = running.total;
            if (lane >= LANES) continue;
#pragma unroll
            for (int i = 0; i < OWNED; ++i) {
                int at = (i / VECTOR * LANES + member) * VECTOR + i % VECTOR;
                if (at < HEAD) shared.sums[warp][h][at] = running.sums[i];
            }
        }
        __syncthreads();
    }

    // Combines a value of each lane of a team that holds the same heads.
    template <class Combine>
    __device__ float over_slots(float value, Combine combine) {
#pragma unroll
        for (int bit = 1; bit <= SLOT_BITS; ++bit) value = combine(value, __shfl_xor_sync(~0u, value, LANES >> bit));
        return value;
    }

    // Turns the scores that a lane ends with into weights, and scales the earlier sums to the new peak. `left` slots exist
    // from the lane's first slot on.
    __device__ void weigh(float (&scores)[UNROLL][HEADS], int left, float (&peak)[HELD_HEADS], float (&total)[HELD_HEADS],
                          float (&sums)[HEADS][OWNED]) {
        float old[HELD_HEADS];
        bool higher = false;
#pragma unroll
        for (int h = 0; h < HELD_HEADS; ++h) {
            float highest = peak[h];
#pragma unroll
            for (int u = 0; u < HELD_SLOTS; ++u) {
                float& score = scores[u][h];
                if (SOFTCAP) score = a.softcap * LOG2_E * tanhf(score / a.softcap);
                if ((first_slot_held() + u) * STEP >= left) score = NONE;
                highest = fmaxf(highest, score);
            }
            highest = over_slots(highest, [](float x, float y) { return fmaxf(x, y); });
            old[h] = factor_of(peak[h], highest);
            higher |= highest != peak[h];
            peak[h] = highest;
            total[h] *= old[h];
#pragma unroll
            for (int u = 0; u < HELD_SLOTS; ++u) total[h] += scores[u][h] = factor_of(scores[u][h], highest);
        }
        if (!__ballot_sync(~0u, higher)) return;
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float scale = __shfl_sync(~0u, old[h % HELD_HEADS], lane_of(0, h));
#pragma unroll
            for (int i = 0; i < OWNED; ++i) sums[h][i] *= scale;
        }
    }

    __device__ float* partial(int split, int h) {
        return a.partials + ((size_t)split * a.key_heads * QUERIES + first_query + h) * (HEAD + 2);
    }

    // Over the warps of the block.
    __device__ void merge_warps() {
        for (int i = threadIdx.x; i < heads * HEAD; i += THREADS) {
            int h = i / HEAD, at = i % HEAD;
            float peak = LOWEST, total = 0.f, sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, shared.peak[w][h]);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                float factor = factor_of(shared.peak[w][h], peak);
                total += shared.total[w][h] * factor;
                sum += shared.sums[w][h][at] * factor;
            }
            if (splits == 1) {
                write(h, at, sum / total);
                continue;
            }
            float* to = partial(blockIdx.x, h);
            to[at] = sum;
            if (at == 0) to[HEAD] = peak, to[HEAD + 1] = total;
        }
    }

    // Over the splits, by the block that arrives last.
    __device__ void merge_splits() {
        __syncthreads();
        if (threadIdx.x == 0) {
            shared.last = arrive_in_global(a.counters + column) == splits - 1;
            if (shared.last) a.counters[column] = 0;
        }
        __syncthreads();
        if (!shared.last) return;
        if (warp < heads) weigh_splits(warp);
        __syncthreads();
        for (int i = threadIdx.x; i < heads * HEAD; i += THREADS) {
            int h = i / HEAD, at = i % HEAD;
            float sum = 0.f;
#pragma unroll 8
            for (int s = 0; s < splits; ++s)
                sum = fmaf(shared.factors[h][s], load_float_from_l2(partial(s, h) + at), sum);
            write(h, at, sum / shared.norms[h]);
        }
    }

    // The factor of each split of a head, by one warp, one lane per split.
    __device__ void weigh_splits(int h) {
        float highest = LOWEST, total[1] = {0.f};
        for (int s = lane; s < splits; s += 32) highest = fmaxf(highest, load_float_from_l2(partial(s, h) + HEAD));
#pragma unroll
        for (int distance = 16; distance; distance /= 2)
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
        for (int s = lane; s < splits; s += 32) {
            float factor = factor_of(load_float_from_l2(partial(s, h) + HEAD), highest);
            total[0] = fmaf(load_float_from_l2(partial(s, h) + HEAD + 1), factor, total[0]);
            shared.factors[h][s] = factor;
        }
        float sum = warp_sums(total);
        if (lane == 0) shared.norms[h] = sum;
    }

    __device__ void write(int h, int at, float value) {
        store_element(a.out + ((size_t)(first_query + h) * HEAD + at) * ELEMENT_BYTES, value);
    }
};
