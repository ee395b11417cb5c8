// Y = (X W^T) * scales + bias of 8-bit or bfloat16 activations and weights for many tokens, or activation(gate) * up
// of it, on Hopper's wgmma. In bfloat16 there are no scales.
//
// Made transposed, Y^T = W X^T: rows of the weight are wgmma's 64, tokens its N. A block has two producer
// warps, which keep a ring of slots full through the bulk copy engine (a slot: 128 bytes of inputs of the block's
// tokens and of its rows), and GROUPS consumer warpgroups of 64 * TILES rows each. Blocks walk over tiles of the
// result, or the blocks of a cluster share the inputs of one tile and add up through each other's shared memory.
#ifndef TOKENS
#define TOKENS 128  // tokens of a tile
#define TILES 1     // tiles of 64 rows of each consumer
#define SLOTS 6     // slots of the ring
#define GROUPS 2    // consumer warpgroups
#define PER_SM 1    // blocks that fit on a multiprocessor
#define BF16 0      // whether numbers are bfloat16, with no scales
#endif

#include "gate.cuh"
#include "wide8.cuh"

constexpr int CONSUMERS = 128 * GROUPS, ROWS = 64 * GROUPS * TILES, OCTETS = TOKENS / 8;
constexpr int ROW_BYTES = 128, INPUTS = BF16 ? 64 : 128;  // of a slot
constexpr int X_BYTES = TOKENS * ROW_BYTES, W_BYTES = ROWS * ROW_BYTES;
constexpr int W_AT = SLOTS * X_BYTES, STAGED_AT = W_AT + SLOTS * W_BYTES;
constexpr int CHUNK = TOKENS % 64 || PER_SM > 1 ? 32 : 64;             // tokens that are stored at once
constexpr int GATED_CHUNK = TOKENS % (2 * CHUNK) ? CHUNK : 2 * CHUNK;  // the same of half as many outputs
constexpr int STAGED_BYTES = 2 * CHUNK * 128;                          // two buffers of them
constexpr int FULL_AT = STAGED_AT + GROUPS * STAGED_BYTES, EMPTY_AT = FULL_AT + 8 * SLOTS;
constexpr int SENT_AT = EMPTY_AT + 8 * SLOTS;
constexpr int BAND = 16;  // token tiles that are walked together: their tokens stay in L2
constexpr bool CAN_SPLIT = TILES * TOKENS <= 128;  // and keep a share's totals in registers
static_assert(ROWS * TOKENS * 4 <= STAGED_AT, "a split tile's sums lie where the ring was");

struct Problem {
    const float *x_scale_T, *w_scale_O;
    const bf16* bias_O;
    int n_tokens, n_out, n_units, token_tiles, row_tiles;  // units of INPUTS
    int activation;  // of gates and ups that alternate by eights of the rows: Y has half as many
};
struct Maps {
    TensorMap x, w, y;
};
struct Tile {
    int token, row;
};

__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
    const int band = index / (BAND * p.row_tiles), within = index - band * BAND * p.row_tiles;
    const int width = min(BAND, p.token_tiles - band * BAND);
    return {(band * BAND + within % width) * TOKENS, within / width * ROWS};
}
__device__ __forceinline__ int first_unit(const Problem& p, int split, int splits) {
    return int(int64_t(p.n_units) * split / splits);
}

// ---- the producers ---------------------------------------------------------------------------------

// A warp keeps the tokens', or the rows', part of the slots full. Weights are no result of the kernel ahead.
template <bool IS_X>
__device__ __forceinline__ void produce(const Problem& p, const Maps& maps, uint32_t smem, int split, int splits) {
    const int n_clusters = gridDim.x / splits, n_tiles = p.token_tiles * p.row_tiles;
    const int first = first_unit(p, split, splits), last = first_unit(p, split + 1, splits);
    int slot = 0;
    uint32_t parity = 1;
    if (IS_X) wait_for_previous();
    for (int index = blockIdx.x / splits; index < n_tiles; index += n_clusters) {
        const Tile tile = tile_at(p, index);
#pragma unroll 1
        for (int unit = first; unit < last; ++unit) {
            const uint32_t full = smem + FULL_AT + 8 * slot;
            barrier_wait(smem + EMPTY_AT + 8 * slot, parity);
            if (is_elected()) {
                barrier_expect(full, IS_X ? X_BYTES : W_BYTES);
                if (IS_X)
                    copy_box(smem + slot * X_BYTES, maps.x, unit * INPUTS, tile.token, full);
                else
                    copy_box(smem + W_AT + slot * W_BYTES, maps.w, unit * INPUTS, tile.row, full);
            }
            __syncwarp();
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
    }
}

// ---- the consumers ---------------------------------------------------------------------------------

// 8 x 8 pieces of Y^T, as the tensor cores leave them, to rows of tokens in swizzled shared memory.
__device__ __forceinline__ void store_pieces(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}
__device__ __forceinline__ void store_pieces(uint32_t at, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b)
                 : "memory");
}
__device__ __forceinline__ void store_piece(uint32_t at, uint32_t a) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(a) : "memory");
}

__device__ __forceinline__ void load_four(uint32_t (&x)[4], uint32_t shared) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared)
                 : "memory");
}

// Scale and bias of the two rows that a lane holds of every 64, and the two tokens of every eight.
struct Outputs {
    float scale[2], bias[2];
    const float* x_scale;
    int n_left;  // tokens from x_scale on

    __device__ __forceinline__ Outputs(const Problem& p, int row, int token) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = row + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * i;
            scale[i] = !BF16 && r < p.n_out ? p.w_scale_O[r] : 0.f;
            bias[i] = p.bias_O != nullptr && r < p.n_out ? to_float(p.bias_O[r]) : 0.f;
        }
        x_scale = p.x_scale_T + token + lane % 4 * 2;
        n_left = p.n_tokens - token - lane % 4 * 2;
    }
    // The four outputs of octet `octet`: of the first row for two neighbouring tokens, then of the second.
    __device__ __forceinline__ float4 scaled(const Total* s, int octet) const {
        if (BF16) return {s[0] + bias[0], s[1] + bias[0], s[2] + bias[1], s[3] + bias[1]};
        const float a = octet * 8 < n_left ? x_scale[octet * 8] : 0.f;
        const float b = octet * 8 + 1 < n_left ? x_scale[octet * 8 + 1] : 0.f;
        return {float(s[0]) * a * scale[0] + bias[0], float(s[1]) * b * scale[0] + bias[0],
                float(s[2]) * a * scale[1] + bias[1], float(s[3]) * b * scale[1] + bias[1]};
    }
    __device__ __forceinline__ uint2 of(const Total* s, int octet) const {
        const float4 y = scaled(s, octet);
        return {pack<bf16>(y.x, y.y), pack<bf16>(y.z, y.w)};
    }
    __device__ __forceinline__ uint32_t gated_of(const Total* s, int octet, int activation) const {
        const float4 y = scaled(s, octet);
        return gated<bf16>(y.x, y.y, y.z, y.w, activation);
    }
};

// A consumer's whole sums to Y, CHUNK tokens at a time through two buffers.
__device__ __forceinline__ void store_tile(const Problem& p, const Maps& maps, uint32_t smem,
                                           const Total (&sum)[TILES][TOKENS / 2], Tile tile, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t staged = smem + STAGED_AT + group * STAGED_BYTES;
    const uint32_t piece = (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int row = tile.row + (group * TILES + i) * 64;
        const Outputs outputs(p, row, tile.token);
#pragma unroll
        for (int chunk = 0; chunk < TOKENS / CHUNK; ++chunk) {
            const uint32_t buffer = staged + (i * (TOKENS / CHUNK) + chunk) % 2 * (STAGED_BYTES / 2);
            if (thread == 0) store_wait_turn(i + chunk == 0);
            group_sync(1 + group, 128);
#pragma unroll
            for (int octet = 0; octet < CHUNK / 8; octet += 2) {
                const int at = chunk * CHUNK / 8 + octet;
                const uint2 low = outputs.of(&sum[i][at * 4], at), high = outputs.of(&sum[i][at * 4 + 4], at + 1);
                store_pieces(buffer + octet * 1024 + piece, low.x, low.y, high.x, high.y);
            }
            fence_async();
            group_sync(1 + group, 128);
            if (thread == 0) {
                // A box that is all outside is slow to be clipped; what is not stored counts as a store all the same.
                if (tile.token + chunk * CHUNK < p.n_tokens)
                    store_box(maps.y, row, tile.token + chunk * CHUNK, buffer);
                store_commit();
            }
        }
    }
}

// The same of activation(gate) * up, 32 outputs of every 64 rows: rows of 64 bytes, two to a swizzled line.
__device__ __forceinline__ void store_gated_tile(const Problem& p, const Maps& maps, uint32_t smem,
                                                 const Total (&sum)[TILES][TOKENS / 2], Tile tile, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t staged = smem + STAGED_AT + group * STAGED_BYTES;
    const uint32_t piece = lane * 64 + (warp ^ lane % 8 / 2) * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int row = tile.row + (group * TILES + i) * 64;
        const Outputs outputs(p, row, tile.token);
#pragma unroll
        for (int chunk = 0; chunk < TOKENS / GATED_CHUNK; ++chunk) {
            const uint32_t buffer = staged + (i * (TOKENS / GATED_CHUNK) + chunk) % 2 * (STAGED_BYTES / 2);
            if (thread == 0) store_wait_turn(i + chunk == 0);
            group_sync(1 + group, 128);
#pragma unroll
            for (int octet = 0; octet < GATED_CHUNK / 8; octet += 4) {
                uint32_t y[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int at = chunk * GATED_CHUNK / 8 + octet + k;
                    y[k] = outputs.gated_of(&sum[i][at * 4], at, p.activation);
                }
                store_pieces(buffer + octet * 512 + piece, y[0], y[1], y[2], y[3]);
            }
            fence_async();
            group_sync(1 + group, 128);
            if (thread == 0) {
                if (tile.token + chunk * GATED_CHUNK < p.n_tokens)
                    store_box(maps.y, row / 2, tile.token + chunk * GATED_CHUNK, buffer);
                store_commit();
            }
        }
    }
}

// Each block of a split tile adds up all blocks' sums of its share of the tokens, and stores those. The others
// send theirs to where its ring was, counted by a barrier.
template <int SPLITS>
__device__ __forceinline__ void store_split(const Problem& p, const Maps& maps, uint32_t smem,
                                            const Total (&sum)[TILES][TOKENS / 2], Tile tile, int group, int split) {
    constexpr int SHARE = OCTETS / SPLITS;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t part_bytes = TILES * SHARE * CONSUMERS * 16, mine = smem + threadIdx.x * 16;
    if (threadIdx.x == 0) barrier_expect(smem + SENT_AT, (SPLITS - 1) * part_bytes);
    cluster_meet();  // no block reads its ring any more
    Total total[TILES][SHARE][4];
#pragma unroll
    for (int q = 0; q < SPLITS; ++q) {
        const uint32_t to = address_in(mine + (split - (split > q)) * part_bytes, q);
        const uint32_t barrier = address_in(smem + SENT_AT, q);
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int octet = 0; octet < SHARE; ++octet) {
                const Total* s = &sum[i][(q * SHARE + octet) * 4];
                const uint32_t four[4] = {bits_of(s[0]), bits_of(s[1]), bits_of(s[2]), bits_of(s[3])};
                if (q != split) send(to + (i * SHARE + octet) * CONSUMERS * 16, four, barrier);
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (q == split) total[i][octet][k] = s[k];
            }
    }
    barrier_wait(smem + SENT_AT, 0);
    const uint32_t staged = smem + STAGED_AT + group * STAGED_BYTES;
    const bool is_gated = p.activation != NO_ACTIVATION;
    const int piece_bytes = is_gated ? 512 : 1024;
    const uint32_t piece = is_gated ? lane % 8 * 64 + (warp ^ lane % 8 / 2) * 16
                                    : lane % 8 * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int row = tile.row + (group * TILES + i) * 64;
        const Outputs outputs(p, row, tile.token);
#pragma unroll
        for (int octet = 0; octet < SHARE; ++octet) {
            const uint32_t to = staged + (i * SHARE + octet) * piece_bytes + piece;
#pragma unroll
            for (int q = 0; q < SPLITS - 1; ++q) {
                uint32_t part[4];
                load_four(part, mine + q * part_bytes + (i * SHARE + octet) * CONSUMERS * 16);
#pragma unroll
                for (int k = 0; k < 4; ++k) total[i][octet][k] += total_of(part[k]);
            }
            if (is_gated) {
                store_piece(to, outputs.gated_of(total[i][octet], split * SHARE + octet, p.activation));
            } else {
                const uint2 y = outputs.of(total[i][octet], split * SHARE + octet);
                store_pieces(to, y.x, y.y);
            }
        }
    }
    fence_async();
    group_sync(1 + group, 128);
    const int token = tile.token + (split * SHARE + thread % SHARE) * 8;
    const int row = tile.row + (group * TILES + thread / SHARE) * 64;
    if (thread < TILES * SHARE && token < p.n_tokens) {
        store_box(maps.y, is_gated ? row / 2 : row, token, staged + thread * piece_bytes);
        store_commit();
    }
}

__device__ __forceinline__ void consume(const Problem& p, const Maps& maps, uint32_t smem, int split, int splits,
                                        int group) {
    const int lane = threadIdx.x % 32;
    const int n_clusters = gridDim.x / splits, n_tiles = p.token_tiles * p.row_tiles;
    const int n_units = first_unit(p, split + 1, splits) - first_unit(p, split, splits);
    const uint32_t empty = smem + EMPTY_AT;
    Total sum[TILES][TOKENS / 2];
    int slot = 0;
    uint32_t parity = 0;
    for (int index = blockIdx.x / splits; index < n_tiles; index += n_clusters) {
        int before = -1;
#pragma unroll 1
        for (int unit = 0; unit < n_units; ++unit) {
            barrier_wait(smem + FULL_AT + 8 * slot, parity);
            const uint64_t x = swizzled_rows(smem + slot * X_BYTES);
            const uint64_t w = swizzled_rows(smem + W_AT + slot * W_BYTES + group * TILES * 64 * ROW_BYTES);
            wgmma_fence();
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
                for (int i = 0; i < TILES; ++i)
                    wgmma<TOKENS>(sum[i], w + i * (64 * ROW_BYTES / 16) + 2 * t, x + 2 * t, unit + t > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
            before = slot;
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TILES; ++i) settle(sum[i]);
        if (lane == 0) barrier_arrive(empty + 8 * before);
        const Tile tile = tile_at(p, index);
        wait_for_previous();  // whose result the scales of the tokens are
        if (splits == 1 && p.activation == NO_ACTIVATION) store_tile(p, maps, smem, sum, tile, group);
        if (splits == 1 && p.activation != NO_ACTIVATION) store_gated_tile(p, maps, smem, sum, tile, group);
        if (CAN_SPLIT && splits == 2) store_split<2>(p, maps, smem, sum, tile, group, split);
    }
    store_wait_read<0>();
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, PER_SM)
    wide_linear_8(const __grid_constant__ Maps maps, const Problem p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t smem = shared_address(shared);
    const int splits = cluster_size(), split = cluster_rank();
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0);
    let_next_begin();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; ++slot) {
            barrier_init(smem + FULL_AT + 8 * slot, 2);
            barrier_init(smem + EMPTY_AT + 8 * slot, CONSUMERS / 32);
        }
        barrier_init(smem + SENT_AT, 1);
        barrier_init_done();
    }
    __syncthreads();
    if (warp >= CONSUMERS / 32) {
        if (PER_SM == 1) give_registers<40>();
        if (warp == CONSUMERS / 32) produce<true>(p, maps, smem, split, splits);
        if (warp == CONSUMERS / 32 + 1) produce<false>(p, maps, smem, split, splits);
        __syncwarp();
        if (splits > 1) cluster_meet();
    } else {
        if (PER_SM == 1) take_registers<232>();
        consume(p, maps, smem, split, splits, warp / 4);
        __syncwarp();
    }
}
