// What the sampling kernels share: a row's parameters, noise, and the best of a thread, a warp and a block.
#pragma once
#include "rows.cuh"

constexpr int THREADS = 512, TILE = THREADS * 8;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr float LOG2_E = 1.44269504f;
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

__device__ __forceinline__ float exp2_near(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Takes the largest of logit / temperature + Gumbel noise -log(-log(u)), u a function of (seed, position, token).
struct Draw {
    uint64_t base;
    Divider by;
    Best best;
    float slope, offset = INFINITE;  // of logit / temperature - the best of the warp, as a power of two

    __device__ __forceinline__ Draw(int64_t seed, int position, float temperature)
        : base(mix(mix(uint64_t(seed)) + uint64_t(position) * GOLDEN)), by(temperature),
          slope(by.lift * by.inverse * LOG2_E) {}
    // The counter behind a token's random number.
    __device__ __forceinline__ uint64_t counter(int token) const { return base + uint64_t(token) * GOLDEN; }
    // To beat the best, -log(u), which is at least 1 - u, must be below exp(value - best).
    __device__ __forceinline__ void offer(float logit, int token, uint64_t counter) {
        const float bits = float(uint32_t(mix(counter) >> 41)) + 0.5f;
        if (fmaf(bits, -0x1p-23f, 1.f) > exp2_near(fmaf(logit, slope, offset))) return;
        best.offer(__fadd_rn(by(logit), -logf(-logf(bits * 0x1p-23f))), token);
    }
    // Take a best score as the bar, less what rounding may add to a sum that is behind it.
    __device__ __forceinline__ void raise(float score) { offset = (3e-7f * fabsf(score) - score + 1e-3f) * LOG2_E; }
    // By all lanes of the warp.
    __device__ __forceinline__ void share() {
        const int bits = __float_as_int(best.value), order = bits ^ (bits >> 31 & 0x7fffffff);
        const int most = __reduce_max_sync(ALL_LANES, order);
        raise(__int_as_float(most ^ (most >> 31 & 0x7fffffff)));
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
__device__ __forceinline__ Partial over_block(Partial p, Partial (&scratch)[32]) {
    const int lane = threadIdx.x % 32;
    p = over_warp(p);
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / 32] = p;
    __syncthreads();
    return over_warp(lane < int(blockDim.x) / 32 ? scratch[lane] : NOTHING);
}
