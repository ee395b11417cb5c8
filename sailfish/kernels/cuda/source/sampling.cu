// Draws one token per row from its logits: penalties, bias, filters and Gumbel noise. TYPE: bf16 or float.
//
// `score` gives slices of rows to blocks: each finds its largest logit, and the token that wins by noise.
// `pick` gives a row to a block, which joins the slices. With a filter it finds how far below the largest logit
// a token may lie; the winner of all tokens, if it is among those, has won, or else the block draws from them.
#include "sampling.cuh"

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

struct Filter {
    int top_k;
    float top_p, min_p;
    bool has_top_k, has_top_p;

    __device__ __forceinline__ Filter(const Rows& rows, int row, int n_vocab)
        : top_k(rows.top_k[row]), top_p(rows.top_p[row]), min_p(rows.min_p[row]),
          has_top_k(top_k < n_vocab), has_top_p(top_p < 1.f) {}
    __device__ __forceinline__ bool any() const { return has_top_k || has_top_p || min_p > 0.f; }
};

// Distances of scaled logits below the largest. Past REACH a token has no weight; noise spans less than 20.
constexpr float REACH = 31.99f;

struct Distance {
    Divider by;
    float largest;

    __device__ __forceinline__ Distance(float temperature, float largest_logit)
        : by(temperature), largest(by(largest_logit)) {}
    __device__ __forceinline__ float of(float logit) const { return largest - by(logit); }
};

// Call f(logit, token) on every element of a row that is not below `least`; loads run ahead of the calls, and
// eight that are all below are passed over.
template <class T, class F>
__device__ __forceinline__ void each(const T* row, int n_vocab, bool is_whole, float least, F f) {
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
        for (int a = 0; a < AHEAD; ++a) {
            const int i = begin + a * TILE, n = n_vocab - i;
            float most = x[a][0];
#pragma unroll
            for (int k = 1; k < 8; ++k) most = fmaxf(most, x[a][k]);
            if (n <= 0 || most < least) continue;
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (x[a][k] >= least && (is_whole || k < n)) f(x[a][k], i + k);
        }
    }
}

struct Weight {
    uint32_t n;
    float mass;
};
struct Scan {
    float warp_mass[THREADS / 32], mass;
    uint32_t warp_count[THREADS / 32], before;
    int bin;
};
struct Found {
    int bin;            // N_BINS: the bins end before
    uint32_t n_before;  // tokens and mass of the bins before it
    float mass_before;
    float total;        // mass of all bins
};

// Find the first bin at whose end there are `n_wanted` tokens, or a mass of `fraction` of all (or of `total`,
// unless it is 0), given what lies before the bins. weigh(bin) returns the tokens and the mass of one.
template <int N_BINS, class F>
__device__ __forceinline__ Found find(Scan& scan, uint32_t n_before, float mass_before, uint32_t n_wanted,
                                      float fraction, float total, F weigh) {
    constexpr int EACH = N_BINS / THREADS;
    const int first = threadIdx.x * EACH, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) scan.bin = N_BINS;
    __syncthreads();
    uint32_t n_mine = 0;
    float mass_mine = 0.f;
#pragma unroll 2
    for (int i = 0; i < EACH; ++i) {
        const Weight at = weigh(first + i);
        n_mine += at.n, mass_mine += at.mass;
    }
    uint32_t n_until = n_mine;
    float mass_until = mass_mine;
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const uint32_t n_left = __shfl_up_sync(ALL_LANES, n_until, k);
        const float mass_left = __shfl_up_sync(ALL_LANES, mass_until, k);
        if (lane >= k) n_until += n_left, mass_until += mass_left;
    }
    if (lane == 31) scan.warp_count[warp] = n_until, scan.warp_mass[warp] = mass_until;
    __syncthreads();
    float all = 0.f;
    for (int w = 0; w < THREADS / 32; ++w) {
        if (w < warp) n_before += scan.warp_count[w], mass_before += scan.warp_mass[w];
        all += scan.warp_mass[w];
    }
    if (total == 0.f) total = all;
    n_before += n_until - n_mine;
    mass_before += mass_until - mass_mine;
    if (n_before + n_mine >= n_wanted || mass_before + mass_mine >= fraction * total) {
        uint32_t n_at = n_before;
        float mass_at = mass_before;
#pragma unroll 1
        for (int i = 0; i < EACH; ++i) {
            const Weight at = weigh(first + i);
            n_at += at.n, mass_at += at.mass;
            if (at.n && (n_at >= n_wanted || mass_at >= fraction * total)) atomicMin(&scan.bin, first + i);
        }
    }
    __syncthreads();
    const int bin = scan.bin;
    if (bin / EACH == threadIdx.x) {
#pragma unroll 1
        for (int i = first; i < bin; ++i) {
            const Weight at = weigh(i);
            n_before += at.n, mass_before += at.mass;
        }
        scan.before = n_before, scan.mass = mass_before;
    }
    __syncthreads();
    return {bin, scan.before, scan.mass, total};
}

// ---- filters of logits that are bfloat16 -------------------------------------------------------------

// A bin for each value of bfloat16, the largest first, in 32 octaves of each sign; what is smaller is zero.
constexpr int VALUES = 8192;

struct Values {
    int floor;  // bits of the largest number that counts as zero

    __device__ __forceinline__ explicit Values(float most)
        : floor(max(0, int(__float_as_uint(most) >> 16 & 0x7f80u) + 128 - VALUES / 2)) {}
    __device__ __forceinline__ int bin(float x) const {
        const uint32_t bits = __float_as_uint(x) >> 16;
        const int size = min(max(int(bits & 0x7fffu) - floor, 0), VALUES / 2 - 1);
        return (bits & 0x8000u) && size > 0 ? VALUES / 2 + size : VALUES / 2 - 1 - size;
    }
    // The largest number that counts as zero.
    __device__ __forceinline__ float zero() const { return __uint_as_float(uint32_t(floor) << 16); }
    __device__ __forceinline__ float value(int bin) const {
        const int size = bin < VALUES / 2 ? VALUES / 2 - 1 - bin : bin - VALUES / 2;
        const float x = size == 0 ? 0.f : __uint_as_float(uint32_t(size + floor) << 16);
        return bin < VALUES / 2 ? x : -x;
    }
};

// Return the least logit that top-k, and of it top-p, leaves, given the lowest that counts.
__device__ float least_value(uint32_t (&count)[VALUES], Scan& scan, const bf16* row, int n_vocab, bool is_whole,
                        const Distance& distance, const Values& values, float lowest, const Filter& filter) {
    for (int i = threadIdx.x; i < VALUES; i += THREADS) count[i] = 0;
    __syncthreads();
    each(row, n_vocab, is_whole, lowest, [&](float x, int) { atomicAdd(&count[values.bin(x)], 1u); });
    __syncthreads();
    int last = VALUES;
    const auto weigh = [&](int bin) {
        const uint32_t n = bin <= last ? count[bin] : 0;
        return Weight{n, n ? n * expf(-distance.of(values.value(bin))) : 0.f};
    };
    if (filter.has_top_k)
        last = find<VALUES>(scan, 0, 0.f, uint32_t(filter.top_k), INFINITE, 0.f, weigh).bin;
    if (filter.has_top_p) last = min(last, find<VALUES>(scan, 0, 0.f, ~0u, filter.top_p, 0.f, weigh).bin);
    return last == VALUES ? lowest : last == VALUES / 2 - 1 ? -values.zero() : values.value(last);
}

// ---- filters of any logits ---------------------------------------------------------------------------

// Tokens by distance below the largest. A token weighs at most 2^30 in its bin, 1 at the bin's near edge:
// sums of integers, which do not depend on the order of the atomics.
constexpr int BINS = 2048;

struct Bins {
    uint32_t count[BINS], low[BINS], high[BINS];

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < BINS; i += THREADS) count[i] = low[i] = high[i] = 0;
        __syncthreads();
    }
    __device__ __forceinline__ void add(uint32_t at, float weight) {
        atomicAdd(&count[at], 1u);
        const uint32_t w = __float2uint_rn(weight * 0x1p30f);
        if (atomicAdd(&low[at], w) > ~w) atomicAdd(&high[at], 1u);
    }
    __device__ __forceinline__ float mass(int at) const {
        return (float(high[at]) * 0x1p32f + float(low[at])) * 0x1p-30f;
    }
};

// Return the steps from the largest that top-k, or top-p, leaves among tokens within `limit` steps; there are
// `per_unit` steps, 2^31 at most in all. Bins of 2^20 steps, then the 2^10 in one of them, then the one in one.
template <class T>
__device__ uint32_t limit_of(Bins& bins, Scan& scan, const T* row, int n_vocab, bool is_whole,
                             const Distance& distance, float per_unit, float lowest, uint32_t limit,
                             uint32_t n_wanted, float fraction) {
    uint32_t prefix = 0, n_before = 0;
    float mass_before = 0.f, total = 0.f;
    for (int shift = 20; shift >= 0; shift -= 10) {
        const float edge = float(prefix << shift) / per_unit;  // of the first bin
        const float width = float(1u << shift) / per_unit;
        bins.clear();
        each(row, n_vocab, is_whole, lowest, [&](float x, int) {
            const float below = distance.of(x);
            if (!(below < REACH)) return;
            const uint32_t steps = uint32_t(below * per_unit), at = (steps >> shift) - prefix;
            if (steps <= limit && at < BINS) bins.add(at, __expf(edge + at * width - below));
        });
        __syncthreads();
        const Found found = find<BINS>(scan, n_before, mass_before, n_wanted, fraction, total, [&](int bin) {
            const uint32_t n = bins.count[bin];
            return Weight{n, n ? bins.mass(bin) * __expf(-edge - bin * width) : 0.f};
        });
        if (found.bin == BINS) return limit;
        const uint32_t n = bins.count[found.bin], end = ((prefix + found.bin + 1) << shift) - 1;
        __syncthreads();
        if (n == 1 || found.n_before + n == n_wanted || shift == 0) return min(end, limit);
        prefix = (prefix + found.bin) << 10;
        n_before = found.n_before, mass_before = found.mass_before, total = found.total;
    }
    return limit;
}

// The largest power of two that keeps the distance of the lowest logit that counts below 2^31 steps.
__device__ __forceinline__ float steps_per_unit(const Distance& distance, float lowest) {
    const float span = fmaxf(fminf(distance.of(lowest), REACH), 0x1p-20f);
    const int exponent = int(__float_as_uint(span) >> 23) - 127;
    return __uint_as_float(uint32_t(30 - exponent + 127) << 23);
}

// The winner among the tokens that are not below `least` and that keeps(logit) says are left: that of all, if
// it is one.
template <class T, class F>
__device__ __forceinline__ uint64_t winner(const T* row, int n_vocab, bool is_whole, const Divider& by, float least,
                                           uint64_t drawn, Draw draw, F keeps) {
    const uint32_t token = token_of(drawn);
    const float x = token < uint32_t(n_vocab) ? to_float(row[token]) : -INFINITE;
    if (x >= least && keeps(x)) return drawn;
    each(row, n_vocab, is_whole, least, [&](float x, int id) {
        if (!keeps(x)) return;
        draw.offer(by(x), id);
        draw.bar = below(draw.best.value);
    });
    return ranked(draw.best);
}

// ---- the kernels -------------------------------------------------------------------------------------

// `adjusted` takes the changed logits of filtered rows; it may be `logits`. Grid: slices of a row, rows.
extern "C" __global__ void __launch_bounds__(THREADS, sizeof(TYPE) == 2 ? 2 : 1)
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
    const int row = row_S[s], length = length_S[s];
    const Effects effects(rows, row, length);
    const float temperature = rows.temperature[row];
    const bool draws = temperature > 0.f, is_filtered = draws && Filter(rows, row, n_vocab).any();
    const Divider by(draws ? temperature : 1.f);
    Draw draw(rows.seed[row], length);
    Best largest;
    Partial mine = NOTHING;
    // Eight logits from token i on, which is one; what a ragged row lacks of eight repeats the first.
    const auto offer = [&](const float (&x)[8], int i) {
        if (draws) {
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (is_whole || i + k < end) draw.offer(by(x[k]), i + k);
        }
        if (draws && !is_filtered) return;
        float most = x[0];
#pragma unroll
        for (int k = 1; k < 8; ++k) most = fmaxf(most, x[k]);
        if (is_filtered) {
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (x[k] > -INFINITE) mine.low = fminf(mine.low, x[k]);
        }
        if (!(most > largest.value)) return;
#pragma unroll
        for (int k = 7; k >= 0; --k)
            if (x[k] == most) largest = {most, i + k};
    };
    const auto take = [&](float (&x)[8], const Eight<TYPE>& from, int i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) mine.sum += x[k] = is_whole || i + k < end ? from[k] : from[0];
    };
    if (effects.any()) {
        for (int i = begin + threadIdx.x * 8, tile = begin; tile < end; tile += TILE, i += TILE) {
            float x[8];
            take(x, fetch(i), i);
            change(x, changes, rows, row, effects, tile);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                if (!is_whole && i + k >= end) x[k] = x[0];
                if (is_filtered && i + k < end) adjusted[int64_t(s) * n_vocab + i + k] = x[k];
            }
            if (i < end) offer(x, i);
            draw.share();
        }
    } else {
        constexpr int AHEAD = sizeof(TYPE) == 2 ? 4 : 1;
        for (int i = begin + threadIdx.x * 8, tile = begin; tile < end; tile += AHEAD * TILE, i += AHEAD * TILE) {
            Eight<TYPE> ahead[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) ahead[a] = fetch(i + a * TILE);
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                if (tile + a * TILE >= end) break;
                float x[8];
                take(x, ahead[a], i + a * TILE);
                if (i + a * TILE < end) offer(x, i + a * TILE);
                if (draws) draw.share();
            }
        }
    }
    mine.largest = ranked(largest), mine.drawn = ranked(draw.best);
    mine = over_block(mine, scratch);
    if (threadIdx.x == 0) partial[int64_t(s) * gridDim.x + blockIdx.x] = mine;
}

union Histogram {
    Bins bins;
    uint32_t count[VALUES];
};

// Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
pick(const TYPE* logits, const float* adjusted, Rows rows, const int* row_S, const int* length_S, int n_vocab,
     int is_whole, const Partial* partial, int n_slices, int64_t* token_S, uint8_t* finite_S) {
    __shared__ Histogram histogram;
    __shared__ Scan scan;
    __shared__ Partial scratch[THREADS / 32];
    let_next_begin();
    wait_for_previous();
    const int s = blockIdx.x, row = row_S[s], length = length_S[s];
    const int64_t at = int64_t(s) * n_vocab;
    Partial mine = NOTHING;
    for (int i = threadIdx.x; i < n_slices; i += THREADS) mine = joined(mine, partial[int64_t(s) * n_slices + i]);
    const float temperature = rows.temperature[row];
    const Filter filter(rows, row, n_vocab);
    mine = over_block(mine, scratch);
    if (temperature > 0.f && filter.any()) {
        const float most = value_of(mine.largest);
        const Distance distance(temperature, most);
        const float floor = filter.min_p > 0.f ? distance.largest + logf(filter.min_p) : -INFINITE;
        const Draw draw(rows.seed[row], length);
        const float lowest = most - REACH * temperature;  // near enough: what matters is far above
        if (sizeof(TYPE) == 2 && !Effects(rows, row, length).any()) {
            const bf16* from = reinterpret_cast<const bf16*>(logits) + at;
            const Values values(fminf(fabsf(most) + REACH * temperature, fmaxf(fabsf(most), fabsf(mine.low))));
            float least = lowest;
            if (filter.has_top_k || filter.has_top_p)
                least = least_value(histogram.count, scan, from, n_vocab, is_whole, distance, values, lowest, filter);
            mine.drawn = winner(from, n_vocab, is_whole, distance.by, least, mine.drawn, draw,
                                [&](float x) { return distance.by(x) >= floor; });
        } else {
            const float* from = adjusted + at;
            const float per_unit = steps_per_unit(distance, mine.low);
            const auto limited = [&](uint32_t limit, uint32_t n_wanted, float fraction) {
                return limit_of(histogram.bins, scan, from, n_vocab, is_whole, distance, per_unit, lowest, limit,
                                n_wanted, fraction);
            };
            uint32_t limit = ~0u;
            if (filter.has_top_k) limit = limited(limit, uint32_t(filter.top_k), INFINITE);
            if (filter.has_top_p) limit = limited(limit, ~0u, filter.top_p);
            mine.drawn = winner(from, n_vocab, is_whole, distance.by, lowest, mine.drawn, draw, [&](float x) {
                const float below = distance.of(x);
                return below < REACH && uint32_t(below * per_unit) <= limit && distance.by(x) >= floor;
            });
        }
        mine.drawn = over_block(Partial{0, mine.drawn, 0.f, 0.f}, scratch).drawn;
    }
    if (threadIdx.x != 0) return;
    const uint32_t token = token_of(temperature > 0.f ? mine.drawn : mine.largest);
    token_S[s] = token < uint32_t(n_vocab) ? token : 0;  // no logit was a number
    finite_S[s] = fabsf(mine.sum) < INFINITE;
}
