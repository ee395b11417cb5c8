// Paged prefill attention on Hopper's wgmma, bf16.
//
// Defined per variant: HEAD (64 or 128). A persistent block has one producer warp, which walks over the
// block's tiles and keeps Q, K and V coming through the bulk copy engine, and two consumer warpgroups of 64
// rows each, with Q in registers. A consumer starts the next scores before the last weighted sum, so that its
// softmax runs while the tensor cores work. Source: Shah et al. 2024 (FlashAttention-3).
#include "prefill_attention.cuh"
#include "wide.cuh"

constexpr int ROWS = 128, KEYS = 128, PANELS = HEAD / 64;
constexpr int STAGES = 3;
constexpr int Q_BYTES = ROWS * HEAD * 2, KV_BYTES = KEYS * HEAD * 2, PANEL_BYTES = KEYS * 128;
constexpr int K_AT = Q_BYTES, V_AT = K_AT + STAGES * KV_BYTES, TILE_AT = V_AT + STAGES * KV_BYTES;
constexpr int BARRIERS_AT = TILE_AT + 64;
constexpr float LAZY = 8.0f;  // a row's sums are rescaled once its peak has grown by 2^8, not every time
static_assert(sizeof(Tile) <= 64 && ROWS == KEYS, "Q and K panels are alike");

struct Maps {
    TensorMap q, k, v;
};

// Addresses of the block's barriers.
struct Barriers {
    uint32_t at;
    __device__ __forceinline__ uint32_t q_full() const { return at; }
    __device__ __forceinline__ uint32_t q_empty() const { return at + 8; }
    __device__ __forceinline__ uint32_t k_full(int i) const { return at + 16 + 8 * i; }
    __device__ __forceinline__ uint32_t k_empty(int i) const { return at + 16 + 8 * (STAGES + i); }
    __device__ __forceinline__ uint32_t v_full(int i) const { return at + 16 + 8 * (2 * STAGES + i); }
    __device__ __forceinline__ uint32_t v_empty(int i) const { return at + 16 + 8 * (3 * STAGES + i); }
};

// Of this block, and for other threads of it: the cluster's kind would fence all of the card's memory.
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_box_3d(uint32_t to, const TensorMap& map, int x, int y, int z, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_box_4d(uint32_t to, const TensorMap& map, int x, int y, int z, int w,
                                            uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(bar)
                 : "memory");
}

// ---- wgmma ----------------------------------------------------------------------------------------

// A descriptor's halves: the low one adds up in 32 bits, the high one is a constant. Broadcast, although all
// lanes have the same, so that the compiler keeps it in uniform registers: an add between products, not eight.
constexpr uint32_t SWIZZLED_128 = 1u << 30 | 64;  // rows of 128 bytes, 1024 from 8 rows to the next 8
__device__ __forceinline__ uint32_t descriptor(uint32_t shared, uint32_t leading_bytes) {
    return __shfl_sync(ALL_LANES, (shared & 0x3FFFF) >> 4 | leading_bytes >> 4 << 16, 0);
}
// d[64 x 128] = or += a[64 x 16] b[16 x 128]: a in registers, b in shared memory, its rows innermost.
__device__ __forceinline__ void wgmma_scores(float* d, const uint32_t* a, uint32_t b, int add) {
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %69, 0;\nmov.b64 b, {%68, %70};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_D128
                 "}, {%64, %65, %66, %67}, b, p, 1, 1, 0;\n}"
                 : WGMMA_64(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(SWIZZLED_128));
}
// d[64 x HEAD] = or += a[64 x 16] b[16 x HEAD]: a in registers, b in shared memory, its columns innermost.
__device__ __forceinline__ void wgmma_values(float* d, const uint32_t* a, uint32_t b, int add) {
#if HEAD == 128
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %69, 0;\nmov.b64 b, {%68, %70};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_D128
                 "}, {%64, %65, %66, %67}, b, p, 1, 1, 1;\n}"
                 : WGMMA_64(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(SWIZZLED_128));
#else
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %37, 0;\nmov.b64 b, {%36, %38};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_D64
                 "}, {%32, %33, %34, %35}, b, p, 1, 1, 1;\n}"
                 : WGMMA_32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(SWIZZLED_128));
#endif
}
// What the tensor cores read or write while we run is not touched, by the compiler either, before this.
template <int N>
__device__ __forceinline__ void settle(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void settle(uint32_t (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// ---- the producer ---------------------------------------------------------------------------------

// The items of a block: the list is dealt out forwards and backwards in turn, so that each gets as much work.
__device__ __forceinline__ int32_t item_of(int32_t round) {
    const int32_t at = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + at;
}

__device__ __forceinline__ Tile broadcast(const Tile& mine, int from) {
    Tile tile;
    tile.first_query = __shfl_sync(ALL_LANES, mine.first_query, from);
    tile.n_queries = __shfl_sync(ALL_LANES, mine.n_queries, from);
    tile.position = __shfl_sync(ALL_LANES, mine.position, from);
    tile.first_head = __shfl_sync(ALL_LANES, mine.first_head, from);
    tile.kv_head = __shfl_sync(ALL_LANES, mine.kv_head, from);
    tile.kv_len = __shfl_sync(ALL_LANES, mine.kv_len, from);
    tile.key_begin = __shfl_sync(ALL_LANES, mine.key_begin, from);
    tile.n_blocks = __shfl_sync(ALL_LANES, mine.n_blocks, from);
    tile.pages = reinterpret_cast<const int32_t*>(
        __shfl_sync(ALL_LANES, reinterpret_cast<uint64_t>(mine.pages), from));
    return tile;
}

// Bring one block of K or V: lane i its page i, if the sequence reaches it.
__device__ __forceinline__ void bring(uint32_t to, const TensorMap& map, uint32_t full, const Tile& tile, int page,
                                      bool exists, int n_pages, int page_shift) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) barrier_expect(full, n_pages * (HEAD * 2) << page_shift);
    __syncwarp();
    if (exists)
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
            copy_box_4d(to + panel * PANEL_BYTES + (lane * 128 << page_shift), map, panel * 64, 0, tile.kv_head, page,
                        full);
}

__device__ __forceinline__ void produce(const Problem& problem, const Work& work, const Maps& maps, uint32_t shared,
                                        Tile* sent, Barriers barriers) {
    const int lane = threadIdx.x % 32, page_shift = problem.page_shift;
    const int pages_a_block = KEYS >> page_shift;
    uint32_t n_sent = 0, n = 0;  // tiles, blocks
    for (int32_t round = 0;; round += 32) {
        Tile mine;
        mine.n_queries = 0;
        const int32_t item = item_of(round + lane);
        const bool is_item = item < work.n_entries * problem.n_heads;
        if (is_item) mine = tile_of<ROWS, KEYS>(problem, work, item);
        for (int i = 0; i < 32; ++i) {
            const bool is_end = !__shfl_sync(ALL_LANES, is_item, i) && round + i > 0;
            Tile tile = broadcast(mine, i);
            if (tile.n_queries <= 0 && !is_end) continue;
            barrier_wait(barriers.q_empty(), (n_sent & 1) ^ 1);
            if (is_end) tile.n_queries = 0;
            if (lane == 0) *sent = tile;
            __syncwarp();
            if (is_end) {
                if (lane == 0) arrive(barriers.q_full());
                return;
            }
            if (lane == 0) {
                barrier_expect(barriers.q_full(), Q_BYTES);
                for (int panel = 0; panel < PANELS; ++panel)
                    copy_box_3d(shared + panel * PANEL_BYTES, maps.q, panel * 64, tile.first_head,
                                tile.first_query, barriers.q_full());
            }
            ++n_sent;
            int32_t first_page = (tile.key_begin + (tile.n_blocks - 1) * KEYS) >> page_shift;
            const int32_t all_pages = (tile.kv_len + (1 << page_shift) - 1) >> page_shift;
            bool exists = lane < pages_a_block && first_page + lane < all_pages;
            int32_t page = exists && tile.n_blocks > 0 ? tile.pages[first_page + lane] : 0;
            for (int32_t block = tile.n_blocks - 1; block >= 0; --block, ++n) {
                const uint32_t stage = n % STAGES, parity = (n / STAGES & 1) ^ 1;
                const int32_t n_pages = min(pages_a_block, all_pages - first_page);
                const int32_t earlier = first_page - pages_a_block;
                const int32_t next = block > 0 && lane < pages_a_block ? tile.pages[earlier + lane] : 0;
                barrier_wait(barriers.k_empty(stage), parity);
                bring(shared + K_AT + stage * KV_BYTES, maps.k, barriers.k_full(stage), tile, page, exists, n_pages,
                      page_shift);
                barrier_wait(barriers.v_empty(stage), parity);
                bring(shared + V_AT + stage * KV_BYTES, maps.v, barriers.v_full(stage), tile, page, exists, n_pages,
                      page_shift);
                page = next;
                first_page = earlier;
                exists = lane < pages_a_block;
            }
        }
    }
}

// ---- the consumers --------------------------------------------------------------------------------

using Query = uint32_t[HEAD / 16][4];
__device__ __forceinline__ void load_query(Query& q, uint32_t shared) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
        const uint32_t at = shared + step / 4 * PANEL_BYTES + row * 128 + ((step % 4 * 2 + lane / 16) ^ row % 8) * 16;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q[step][0]), "=r"(q[step][1]), "=r"(q[step][2]), "=r"(q[step][3]) : "r"(at) : "memory");
    }
}
__device__ __forceinline__ void start_scores(float (&score)[KEYS / 2], const Query& q, uint32_t k) {
    const uint32_t b = descriptor(k, 16);
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
        const int at = (step / 4 * PANEL_BYTES + step % 4 * 32) >> 4;
        wgmma_scores(score, q[step], b + at, step > 0);
    }
    wgmma_commit();
}
__device__ __forceinline__ void start_values(float (&sum)[HEAD / 2], const uint32_t (&p)[KEYS / 4], uint32_t v,
                                             bool add) {
    const uint32_t b = descriptor(v, PANEL_BYTES);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) wgmma_values(sum, p + 4 * step, b + step * 128, step > 0 || add);
    wgmma_commit();
}

// A row pair's running softmax: exponents are relative to `shift`, which follows the peak lazily.
struct Running {
    float shift[2], total[2], fade[2];
    bool fades;  // whether some row of the warp must multiply its sums by `fade`
};

// Turn scores into weights, and say what earlier sums must be multiplied by.
__device__ __forceinline__ void weigh(float (&score)[KEYS / 2], Running& run, const Problem& problem,
                                      const Tile& tile, int32_t first_key, int row) {
    if (problem.cap_scale != 0.0f) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) score[i] = precise_tanh(score[i] * problem.cap_scale);
    }
    if (has_hidden<KEYS>(tile, first_key, problem.window)) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            hide<KEYS>(score, half, first_key, tile.position + (row + 8 * half >> problem.pack_shift), problem.window);
    }
    float high[2], base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float part[4] = {NEVER, NEVER, NEVER, NEVER};
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j)
            part[j % 4] = fmaxf(part[j % 4], fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
        high[half] = quad_max(fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]))) * problem.log2_scale;
    }
    const bool grows = high[0] > run.shift[0] + LAZY || high[1] > run.shift[1] + LAZY;
    run.fades = __any_sync(ALL_LANES, grows);
    if (run.fades) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float shift = fmaxf(run.shift[half], high[half]);
            run.fade[half] = shift == NEVER ? 1.0f : power_of_2(run.shift[half] - shift);
            run.shift[half] = shift;
            run.total[half] *= run.fade[half];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        base[half] = run.shift[half] == NEVER ? 0.0f : run.shift[half];
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float& x = score[4 * j + 2 * half + c];
                x = power_of_2(x * problem.log2_scale - base[half]);
                part[j % 2 * 2 + c] += x;
            }
        run.total[half] += (part[0] + part[1]) + (part[2] + part[3]);
    }
}

__device__ __forceinline__ void round_weights(uint32_t (&p)[KEYS / 4], const float (&score)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) p[i] = pack<bf16>(score[2 * i], score[2 * i + 1]);
}

// Zero the rows of V past the sequence's last token: a weight of zero does not stop a NaN.
__device__ __forceinline__ void clean(uint32_t v, int n_rows) {
    for (int unit = threadIdx.x - 128; unit < (KEYS - n_rows) * HEAD / 8; unit += 256) {
        const int row = n_rows + unit / (HEAD / 8), column = unit % (HEAD / 8);
        const uint32_t at = v + column / 8 * PANEL_BYTES + row * 128 + column % 8 * 16;
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
        barrier_wait(barriers.q_full(), n_tiles & 1);
        const Tile tile = broadcast(*sent, 0);
        if (tile.n_queries <= 0) break;
        Query q;
        load_query(q, shared + group * 64 * 128);
        if (lane == 0) arrive(barriers.q_empty());
        float sum[HEAD / 2];
        Running run = {{NEVER, NEVER}, {0.0f, 0.0f}, {1.0f, 1.0f}, false};
        if (tile.n_blocks > 0) {
            float score[KEYS / 2];
            uint32_t p[KEYS / 4];
            int32_t first_key = tile.key_begin + (tile.n_blocks - 1) * KEYS;
            barrier_wait(barriers.k_full(n % STAGES), n / STAGES & 1);
            wgmma_fence();
            start_scores(score, q, shared + K_AT + n % STAGES * KV_BYTES);
            wgmma_wait<0>();
            settle(score);
            if (lane == 0) arrive(barriers.k_empty(n % STAGES));
            weigh(score, run, problem, tile, first_key, row);
            round_weights(p, score);
            if (tile.kv_len < first_key + KEYS) {
                barrier_wait(barriers.v_full(n % STAGES), n / STAGES & 1);
                clean(shared + V_AT + n % STAGES * KV_BYTES, tile.kv_len - first_key);
            }
            for (int32_t block = tile.n_blocks - 2; block >= 0; --block, ++n) {
                const uint32_t stage = n % STAGES, ahead = (n + 1) % STAGES;
                first_key -= KEYS;
                barrier_wait(barriers.k_full(ahead), (n + 1) / STAGES & 1);
                wgmma_fence();
                start_scores(score, q, shared + K_AT + ahead * KV_BYTES);
                barrier_wait(barriers.v_full(stage), n / STAGES & 1);
                wgmma_fence();
                start_values(sum, p, shared + V_AT + stage * KV_BYTES, block < tile.n_blocks - 2);
                wgmma_wait<1>();
                settle(score);
                if (lane == 0) arrive(barriers.k_empty(ahead));
                weigh(score, run, problem, tile, first_key, row);
                wgmma_wait<0>();
                settle(sum);
                settle(p);
                if (lane == 0) arrive(barriers.v_empty(stage));
                round_weights(p, score);
                if (run.fades) {
#pragma unroll
                    for (int i = 0; i < HEAD / 2; ++i) sum[i] *= run.fade[i / 2 % 2];
                }
            }
            barrier_wait(barriers.v_full(n % STAGES), n / STAGES & 1);
            wgmma_fence();
            start_values(sum, p, shared + V_AT + n % STAGES * KV_BYTES, tile.n_blocks > 1);
            wgmma_wait<0>();
            settle(sum);
            if (lane == 0) arrive(barriers.v_empty(n % STAGES));
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
prefill_attention_wide(const __grid_constant__ Problem problem, const __grid_constant__ Work work,
                       const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t shared = shared_address(memory);
    Tile* sent = reinterpret_cast<Tile*>(memory + TILE_AT);
    const Barriers barriers = {shared + BARRIERS_AT};
    if (threadIdx.x == 0) {
        barrier_init(barriers.q_full(), 1);
        barrier_init(barriers.q_empty(), 8);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(barriers.k_full(i), 1);
            barrier_init(barriers.k_empty(i), 8);
            barrier_init(barriers.v_full(i), 1);
            barrier_init(barriers.v_empty(i), 8);
        }
        barrier_init_done();
        prefetch(maps.q);
        prefetch(maps.k);
        prefetch(maps.v);
    }
    __syncthreads();
    wait_for_previous();
    let_next_begin();
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x < 32) produce(problem, work, maps, shared, sent, barriers);
    } else {
        take_registers<232>();
        consume(problem, shared, sent, barriers);
    }
}
