// Y = X W^T + bias for many tokens and a 4-bit weight, or activation(gate) * up of it, on Hopper's wgmma.
//
// The product is made transposed, Y^T = W X^T: the weight is wgmma's A operand, which comes from registers,
// so what is dequantised never goes back to shared memory; the tokens are B, in shared memory. A block has
// three producer warps, which keep a ring of slots full through the bulk copy engine (a slot: 64 inputs of the
// block's tokens and rows), and GROUPS consumer warpgroups of 64 rows each, which turn one slot into A registers
// while the tensor cores work on the slot before. Blocks walk over tiles of the result.
//
// A cluster is `splits` blocks with the same tile: they share its inputs, and add up from each other's memory.
#include "gate.cuh"
#include "wide.cuh"
#include "wide_weight.cuh"

#ifndef TOKENS
#define TOKENS 256  // tokens of a tile
#define GROUPS 2    // consumer warpgroups
#define SLOTS 5     // slots of the ring
#define PER_SM 1    // blocks that fit on a multiprocessor
#define SCALES 1    // groups of the weight in 64 inputs
#define ZEROS 0     // whether the weight has zero points
#endif

constexpr int CONSUMERS = 128 * GROUPS, STRIPS = 4 * GROUPS, ROWS = 64 * GROUPS, OCTETS = TOKENS / 8;
constexpr int X_BYTES = TOKENS * 128, W_BYTES = STRIPS * 512, SCALE_BYTES = STRIPS * 32 * SCALES;
constexpr int W_AT = SLOTS * X_BYTES, SCALE_AT = W_AT + SLOTS * W_BYTES, ZERO_AT = SCALE_AT + SLOTS * SCALE_BYTES;
constexpr int CHUNK = TOKENS % 64 || GROUPS > 2 || PER_SM > 1 ? 32 : 64;  // tokens that are stored at once
constexpr int GATED_CHUNK = TOKENS % (2 * CHUNK) ? CHUNK : 2 * CHUNK;  // the same of half as many outputs
constexpr int STAGED_BYTES = CHUNK * 256;  // of a consumer: two chunks, or its share of a split tile
constexpr int STAGED_AT = (ZERO_AT + ZEROS * SLOTS * SCALE_BYTES + 1023) / 1024 * 1024;
constexpr int FULL_AT = STAGED_AT + GROUPS * STAGED_BYTES, EMPTY_AT = FULL_AT + 8 * SLOTS;
constexpr int PRODUCERS = 3;  // warps
constexpr int PRODUCER_REGISTERS = GROUPS == 2 && PER_SM == 1 ? 40 : 32;
constexpr int CONSUMER_REGISTERS = PER_SM == 2 ? 104 : GROUPS == 2 ? 232 : GROUPS == 3 ? 160 : 112;
constexpr int BUFFERS = GROUPS == 2 ? 2 : 1;  // sets of A registers: more than two groups hide each other's waits
constexpr int BAND = 16;                      // token tiles that are walked together: their tokens stay in L2
static_assert(ROWS * TOKENS * 4 <= STAGED_AT, "a split tile's sums lie where the ring was");

struct Problem {
    const Element* bias_O;
    int n_out, n_pairs;               // pairs of units of 64 inputs
    int token_tiles, row_tiles;       // tiles for all groups
    int narrow_tiles, narrow_groups;  // row tiles after those, in which only the first groups have rows
    int units_per_group;
    int activation;  // of gates and ups that alternate by eights of the rows: Y has half as many
};
struct Maps {
    TensorMap x, w, scale, zero, y;
};
struct Tile {
    int token, row, groups;  // its first token and row, and the groups that have rows in it
};
// What a block has to do: tiles first_tile, first_tile + n_clusters, ... and units first .. last of each.
struct Work {
    int first_tile, n_clusters, n_tiles, first, last, split, splits;
};

__device__ __forceinline__ Work work_of_block(const Problem& p) {
    const int splits = cluster_size(), split = cluster_rank();
    const auto begin = [&](int q) { return 2 * int(int64_t(p.n_pairs) * q / splits); };
    return {int(blockIdx.x) / splits, int(gridDim.x) / splits, p.token_tiles * (p.row_tiles + p.narrow_tiles),
            begin(split), begin(split + 1), split, splits};
}

// Tokens change fastest, so that blocks that run together read the same weights.
__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
    const int narrow = index - p.token_tiles * p.row_tiles;
    if (narrow >= 0)
        return {narrow % p.token_tiles * TOKENS, p.row_tiles * ROWS + narrow / p.token_tiles * p.narrow_groups * 64,
                p.narrow_groups};
    const int band = index / (BAND * p.row_tiles), within = index - band * BAND * p.row_tiles;
    const int width = min(BAND, p.token_tiles - band * BAND);
    return {(band * BAND + within % width) * TOKENS, within / width * ROWS, GROUPS};
}

// ---- the producers ---------------------------------------------------------------------------------

enum Part { TOKENS_OF_X, CODES, SCALES_AND_ZEROS };

// A warp keeps one part of the slots full. Only the tokens wait for the kernel ahead; weights are no result of it.
template <Part PART>
__device__ __forceinline__ void produce(const Problem& p, const Maps& maps, const Work& work, uint32_t smem) {
    int slot = 0;
    uint32_t parity = 1;
    if (PART == TOKENS_OF_X) wait_for_previous();
    for (int index = work.first_tile; index < work.n_tiles; index += work.n_clusters) {
        const Tile tile = tile_at(p, index);
        const int strip = tile.row / 16;
        int group = work.first / p.units_per_group, in_group = work.first % p.units_per_group;
#pragma unroll 1
        for (int unit = work.first; unit < work.last; ++unit) {
            const uint32_t full = smem + FULL_AT + 8 * slot;
            barrier_wait(smem + EMPTY_AT + 8 * slot, parity);
            if (PART == TOKENS_OF_X && is_elected()) {
                barrier_expect(full, X_BYTES);
                copy_box(smem + slot * X_BYTES, maps.x, unit * 64, tile.token, full);
            }
            if (PART == CODES && is_elected()) {
                barrier_expect(full, W_BYTES);
                copy_box(smem + W_AT + slot * W_BYTES, maps.w, unit * 128, strip, full);
            }
            if (PART == SCALES_AND_ZEROS) {
                if (is_elected()) {
                    const uint32_t at = smem + SCALE_AT + slot * SCALE_BYTES;
                    barrier_expect(full, SCALE_BYTES * (1 + ZEROS));
                    copy_box(at, maps.scale, group * SCALES * 16, strip, full);
                    if (ZEROS) copy_box(at + ZERO_AT - SCALE_AT, maps.zero, group * SCALES * 16, strip, full);
                }
                if (++in_group == p.units_per_group) in_group = 0, ++group;
            }
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
    }
}

// ---- the consumers ---------------------------------------------------------------------------------

// Four, two or one 8 x 8 pieces of Y^T, as the tensor cores leave them, to rows of tokens in swizzled shared memory.
__device__ __forceinline__ void store_pieces(uint32_t at, const uint32_t (&y)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(y[0]),
                 "r"(y[1]), "r"(y[2]), "r"(y[3])
                 : "memory");
}
__device__ __forceinline__ void store_pieces(uint32_t at, const uint32_t (&y)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(y[0]), "r"(y[1])
                 : "memory");
}
__device__ __forceinline__ void store_piece(uint32_t at, uint32_t y) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(y) : "memory");
}

__device__ __forceinline__ void store_4(uint32_t shared, const float* x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}

__device__ __forceinline__ float bias_at(const Problem& p, int row) {
    return p.bias_O != nullptr && row < p.n_out ? to_float(p.bias_O[row]) : 0.f;
}

// A group's whole sums to Y, CHUNK tokens at a time through two buffers. `row` is the group's first.
__device__ __forceinline__ void store_tile(const Problem& p, const Maps& maps, uint32_t smem,
                                           const float (&sum)[TOKENS / 2], int token, int row, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t staged = smem + STAGED_AT + group * STAGED_BYTES;
    const uint32_t at = (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
    const float low = bias_at(p, row + warp * 16 + lane / 4), high = bias_at(p, row + warp * 16 + lane / 4 + 8);
#pragma unroll
    for (int chunk = 0; chunk < TOKENS / CHUNK; ++chunk) {
        const uint32_t buffer = staged + chunk % 2 * (STAGED_BYTES / 2);
        if (thread == 0) store_wait_turn(chunk == 0);
        group_sync(1 + group, 128);
#pragma unroll
        for (int octet = 0; octet < CHUNK / 8; octet += 2) {
            const float* s = &sum[chunk * CHUNK / 2 + octet * 4];
            const uint32_t y[4] = {pack<Element>(s[0] + low, s[1] + low), pack<Element>(s[2] + high, s[3] + high),
                                   pack<Element>(s[4] + low, s[5] + low), pack<Element>(s[6] + high, s[7] + high)};
            store_pieces(buffer + octet * 1024 + at, y);
        }
        fence_async();
        group_sync(1 + group, 128);
        if (thread == 0) {
            store_box(maps.y, row, token + chunk * CHUNK, buffer);
            store_commit();
        }
    }
}

// The same of activation(gate) * up, 32 outputs of a group: rows of 64 bytes, two to a swizzled line.
__device__ __forceinline__ void store_gated_tile(const Problem& p, const Maps& maps, uint32_t smem,
                                                 const float (&sum)[TOKENS / 2], int token, int row, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const uint32_t staged = smem + STAGED_AT + group * STAGED_BYTES;
    const uint32_t at = lane * 64 + (warp ^ lane % 8 / 2) * 16;
    const float low = bias_at(p, row + warp * 16 + lane / 4), high = bias_at(p, row + warp * 16 + lane / 4 + 8);
#pragma unroll
    for (int chunk = 0; chunk < TOKENS / GATED_CHUNK; ++chunk) {
        const uint32_t buffer = staged + chunk % 2 * (STAGED_BYTES / 2);
        if (thread == 0) store_wait_turn(chunk == 0);
        group_sync(1 + group, 128);
#pragma unroll
        for (int octet = 0; octet < GATED_CHUNK / 8; octet += 4) {
            uint32_t y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* s = &sum[chunk * GATED_CHUNK / 2 + (octet + i) * 4];
                y[i] = gated<Element>(s[0] + low, s[1] + low, s[2] + high, s[3] + high, p.activation);
            }
            store_pieces(buffer + octet * 512 + at, y);
        }
        fence_async();
        group_sync(1 + group, 128);
        if (thread == 0) {
            store_box(maps.y, row / 2, token + chunk * GATED_CHUNK, buffer);
            store_commit();
        }
    }
}

constexpr uint32_t PIECE = CONSUMERS * 16;  // four sums of every thread of a block: an octet of tokens

// Adds up `splits` blocks' sums of the n octets at `first`, Q blocks' of E octets on their way at once.
template <int E, int Q>
__device__ __forceinline__ void add_up(uint32_t first, int n, int splits, float low, float high, uint32_t to,
                                       int activation) {
    for (int octet = 0; octet < n; octet += E) {
        float4 total[E];
#pragma unroll
        for (int e = 0; e < E; ++e) total[e] = {low, low, high, high};
        for (int block = 0; block < splits; block += Q) {
            float4 part[Q][E];
#pragma unroll
            for (int q = 0; q < Q; ++q)
#pragma unroll
                for (int e = 0; e < E; ++e) {
                    part[q][e] = {0, 0, 0, 0};
                    if (block + q < splits && octet + e < n)
                        part[q][e] = load_in_cluster(address_in(first + (octet + e) * PIECE, block + q));
                }
#pragma unroll
            for (int q = 0; q < Q; ++q)
#pragma unroll
                for (int e = 0; e < E; ++e)
                    total[e].x += part[q][e].x, total[e].y += part[q][e].y, total[e].z += part[q][e].z,
                        total[e].w += part[q][e].w;
        }
#pragma unroll
        for (int e = 0; e < E; ++e) {
            if (octet + e >= n) continue;
            const float4& t = total[e];
            if (activation == NO_ACTIVATION) {
                const uint32_t y[2] = {pack<Element>(t.x, t.y), pack<Element>(t.z, t.w)};
                store_pieces(to + (octet + e) * 1024, y);
            } else {
                store_piece(to + (octet + e) * 512, gated<Element>(t.x, t.y, t.z, t.w, activation));
            }
        }
    }
}

// Each block of a split tile adds up all blocks' sums of its share of the tokens, in order, and stores those.
__device__ __forceinline__ void store_split(const Problem& p, const Maps& maps, uint32_t smem,
                                            const float (&sum)[TOKENS / 2], int token, int row, int group, int split,
                                            int splits) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int begin = OCTETS * split / splits, n = OCTETS * (split + 1) / splits - begin;
    const uint32_t mine = smem + threadIdx.x * 16, staged = smem + STAGED_AT + group * STAGED_BYTES;
    const bool is_gated = p.activation != NO_ACTIVATION;
    const uint32_t to = is_gated ? staged + lane % 8 * 64 + (warp ^ lane % 8 / 2) * 16
                                 : staged + lane % 8 * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
    const float low = bias_at(p, row + warp * 16 + lane / 4), high = bias_at(p, row + warp * 16 + lane / 4 + 8);
    group_sync(1 + GROUPS, CONSUMERS);  // no consumer reads the ring any more: the sums go there
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) store_4(mine + octet * PIECE, &sum[octet * 4]);
    cluster_sync();
    if (splits == 2)
        add_up<4, 2>(mine + begin * PIECE, n, splits, low, high, to, p.activation);
    else
        add_up<2, 4>(mine + begin * PIECE, n, splits, low, high, to, p.activation);
    fence_async();
    group_sync(1 + group, 128);
    if (thread < n) {
        store_box(maps.y, is_gated ? row / 2 : row, token + (begin + thread) * 8,
                  staged + thread * (is_gated ? 512 : 1024));
        store_commit();
    }
}

// This warp's strip in one slot, which it waits for.
__device__ __forceinline__ Strip load_slot(uint32_t smem, int slot, uint32_t parity, int strip, int lane) {
    const uint32_t scales = smem + SCALE_AT + slot * SCALE_BYTES + strip * 32 * SCALES;
    barrier_wait(smem + FULL_AT + 8 * slot, parity);
    return load_strip(smem + W_AT + slot * W_BYTES + strip * 512, scales, scales + ZERO_AT - SCALE_AT, SCALES, ZEROS,
                      lane);
}

// `warp` is the block's; four make a group.
__device__ __forceinline__ void consume(const Problem& p, const Maps& maps, const Work& work, uint32_t smem, int warp) {
    const int group = warp / 4, lane = threadIdx.x % 32, n_units = work.last - work.first;
    const uint32_t empty = smem + EMPTY_AT;
    float sum[TOKENS / 2];
    uint32_t a[BUFFERS][4][4];
    int slot = 0;
    uint32_t parity = 0;
    for (int index = work.first_tile; index < work.n_tiles; index += work.n_clusters) {
        const Tile tile = tile_at(p, index);
        if (group >= tile.groups) {
            for (int unit = 0; unit < n_units; ++unit) {
                barrier_wait(smem + FULL_AT + 8 * slot, parity);
                if (lane == 0) barrier_arrive(empty + 8 * slot);
                if (++slot == SLOTS) slot = 0, parity ^= 1;
            }
            continue;
        }
        int before = -1;
        Strip strip = load_slot(smem, slot, parity, warp, lane);
        for (int unit = 0; unit < n_units; unit += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                dequantise(a[half % BUFFERS], strip);
                const uint64_t x = swizzled_rows(smem + slot * X_BYTES);
                wgmma_fence();
#pragma unroll
                for (int t = 0; t < 4; ++t) wgmma<TOKENS>(sum, a[half % BUFFERS][t], x + 2 * t, unit + half + t > 0);
                wgmma_commit();
                const int done = BUFFERS == 1 ? slot : before;
                before = slot;
                if (++slot == SLOTS) slot = 0, parity ^= 1;
                if (half == 0 || unit + 2 < n_units) strip = load_slot(smem, slot, parity, warp, lane);
                wgmma_wait<BUFFERS - 1>();
                if (done >= 0 && lane == 0) barrier_arrive(empty + 8 * done);
            }
        }
        wgmma_wait<0>();
        settle(sum);
        if (BUFFERS == 2 && lane == 0) barrier_arrive(empty + 8 * before);
        const int row = tile.row + group * 64;
        if (work.splits == 1 && p.activation == NO_ACTIVATION)
            store_tile(p, maps, smem, sum, tile.token, row, group);
        else if (work.splits == 1)
            store_gated_tile(p, maps, smem, sum, tile.token, row, group);
        else
            store_split(p, maps, smem, sum, tile.token, row, group, work.split, work.splits);
    }
    store_wait_read<0>();
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, PER_SM)
    wide_linear_int4(const __grid_constant__ Maps maps, const Problem p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t smem = shared_address(shared);
    const Work work = work_of_block(p);
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), producer = warp - CONSUMERS / 32;
    let_next_begin();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; ++slot) {
            barrier_init(smem + FULL_AT + 8 * slot, PRODUCERS);
            barrier_init(smem + EMPTY_AT + 8 * slot, CONSUMERS / 32);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (producer >= 0) {
        give_registers<PRODUCER_REGISTERS>();
        if (producer == 0) produce<TOKENS_OF_X>(p, maps, work, smem);
        if (producer == 1) produce<CODES>(p, maps, work, smem);
        if (producer == 2) produce<SCALES_AND_ZEROS>(p, maps, work, smem);
        if (producer == PRODUCERS) prefetch(maps.y);
        __syncwarp();
        if (work.splits > 1) cluster_sync();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(p, maps, work, smem, warp);
        __syncwarp();
    }
    if (work.splits > 1) cluster_meet();  // no block ends while another reads its sums
}
