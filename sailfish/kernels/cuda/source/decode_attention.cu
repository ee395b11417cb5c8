// Paged attention of sequences with one or a few queries each, in one launch that divides the cache evenly
// among the blocks. It is compiled with
//   HEAD               elements of a head
//   KV                 what the cache holds: 0 bf16, 1 int8, 2 float8 e4m3
//   QUERY_TILES        eights of (query, head) rows that share a kv head
//   WARPS, STAGES      warps of a block; tiles that a warp has on the way
//   BULK               whether Hopper's copy engine fetches tiles, else the threads do
//   BLOCKS             that a multiprocessor must have room for
//   MOST_SHARED_BYTES  what the launch asks for
//
// Each warp takes every WARPS-th tile of its block's run and brings it through a ring of its own, so that no
// barrier stands in the loop. Scores are K Q^T and outputs V^T P^T: tokens and elements are the 16 rows of a
// tensor-core product, (query, head) pairs its 8 columns. The softmax's reference is not the running maximum
// but any score that is at most SLACK (in powers of two) below it, hence seldom changes.
#include "decode_attention_ring.cuh"

constexpr bool KEEPS_Q = QUERY_TILES == 1;     // in registers; more are read from shared memory again and again
constexpr bool TWO_CHAINS = QUERY_TILES == 1;  // of products for a score: half the wait, where there are few
constexpr int SLOT_FLOATS = ROWS * (HEAD + 2);  // outputs, then reference and sum of each row
constexpr float SLACK = 8.f;
constexpr float UNSEEN = -3e38f;  // its power of two is 0, less any reference too
constexpr float LOG2_E = 1.4426950408889634f;
// Where a lane's 16 bytes of a fragment start, in a unit: `row` of the tile, 16 bytes on if `is_second`; then
// 32 bytes further `k` times.
__device__ __forceinline__ uint32_t lane_place(int row, int is_second) {
    return BULK ? row * 128 + ((is_second ^ (row & 7)) << 4) : row * PITCH + is_second * 16;
}
__device__ __forceinline__ uint32_t further(uint32_t place, int k) {
    return BULK ? (place ^ (k % 4 * 32)) + k / 4 * (TILE * 128) : place + k * 32;
}

// What a warp has summed of one kv head of a sequence. A lane holds rows 2 * (lane % 4) and the next of each
// eight; of the outputs, elements lane / 4 and lane / 4 + 8 of each 16 (8-bit caches: 2 * (lane / 4) and + 1).
struct Sums {
    uint32_t q[KEEPS_Q ? (CHUNKS + 1) / 2 : 1][4];
    uint32_t q_from;  // shared address
    float out[CHUNKS][QUERY_TILES][4];
    float reference[QUERY_TILES][2];
    float sum[QUERY_TILES][2];
    float none[QUERY_TILES][2];  // int8: minus the score that a key of zeros would have, as `widen_k` writes it

    __device__ __forceinline__ void load_q(uint32_t (&b)[4], int tile, int chunk) const {
        load_matrices(b, q_from + tile * 8 * Q_PITCH * 2 + chunk * 32);
    }
    __device__ __forceinline__ void begin(uint32_t q_shared, int lane) {
        q_from = q_shared + lane % 8 * Q_PITCH * 2 + lane / 8 * 16;
        if constexpr (KEEPS_Q)
#pragma unroll
            for (int c = 0; c < CHUNKS; c += 2) load_q(q[c / 2], 0, c);
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) reference[n][i] = NEVER, sum[n][i] = 0.f;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[c][n][i] = 0.f;
        }
        if constexpr (KV == 1) {
            float score[QUERY_TILES][4] = {};
            uint32_t zeros[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) zeros[i / 4][i % 4] = widen_k<false>(0);
#pragma unroll
            for (int c = 0; c < CHUNKS; c += 2) multiply_q(score, score, zeros, c);
#pragma unroll
            for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) none[n][i] = -score[n][i];
        }
    }
    // Scores of 16 tokens (rows) and all queries (columns); `k`: the lane's place in K's unit.
    __device__ __forceinline__ void scores(float (&score)[QUERY_TILES][4], uint32_t k) const {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[n][i] = KV == 1 ? none[n][i % 2] : 0.f;
        float odd[QUERY_TILES][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 2) {
            uint32_t a[2][4] = {};
            if constexpr (KV == 0) {
                load_matrices(a[0], further(k, c));
                if (c + 1 < CHUNKS) load_matrices(a[1], further(k, c + 1));
            } else {
                uint32_t w[4];
                load_matrices(w, further(k, c / 2));
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {  // tokens 0-7, 8-15
                        a[half][i] = widen_k<false>(w[2 * half + i]);
                        a[half][2 + i] = widen_k<true>(w[2 * half + i]);
                    }
            }
            multiply_q(score, odd, a, c);
        }
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (TWO_CHAINS) score[n][i] += odd[n][i];
    }
    // Add the products of two chunks of keys with all queries, one to `even`, one to `odd`.
    __device__ __forceinline__ void multiply_q(float (&even)[QUERY_TILES][4], float (&odd)[QUERY_TILES][4],
                                               const uint32_t (&a)[2][4], int c) const {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n) {
            uint32_t b[4];
            if constexpr (!KEEPS_Q) load_q(b, n, c);
            const uint32_t* pairs = KEEPS_Q ? q[c / 2] : b;
            if constexpr (KV == 1) {
                multiply_add_f16(even[n], a[0], pairs[0], pairs[1]);
                multiply_add_f16(TWO_CHAINS ? odd[n] : even[n], a[1], pairs[2], pairs[3]);
            } else {
                multiply_add(even[n], a[0], pairs[0], pairs[1]);
                if (c + 1 < CHUNKS) multiply_add(TWO_CHAINS ? odd[n] : even[n], a[1], pairs[2], pairs[3]);
            }
        }
    }
    // Move the references up to the largest score so far, and what was summed with them.
    __device__ __forceinline__ void raise(const float (&score)[QUERY_TILES][4]) {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float largest = fmaxf(score[n][i], score[n][i + 2]);
#pragma unroll
                for (int away = 4; away < 32; away *= 2)
                    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, away));
                largest = fmaxf(largest, reference[n][i]);
                const float factor = exp2_fast(reference[n][i] - largest);
                reference[n][i] = largest;
                sum[n][i] *= factor;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) out[c][n][i] *= factor, out[c][n][i + 2] *= factor;
            }
    }
    // Add 16 tokens' values, weighted; `v`: the lane's place in V's unit.
    __device__ __forceinline__ void add(const uint32_t (&weight)[QUERY_TILES][2], uint32_t v) {
        if constexpr (KV == 0) {
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                uint32_t a[4];
                load_transposed(a, further(v, c));
#pragma unroll
                for (int n = 0; n < QUERY_TILES; ++n) multiply_add(out[c][n], a, weight[n][0], weight[n][1]);
            }
        } else {
#pragma unroll
            for (int c = 0; c < CHUNKS; c += 2) {
                uint32_t w[4], a[2][4];
                load_transposed(w, further(v, c / 2));
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {  // tokens 0-7, 8-15
                        a[half][2 * i] = widen<false>(w[2 * half + i]);
                        a[half][2 * i + 1] = widen<true>(w[2 * half + i]);
                    }
#pragma unroll
                for (int n = 0; n < QUERY_TILES; ++n) {
                    multiply_add(out[c][n], a[0], weight[n][0], weight[n][1]);
                    multiply_add(out[c + 1][n], a[1], weight[n][0], weight[n][1]);
                }
            }
        }
    }
};

// Scores in units of log2, soft-capped; UNSEEN where a query does not see a token. `queries`: of the lane's rows,
// four bits each; `scale`: of K's tokens.
__device__ __forceinline__ void finish_scores(float (&score)[QUERY_TILES][4], const Problem& p, uint32_t scale,
                                              uint32_t queries, int begin, int length, int lane) {
    const float unit = p.scale * SCORE_FACTOR * (p.softcap == 0.f ? LOG2_E : 1.f);
    float factor[2] = {unit, unit};  // of tokens lane / 4 and lane / 4 + 8
    if constexpr (KV != 0) {
        factor[0] *= load_shared(scale + lane / 4 * 4);
        factor[1] *= load_shared(scale + lane / 4 * 4 + 32);
    }
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] *= factor[i / 2];
    if (p.softcap != 0.f) {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                score[n][i] = p.softcap * LOG2_E * tanh_exact(__fdividef(score[n][i], p.softcap));
    }
    if (begin + TILE > length - p.n_queries + 1 || begin + p.window < length) {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int position = length - p.n_queries + (queries >> (n * 8 + i % 2 * 4) & 15);
                const int token = begin + lane / 4 + i / 2 * 8;
                if (token > position || token <= position - p.window) score[n][i] = UNSEEN;
            }
    }
}

// Zero the rows of V that no query sees: the copy engine brought what lay there, and NaN times 0 is NaN.
__device__ __forceinline__ void clear_unseen(uint32_t v, const Problem& p, int begin, int length, int lane) {
    const int low = first_token(p, length);
    if (begin >= low && begin + TILE <= length) return;
    for (int i = lane; i < UNIT_BYTES / 16; i += 32) {
        const int token = begin + i / 8 % TILE;
        if (token < low || token >= length) store_shared(v + i * 16, make_uint4(0, 0, 0, 0));
    }
    fence_async();  // before the engine writes there again
    __syncwarp();
}

// Add what other blocks have put of a row, two elements by each lane that has some, as it arrives, and clear it.
__device__ __forceinline__ void add_others(const Problem& p, int first_worker, int row, int e, float& reference,
                                           float& sum, float2& out) {
    constexpr int AT_ONCE = QUERY_TILES * HEAD * BLOCKS <= 128 ? 16 : 8;  // reads on the way
    const int lane = threadIdx.x % 32;
    const int64_t stride = gridDim.x * SLOT_FLOATS;
    float* from = p.partial + first_worker * stride + blockIdx.x * SLOT_FLOATS;
    const float* stats_from = from + ROWS * HEAD + row * 2;
    from += row * HEAD + min(e, HEAD - 2);
    for (int left = blockIdx.y - first_worker; left > 0; left -= AT_ONCE) {
        // Reads past the last go to the last again: with nothing to decide they all start at once.
        const int n = min(left, AT_ONCE);
        uint2 x[AT_ONCE], stats;
        for (bool is_again = false;; is_again = true) {
            if (is_again) __nanosleep(20);
            stats = look(stats_from + min(lane, n - 1) * stride);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) x[i] = look(from + min(i, n - 1) * stride);
            uint32_t largest_word = max(stats.x, stats.y);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) largest_word = max(largest_word, max(x[i].x, x[i].y));
            if (__all_sync(ALL_LANES, largest_word != UNWRITTEN)) break;
        }
        if (lane >= n) stats = make_uint2(__float_as_uint(NEVER), 0);
        float largest = __uint_as_float(stats.x);
#pragma unroll
        for (int away = 1; away < 32; away *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, away));
        largest = fmaxf(largest, reference);
        const float factor = exp2_fast(reference - largest), weight = exp2_fast(__uint_as_float(stats.x) - largest);
        float others = weight * __uint_as_float(stats.y);
#pragma unroll
        for (int away = 1; away < 32; away *= 2) others += __shfl_xor_sync(ALL_LANES, others, away);
        reference = largest;
        sum = sum * factor + others;
        out.x *= factor, out.y *= factor;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const float its = __shfl_sync(ALL_LANES, weight, i);
            if (i < n) {
                out.x += its * __uint_as_float(x[i].x), out.y += its * __uint_as_float(x[i].y);
                if (e < HEAD) *reinterpret_cast<uint2*>(from + i * stride) = make_uint2(UNWRITTEN, UNWRITTEN);
            }
        }
        from += AT_ONCE * stride, stats_from += AT_ONCE * stride;
    }
}

// Sum a block's share of a sequence over its warps, then over the blocks that have the rest, and write it.
__device__ __forceinline__ void finish(const Problem& p, Shared& shared, Sums& sums, const Deal& deal,
                                       const Run& run, int sequence) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n_rows = p.n_group * p.n_queries;
    const Sequences& s = shared.sequences;
    const bool is_first = run.begin <= s.before[sequence], is_last = run.end >= s.before[sequence + 1];
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int away = 4; away < 32; away *= 2)
                sums.sum[n][i] += __shfl_xor_sync(ALL_LANES, sums.sum[n][i], away);
    int first_worker = blockIdx.y;  // the first block that holds a part
    if (is_last && !is_first)
        first_worker = deal.splits ? blockIdx.y - run.split : deal.owner(s.before[sequence]);
    __syncthreads();  // the last sequence's sums have been read
    if (lane < 4) {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                shared.stats[warp][n * 8 + lane * 2 + i] = make_float2(sums.reference[n][i], sums.sum[n][i]);
    }
#pragma unroll 1
    for (int pass = 0; pass * PASS_ROWS < n_rows; ++pass) {
        if (pass > 0) __syncthreads();
        float* to = &shared.sums[warp][lane % 2 * 2][0];
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
            if (n * 2 + lane % 4 / 2 == pass) {
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int e = KV == 0 ? lane / 4 + i / 2 * 8 : lane / 4 * 2 + i / 2;
                        to[i % 2 * SUM_PITCH + c * 16 + e] = sums.out[c][n][i];
                    }
            }
        __syncthreads();
        constexpr int PARTS = (HEAD + 63) / 64;  // of a row, each summed by one warp
        const int n_items = min(PASS_ROWS, n_rows - pass * PASS_ROWS) * PARTS;
        for (int item = warp; item < n_items; item += WARPS) {
            const int in_pass = item / PARTS, e = item % PARTS * 64 + lane * 2;
            const int row = pass * PASS_ROWS + in_pass;
            const bool is_mine = HEAD % 64 == 0 || e < HEAD;
            float reference = NEVER, sum = 0.f;
            float2 out = make_float2(0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) reference = fmaxf(reference, shared.stats[w][row].x);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float factor = exp2_fast(shared.stats[w][row].x - reference);
                const float2 x = is_mine ? *reinterpret_cast<const float2*>(&shared.sums[w][in_pass][e]) : out;
                sum += factor * shared.stats[w][row].y;
                out.x += factor * x.x, out.y += factor * x.y;
            }
            if (!is_last) {  // only of the run's last sequence: a block puts one part at most
                float* slot = p.partial + (blockIdx.y * gridDim.x + blockIdx.x) * SLOT_FLOATS;
                if (is_mine) put(slot + row * HEAD + e, out);
                if (e == 0) put(slot + ROWS * HEAD + row * 2, make_float2(reference, sum));
                continue;
            }
            if (!is_first) add_others(p, first_worker, row, e, reference, sum, out);
            const float factor = sum == 0.f ? 0.f : __fdividef(V_FACTOR, sum);
            const int query = p.n_queries == 1 ? 0 : divide(row, p.n_group);
            const int64_t token = s.of[sequence] * p.n_queries + query;
            bf16* at =
                p.out + ((token * gridDim.x + blockIdx.x) * p.n_group + row - query * p.n_group) * HEAD + e;
            if (is_mine) *reinterpret_cast<uint32_t*>(at) = pack<bf16>(out.x * factor, out.y * factor);
        }
    }
    if (is_last && !is_first) {
        __syncthreads();  // every thread has read the others' references
        const int n = (blockIdx.y - first_worker) * n_rows;
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const int b = divide(i, n_rows);
            float* slot = p.partial + ((first_worker + b) * gridDim.x + blockIdx.x) * SLOT_FLOATS;
            reinterpret_cast<uint2*>(slot + ROWS * HEAD)[i - b * n_rows] = make_uint2(UNWRITTEN, UNWRITTEN);
        }
    }
}

// Write zeros for the sequences without tokens.
__device__ __forceinline__ void clear_empty(const Problem& p, const Sequences& s) {
    if (s.n == p.n_sequences) return;
    const int words = p.n_group * HEAD / 8, stride = gridDim.x * words;  // of one kv head; from query to query
    uint4* out = reinterpret_cast<uint4*>(p.out);
    for (int b = blockIdx.y; b < p.n_sequences; b += gridDim.y)
        if (s.is_empty[b])
            for (int j = 0; j < p.n_queries; ++j)
                for (int i = threadIdx.x; i < words; i += THREADS)
                    out[int64_t(b * p.n_queries + j) * stride + blockIdx.x * words + i] = make_uint4(0, 0, 0, 0);
}

// Grid: kv heads, blocks of each.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
decode_attention(const __grid_constant__ Problem p, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#if BULK
    if (lane == 0) {
        for (int i = 0; i < 2 * STAGES; ++i)
            barrier_init(shared_address(&shared.arrived[warp][i / 2][i % 2]), KV != 0 && i % 2 == 0 ? 33 : 1);
        barrier_init_done();
        fence_async();
    }
    __syncwarp();
#endif
    bool has_waited = !p.is_settled;
    if (has_waited) wait_for_previous();
    gather(shared.sequences, p);
    const Sequences& s = shared.sequences;
    const Deal deal(s, p, gridDim.y);
    const Run run = deal.run(s, p, blockIdx.y);
    Loader loader(p, maps, shared, run);
    // Of a warp's first tile only the newest token may be late: it is put in its place after the wait.
    const bool is_late = BULK && BLOCKS == 1 && !has_waited && p.n_queries == 1 && loader.is_unsettled();
    int late_block = 0, late_place = 0;
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
        if (!has_waited && loader.is_unsettled() && !(is_late && stage == 0)) {
            wait_for_previous();
            has_waited = true;
        }
        loader.begin_k(stage);
        if (stage == 0) late_block = loader.begun_block, late_place = loader.begun_place;
        if (stage < STAGES - 1) loader.begin_v(stage);
    }
    uint32_t queries = 0;  // of the lane's rows, four bits each
    if (p.n_queries > 1)
#pragma unroll
        for (int i = 0; i < 2 * QUERY_TILES; ++i)
            queries |= min(15, divide(i / 2 * 8 + lane % 4 * 2 + i % 2, p.n_group)) << (4 * i);
    const uint32_t ring = shared_address(shared.ring[warp]);
    const uint32_t k_place = ring + lane_place(lane % 16, lane / 16);
    const uint32_t v_place = KV != 0 ? k_place + UNIT_BYTES
                                     : ring + UNIT_BYTES + lane_place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    if (!has_waited) wait_for_previous();
    let_next_begin();
    Sums sums;
    int left = run.end - run.begin, stage = 0, round = 0;
    Loader::Newest newest{};
    if (is_late) newest = loader.newest(late_block, late_place);
    if (left > 0) copy_q(shared.q, p, s.of[run.sequence]);
    if (is_late) loader.put(newest);
    clear_empty(p, s);
    int mine = warp;  // the warp's next tile, counted from the first of the run's share of the sequence
    for (int sequence = run.sequence; left > 0; --sequence) {
        const int first = run.first(s, sequence), n = run.after(s, sequence) - first;
        const int length = s.length[sequence];
        int begin = ((length + TILE - 1) / TILE - s.before[sequence + 1] + first + mine) * TILE;
        // `finish` began when no warp read the last one's any more
        if (sequence != run.sequence) copy_q(shared.q, p, s.of[sequence]);
        __syncthreads();
        sums.begin(shared_address(shared.q), lane);
        if (left > n) prefetch_q(p, s.of[sequence - 1]);
#pragma unroll 1
        for (; mine < n; mine += WARPS, begin += WARPS * TILE) {
            const uint32_t scale = shared_address(shared.scale[warp][stage]);
            loader.wait(stage, 0, round);
            loader.begin_v(stage == 0 ? STAGES - 1 : stage - 1);
            float score[QUERY_TILES][4];
            sums.scores(score, k_place + 2 * stage * UNIT_BYTES);
            finish_scores(score, p, scale, queries, begin, length, lane);
            bool is_far = false;
#pragma unroll
            for (int i = 0; i < 4 * QUERY_TILES; ++i)
                is_far |= score[i / 4][i % 4] > sums.reference[i / 4][i % 2] + SLACK;
            if (__any_sync(ALL_LANES, is_far)) sums.raise(score);
            float factor[2] = {1.f, 1.f};
            if constexpr (KV != 0) {
                factor[0] = load_shared(scale + (TILE + lane / 4) * 4) * V_FACTOR;
                factor[1] = load_shared(scale + (TILE + lane / 4 + 8) * 4) * V_FACTOR;
            }
            uint32_t weight[QUERY_TILES][2];
#pragma unroll
            for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[n][i] = exp2_fast(score[n][i] - sums.reference[n][i % 2]);
                    sums.sum[n][i % 2] += score[n][i];
                }
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    weight[n][half] = transpose(pack<bf16>(score[n][2 * half] * factor[half],
                                                           score[n][2 * half + 1] * factor[half]));
            }
            loader.wait(stage, 1, round);
            loader.begin_k(stage);
            if (BULK) clear_unseen(ring + (2 * stage + 1) * UNIT_BYTES, p, begin, length, lane);
            sums.add(weight, v_place + 2 * stage * UNIT_BYTES);
            if (++stage == STAGES) stage = 0, ++round;
        }
        mine -= n;
        left -= n;
        finish(p, shared, sums, deal, run, sequence);
    }
}
