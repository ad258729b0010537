// Attention of one new token: norms of its heads, rotary embedding, write to the cache, and attention over the slots in
// sight, split along their length.
//
// The grid is [splits, key heads * parts]; blocks that a short context does not need end at once. A block handles up to
// HEADS query heads that share a key head, over its share of the slots. LANES lanes hold one key, 16 bytes each, so that a
// warp reads several slots at once, UNROLL times in flight. Each such team of lanes keeps its own running maximum and
// sums; they are merged over the warp, the block, and, by the block that arrives last, over the splits.
//
// The new key and value are rounded as the cache holds them, and read from shared memory: no block depends on another
// one's write to the cache. Older ones, and where the new token goes, are the work of earlier tokens: they are read before
// the kernel in front has ended.
//
// The loader defines DTYPE, HEAD (size of a head), ROTARY (its rotated columns), HEADS and QUERIES (query heads of a key
// head), SPLIT_SLOTS (fewer are not split further), MAX_SPLITS, and the switches HEAD_NORM and SOFTCAP.
#include "primitives.cuh"

typedef long long int64;

constexpr int WARPS = 8, THREADS = WARPS * 32, UNROLL = 4;
static_assert(HEADS <= WARPS);
constexpr int HEAD_VECTORS = HEAD / VECTOR, PARTS = (QUERIES + HEADS - 1) / HEADS;

__device__ constexpr int lanes_of_a_slot() {
    int lanes = 1;
    while (lanes < HEAD_VECTORS && lanes < 32) lanes *= 2;
    return lanes;
}
constexpr int LANES = lanes_of_a_slot(), SLOTS = 32 / LANES, VECTORS = (HEAD_VECTORS + LANES - 1) / LANES;
constexpr int OWNED = VECTORS * VECTOR, EACH = (HEAD + 31) / 32;
constexpr float NEVER = -3.402823466e38f;  // no score yet

struct Arguments {
    const float* qkv;       // [QH + 2 KH, HEAD]: queries, keys, values of the new token
    const float* cosines;   // [capacity, ROTARY]
    const float* sines;     // [capacity, ROTARY]
    const char* q_weight;   // [HEAD], of the norm of each query, for HEAD_NORM
    const char* k_weight;   // [HEAD]
    char* keys;             // [KH, capacity, HEAD]
    char* values;           // [KH, capacity, HEAD]
    char* out;              // [QH, HEAD]
    const int64* slot;      // where the new token goes
    const int64* position;  // its position
    float* partials;        // [splits, QH, HEAD + 2] for more than one split
    unsigned* counters;     // [key heads * parts], zero between calls
    int key_heads;
    int capacity;
    int window;  // slots in sight, the new one included
    float scale;
    float softcap;
    float epsilon;
    float weight_offset;
};

struct Shared {
    float queries[HEADS][HEAD];
    float key[HEAD];
    uint4 new_key[HEAD_VECTORS], new_value[HEAD_VECTORS];
    float peak[WARPS][HEADS], total[WARPS][HEADS];
    float sums[WARPS][HEADS][HEAD];
    float factors[HEADS][MAX_SPLITS], norms[HEADS];  // of the splits, for the block that comes last
    bool last;
};

// Keys and values of one turn of a warp, on their way from memory.
struct Fetched {
    uint4 keys[UNROLL][VECTORS], values[UNROLL][VECTORS];
};

// What softmax and the weighted sum of values have come to.
struct Running {
    float peak, total;
    float sums[OWNED];

    // exp(old - peak), 0 before anything was seen
    __device__ static float factor(float old, float peak) { return old == NEVER ? 0.f : expf(old - peak); }

    __device__ void merge(int distance) {
        float other = __shfl_xor_sync(~0u, peak, distance), highest = fmaxf(peak, other);
        float mine = factor(peak, highest), theirs = factor(other, highest);
        total = total * mine + __shfl_xor_sync(~0u, total, distance) * theirs;
#pragma unroll
        for (int i = 0; i < OWNED; ++i) sums[i] = sums[i] * mine + __shfl_xor_sync(~0u, sums[i], distance) * theirs;
        peak = highest;
    }
};

struct Block {
    const Arguments& a;
    Shared& shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int key_head = blockIdx.y / PARTS, part = blockIdx.y % PARTS;
    const int first_query = key_head * QUERIES + part * HEADS;
    const int heads = min(HEADS, QUERIES - part * HEADS);
    // written by another kernel of the token before: not from the L1 cache
    const int newest = load_word_from_l2(a.slot), position = load_word_from_l2(a.position);  // the low halves
    int splits, begin, end;  // slots of this block
    float cosines[EACH], sines[EACH];  // of this lane's columns: lane, lane + 32, ...

    __device__ Block(const Arguments& a, Shared& shared) : a(a), shared(shared) {
        int first = max(0, newest + 1 - a.window), count = newest + 1 - first;
        splits = min(gridDim.x, (count + SPLIT_SLOTS - 1) / SPLIT_SLOTS);
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

    // Slots of a turn are base + lane / LANES + u * STEP.
    static constexpr int STEP = WARPS * SLOTS;
    __device__ int first_base() { return begin + warp * SLOTS; }
    __device__ int slot(int base, int u) { return base + lane / LANES + u * STEP; }

    __device__ void fetch(Fetched& to, int base) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                int vector = v * LANES + lane % LANES, at = slot(base, u);
                to.keys[u][v] = to.values[u][v] = make_uint4(0, 0, 0, 0);
                if (at >= min(end, newest) || vector >= HEAD_VECTORS) continue;
                size_t offset = ((size_t)key_head * a.capacity + at) * HEAD * ELEMENT_BYTES + vector * 16;
                to.keys[u][v] = load_from_l2(a.keys + offset);
                to.values[u][v] = load_from_l2(a.values + offset);
            }
    }

    __device__ void add_newest(Fetched& to, int base) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                int vector = v * LANES + lane % LANES;
                if (slot(base, u) != newest || vector >= HEAD_VECTORS) continue;
                to.keys[u][v] = shared.new_key[vector];
                to.values[u][v] = shared.new_value[vector];
            }
    }

    // `fetched` holds the first turn, but for the new token.
    __device__ void attend(Fetched& fetched) {
        const int member = lane % LANES;
        float query[HEADS][OWNED];
        Running running[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            running[h].peak = NEVER, running[h].total = 0.f;
#pragma unroll
            for (int i = 0; i < OWNED; ++i) {
                int at = (i / VECTOR * LANES + member) * VECTOR + i % VECTOR;
                query[h][i] = h < heads && at < HEAD ? shared.queries[h][at] * a.scale : 0.f;
                running[h].sums[i] = 0.f;
            }
        }
        // the same number of turns in all lanes of a warp
        for (int base = first_base(); base < end; base += UNROLL * STEP) {
            if (base != first_base()) fetch(fetched, base);
            add_newest(fetched, base);
            float scores[UNROLL][HEADS];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float key[OWNED];
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) unpack(fetched.keys[u][v], &key[v * VECTOR]);
                bool there = slot(base, u) < end;
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    float score = 0.f;
#pragma unroll
                    for (int i = 0; i < OWNED; ++i) score = fmaf(query[h][i], key[i], score);
#pragma unroll
                    for (int distance = LANES / 2; distance; distance /= 2)
                        score += __shfl_xor_sync(~0u, score, distance);
                    if (SOFTCAP) score = a.softcap * tanhf(score / a.softcap);
                    scores[u][h] = there ? score : NEVER;
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                Running& r = running[h];
                float peak = r.peak;
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) peak = fmaxf(peak, scores[u][h]);
                float old = Running::factor(r.peak, peak);
                r.peak = peak;
                r.total *= old;
#pragma unroll
                for (int i = 0; i < OWNED; ++i) r.sums[i] *= old;
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                float value[OWNED];
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) unpack(fetched.values[u][v], &value[v * VECTOR]);
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    float weight = Running::factor(scores[u][h], running[h].peak);
                    running[h].total += weight;
#pragma unroll
                    for (int i = 0; i < OWNED; ++i) running[h].sums[i] = fmaf(weight, value[i], running[h].sums[i]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
#pragma unroll
            for (int distance = LANES; distance < 32; distance *= 2) running[h].merge(distance);
            if (lane == 0) shared.peak[warp][h] = running[h].peak, shared.total[warp][h] = running[h].total;
            if (lane >= LANES) continue;
#pragma unroll
            for (int i = 0; i < OWNED; ++i) {
                int at = (i / VECTOR * LANES + member) * VECTOR + i % VECTOR;
                if (at < HEAD) shared.sums[warp][h][at] = running[h].sums[i];
            }
        }
        __syncthreads();
    }

    __device__ float* partial(int split, int h) {
        return a.partials + ((size_t)split * a.key_heads * QUERIES + first_query + h) * (HEAD + 2);
    }

    // Over the warps of the block.
    __device__ void merge_warps() {
        for (int i = threadIdx.x; i < heads * HEAD; i += THREADS) {
            int h = i / HEAD, at = i % HEAD;
            float peak = NEVER, total = 0.f, sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, shared.peak[w][h]);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                float factor = Running::factor(shared.peak[w][h], peak);
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

    // Over the splits, by the block that comes last.
    __device__ void merge_splits() {
        __syncthreads();
        if (threadIdx.x == 0) {
            shared.last = arrive_in_global(a.counters + blockIdx.y) == splits - 1;
            if (shared.last) a.counters[blockIdx.y] = 0;
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

    // What each split of a head counts, by one warp: a lane a split.
    __device__ void weigh_splits(int h) {
        float highest = NEVER, total[1] = {0.f};
        for (int s = lane; s < splits; s += 32) highest = fmaxf(highest, load_float_from_l2(partial(s, h) + HEAD));
#pragma unroll
        for (int distance = 16; distance; distance /= 2)
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
        for (int s = lane; s < splits; s += 32) {
            float factor = Running::factor(load_float_from_l2(partial(s, h) + HEAD), highest);
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

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    Block block(a, shared);
    if (blockIdx.x >= block.splits) return;
    Fetched fetched;
    block.fetch(fetched, block.first_base());
    wait_for_previous_kernel();
    allow_next_kernel();
    block.prepare_all();
    block.attend(fetched);
    block.merge_warps();
    if (block.splits > 1) block.merge_splits();
}
