// Paged prefill attention on Hopper's wgmma.
//
// Defined per variant: HEAD (64 or 128), KV_BITS (16, or 8: int8 or e4m3) and PEERS (blocks of a cluster: 1, or
// with 16 bits 2). A persistent block has one producer warp, which walks over the block's tiles and keeps Q, K
// and V coming through the bulk copy engine, and two consumer warpgroups of 64 rows each, with Q in registers.
// A consumer starts the next scores before the last weighted sum, so that its softmax runs while the tensor
// cores work. The two blocks of a cluster have tiles with the same keys: each fetches half of them for both.
// Keys and values of 8 bits come as they are; three more warps turn them into bf16 for the tensor cores.
// Source: Shah et al. 2024 (FlashAttention-3).
#include "prefill_attention_feed.cuh"

constexpr int PRODUCER_REGISTERS = KV_BITS == 16 ? 40 : 56, CONSUMER_REGISTERS = KV_BITS == 16 ? 232 : 224;
constexpr float LARGEST = 1099511627776.0f;  // 2^40: of a row's sum of weights over a block before it is rescaled

// Tell every block of the cluster that this warp is done with a stage.
__device__ __forceinline__ void release(uint32_t barrier) {
    const int lane = threadIdx.x % 32;
    if (PEERS == 1 && lane == 0) barrier_arrive(barrier);
    if (PEERS > 1 && lane < PEERS) barrier_arrive_at(barrier, lane);
}

// ---- products -------------------------------------------------------------------------------------

using Query = uint32_t[HEAD / 16][4];
__device__ __forceinline__ void load_query(Query& q, uint32_t shared) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
        const uint32_t at = shared + step / 4 * Q_PANEL + row * 128 + ((step % 4 * 2 + lane / 16) ^ row % 8) * 16;
        load_fragments(q[step], at);
    }
}
template <int N>
__device__ __forceinline__ void start_scores(float (&score)[N], const Query& q, uint32_t k) {
    const uint32_t b = descriptor(k, 16);
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step)
        wgmma<false>(score, q[step], b + ((step / 4 * PANEL + step % 4 * 32) >> 4), step > 0);
    wgmma_commit();
}
__device__ __forceinline__ void start_values(float (&sum)[HEAD / 2], const uint32_t (&p)[KEYS / 4], uint32_t v,
                                             bool add) {
    const uint32_t b = descriptor(v, PANEL);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step)
        wgmma<true>(sum, p + 4 * step, b + step * 128, step > 0 || add);
    wgmma_commit();
}

// ---- softmax --------------------------------------------------------------------------------------

// Right to 5e-4, as FlashAttention has it, in one instruction.
__device__ __forceinline__ float quick_tanh(float x) {
    asm("tanh.approx.f32 %0, %0;" : "+f"(x));
    return x;
}

// A row pair's running softmax. Weights are exponentials relative to `shift`, the peak of the first keys seen:
// not to the peak so far, whose search would stand between scores and weights in every block of keys. Sums
// that outgrow LARGEST tell that a shift is too low; the scores are then made again and their peaks searched.
struct Running {
    float shift[2], total[2], fade[2];
    bool fades;    // whether some row of the warp must multiply its sums by `fade`
    bool is_open;  // whether some row of the warp has seen no key
};

template <int N>
__device__ __forceinline__ void cap_and_hide(float (&score)[N], const Problem& problem, const Tile& tile,
                                             int32_t first_key, int row) {
    if (problem.cap_scale != 0.0f) {
#pragma unroll
        for (int i = 0; i < N; ++i) score[i] = quick_tanh(score[i] * problem.cap_scale);
    }
    if (has_hidden<2 * N>(tile, first_key, problem.window)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = row + 8 * half >> problem.pack_shift;
            hide<2 * N>(score, half, first_key, tile.position + query, problem.window);
        }
    }
}

// Turn a row's scores into weights and return their sum.
template <int N>
__device__ __forceinline__ float weights_of(float (&score)[N], int half, float scale, float shift) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float& x = score[4 * j + 2 * half + c];
            x = power_of_2(x * scale - shift);
            part[j % 2 * 2 + c] += x;
        }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

// Turn scores into weights relative to the shifts as they are; false: some are too large.
__device__ __forceinline__ bool weigh_boldly(float (&score)[KEYS / 2], Running& run, const Problem& problem) {
    float sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = weights_of(score, half, problem.log2_scale, run.shift[half]);
    run.fades = false;
    if (!__all_sync(ALL_LANES, sum[0] < LARGEST && sum[1] < LARGEST)) return false;
    run.total[0] += sum[0];
    run.total[1] += sum[1];
    return true;
}

// Turn scores into weights relative to the peaks so far, and say what earlier sums must be multiplied by.
template <int N>
__device__ __forceinline__ void weigh(float (&score)[N], Running& run, const Problem& problem) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float part[4] = {NEVER, NEVER, NEVER, NEVER};
#pragma unroll
        for (int j = 0; j < N / 4; ++j)
            part[j % 4] = fmaxf(part[j % 4], fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
        const float high = quad_max(fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]))) * problem.log2_scale;
        const float shift = fmaxf(run.shift[half], high);
        run.fade[half] = shift == NEVER ? 1.0f : power_of_2(run.shift[half] - shift);
        run.shift[half] = shift;
        const float sum = weights_of(score, half, problem.log2_scale, shift == NEVER ? 0.0f : shift);
        run.total[half] = run.total[half] * run.fade[half] + sum;
    }
    run.fades = true;
    run.is_open = __any_sync(ALL_LANES, run.shift[0] == NEVER || run.shift[1] == NEVER);
}

// Make this warp's scores again, which weigh_boldly has overwritten.
__device__ __forceinline__ void score_again(float (&score)[KEYS / 2], const Query& q, uint32_t k) {
    const int lane = threadIdx.x % 32;
    k += (lane % 8 + lane / 16 * 8) * 128;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) score[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
        const uint32_t at = k + step / 4 * PANEL + (((step % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            uint32_t b[4];
            load_fragments(b, at + j * 16 * 128);
            multiply(score + 8 * j, q[step], b[0], b[1]);
            multiply(score + 8 * j + 4, q[step], b[2], b[3]);
        }
    }
}

__device__ __forceinline__ void round_weights(uint32_t (&p)[KEYS / 4], const float (&score)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) p[i] = pack<bf16>(score[2 * i], score[2 * i + 1]);
}

// Zero the rows of V past the sequence's last token: a weight of zero does not stop a NaN.
__device__ __forceinline__ void clean(uint32_t v, int n_rows) {
    uint32_t unit = threadIdx.x - 128 + n_rows * (HEAD / 8);
#pragma unroll 1
    for (; unit < KEYS * HEAD / 8; unit += 256) {
        const uint32_t row = unit / (HEAD / 8), column = unit % (HEAD / 8);
        const uint32_t at = v + column / 8 * PANEL + row * 128 + column % 8 * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_async();
    group_sync(3, 256);
}

__device__ __forceinline__ void consume(const Problem& problem, uint32_t shared, const Tile* sent,
                                        Barriers barriers) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    const int row = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    uint32_t n = 0;
    for (uint32_t n_tiles = 0;; ++n_tiles) {
        wait_for(barriers.q_full(), n_tiles & 1);
        const Tile tile = broadcast(*sent);
        if (tile.n_blocks < 0) break;
        Query q;
        load_query(q, shared + group * 64 * 128);
        if (lane == 0) barrier_arrive(barriers.q_empty());
        float sum[HEAD / 2];
        Running run = {{NEVER, NEVER}, {0.0f, 0.0f}, {1.0f, 1.0f}, false, true};
        if (tile.n_blocks > 0) {
            uint32_t p[KEYS / 4];
            int32_t first_key = tile.key_begin + (tile.n_blocks - 1) * KEYS;
            wait_for(barriers.k_full(n % STAGES), n / STAGES & 1);
            const uint32_t k = shared + K_AT + n % STAGES * KV_BYTES;
            if (tile.position + tile.n_queries <= first_key + KEYS / 2) {
                // No row of the tile sees the second half of its last block of keys: its weights are zero.
                float half[KEYS / 4];
                wgmma_fence();
                start_scores(half, q, k);
                wgmma_wait<0>();
                settle(half);
                release(barriers.k_empty(n % STAGES));
                cap_and_hide(half, problem, tile, first_key, row);
                weigh(half, run, problem);
#pragma unroll
                for (int i = 0; i < KEYS / 8; ++i) {
                    p[i] = pack<bf16>(half[2 * i], half[2 * i + 1]);
                    p[KEYS / 8 + i] = 0;
                }
            } else {
                float score[KEYS / 2];
                wgmma_fence();
                start_scores(score, q, k);
                wgmma_wait<0>();
                settle(score);
                release(barriers.k_empty(n % STAGES));
                cap_and_hide(score, problem, tile, first_key, row);
                weigh(score, run, problem);
                round_weights(p, score);
            }
            if (KV_BITS == 16 && tile.kv_len < first_key + KEYS) {
                wait_for(barriers.v_full(n % STAGES), n / STAGES & 1);
                clean(shared + V_AT + n % STAGES * KV_BYTES, tile.kv_len - first_key);
            }
            for (int32_t block = tile.n_blocks - 2; block >= 0; --block, ++n) {
                const uint32_t stage = n % STAGES, ahead = (n + 1) % STAGES;
                first_key -= KEYS;
                float score[KEYS / 2];
                wait_for(barriers.k_full(ahead), (n + 1) / STAGES & 1);
                wgmma_fence();
                start_scores(score, q, shared + K_AT + ahead * KV_BYTES);
                wait_for(barriers.v_full(stage), n / STAGES & 1);
                wgmma_fence();
                start_values(sum, p, shared + V_AT + stage * KV_BYTES, block < tile.n_blocks - 2);
                wgmma_wait<1>();
                settle(score);
                cap_and_hide(score, problem, tile, first_key, row);
                bool is_done = false;
                if (!run.is_open) {
                    is_done = weigh_boldly(score, run, problem);
                    if (!is_done) {
                        score_again(score, q, shared + K_AT + ahead * KV_BYTES);
                        cap_and_hide(score, problem, tile, first_key, row);
                    }
                }
                release(barriers.k_empty(ahead));
                if (!is_done) weigh(score, run, problem);
                wgmma_wait<0>();
                settle(sum);
                settle(p);
                release(barriers.v_empty(stage));
                round_weights(p, score);
                if (run.fades) {
#pragma unroll
                    for (int i = 0; i < HEAD / 2; ++i) sum[i] *= run.fade[i / 2 % 2];
                }
            }
            wait_for(barriers.v_full(n % STAGES), n / STAGES & 1);
            wgmma_fence();
            start_values(sum, p, shared + V_AT + n % STAGES * KV_BYTES, tile.n_blocks > 1);
            wgmma_wait<0>();
            settle(sum);
            release(barriers.v_empty(n % STAGES));
            ++n;
        } else {
#pragma unroll
            for (int i = 0; i < HEAD / 2; ++i) sum[i] = 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float all = quad_sum(run.total[half]);
            bf16* out = out_row<HEAD>(problem, tile, row + 8 * half);
            store_row<HEAD>(sum, half, all > 0.0f ? 1.0f / all : 0.0f, out);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
prefill_attention_wide(const __grid_constant__ Problem problem, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t shared = shared_address(memory);
    Tile* sent = reinterpret_cast<Tile*>(memory + TILE_AT);
    const Barriers barriers = {shared + BARRIERS_AT};
    if (threadIdx.x == 0) {
        barrier_init(barriers.q_full(), 1);
        barrier_init(barriers.q_empty(), CONSUMERS + CONVERTERS);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(barriers.k_full(i), KV_BITS == 16 ? 1 : CONVERTERS);
            barrier_init(barriers.k_empty(i), CONSUMERS * PEERS);
            barrier_init(barriers.v_full(i), KV_BITS == 16 ? 1 : CONVERTERS);
            barrier_init(barriers.v_empty(i), CONSUMERS * PEERS);
        }
#if KV_BITS == 8
        for (int i = 0; i < RAW_SLOTS; ++i) {
            barrier_init(barriers.raw_full(i), 1);
            barrier_init(barriers.raw_empty(i), CONVERTERS);
        }
#endif
        barrier_init_done();
        prefetch(maps.q);
        prefetch(maps.k);
        prefetch(maps.v);
    }
    if (PEERS > 1) cluster_sync();
    else __syncthreads();
    wait_for_previous();
    let_next_begin();
    if (threadIdx.x < 128) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce(problem, maps, shared, sent, barriers);
#if KV_BITS == 8
        else if (problem.is_fp8) convert_all<true>(problem, shared, sent, barriers);
        else convert_all<false>(problem, shared, sent, barriers);
#endif
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(problem, shared, sent, barriers);
    }
    if (PEERS > 1) cluster_sync();  // a block's shared memory lives until no other writes to it
}
