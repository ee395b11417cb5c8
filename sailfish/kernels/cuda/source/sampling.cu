// Draws one token per row from its logits: penalties, bias, filters and Gumbel noise. TYPE: bf16 or float.
//
// `score` gives slices of rows to blocks: the best score of each slice decides a row without a filter.
// `pick` gives a row to a block, which joins the slices. With a filter it finds in the whole row how far below
// the largest logit a token may lie, by histograms of that distance, refined twice, and draws from those.
#include "rows.cuh"

constexpr int THREADS = 512, TILE = THREADS * 8, BINS = 2048;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
constexpr float MOST_NOISE = 16.64f;  // -log(-log(1 - 2^-24))
constexpr uint32_t SEEN = 1u << 31;
#define INFINITE __int_as_float(0x7f800000)

struct Rows {
    const int *token, *n_prompt, *top_k, *min_length, *barred, *n_barred, *bias_id, *n_bias;
    const float *temperature, *top_p, *min_p, *penalties, *bias;
    const int64_t* seed;
    int n_positions, max_barred, max_bias;
};

struct Partial {
    uint64_t best;
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

// Takes the largest of value + Gumbel noise, the noise a function of (seed, position, token id). What cannot
// win with the largest noise there is costs one addition.
struct Draw {
    uint64_t base;
    float best = -INFINITE;
    int id = 0x7fffffff;

    __device__ __forceinline__ Draw(int64_t seed, int position)
        : base(mix(mix(uint64_t(seed)) + uint64_t(position) * GOLDEN)) {}
    __device__ __forceinline__ void offer(float value, int token) {
        if (value + MOST_NOISE <= best) return;
        const uint32_t bits = uint32_t(mix(base + uint64_t(token) * GOLDEN) >> 41);
        const float exponential = -logf((float(bits) + 0.5f) * 0x1p-23f);
        if (value - __logf(exponential) < best - 1e-4f * (1.f + fabsf(best))) return;
        const float score = __fadd_rn(value, -logf(exponential));
        if (score > best) best = score, id = token;
    }
};

// A float and a token in one number: the largest float wins, of equal ones the lowest token.
__device__ __forceinline__ uint64_t ranked(float x, int token) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t order = bits ^ (uint32_t(int(bits) >> 31) | 0x80000000u);
    return uint64_t(order) << 32 | ~uint32_t(token);
}
__device__ __forceinline__ float value_of(uint64_t rank) {
    const uint32_t order = uint32_t(rank >> 32);
    return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}
__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// ---- reductions over the block -----------------------------------------------------------------------

__device__ __forceinline__ Partial joined(Partial a, Partial b) {
    return {larger(a.best, b.best), a.sum + b.sum, fminf(a.low, b.low)};
}
__device__ __forceinline__ Partial over_warp(Partial p) {
#pragma unroll
    for (int k = 16; k > 0; k /= 2)
        p = joined(p, {__shfl_xor_sync(ALL_LANES, p.best, k), __shfl_xor_sync(ALL_LANES, p.sum, k),
                       __shfl_xor_sync(ALL_LANES, p.low, k)});
    return p;
}
__device__ __forceinline__ Partial over_block(Partial p, Partial (&scratch)[THREADS / 32]) {
    const int lane = threadIdx.x % 32;
    p = over_warp(p);
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / 32] = p;
    __syncthreads();
    return over_warp(lane < THREADS / 32 ? scratch[lane] : Partial{0, 0.f, INFINITE});
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
        for (int i = threadIdx.x; i < effects.length; i += THREADS) {
            const uint32_t at = tokens[i] - begin;
            if (at >= TILE) continue;
            atomicOr(&changes.count[at], SEEN);
            if (i >= n_prompt) atomicAdd(&changes.count[at], 1u);
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

// ---- filters -----------------------------------------------------------------------------------------

// Tokens by distance below the largest. A token weighs at most 2^30 in its bin, 1 at the bin's near edge:
// sums of integers, which do not depend on the order of the atomics.
struct Bins {
    uint32_t count[BINS], low[BINS], high[BINS];
    float warp_mass[THREADS / 32], mass;
    uint32_t warp_count[THREADS / 32], before;
    int bin;

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < BINS; i += THREADS) count[i] = low[i] = high[i] = 0;
        if (threadIdx.x == 0) bin = BINS;
        __syncthreads();
    }
    __device__ __forceinline__ void add(uint32_t at, float weight) {
        atomicAdd(&count[at], 1u);
        const uint32_t w = __float2uint_rn(weight * 0x1p30f);
        if (atomicAdd(&low[at], w) > ~w) atomicAdd(&high[at], 1u);
    }
    __device__ __forceinline__ float mass_of(int at) const {
        return (float(high[at]) * 0x1p32f + float(low[at])) * 0x1p-30f;
    }
};

struct Found {
    int bin;             // BINS: the row ends before
    uint32_t n_before;   // tokens and mass of the bins before it
    float mass_before;
    float total;         // mass of all bins
};

// Find the first bin at whose end there are `n_wanted` tokens, or a mass of `fraction` of all (or of
// `total`, unless it is 0), given what lies before the bins. Bin i weighs unit * exp(-i * width).
__device__ Found find(Bins& bins, uint32_t n_before, float mass_before, float unit, float width,
                      uint32_t n_wanted, float fraction, float total) {
    constexpr int EACH = BINS / THREADS;
    const int first = threadIdx.x * EACH, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    uint32_t n[EACH], n_mine = 0;
    float mass[EACH], mass_mine = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        n_mine += n[i] = bins.count[first + i];
        mass_mine += mass[i] = n[i] ? bins.mass_of(first + i) * unit * expf(-(first + i) * width) : 0.f;
    }
    uint32_t n_until = n_mine;
    float mass_until = mass_mine;
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const uint32_t n_left = __shfl_up_sync(ALL_LANES, n_until, k);
        const float mass_left = __shfl_up_sync(ALL_LANES, mass_until, k);
        if (lane >= k) n_until += n_left, mass_until += mass_left;
    }
    if (lane == 31) bins.warp_count[warp] = n_until, bins.warp_mass[warp] = mass_until;
    __syncthreads();
    float all = 0.f;
    for (int w = 0; w < THREADS / 32; ++w) {
        if (w < warp) n_before += bins.warp_count[w], mass_before += bins.warp_mass[w];
        all += bins.warp_mass[w];
    }
    if (total == 0.f) total = all;
    n_before += n_until - n_mine;
    mass_before += mass_until - mass_mine;
    uint32_t n_at = n_before;
    float mass_at = mass_before;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        n_at += n[i], mass_at += mass[i];
        if (n[i] && (n_at >= n_wanted || mass_at >= fraction * total)) atomicMin(&bins.bin, first + i);
    }
    __syncthreads();
    const int bin = bins.bin;
    if (bin / EACH == threadIdx.x) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (first + i < bin) n_before += n[i], mass_before += mass[i];
        bins.before = n_before, bins.mass = mass_before;
    }
    __syncthreads();
    return {bin, bins.before, bins.mass, total};
}

// Call f(logit, token) on every element of a row; loads run ahead of the calls.
template <class T, class F>
__device__ __forceinline__ void each(const T* row, int n_vocab, bool is_whole, F f) {
    constexpr int AHEAD = 4 / sizeof(T);
    for (int begin = threadIdx.x * 8; begin < n_vocab; begin += AHEAD * TILE) {
        Eight<T> x[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int i = begin + a * TILE;
            if (is_whole && i < n_vocab) x[a].load(row + i);
            if (!is_whole) x[a].load_some(row + i, n_vocab - i);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const int i = begin + a * TILE + k;
                if (i < n_vocab) f(x[a][k], i);
            }
    }
}

// Distances below the largest scaled logit as 31-bit integers, those past `reach` left out: noise spans less
// than 20, and what lies 32 below weighs nothing.
struct Distance {
    Divider by;
    float largest, per_unit, reach;

    __device__ __forceinline__ Distance(float temperature, float largest_logit, float lowest_logit)
        : by(temperature), largest(by(largest_logit)), reach(31.99f) {
        const float span = fminf(largest - by(lowest_logit), reach);
        // The largest power of two that keeps `span` below 2^31.
        const int exponent = int(__float_as_uint(fmaxf(span, 0x1p-20f)) >> 23) - 127;
        per_unit = __uint_as_float(uint32_t(30 - exponent + 127) << 23);
    }
    __device__ __forceinline__ float below(float scaled) const { return largest - scaled; }
    __device__ __forceinline__ uint32_t steps(float distance) const { return uint32_t(distance * per_unit); }
};

// Return the most steps below the largest that top-k, or top-p, leaves among tokens within `limit` steps.
template <class T>
__device__ uint32_t limit_of(Bins& bins, const T* row, int n_vocab, bool is_whole, const Distance& distance,
                             uint32_t limit, uint32_t n_wanted, float fraction) {
    uint32_t prefix = 0, n_before = 0;
    float mass_before = 0.f, total = 0.f;
    for (int shift = 20; shift >= 0; shift -= 10) {
        const float edge = float(prefix << shift) / distance.per_unit;  // of the bins' first
        const float width = float(1u << shift) / distance.per_unit;
        bins.clear();
        each(row, n_vocab, is_whole, [&](float x, int) {
            const float below = distance.below(distance.by(x));
            if (!(below < distance.reach)) return;
            const uint32_t steps = distance.steps(below);
            const uint32_t at = (steps >> shift) - prefix;
            if (steps <= limit && at < BINS) bins.add(at, __expf(edge + at * width - below));
        });
        const Found found =
            find(bins, n_before, mass_before, __expf(-edge), width, n_wanted, fraction, total);
        if (found.bin == BINS) return limit;
        const uint32_t n_until = found.n_before + bins.count[found.bin];
        const uint32_t end = ((prefix + found.bin + 1) << shift) - 1;
        const bool is_alone = bins.count[found.bin] == 1 || n_until == n_wanted;
        __syncthreads();
        if (is_alone || shift == 0) return end < limit ? end : limit;
        prefix = (prefix + found.bin) << 10;
        n_before = found.n_before, mass_before = found.mass_before, total = found.total;
    }
    return limit;
}

struct Filter {
    int top_k;
    float top_p, min_p;
    bool has_top_k, has_top_p;

    __device__ __forceinline__ Filter(const Rows& rows, int row, int n_vocab)
        : top_k(rows.top_k[row]), top_p(rows.top_p[row]), min_p(rows.min_p[row]),
          has_top_k(top_k < n_vocab), has_top_p(top_p < 1.f) {}
    __device__ __forceinline__ bool any() const { return has_top_k || has_top_p || min_p > 0.f; }
};

// Draw from what top-k, of it top-p, and of it min-p leave.
template <class T>
__device__ void draw_likely(Draw& draw, Bins& bins, const T* row, int n_vocab, bool is_whole,
                            const Distance& distance, const Filter& filter) {
    uint32_t limit = ~0u;
    if (filter.has_top_k)
        limit = limit_of(bins, row, n_vocab, is_whole, distance, limit, uint32_t(filter.top_k), INFINITE);
    if (filter.has_top_p)
        limit = limit_of(bins, row, n_vocab, is_whole, distance, limit, ~0u, filter.top_p);
    const float floor = filter.min_p > 0.f ? distance.largest + logf(filter.min_p) : -INFINITE;
    each(row, n_vocab, is_whole, [&](float x, int token) {
        const float scaled = distance.by(x), below = distance.below(scaled);
        if (scaled < floor || !(below < distance.reach) || distance.steps(below) > limit) return;
        draw.offer(scaled, token);
    });
}

// ---- the kernels -------------------------------------------------------------------------------------

// `adjusted` takes the changed logits of filtered rows; it may be `logits`. Grid: slices of a row, rows.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
score(const TYPE* logits, float* adjusted, Rows rows, const int* row_S, const int* length_S, int n_vocab,
      int tiles_per_slice, int is_whole, Partial* partial) {
    __shared__ Changes changes;
    __shared__ Partial scratch[THREADS / 32];
    let_next_begin();
    wait_for_previous();
    const int s = blockIdx.y;
    const TYPE* from = logits + int64_t(s) * n_vocab;
    const int begin = blockIdx.x * tiles_per_slice * TILE, end = min(begin + tiles_per_slice * TILE, n_vocab);
    const auto fetch = [&](int i) {
        Eight<TYPE> x;
        x.clear();
        if (is_whole && i < end) x.load(from + i);
        if (!is_whole) x.load_some(from + i, end - i);
        return x;
    };
    Eight<TYPE> next = fetch(begin + threadIdx.x * 8);
    const int row = row_S[s], length = length_S[s];
    const Effects effects(rows, row, length);
    const float temperature = rows.temperature[row];
    const bool draws = temperature > 0.f, is_filtered = draws && Filter(rows, row, n_vocab).any();
    const bool has_effects = effects.any();
    const Divider by(draws ? temperature : 1.f);
    Draw draw(rows.seed[row], length);
    Partial mine{0, 0.f, INFINITE};
    for (int tile = begin; tile < end; tile += TILE) {
        const int i = tile + threadIdx.x * 8;
        const Eight<TYPE> now = next;
        if (tile + TILE < end) next = fetch(i + TILE);
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) mine.sum += x[k] = now[k];
        if (has_effects) change(x, changes, rows, row, effects, tile);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (i + k >= end) break;
            if (has_effects && is_filtered) adjusted[int64_t(s) * n_vocab + i + k] = x[k];
            if (is_filtered && x[k] > -INFINITE) mine.low = fminf(mine.low, x[k]);
            if (draws && !is_filtered) {
                draw.offer(by(x[k]), i + k);
            } else if (x[k] > draw.best) {
                draw.best = x[k], draw.id = i + k;
            }
        }
    }
    mine.best = ranked(draw.best, draw.id);
    mine = over_block(mine, scratch);
    if (threadIdx.x == 0) partial[int64_t(s) * gridDim.x + blockIdx.x] = mine;
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS)
pick(const TYPE* logits, const float* adjusted, Rows rows, const int* row_S, const int* length_S, int n_vocab,
     int is_whole, const Partial* partial, int n_slices, int64_t* token_S, uint8_t* finite_S) {
    __shared__ Bins bins;
    __shared__ Partial scratch[THREADS / 32];
    let_next_begin();
    wait_for_previous();
    const int s = blockIdx.x, row = row_S[s], length = length_S[s];
    Partial mine{0, 0.f, INFINITE};
    for (int i = threadIdx.x; i < n_slices; i += THREADS) mine = joined(mine, partial[int64_t(s) * n_slices + i]);
    const float temperature = rows.temperature[row];
    const Filter filter(rows, row, n_vocab);
    mine = over_block(mine, scratch);
    if (temperature > 0.f && filter.any()) {
        const int64_t at = int64_t(s) * n_vocab;
        const Distance distance(temperature, value_of(mine.best), mine.low);
        Draw draw(rows.seed[row], length);
        if (Effects(rows, row, length).any()) {
            draw_likely(draw, bins, adjusted + at, n_vocab, is_whole, distance, filter);
        } else {
            draw_likely(draw, bins, logits + at, n_vocab, is_whole, distance, filter);
        }
        mine.best = over_block(Partial{ranked(draw.best, draw.id), 0.f, 0.f}, scratch).best;
    }
    if (threadIdx.x != 0) return;
    const uint32_t token = ~uint32_t(mine.best);
    token_S[s] = token < uint32_t(n_vocab) ? token : 0;  // no logit was a number
    finite_S[s] = fabsf(mine.sum) < INFINITE;
}
