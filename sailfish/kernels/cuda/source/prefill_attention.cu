// Paged prefill attention on mma.sync: every architecture, every head width, bf16 and 8-bit caches.
//
// Defined per variant: HEAD (head width, a multiple of 16) and KV_BITS (16, or 8: int8 or e4m3).
// One block does one tile: Q stays in registers (in shared memory above 128), K and V pass through a ring of
// two stages, the block with the diagonal first. Source: Dao 2023 (FlashAttention-2).
#include "prefill_attention.cuh"

constexpr int ROWS = HEAD <= 128 ? 128 : 64;
constexpr int KEYS = HEAD <= 128 ? 64 : KV_BITS == 16 ? 32 : 16;
constexpr int THREADS = ROWS * 2;
constexpr int PITCH = HEAD + 8;  // elements; an odd number of 16-byte units, so that 8 rows meet no bank twice
constexpr int STEPS = HEAD / 16;
constexpr bool Q_STAYS = HEAD <= 128;
constexpr int STAGE = 2 * KEYS * PITCH;

__device__ __forceinline__ void load_fragments_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// ---- loading K and V ------------------------------------------------------------------------------

// The K and V rows of one block of keys on their way to a stage of the ring. Rows past the sequence are zeros.
struct Loader {
    static constexpr int UNITS = HEAD * KV_BITS / 128;  // of 16 bytes a row
    static constexpr int EACH = (KEYS * UNITS + THREADS - 1) / THREADS;  // of a thread, for each of K and V
    static constexpr int HELD = KV_BITS == 8 ? EACH : 1;
    uint4 k[HELD], v[HELD];
    float k_scale[HELD], v_scale[HELD];

    // The row of the caches that holds a token: token of the cache * n_kv_heads + head.
    __device__ __forceinline__ int64_t slot(const Problem& problem, const Tile& tile, int32_t token) {
        return tile.pages[token >> problem.page_shift];
    }
    __device__ __forceinline__ int32_t in_page(const Problem& problem, const Tile& tile, int32_t token) {
        return (token & ((1 << problem.page_shift) - 1)) * problem.n_kv_heads + tile.kv_head;
    }

    __device__ __forceinline__ void begin(const Problem& problem, const Tile& tile, int32_t first_key,
                                          bf16* stage) {
        if constexpr (KV_BITS == 16) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int unit = threadIdx.x + i * THREADS, row = unit / UNITS, column = unit % UNITS * 8;
                const int32_t token = first_key + row;
                if (row >= KEYS) break;
                const bool valid = token < tile.kv_len;
                int64_t at = 0;
                if (valid)
                    at = slot(problem, tile, token) * problem.block_stride +
                         int64_t(in_page(problem, tile, token)) * HEAD + column;
                const uint32_t to = shared_address(stage + row * PITCH + column);
                copy_async_16(to, static_cast<const bf16*>(problem.k_NPKE) + at, valid);
                copy_async_16(to + KEYS * PITCH * 2, static_cast<const bf16*>(problem.v_NPKE) + at, valid);
            }
            copy_commit();
        } else {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int unit = threadIdx.x + i * THREADS, row = unit / UNITS;
                const int32_t token = first_key + row;
                k[i] = v[i] = make_uint4(0, 0, 0, 0);
                k_scale[i] = v_scale[i] = 0.0f;
                if (row < KEYS && token < tile.kv_len) {
                    const int64_t page = slot(problem, tile, token);
                    const int32_t inside = in_page(problem, tile, token);
                    const int64_t at = page * problem.block_stride + int64_t(inside) * HEAD + unit % UNITS * 16;
                    k[i] = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(problem.k_NPKE) + at);
                    v[i] = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(problem.v_NPKE) + at);
                    k_scale[i] = problem.k_scale_NPK[page * problem.scale_stride + inside];
                    v_scale[i] = problem.v_scale_NPK[page * problem.scale_stride + inside];
                }
            }
        }
    }

    __device__ __forceinline__ void end(const Problem& problem, bf16* stage) {
        if constexpr (KV_BITS == 16) {
            copy_wait<0>();
        } else {
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int unit = threadIdx.x + i * THREADS, row = unit / UNITS;
                if (row >= KEYS) break;
                bf16* to = stage + row * PITCH + unit % UNITS * 16;
                put(to, k[i], k_scale[i], problem.is_fp8);
                put(to + KEYS * PITCH, v[i], v_scale[i], problem.is_fp8);
            }
        }
    }

    __device__ __forceinline__ void put(bf16* to, const uint4& from, float scale, bool is_fp8) {
        uint4 low, high;
        if (is_fp8) widen_16<true>(from, scale, low, high);
        else widen_16<false>(from, scale, low, high);
        reinterpret_cast<uint4*>(to)[0] = low;
        reinterpret_cast<uint4*>(to)[1] = high;
    }
};

// ---- one block of keys ----------------------------------------------------------------------------

// Scores of this warp's 16 rows against the K of a stage.
__device__ __forceinline__ void score_keys(float (&score)[KEYS / 2], const uint32_t (&q)[Q_STAYS ? STEPS : 1][4],
                                           uint32_t q_address, const bf16* k) {
    const int lane = threadIdx.x % 32;
    const uint32_t at = shared_address(k + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) score[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        uint32_t a[4];
        if constexpr (Q_STAYS) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = q[step][i];
        } else {
            load_fragments(a, q_address + step * 32);
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            uint32_t b[4];
            load_fragments(b, at + (j * 16 * PITCH + step * 16) * 2);
            multiply(score + 8 * j, a, b[0], b[1]);
            multiply(score + 8 * j + 4, a, b[2], b[3]);
        }
    }
}

// sum += P V, P being the scores as bf16.
__device__ __forceinline__ void add_values(float (&sum)[HEAD / 2], const float (&p)[KEYS / 2], const bf16* v) {
    const int lane = threadIdx.x % 32;
    const uint32_t at = shared_address(v + (lane % 16) * PITCH + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
        const uint32_t a[4] = {pack<bf16>(p[8 * j], p[8 * j + 1]), pack<bf16>(p[8 * j + 2], p[8 * j + 3]),
                               pack<bf16>(p[8 * j + 4], p[8 * j + 5]), pack<bf16>(p[8 * j + 6], p[8 * j + 7])};
#pragma unroll
        for (int e = 0; e < HEAD / 16; ++e) {
            uint32_t b[4];
            load_fragments_transposed(b, at + (j * 16 * PITCH + e * 16) * 2);
            multiply(sum + 8 * e, a, b[0], b[1]);
            multiply(sum + 8 * e + 4, a, b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, HEAD <= 64 ? 2 : 1)
prefill_attention(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(16) bf16 ring[];
    wait_for_previous();
    let_next_begin();
    if (blockIdx.x >= problem.work[0] * problem.n_heads) return;
    const Tile tile = tile_of<ROWS, KEYS>(problem, blockIdx.x);
    if (tile.n_blocks < 0) return;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    bf16* q_rows = Q_STAYS ? ring + STAGE : ring + 2 * STAGE;  // the second stage is free until the first block

    const int32_t pack_mask = (1 << problem.pack_shift) - 1;
    for (int unit = threadIdx.x; unit < ROWS * HEAD / 8; unit += THREADS) {
        const int row = unit / (HEAD / 8), column = unit % (HEAD / 8) * 8;
        const int32_t query = row >> problem.pack_shift;
        const int64_t token = tile.first_query + min(query, tile.n_queries - 1);
        const bf16* from = problem.q_THE + token * problem.q_stride +
                           (tile.first_head + (row & pack_mask)) * HEAD + column;
        copy_async_16(shared_address(q_rows + row * PITCH + column), from);
    }
    copy_commit();

    float sum[HEAD / 2], peak[2] = {NEVER, NEVER}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < HEAD / 2; ++i) sum[i] = 0.0f;
    uint32_t q[Q_STAYS ? STEPS : 1][4];
    const uint32_t q_address = shared_address(q_rows + (warp_row + lane % 16) * PITCH + lane / 16 * 8);
    Loader loader;
    if (tile.n_blocks > 0) loader.begin(problem, tile, tile.key_begin + (tile.n_blocks - 1) * KEYS, ring);
    copy_wait<0>();
    __syncthreads();
    if constexpr (Q_STAYS) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) load_fragments(q[step], q_address + step * 32);
    }
    if (tile.n_blocks > 0) loader.end(problem, ring);
    __syncthreads();

    for (int32_t block = tile.n_blocks - 1; block >= 0; --block) {
        bf16* stage = ring + (tile.n_blocks - 1 - block) % 2 * STAGE;
        bf16* next = ring + (tile.n_blocks - block) % 2 * STAGE;
        const int32_t first_key = tile.key_begin + block * KEYS;
        if (block > 0) loader.begin(problem, tile, first_key - KEYS, next);

        float score[KEYS / 2];
        score_keys(score, q, q_address, stage);
        if (problem.cap_scale != 0.0f) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) score[i] = precise_tanh(score[i] * problem.cap_scale);
        }
        const bool is_cut = has_hidden<KEYS>(tile, first_key, problem.window);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (is_cut) {
                const int32_t query = (warp_row + lane / 4 + 8 * half) >> problem.pack_shift;
                hide<KEYS>(score, half, first_key, tile.position + query, problem.window);
            }
            float high = peak[half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
                high = fmaxf(high, fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
            high = quad_max(high);
            const float shift = high == NEVER ? 0.0f : high * problem.log2_scale;
            const float fade = power_of_2(peak[half] * problem.log2_scale - shift);
            peak[half] = high;
            float add = 0.0f;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = score[4 * j + 2 * half + c];
                    x = power_of_2(x * problem.log2_scale - shift);
                    add += x;
                }
            total[half] = total[half] * fade + add;
#pragma unroll
            for (int e = 0; e < HEAD / 8; ++e) {
                sum[4 * e + 2 * half] *= fade;
                sum[4 * e + 2 * half + 1] *= fade;
            }
        }
        add_values(sum, score, stage + KEYS * PITCH);
        if (block > 0) loader.end(problem, next);
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float all = quad_sum(total[half]);
        bf16* out = out_row<HEAD>(problem, tile, warp_row + lane / 4 + 8 * half);
        store_row<HEAD>(sum, half, all > 0.0f ? 1.0f / all : 0.0f, out);
    }
}
