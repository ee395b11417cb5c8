// Y = X W^T + bias for many tokens and a 4-bit weight, on Hopper's wgmma.
//
// The product is made transposed, Y^T = W X^T: the weight is wgmma's A operand, which comes from registers,
// so what is dequantised never goes back to shared memory; the tokens are B, in shared memory. A block has
// three producer warps, which keep a ring of slots full through the bulk copy engine (a slot: 64 inputs of the
// block's tokens and of its rows), and GROUPS consumer warpgroups of 64 * TILES rows each, which turn one slot
// into A registers while the tensor cores work on the slot before. Blocks walk over tiles of the result.
//
// Two kinds of cluster: PEERS blocks with neighbouring rows share their tokens (each fetches a part for
// all), and `splits` blocks with the same tile share its inputs and add up through each other's shared memory.
#include "wide.cuh"
#include "wide_weight.cuh"

#ifndef TOKENS
#define TOKENS 256  // tokens of a tile
#define GROUPS 2    // consumer warpgroups
#define TILES 1     // tiles of 64 rows of each
#define SLOTS 5     // slots of the ring
#define PEERS 1     // blocks of a cluster that share tokens
#define SCALES 1    // groups of the weight in 64 inputs
#define ZEROS 0     // whether the weight has zero points
#endif

constexpr int CONSUMERS = 128 * GROUPS, STRIPS = 4 * GROUPS * TILES, ROWS = 16 * STRIPS, OCTETS = TOKENS / 8;
constexpr int X_BYTES = TOKENS * 128, W_BYTES = STRIPS * 512, SCALE_BYTES = STRIPS * 32 * SCALES;
constexpr int W_AT = SLOTS * X_BYTES, SCALE_AT = W_AT + SLOTS * W_BYTES, ZERO_AT = SCALE_AT + SLOTS * SCALE_BYTES;
constexpr int CHUNK = TOKENS < 64 || GROUPS > 2 ? 32 : 64;  // tokens that are stored at once
constexpr int STAGED_BYTES = CHUNK * 256;                   // of a consumer: two chunks, or more where a tile is split
constexpr int STAGED_AT = (ZERO_AT + ZEROS * SLOTS * SCALE_BYTES + 1023) / 1024 * 1024;
constexpr int FULL_AT = STAGED_AT + GROUPS * STAGED_BYTES, EMPTY_AT = FULL_AT + 8 * SLOTS;
constexpr int BUFFERS = GROUPS == 2 ? 2 : 1;  // sets of A registers; more than two groups hide each other's waits
constexpr int PRODUCERS = 3;                  // warps
constexpr int BAND = 16;                      // token tiles that are walked together: their tokens stay in L2
static_assert(ROWS * TOKENS * 4 <= STAGED_AT, "a split tile's sums lie where the ring was");

struct Problem {
    const Element* bias_O;
    int n_out, n_pairs, token_tiles, row_tiles;  // pairs of units of 64 inputs; row tiles of a whole cluster
    int units_per_group;
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

enum Part { TOKENS_OF_X, CODES, SCALES_AND_ZEROS };

// A warp keeps one part of the slots full. Only the tokens wait for the kernel ahead; weights are no result of it.
template <Part PART>
__device__ __forceinline__ void produce(const Problem& p, const Maps& maps, uint32_t smem, int peer, int split,
                                        int splits) {
    const int n_clusters = gridDim.x / (PEERS * splits), n_tiles = p.token_tiles * p.row_tiles;
    const int first = first_unit(p, split, splits), last = first_unit(p, split + 1, splits);
    int slot = 0;
    uint32_t parity = 1;
    if (PART == TOKENS_OF_X) wait_for_previous();
    for (int index = blockIdx.x / (PEERS * splits); index < n_tiles; index += n_clusters) {
        const Tile tile = tile_at(p, index);
        const int strip = (tile.row + peer) * STRIPS;
        int group = first / p.units_per_group, in_group = first % p.units_per_group;
#pragma unroll 1
        for (int unit = first; unit < last; ++unit) {
            const uint32_t full = smem + FULL_AT + 8 * slot;
            barrier_wait(smem + EMPTY_AT + 8 * slot, parity);
            if (PART == TOKENS_OF_X && is_elected()) {
                const uint32_t at = smem + slot * X_BYTES + peer * (X_BYTES / PEERS);
                barrier_expect(full, X_BYTES);
                if (PEERS == 1)
                    copy_box(at, maps.x, unit * 64, tile.token, full, READ_AGAIN);
                else
                    copy_box_to(((1 << PEERS) - 1) << split * PEERS, at, maps.x, unit * 64,
                                tile.token + peer * (TOKENS / PEERS), full, READ_AGAIN);
            }
            if (PART == CODES && is_elected()) {
                barrier_expect(full, W_BYTES);
                copy_box(smem + W_AT + slot * W_BYTES, maps.w, unit * 128, strip, full, READ_ONCE);
            }
            if (PART == SCALES_AND_ZEROS) {
                if (is_elected()) {
                    const uint32_t at = smem + SCALE_AT + slot * SCALE_BYTES;
                    barrier_expect(full, SCALE_BYTES * (1 + ZEROS));
                    copy_box(at, maps.scale, group * SCALES * 16, strip, full, READ_ONCE);
                    if (ZEROS) copy_box(at + ZERO_AT - SCALE_AT, maps.zero, group * SCALES * 16, strip, full, READ_ONCE);
                }
                if (++in_group == p.units_per_group) in_group = 0, ++group;
            }
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
    group_sync(1 + GROUPS, CONSUMERS);  // neither consumer reads the ring any more
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

// This warp's strips in one slot, which it waits for.
__device__ __forceinline__ void load_slot(Strip (&strips)[TILES], uint32_t smem, int slot, uint32_t parity, int strip,
                                          int lane) {
    barrier_wait(smem + FULL_AT + 8 * slot, parity);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const uint32_t codes = smem + W_AT + slot * W_BYTES + (strip + 4 * i) * 512;
        const uint32_t scales = smem + SCALE_AT + slot * SCALE_BYTES + (strip + 4 * i) * 32 * SCALES;
        strips[i] = load_strip(codes, scales, scales + ZERO_AT - SCALE_AT, SCALES, ZEROS, lane);
    }
}

__device__ __forceinline__ void consume(const Problem& p, const Maps& maps, uint32_t smem, int peer, int split,
                                        int splits, int warp_of_block) {
    const int group = warp_of_block / 4, strip = group * TILES * 4 + warp_of_block % 4, lane = threadIdx.x % 32;
    const int n_clusters = gridDim.x / (PEERS * splits), n_tiles = p.token_tiles * p.row_tiles;
    const int n_units = first_unit(p, split + 1, splits) - first_unit(p, split, splits);
    const uint32_t empty = lane < PEERS ? address_in(smem + EMPTY_AT, split * PEERS + lane) : 0;
    float sum[TILES][TOKENS / 2];
    uint32_t a[BUFFERS][TILES][4][4];
    Strip strips[TILES];
    int slot = 0;
    uint32_t parity = 0;
    for (int index = blockIdx.x / (PEERS * splits); index < n_tiles; index += n_clusters) {
        int before = -1;
        load_slot(strips, smem, slot, parity, strip, lane);
        for (int unit = 0; unit < n_units; unit += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < TILES; ++i) dequantise(a[half % BUFFERS][i], strips[i]);
                const uint64_t x = swizzled_rows(smem + slot * X_BYTES);
                wgmma_fence();
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
                        wgmma<TOKENS>(sum[i], a[half % BUFFERS][i][t], x + 2 * t, unit + half + t > 0);
                wgmma_commit();
                const int done = BUFFERS == 1 ? slot : before;
                before = slot;
                if (++slot == SLOTS) slot = 0, parity ^= 1;
                if (half == 0 || unit + 2 < n_units) load_slot(strips, smem, slot, parity, strip, lane);
                wgmma_wait<BUFFERS - 1>();
                if (done >= 0 && lane < PEERS) barrier_arrive(empty + 8 * done);
            }
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int j = 0; j < TOKENS / 2; ++j) asm volatile("" : "+f"(sum[i][j])::"memory");
        if (BUFFERS == 2 && lane < PEERS) barrier_arrive(empty + 8 * before);
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
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0);
    let_next_begin();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; ++slot) {
            barrier_init(smem + FULL_AT + 8 * slot, PRODUCERS);
            barrier_init(smem + EMPTY_AT + 8 * slot, CONSUMERS / 32 * PEERS);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (PEERS > 1) cluster_meet();
    if (warp >= CONSUMERS / 32) {
        give_registers<GROUPS == 2 ? 40 : 32>();
        if (warp == CONSUMERS / 32) produce<TOKENS_OF_X>(p, maps, smem, peer, split, splits);
        if (warp == CONSUMERS / 32 + 1) produce<CODES>(p, maps, smem, peer, split, splits);
        if (warp == CONSUMERS / 32 + 2) produce<SCALES_AND_ZEROS>(p, maps, smem, peer, split, splits);
        __syncwarp();
        if (splits > 1) cluster_sync();
    } else {
        take_registers<GROUPS == 2 ? 232 : GROUPS == 3 ? 160 : 112>();
        consume(p, maps, smem, peer, split, splits, warp);
        __syncwarp();
    }
    if (cluster_size() > 1) cluster_meet();  // no block ends while another still writes to it or reads it
}
