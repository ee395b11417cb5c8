// What the sampling kernels share: a row's parameters, noise, and the best of a thread, a warp and a block.
#pragma once
#include "rows.cuh"

constexpr int THREADS = 512, TILE = THREADS * 8;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr uint32_t SEEN = 1u << 31;
#define INFINITE __int_as_float(0x7f800000)

struct Rows {
    const int *token, *n_prompt, *top_k, *min_length, *barred, *n_barred, *bias_id, *n_bias;
    const float *temperature, *top_p, *min_p, *penalties, *bias;
    const int64_t* seed;
    int n_positions, max_barred, max_bias;
};

// Of a slice, or a row: its largest logit and its winner by noise, as ranks; sum and least of its logits.
struct Partial {
    uint64_t largest, drawn;
    float sum, low;
};

// ---- the pieces of a row's parameters ----------------------------------------------------------------

struct Effects {
    float repetition, presence, frequency;
    int n_bias, n_barred, length;
    bool is_penalised;

    __device__ __forceinline__ Effects(const Rows& rows, int row, int length_) : length(length_) {
        repetition = rows.penalties[3 * row];
        presence = rows.penalties[3 * row + 1];
        frequency = rows.penalties[3 * row + 2];
        n_bias = rows.n_bias[row];
        n_barred = length < rows.min_length[row] ? rows.n_barred[row] : 0;
        is_penalised = repetition != 1.f || presence != 0.f || frequency != 0.f;
    }
    __device__ __forceinline__ bool any() const { return is_penalised || n_bias > 0 || n_barred > 0; }
};

// ---- noise -------------------------------------------------------------------------------------------

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014).
__device__ __forceinline__ uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// The largest of what it is offered, and whose it is: the first of equals.
struct Best {
    float value = -INFINITE;
    int token = 0x7fffffff;

    __device__ __forceinline__ void offer(float x, int id) {
        if (x > value) value = x, token = id;
    }
};

// What a sum may be rounded from without falling behind x.
__device__ __forceinline__ float below(float x) { return x - 3e-7f * fabsf(x); }

// Takes the largest of value + Gumbel noise -log(-log(u)), u a function of (seed, position, token id).
struct Draw {
    uint64_t base;
    Best best;
    float bar = -INFINITE;  // the best of the warp at times: a token below it need not be looked at closely

    __device__ __forceinline__ Draw(int64_t seed, int position)
        : base(mix(mix(uint64_t(seed)) + uint64_t(position) * GOLDEN)) {}
    // To beat the bar, -log(u), which is at least 1 - u, must be below exp(value - bar).
    __device__ __forceinline__ void offer(float value, int token) {
        const float bits = float(uint32_t(mix(base + uint64_t(token) * GOLDEN) >> 41)) + 0.5f;
        if (fmaf(bits, -0x1p-23f, 1.f) > 1.001f * __expf(value - bar)) return;
        best.offer(__fadd_rn(value, -logf(-logf(bits * 0x1p-23f))), token);
    }
    // By all lanes of the warp.
    __device__ __forceinline__ void share() {
        const int bits = __float_as_int(best.value), order = bits ^ (bits >> 31 & 0x7fffffff);
        const int most = __reduce_max_sync(ALL_LANES, order);
        bar = below(__int_as_float(most ^ (most >> 31 & 0x7fffffff)));
    }
};

// A float and a token in one number: the largest float wins, of equal ones the lowest token.
__device__ __forceinline__ uint64_t ranked(float x, int token) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t order = bits ^ (uint32_t(int(bits) >> 31) | 0x80000000u);
    return uint64_t(order) << 32 | ~uint32_t(token);
}
__device__ __forceinline__ uint64_t ranked(const Best& best) { return ranked(best.value, best.token); }
__device__ __forceinline__ int token_of(uint64_t rank) { return int(~uint32_t(rank)); }
__device__ __forceinline__ float value_of(uint64_t rank) {
    const uint32_t order = uint32_t(rank >> 32);
    return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}
__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// ---- reductions over the block -----------------------------------------------------------------------

__device__ __forceinline__ Partial joined(Partial a, Partial b) {
    return {larger(a.largest, b.largest), larger(a.drawn, b.drawn), a.sum + b.sum, fminf(a.low, b.low)};
}
__device__ __forceinline__ Partial over_warp(Partial p) {
#pragma unroll
    for (int k = 16; k > 0; k /= 2)
        p = joined(p, {__shfl_xor_sync(ALL_LANES, p.largest, k), __shfl_xor_sync(ALL_LANES, p.drawn, k),
                       __shfl_xor_sync(ALL_LANES, p.sum, k), __shfl_xor_sync(ALL_LANES, p.low, k)});
    return p;
}
#define NOTHING (Partial{0, 0, 0.f, INFINITE})
__device__ __forceinline__ Partial over_block(Partial p, Partial (&scratch)[THREADS / 32]) {
    const int lane = threadIdx.x % 32;
    p = over_warp(p);
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / 32] = p;
    __syncthreads();
    return over_warp(lane < THREADS / 32 ? scratch[lane] : NOTHING);
}
