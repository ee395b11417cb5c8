// Feeds Hopper's prefill attention: walks over a block's tiles, brings Q, K and V, widens 8-bit caches.
#pragma once
#include "prefill_attention.cuh"
#include "prefill_attention_wide.cuh"

constexpr int ROWS = 128, KEYS = 128, PANELS = HEAD / 64;
constexpr int CONSUMERS = 8, CONVERTERS = KV_BITS == 16 ? 0 : 3;  // warps
constexpr int STAGES = KV_BITS == 16 ? 3 : 2, RAW_SLOTS = 4;
constexpr int Q_BYTES = ROWS * HEAD * 2, Q_PANEL = ROWS * 128, KV_BYTES = KEYS * HEAD * 2;
constexpr int PANEL = KEYS * 128;  // bytes of 64 columns of a block of keys
constexpr int K_AT = Q_BYTES, V_AT = K_AT + STAGES * KV_BYTES, RAW_AT = V_AT + STAGES * KV_BYTES;
constexpr int RAW_BYTES = KEYS * HEAD, TILE_AT = RAW_AT + (KV_BITS == 16 ? 0 : RAW_SLOTS * RAW_BYTES);
constexpr int BARRIERS_AT = TILE_AT + 33 * sizeof(Tile);
static_assert(sizeof(Tile) % 8 == 0, "barriers are aligned");

struct Maps {
    TensorMap q;     // boxes: 64 columns of a tile's rows
    TensorMap k, v;  // boxes: 64 columns (with 8 bits, all) of up to 64 tokens of one page and head
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
    __device__ __forceinline__ uint32_t raw_full(int i) const { return at + 16 + 8 * (4 * STAGES + i); }
    __device__ __forceinline__ uint32_t raw_empty(int i) const { return at + 16 + 8 * (4 * STAGES + RAW_SLOTS + i); }
};

// ---- the producer ---------------------------------------------------------------------------------

// The items of a block: the list is dealt out to clusters forwards and backwards in turn, so that each gets
// as much work; neighbours in a cluster get neighbours in the list.
__device__ __forceinline__ int32_t item_of(int32_t round) {
    uint32_t grid = gridDim.x, block = blockIdx.x;
    asm volatile("" : "+r"(grid), "+r"(block));  // else what follows from them is held in registers
    return round * grid + (round & 1 ? grid - block - PEERS + 2 * (block % PEERS) : block);
}

// The tile at a place in shared memory, in uniform registers.
__device__ __forceinline__ Tile broadcast(const Tile& tile) {
    return {__shfl_sync(ALL_LANES, tile.first_query, 0), __shfl_sync(ALL_LANES, tile.n_queries, 0),
            __shfl_sync(ALL_LANES, tile.position, 0),    __shfl_sync(ALL_LANES, tile.first_head, 0),
            __shfl_sync(ALL_LANES, tile.kv_head, 0),     __shfl_sync(ALL_LANES, tile.kv_len, 0),
            __shfl_sync(ALL_LANES, tile.key_begin, 0),   __shfl_sync(ALL_LANES, tile.n_blocks, 0),
            tile.pages};
}

// A block of keys of one tile on its way: lane i brings box i of this block's share.
struct Boxes {
    int shift;           // log2 of the tokens of a box
    int token, in_page;  // of this lane's box, in its block of keys; in its page
    bool is_mine;

    __device__ __forceinline__ explicit Boxes(int page_shift) {
        const int lane = threadIdx.x % 32, rank = PEERS == 1 ? 0 : cluster_rank();
        shift = min(page_shift, 6);
        const int share = (KEYS / PEERS) >> shift;
        token = (rank * share + lane) << shift;
        in_page = token & ((1 << page_shift) - 1);
        is_mine = lane < share;
    }
    // To `to`, when the barrier `empty` says so.
    __device__ __forceinline__ void bring(uint32_t to, const TensorMap& map, uint32_t full, uint32_t empty,
                                          uint32_t parity, int head, int page, bool exists, int n_tokens) {
        wait_for(empty, parity);
        if (threadIdx.x % 32 == 0)
            barrier_expect(full, ((n_tokens + (1 << shift) - 1) >> shift << shift) * HEAD * KV_BITS / 8);
        __syncwarp();
        if (!exists) return;
        if constexpr (KV_BITS == 8) {
            copy_tokens<1>(to + token * HEAD, map, 0, in_page, head, page, full);
        } else {
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel)
                copy_tokens<PEERS>(to + panel * PANEL + token * 128, map, panel * 64, in_page, head, page, full);
        }
    }
};

__device__ __forceinline__ void produce(const Problem& problem, const Maps& maps, uint32_t shared, Tile* sent,
                                        Barriers barriers) {
    const int lane = threadIdx.x % 32;
    Boxes boxes(problem.page_shift);
    const int32_t n_all = problem.work[0] * problem.n_heads;
    uint32_t n_sent = 0, n = 0;  // tiles, blocks of keys
    for (int32_t round = 0;; round += 32) {
        const int32_t item = item_of(round + lane);
        const bool is_item = item < n_all;
        __syncwarp();
        if (is_item) sent[1 + lane] = tile_of<ROWS, KEYS, PEERS>(problem, item);
        const int n_items = __popc(__ballot_sync(ALL_LANES, is_item));
        __syncwarp();
        for (int i = 0; i < 32; ++i) {
            const bool is_end = i == n_items;
            Tile tile = broadcast(sent[1 + i]);
            if (is_end) tile.n_blocks = -1;
            else if (tile.n_blocks < 0) continue;
            wait_for(barriers.q_empty(), (n_sent & 1) ^ 1);
            ++n_sent;
            if (lane == 0) {
                *sent = tile;
                if (is_end) {
                    barrier_arrive(barriers.q_full());
                } else {
                    barrier_expect(barriers.q_full(), Q_BYTES);
                    for (int panel = 0; panel < PANELS; ++panel)
                        copy_rows(shared + panel * Q_PANEL, maps.q, panel * 64, tile.first_head, tile.first_query,
                                  barriers.q_full());
                }
            }
            if (is_end) return;
            int32_t first_key = tile.key_begin + (tile.n_blocks - 1) * KEYS;
            bool exists = boxes.is_mine && first_key + boxes.token < tile.kv_len && tile.n_blocks > 0;
            int32_t page = exists ? tile.pages[(first_key + boxes.token) >> problem.page_shift] : 0;
            for (int32_t block = tile.n_blocks - 1; block >= 0; --block, ++n) {
                const int32_t n_tokens = min(KEYS, tile.kv_len - first_key);
                first_key -= KEYS;
                int32_t next = 0;
                if (block > 0 && boxes.is_mine) next = tile.pages[(first_key + boxes.token) >> problem.page_shift];
#if KV_BITS == 8
                const uint32_t slot = 2 * n % RAW_SLOTS, parity = (2 * n / RAW_SLOTS & 1) ^ 1;
                const uint32_t raw = shared + RAW_AT + slot * RAW_BYTES;
                boxes.bring(raw, maps.k, barriers.raw_full(slot), barriers.raw_empty(slot), parity, tile.kv_head,
                            page, exists, n_tokens);
                boxes.bring(raw + RAW_BYTES, maps.v, barriers.raw_full(slot + 1), barriers.raw_empty(slot + 1),
                            parity, tile.kv_head, page, exists, n_tokens);
#else
                const uint32_t stage = n % STAGES, parity = (n / STAGES & 1) ^ 1;
                boxes.bring(shared + K_AT + stage * KV_BYTES, maps.k, barriers.k_full(stage),
                            barriers.k_empty(stage), parity, tile.kv_head, page, exists, n_tokens);
                boxes.bring(shared + V_AT + stage * KV_BYTES, maps.v, barriers.v_full(stage),
                            barriers.v_empty(stage), parity, tile.kv_head, page, exists, n_tokens);
#endif
                page = next;
                exists = boxes.is_mine;
            }
        }
    }
}

// ---- the converters -------------------------------------------------------------------------------

#if KV_BITS == 8
// The 48 rows of a block of keys that a warp converts, the last 8 of which the next one does too: as fast as to
// stop earlier, and lengths are constants. Lane i holds the scales of row i and of row 32 + i.
constexpr int SHARE = 48;
struct Share {
    int first;
    int32_t page[2];   // of a block two ahead
    float k[2], v[2];  // of the block ahead

    __device__ __forceinline__ int32_t token(int i, int32_t first_key, const Tile& tile) {
        int lane = threadIdx.x % 32;
        asm volatile("" : "+r"(lane));  // else rows and pages are held in registers, which are short
        const int row = first + 32 * i + lane;
        return 32 * i + lane < SHARE && first_key + row < tile.kv_len ? first_key + row : -1;
    }
    __device__ __forceinline__ void load_pages(const Problem& problem, const Tile& tile, int32_t first_key) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t at = token(i, first_key, tile);
            page[i] = at >= 0 ? tile.pages[at >> problem.page_shift] : 0;
        }
    }
    __device__ __forceinline__ void load_scales(const Problem& problem, const Tile& tile, int32_t first_key) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t at = token(i, first_key, tile);
            const int32_t inside = (at & ((1 << problem.page_shift) - 1)) * problem.n_kv_heads + tile.kv_head;
            const int64_t slot = page[i] * problem.scale_stride + inside;
            k[i] = at >= 0 ? problem.k_scale_NPK[slot] : 0.0f;  // a scale of zero makes zeros of what is no token
            v[i] = at >= 0 ? problem.v_scale_NPK[slot] : 0.0f;
        }
    }
};

template <bool FP8>
__device__ __forceinline__ void convert(uint32_t from, uint32_t to, const Share& share, const float (&scale)[2]) {
    constexpr int STEP = 32 * 16 / HEAD;  // rows at once; 8 lanes write two rows' quarters of a panel: no conflict
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));
    const int unit = lane % 4, panel = PANELS == 2 ? lane / 8 % 2 : 0;
    const int below = PANELS == 2 ? lane / 4 % 2 + lane / 16 * 2 : lane / 4;
    from += (share.first + below) * HEAD + panel * 64 + unit * 16;
    to += panel * PANEL + (share.first + below) * 128;
    const uint32_t swizzled = ((2 * unit) ^ below) * 16;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll 2
        for (int row = 0; row < (part ? SHARE - 32 : 32); row += STEP) {
            const float s = __shfl_sync(ALL_LANES, scale[part], row + below);
            uint4 raw, low, high;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                         : "r"(from + (32 * part + row) * HEAD) : "memory");
            widen_16<FP8>(raw, s, low, high);
            const uint32_t at = to + (32 * part + row) * 128, column = swizzled ^ row % 8 * 16;
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + column), "r"(low.x), "r"(low.y),
                         "r"(low.z), "r"(low.w) : "memory");
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + (column ^ 16)), "r"(high.x),
                         "r"(high.y), "r"(high.z), "r"(high.w) : "memory");
        }
    }
}

template <bool FP8>
__device__ __forceinline__ void convert_all(const Problem& problem, uint32_t shared, const Tile* sent,
                                            Barriers barriers) {
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0) - 1;
    const bool is_first_lane = threadIdx.x % 32 == 0;
    Share share;
    share.first = 40 * warp;
    constexpr uint32_t ODD = 1u << 31;
    for (uint32_t n = 0;; n ^= ODD) {  // blocks of keys so far, and whether the tiles so far are odd: one register
        wait_for(barriers.q_full(), n / ODD);
        const Tile tile = broadcast(*sent);
        if (tile.n_blocks < 0) return;
        __syncwarp();
        if (is_first_lane) barrier_arrive(barriers.q_empty());
        if (tile.n_blocks == 0) continue;
        int32_t first_key = tile.key_begin + (tile.n_blocks - 1) * KEYS;
        share.load_pages(problem, tile, first_key);
        share.load_scales(problem, tile, first_key);
        if (tile.n_blocks > 1) share.load_pages(problem, tile, first_key - KEYS);
        for (int32_t block = tile.n_blocks - 1; block >= 0; --block, ++n) {
            const float k[2] = {share.k[0], share.k[1]}, v[2] = {share.v[0], share.v[1]};
            first_key -= KEYS;
            if (block > 0) share.load_scales(problem, tile, first_key);
            if (block > 1) share.load_pages(problem, tile, first_key - KEYS);
            const uint32_t slot = 2 * n % RAW_SLOTS, stage = n % STAGES;
#pragma unroll 1
            for (int i = 0; i < 2; ++i) {
                const float scale[2] = {i ? v[0] : k[0], i ? v[1] : k[1]};
                wait_for(barriers.raw_full(slot + i), 2 * n / RAW_SLOTS & 1);
                wait_for(i ? barriers.v_empty(stage) : barriers.k_empty(stage), (n / STAGES & 1) ^ 1);
                const uint32_t to = shared + (i ? V_AT : K_AT) + stage * KV_BYTES;
                convert<FP8>(shared + RAW_AT + (slot + i) * RAW_BYTES, to, share, scale);
                fence_async();
                __syncwarp();
                if (is_first_lane) {
                    barrier_arrive(barriers.raw_empty(slot + i));
                    barrier_arrive(i ? barriers.v_full(stage) : barriers.k_full(stage));
                }
            }
        }
    }
}
#endif
