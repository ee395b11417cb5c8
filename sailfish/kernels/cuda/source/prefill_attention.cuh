// What both prefill attention kernels share: the work list, the cut of a step into tiles, and how rows are stored.
//
// A tile is ROWS rows of scores. Row r is query r >> pack_shift of the tile and head r & (pack - 1) of its
// first head: the heads that share keys lie in one tile, so that a short run of queries still fills it.
// An entry of the work list stands for ROWS queries of one sequence in all its heads, that is n_heads tiles.
#pragma once
#include "base.cuh"

#define NEVER __int_as_float(0xff800000)  // minus infinity

struct Problem {
    const bf16* q_THE;
    bf16* out_THE;
    const void* k_NPKE;
    const void* v_NPKE;
    const float* k_scale_NPK;
    const float* v_scale_NPK;
    const int32_t* block_table_RW;
    const int32_t* row_B;
    const int32_t* kv_len_B;
    const int32_t* query_start_B1;
    const uint32_t* work;  // n entries; sequence << 16 | run of ROWS queries, the longest in keys first
    int64_t q_stride, block_stride, scale_stride, table_stride;  // in elements: of T, N, N, R
    int32_t n_heads, n_kv_heads, page_shift, pack_shift;
    int32_t window;    // keys that a query sees, at most
    int32_t is_fp8;    // of 8-bit caches: e4m3, else int8
    float cap_scale;   // with a softcap, what a score is multiplied by before the tanh; else 0
    float log2_scale;  // what a score (or the tanh) is multiplied by to be an exponent of 2
};

struct Tile {
    int32_t first_query;  // of the step
    int32_t n_queries;    // 0 or less: nothing is stored
    int32_t position;     // of the first query in its sequence
    int32_t first_head, kv_head;
    int32_t kv_len;
    int32_t key_begin;  // a multiple of KEYS
    int32_t n_blocks;   // of KEYS keys; 0: queries of a row that only pads a captured step; -1: no queries
    const int32_t* pages;
};

// The tile of an item. Its blocks of keys are those that the N_PEERS tiles from the last multiple of N_PEERS
// see together: in a cluster each of them walks over the same ones.
template <int ROWS, int KEYS, int N_PEERS = 1>
__device__ __forceinline__ Tile tile_of(const Problem& problem, uint32_t item) {
    uint32_t n_heads = problem.n_heads, pack_shift = problem.pack_shift;
    asm volatile("" : "+r"(n_heads), "+r"(pack_shift));  // else what follows from them is held in registers
    const uint32_t entry = problem.work[1 + item / n_heads];
    const int32_t part = item % n_heads, pack_mask = (1 << pack_shift) - 1;
    const int32_t sequence = entry >> 16, queries = ROWS >> pack_shift;
    const int32_t start = problem.query_start_B1[sequence];
    const int32_t n_queries = problem.query_start_B1[sequence + 1] - start;
    const int32_t begin = (entry & 0xffff) * ROWS + (part & pack_mask & -N_PEERS) * queries;
    const int32_t end = min(begin + N_PEERS * queries, n_queries);
    const int32_t offset = begin + part % N_PEERS * queries;
    Tile tile;
    tile.kv_len = problem.kv_len_B[sequence];
    tile.first_query = start + offset;
    tile.n_queries = min(queries, n_queries - offset);
    tile.position = tile.kv_len - n_queries + offset;
    tile.first_head = part & ~pack_mask;
    tile.kv_head = tile.first_head / (n_heads / problem.n_kv_heads);
    const int32_t before = tile.kv_len - n_queries;
    tile.key_begin = max(0, before + begin - problem.window + 1) / KEYS * KEYS;
    tile.n_blocks = tile.kv_len == 0 ? 0 : (before + end - tile.key_begin + KEYS - 1) / KEYS;
    if (end <= begin) tile.n_blocks = -1;
    tile.pages = problem.block_table_RW + problem.row_B[sequence] * problem.table_stride;
    return tile;
}

// Whether some row of the tile must not see some of the KEYS keys from `first_key`.
template <int KEYS>
__device__ __forceinline__ bool has_hidden(const Tile& tile, int32_t first_key, int32_t window) {
    return first_key + KEYS - 1 > tile.position || first_key <= tile.position + tile.n_queries - 1 - window;
}

// Hide keys of a row of scores in accumulator order: this thread's columns are 8 j + 2 (lane % 4) + {0, 1}.
template <int KEYS>
__device__ __forceinline__ void hide(float (&score)[KEYS / 2], int half, int32_t first_key, int32_t position,
                                     int32_t window) {
    const int32_t at = 2 * int(threadIdx.x % 4), last = position - first_key - at, first = last - window + 1;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
            if (8 * j + c > last) score[4 * j + 2 * half + c] = NEVER;
    if (first <= 0) return;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
            if (8 * j + c < first) score[4 * j + 2 * half + c] = NEVER;
}

// Four 8 x 8 matrices of shared memory in fragment order.
__device__ __forceinline__ void load_fragments(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// d[16 x 8] += a[16 x 16] b[16 x 8] by one warp.
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// tanh to about 1e-7, which tanh.approx (5e-4) is not: a cap multiplies the error by about 50.
__device__ __forceinline__ float precise_tanh(float x) {
    return 1.0f - __fdividef(2.0f, power_of_2(x * 2.8853900817779268f) + 1.0f);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Give lane t of each quad the words that its four lanes hold at index t.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
    const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(ALL_LANES, high ? word[i] : word[i + 2], 2);
        (high ? word[i] : word[i + 2]) = got;
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(ALL_LANES, odd ? word[i] : word[i + 1], 1);
        (odd ? word[i] : word[i + 1]) = got;
    }
}

// Store one row of the accumulator times `factor`; a null `out` stores nothing (but joins the exchange).
template <int E>
__device__ __forceinline__ void store_row(const float (&sum)[E / 2], int half, float factor, bf16* out) {
    const int t = threadIdx.x % 4;
    uint32_t word[E / 8];
#pragma unroll
    for (int j = 0; j < E / 8; ++j)
        word[j] = pack<bf16>(sum[4 * j + 2 * half] * factor, sum[4 * j + 2 * half + 1] * factor);
    constexpr int WHOLE = E / 32 * 4;
#pragma unroll
    for (int j = 0; j < WHOLE; j += 4) {
        uint32_t four[4] = {word[j], word[j + 1], word[j + 2], word[j + 3]};
        transpose_quad(four);
        if (out) *reinterpret_cast<uint4*>(out + (j + t) * 8) = make_uint4(four[0], four[1], four[2], four[3]);
    }
#pragma unroll
    for (int j = WHOLE; j < E / 8; ++j)
        if (out) *reinterpret_cast<uint32_t*>(out + j * 8 + 2 * t) = word[j];
}

// Where row r of the tile is stored; null for rows past the last query.
template <int E>
__device__ __forceinline__ bf16* out_row(const Problem& problem, const Tile& tile, int32_t row) {
    const int32_t query = row >> problem.pack_shift, head = row & ((1 << problem.pack_shift) - 1);
    if (query >= tile.n_queries) return nullptr;
    const int64_t token = tile.first_query + query;
    return problem.out_THE + (token * problem.n_heads + tile.first_head + head) * E;
}

// ---- 8-bit caches ---------------------------------------------------------------------------------

// Four 8-bit values times their scale, as two pairs of bf16.
template <bool FP8>
__device__ __forceinline__ uint2 widen_4(uint32_t four, float scale) {
    float x[4];
    if constexpr (FP8) {
        scale *= 256.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // The bits of e4m3 as those of a half-precision float are the value / 256, subnormals included.
            const uint32_t two = __byte_perm(four, 0, i ? 0x3424 : 0x1404);
            const uint32_t half = (two & 0x80008000u) | ((two & 0x7f007f00u) >> 1);
            x[2 * i] = to_float(f16{uint16_t(half)}) * scale;
            x[2 * i + 1] = to_float(f16{uint16_t(half >> 16)}) * scale;
        }
    } else {
        // A byte in the right place of the float 32768 adds itself to it; the flipped sign bit adds 128.
        const float zero = -32896.0f * scale;
        four ^= 0x80808080u;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[i] = fmaf(__uint_as_float(__byte_perm(four, 0x47000000u, 0x7404 + 16 * i)), scale, zero);
    }
    return {pack<bf16>(x[0], x[1]), pack<bf16>(x[2], x[3])};
}
// Sixteen of them; the first eight in `low`.
template <bool FP8>
__device__ __forceinline__ void widen_16(const uint4& from, float scale, uint4& low, uint4& high) {
    const uint2 a = widen_4<FP8>(from.x, scale), b = widen_4<FP8>(from.y, scale);
    const uint2 c = widen_4<FP8>(from.z, scale), d = widen_4<FP8>(from.w, scale);
    low = make_uint4(a.x, a.y, b.x, b.y);
    high = make_uint4(c.x, c.y, d.x, d.y);
}
