// What the sampling kernels share: a row's parameters and what they change, noise, and the best of a thread, a
// warp and a block.
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
    // Whether one of eight tokens, of which `most` is the largest logit, might beat the best: the largest random
    // number of theirs would with that logit. Conversions and powers have narrow units: one for eight.
    __device__ __forceinline__ bool may_win(float most, uint64_t counter) const {
        uint32_t largest = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) largest = max(largest, uint32_t(mix(counter + k * GOLDEN) >> 32));
        const float bits = float(largest >> 9) + 0.5f;
        return !(fmaf(bits, -0x1p-23f, 1.f) > exp2_near(fmaf(most, slope, offset)));
    }
    // Take the best score of the block so far as the bar, by all lanes of a warp. `ranks`, in shared memory,
    // holds it as an integer of the same order; that others may raise it at any time changes no result.
    __device__ __forceinline__ void share(int& ranks) {
        const int bits = __float_as_int(best.value), mine = bits ^ (bits >> 31 & 0x7fffffff);
        int most = __reduce_max_sync(ALL_LANES, mine);
        const int others = *static_cast<volatile int*>(&ranks);
        if (most > others && threadIdx.x % 32 == 0) atomicMax(&ranks, most);
        most = max(most, others);
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

// ---- what changes logits -----------------------------------------------------------------------------

struct Changes {
    uint32_t count[TILE];  // of each token in the output, with SEEN if it is in the prompt or output
    float bias[TILE];
};

// Apply the row's penalties, biases and bars to eight logits of the tile that begins at token `begin`.
__device__ void change(float (&x)[8], Changes& changes, const Rows& rows, int row, const Effects& effects,
                       int begin) {
    __syncthreads();
    for (int i = threadIdx.x; i < TILE; i += THREADS) changes.count[i] = 0, changes.bias[i] = 0.f;
    __syncthreads();
    if (effects.is_penalised) {
        const int* tokens = rows.token + int64_t(row) * rows.n_positions;
        const int n_prompt = rows.n_prompt[row];
        constexpr int AHEAD = 4;  // tokens on the way
        for (int begun = threadIdx.x; begun < effects.length; begun += AHEAD * THREADS) {
            uint32_t at[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                const int i = begun + a * THREADS;
                at[a] = i < effects.length ? uint32_t(tokens[i] - begin) : TILE;
            }
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                if (at[a] >= TILE) continue;
                atomicOr(&changes.count[at[a]], SEEN);
                if (begun + a * THREADS >= n_prompt) atomicAdd(&changes.count[at[a]], 1u);
            }
        }
    }
    for (int i = threadIdx.x; i < effects.n_bias; i += THREADS) {
        const uint32_t at = rows.bias_id[int64_t(row) * rows.max_bias + i] - begin;
        if (at < TILE) changes.bias[at] = rows.bias[int64_t(row) * rows.max_bias + i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < effects.n_barred; i += THREADS) {
        const uint32_t at = rows.barred[int64_t(row) * rows.max_barred + i] - begin;
        if (at < TILE) changes.bias[at] = -INFINITE;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const uint32_t count = changes.count[threadIdx.x * 8 + k];
        if (count & SEEN) {
            x[k] = x[k] > 0.f ? x[k] / effects.repetition : x[k] * effects.repetition;
            const float n = float(count & ~SEEN), once = n > 0.f ? effects.presence : 0.f;
            x[k] = __fadd_rn(x[k], -__fadd_rn(__fmul_rn(effects.frequency, n), once));
        }
        x[k] += changes.bias[threadIdx.x * 8 + k];
    }
}
