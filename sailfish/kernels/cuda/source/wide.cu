// Y = X W^T + bias for many tokens and a 4-bit weight, on Hopper's wgmma.
//
// The product is made transposed, Y^T = W X^T: the weight is wgmma's A operand, which comes from registers,
// so what is dequantised never goes back to shared memory; the tokens are B, in shared memory. A block has
// one producer, which keeps a ring of slots full through the bulk copy engine (a slot: 64 inputs of the
// block's tokens and of its rows), and two consumer warpgroups of 64 * TILES rows each, which turn one slot
// into A registers while the tensor cores work on the slot before. Blocks walk over tiles of the result.
//
// Two kinds of cluster: PEERS blocks with neighbouring rows share their tokens (each fetches a part for
// all), and `splits` blocks with the same tile share its inputs and add up through each other's shared memory.
#include "wide.cuh"
#include "wide_weight.cuh"

#ifndef TOKENS
#define TOKENS 256  // tokens of a tile
#define TILES 1     // tiles of 64 rows of each consumer
#define SLOTS 5     // slots of the ring
#define PEERS 1     // blocks of a cluster that share tokens
#endif
constexpr int CONSUMERS = 256, STRIPS = 8 * TILES, ROWS = 16 * STRIPS, OCTETS = TOKENS / 8;
constexpr int X_BYTES = TOKENS * 128, W_BYTES = STRIPS * 512, SCALE_BYTES = STRIPS * 64;
constexpr int W_AT = SLOTS * X_BYTES, SCALE_AT = W_AT + SLOTS * W_BYTES, ZERO_AT = SCALE_AT + SLOTS * SCALE_BYTES;
constexpr int CHUNK = TOKENS < 64 ? TOKENS : 64;  // tokens that are stored at once
constexpr int STAGED_BYTES = 16384;               // of a consumer: two chunks, or all octets of a split tile
constexpr int STAGED_AT = (ZERO_AT + SLOTS * SCALE_BYTES + 1023) / 1024 * 1024;
constexpr int FULL_AT = STAGED_AT + 2 * STAGED_BYTES, EMPTY_AT = FULL_AT + 8 * SLOTS;
constexpr int BAND = 16;  // token tiles that are walked together: their tokens stay in L2
static_assert(ROWS * TOKENS * 4 <= STAGED_AT, "a split tile's sums lie where the ring was");

struct Problem {
    const Element* bias_O;
    int n_out, n_pairs, token_tiles, row_tiles;  // pairs of units of 64 inputs; row tiles of a whole cluster
    int units_per_group, groups_per_unit, has_zero;
};
struct Maps {
    TensorMap x, w, scale, zero, y;
};
struct Tile {
    int token, row;
};

__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
    const int band = index / (BAND * p.row_tiles), within = index - band * BAND * p.row_tiles;
    const int width = min(BAND, p.token_tiles - band * BAND);
    return {(band * BAND + within % width) * TOKENS, within / width * PEERS};
}
// The units that block `split` of `splits` adds up.
__device__ __forceinline__ int first_unit(const Problem& p, int split, int splits) {
    return 2 * (int(int64_t(p.n_pairs) * split / splits));
}

// ---- the producer ----------------------------------------------------------------------------------

__device__ __forceinline__ void copy_weights(const Problem& p, const Maps& maps, uint32_t smem, int slot, int unit,
                                             int strip) {
    const uint32_t full = smem + FULL_AT + 8 * slot;
    const int scale_bytes = STRIPS * 32 * p.groups_per_unit;
    const int column = (unit / p.units_per_group) * p.groups_per_unit * 16;
    barrier_expect(full, X_BYTES + W_BYTES + scale_bytes * (1 + p.has_zero));
    copy_box(smem + W_AT + slot * W_BYTES, maps.w, unit * 128, strip, full, READ_ONCE);
    copy_box(smem + SCALE_AT + slot * SCALE_BYTES, maps.scale, column, strip, full, READ_ONCE);
    if (p.has_zero) copy_box(smem + ZERO_AT + slot * SCALE_BYTES, maps.zero, column, strip, full, READ_ONCE);
}

__device__ __forceinline__ void copy_tokens(const Maps& maps, uint32_t smem, int slot, int unit, int token, int peer,
                                            int split) {
    const uint32_t full = smem + FULL_AT + 8 * slot, at = smem + slot * X_BYTES + peer * (X_BYTES / PEERS);
    if (PEERS == 1)
        copy_box(at, maps.x, unit * 64, token, full, READ_AGAIN);
    else
        copy_box_to(((1 << PEERS) - 1) << split * PEERS, at, maps.x, unit * 64, token + peer * (TOKENS / PEERS), full, READ_AGAIN);
}

// One thread. The first weights are asked for before the kernel ahead has ended, its results are not.
__device__ __forceinline__ void produce(const Problem& p, const Maps& maps, uint32_t smem, int peer, int split,
                                        int splits) {
    const int n_clusters = gridDim.x / (PEERS * splits), n_tiles = p.token_tiles * p.row_tiles;
    const int first = first_unit(p, split, splits), last = first_unit(p, split + 1, splits);
    int slot = 0, early = 0;
    uint32_t parity = 1;
    for (int index = blockIdx.x / (PEERS * splits); index < n_tiles; index += n_clusters) {
        const Tile tile = tile_at(p, index);
        const int strip = (tile.row + peer) * STRIPS;
        int unit = first;
        if (early == 0) {
            early = min(SLOTS, last - first);
#pragma unroll 1
            for (int i = 0; i < early; ++i) copy_weights(p, maps, smem, i, first + i, strip);
            wait_for_previous();
#pragma unroll 1
            for (int i = 0; i < early; ++i) copy_tokens(maps, smem, i, first + i, tile.token, peer, split);
            unit += early, slot = early % SLOTS, parity ^= early == SLOTS;
        }
#pragma unroll 1
        for (; unit < last; ++unit) {
            barrier_wait(smem + EMPTY_AT + 8 * slot, parity);
            copy_weights(p, maps, smem, slot, unit, strip);
            copy_tokens(maps, smem, slot, unit, tile.token, peer, split);
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
    }
}

// ---- the consumers ---------------------------------------------------------------------------------

// Four 8 x 8 pieces of Y^T, as the tensor cores leave them, to rows of tokens in swizzled shared memory.
__device__ __forceinline__ void store_pieces(uint32_t at, const uint32_t (&y)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(y[0]),
                 "r"(y[1]), "r"(y[2]), "r"(y[3])
                 : "memory");
}
__device__ __forceinline__ void store_pieces(uint32_t at, const uint32_t (&y)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(y[0]), "r"(y[1])
                 : "memory");
}

__device__ __forceinline__ float bias_at(const Problem& p, int row) {
    return p.bias_O != nullptr && row < p.n_out ? to_float(p.bias_O[row]) : 0.f;
}

// A consumer's whole sums to Y, CHUNK tokens at a time through two buffers.
__device__ __forceinline__ void store_tile(const Problem& p, const Maps& maps, uint32_t smem,
                                           const float (&sum)[TILES][TOKENS / 2], Tile tile, int peer, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t staged = smem + STAGED_AT + group * STAGED_BYTES;
    const uint32_t piece = (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int row = (tile.row + peer) * ROWS + (group * TILES + i) * 64;
        const float low = bias_at(p, row + warp * 16 + lane / 4), high = bias_at(p, row + warp * 16 + lane / 4 + 8);
#pragma unroll
        for (int chunk = 0; chunk < TOKENS / CHUNK; ++chunk) {
            const uint32_t buffer = staged + (i * (TOKENS / CHUNK) + chunk) % 2 * (STAGED_BYTES / 2);
            if (thread == 0) store_wait_read<1>();
            group_sync(1 + group, 128);
#pragma unroll
            for (int octet = 0; octet < CHUNK / 8; octet += 2) {
                const float* s = &sum[i][chunk * CHUNK / 2 + octet * 4];
                const uint32_t y[4] = {pack<Element>(s[0] + low, s[1] + low), pack<Element>(s[2] + high, s[3] + high),
                                       pack<Element>(s[4] + low, s[5] + low), pack<Element>(s[6] + high, s[7] + high)};
                store_pieces(buffer + octet * 1024 + piece, y);
            }
            fence_async();
            group_sync(1 + group, 128);
            if (thread == 0) {
                store_box(maps.y, row, tile.token + chunk * CHUNK, buffer);
                store_commit();
            }
        }
    }
}

// Each block of a split tile adds up all blocks' sums of its share of the tokens, and stores those.
__device__ __forceinline__ void store_split(const Problem& p, const Maps& maps, uint32_t smem,
                                            const float (&sum)[TILES][TOKENS / 2], Tile tile, int peer, int group,
                                            int split, int splits) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    group_sync(3, CONSUMERS);  // neither consumer reads the ring any more
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
            const float* s = &sum[i][octet * 4];
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                             smem + ((i * OCTETS + octet) * CONSUMERS + threadIdx.x) * 16),
                         "f"(s[0]), "f"(s[1]), "f"(s[2]), "f"(s[3])
                         : "memory");
        }
    cluster_sync();
    const int begin = OCTETS * split / splits, n = OCTETS * (split + 1) / splits - begin;
    const uint32_t staged = smem + STAGED_AT + group * STAGED_BYTES;
    const uint32_t piece = lane % 8 * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int row = (tile.row + peer) * ROWS + (group * TILES + i) * 64;
        const float low = bias_at(p, row + warp * 16 + lane / 4), high = bias_at(p, row + warp * 16 + lane / 4 + 8);
#pragma unroll 2
        for (int octet = 0; octet < n; ++octet) {
            const uint32_t at = smem + ((i * OCTETS + begin + octet) * CONSUMERS + threadIdx.x) * 16;
            float4 total = {low, low, high, high};
#pragma unroll 4
            for (int q = 0; q < splits; ++q) {
                const float4 part = load_in_cluster(address_in(at, q * PEERS + peer));
                total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
            }
            const uint32_t y[2] = {pack<Element>(total.x, total.y), pack<Element>(total.z, total.w)};
            store_pieces(staged + (i * n + octet) * 1024 + piece, y);
        }
    }
    fence_async();
    group_sync(1 + group, 128);
    if (thread < TILES * n) {
        const int row = (tile.row + peer) * ROWS + (group * TILES + thread / n) * 64;
        store_box(maps.y, row, tile.token + (begin + thread % n) * 8, staged + thread * 1024);
        store_commit();
    }
}

__device__ __forceinline__ void consume(const Problem& p, const Maps& maps, uint32_t smem, int peer, int split,
                                        int splits) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int n_clusters = gridDim.x / (PEERS * splits), n_tiles = p.token_tiles * p.row_tiles;
    const int n_units = first_unit(p, split + 1, splits) - first_unit(p, split, splits);
    const uint32_t empty = lane < PEERS ? address_in(smem + EMPTY_AT, split * PEERS + lane) : 0;
    float sum[TILES][TOKENS / 2];
    uint32_t a[2][TILES][4][4];
    int slot = 0;
    uint32_t parity = 0;
    for (int index = blockIdx.x / (PEERS * splits); index < n_tiles; index += n_clusters) {
        int before = -1;
        for (int unit = 0; unit < n_units; unit += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                barrier_wait(smem + FULL_AT + 8 * slot, parity);
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    const int strip = (group * TILES + i) * 4 + warp;
                    const uint32_t scale = smem + SCALE_AT + slot * SCALE_BYTES + strip * 32 * p.groups_per_unit;
                    dequantise(a[half][i], smem + W_AT + slot * W_BYTES + strip * 512, scale,
                               scale + ZERO_AT - SCALE_AT, p.groups_per_unit, p.has_zero, lane);
                }
                const uint64_t x = swizzled_rows(smem + slot * X_BYTES);
                wgmma_fence();
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
                        wgmma<TOKENS>(sum[i], a[half][i][t], x + 2 * t, unit + half + t > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (before >= 0 && lane < PEERS) barrier_arrive(empty + 8 * before);
                before = slot;
                if (++slot == SLOTS) slot = 0, parity ^= 1;
            }
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int j = 0; j < TOKENS / 2; ++j) asm volatile("" : "+f"(sum[i][j])::"memory");
        if (before >= 0 && lane < PEERS) barrier_arrive(empty + 8 * before);
        const Tile tile = tile_at(p, index);
        if (splits == 1)
            store_tile(p, maps, smem, sum, tile, peer, group);
        else
            store_split(p, maps, smem, sum, tile, peer, group, split, splits);
    }
    store_wait_read<0>();
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    wide_linear_int4(const __grid_constant__ Maps maps, const Problem p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t smem = shared_address(shared);
    const int splits = cluster_size() / PEERS, peer = cluster_rank() % PEERS, split = cluster_rank() / PEERS;
    let_next_begin();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; ++slot) {
            barrier_init(smem + FULL_AT + 8 * slot, 1);
            barrier_init(smem + EMPTY_AT + 8 * slot, CONSUMERS / 32 * PEERS);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (PEERS > 1) cluster_meet();
    if (threadIdx.x >= CONSUMERS) {
        give_registers<40>();
        if (threadIdx.x == CONSUMERS) produce(p, maps, smem, peer, split, splits);
        __syncwarp();
        if (splits > 1) cluster_sync();
    } else {
        take_registers<232>();
        consume(p, maps, smem, peer, split, splits);
        __syncwarp();
    }
    if (cluster_size() > 1) cluster_meet();  // no block ends while another still writes to it or reads it
}
