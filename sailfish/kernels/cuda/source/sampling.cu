// Draws one token per row from its logits: penalties, bias, filters and Gumbel noise. TYPE: bf16 or float.
//
// `score` gives slices of rows to blocks: each finds its largest logit, and the token that wins by noise.
// `pick` gives a row to a block, which joins the slices. With a filter it finds how far below the largest logit
// a token may lie; the winner of all tokens, if it is among those, has won, or else the block draws from them.
#include "sampling.cuh"

constexpr int PICK_THREADS = 1024;  // of a whole row

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
    float temperature, largest;

    __device__ __forceinline__ Distance(float temperature_, float largest_logit)
        : by(temperature_), temperature(temperature_), largest(by(largest_logit)) {}
    __device__ __forceinline__ float of(float logit) const { return largest - by(logit); }
};

// Call f(logit, token) on every element of a row that is not below `least`; loads run ahead of the calls, and
// eight that are all below are passed over.
template <class T, class F>
__device__ __forceinline__ void each(const T* row, int n_vocab, bool is_whole, float least, F f) {
    constexpr int AHEAD = 4 / sizeof(T);
    const int tile = blockDim.x * 8;
    for (int begin = threadIdx.x * 8; begin < n_vocab; begin += AHEAD * tile) {
        Eight<T> x[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int i = begin + a * tile;
            if (is_whole && i < n_vocab) x[a].load(row + i);
            if (!is_whole) x[a].load_some(row + i, n_vocab - i);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int i = begin + a * tile, n = n_vocab - i;
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
    float warp_mass[32], mass;
    uint32_t warp_count[32], before;
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
    constexpr int EACH = N_BINS / PICK_THREADS;
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
    for (int w = 0; w < PICK_THREADS / 32; ++w) {
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

// ---- filters of logits of which most are bfloat16 ----------------------------------------------------

// A bin for each value of bfloat16, the largest first, in 32 octaves of each sign; what is smaller is zero. A
// changed logit falls into the bin of what it is when cut off, and adds what it weighs more than that.
constexpr int VALUES = 8192;
[[maybe_unused]] constexpr uint32_t CHANGED = 1u << 31;

struct Counts {
    uint32_t count[VALUES];  // with CHANGED if a changed logit is among them
    int more[VALUES];        // in units of 2^-24: a sum that does not depend on the order of the atomics
};

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

// Return the least logit that top-k, and of it top-p, leaves, given the lowest that counts. NaN if that lies
// in a bin with changed logits, whose order the bins do not tell.
template <class T>
__device__ float least_value(Counts& counts, Scan& scan, const T* row, int n_vocab, bool is_whole,
                             const Distance& distance, const Values& values, float lowest, const Filter& filter) {
    for (int i = threadIdx.x; i < VALUES; i += PICK_THREADS) counts.count[i] = counts.more[i] = 0;
    __syncthreads();
    each(row, n_vocab, is_whole, lowest, [&](float x, int) {
        const int bin = values.bin(x);
        atomicAdd(&counts.count[bin], 1u);
        if (sizeof(T) == 2 || !(__float_as_uint(x) & 0xffffu)) return;
        const float more = expf(-distance.of(x)) - expf(-distance.of(values.value(bin)));
        atomicAdd(&counts.more[bin], __float2int_rn(more * 0x1p24f));
        atomicOr(&counts.count[bin], CHANGED);
    });
    __syncthreads();
    int last = VALUES;
    const auto weigh = [&](int bin) {
        const uint32_t n = bin <= last ? counts.count[bin] & ~CHANGED : 0;
        if (n == 0) return Weight{0, 0.f};
        return Weight{n, n * expf(-distance.of(values.value(bin))) + counts.more[bin] * 0x1p-24f};
    };
    if (filter.has_top_k)
        last = find<VALUES>(scan, 0, 0.f, uint32_t(filter.top_k), INFINITE, 0.f, weigh).bin;
    if (last < VALUES && (counts.count[last] & CHANGED)) return __int_as_float(0x7fffffff);
    if (filter.has_top_p) last = min(last, find<VALUES>(scan, 0, 0.f, ~0u, filter.top_p, 0.f, weigh).bin);
    if (last == VALUES) return lowest;
    if (counts.count[last] & CHANGED) return __int_as_float(0x7fffffff);
    return last == VALUES / 2 - 1 ? -values.zero() : values.value(last);
}

// ---- filters of any logits ---------------------------------------------------------------------------

// Tokens by distance below the largest. A token weighs at most 2^30 in its bin, 1 at the bin's near edge:
// sums of integers, which do not depend on the order of the atomics.
constexpr int BINS = 2048;

struct Bins {
    uint32_t count[BINS], low[BINS], high[BINS];

    __device__ __forceinline__ void clear() {
        for (int i = threadIdx.x; i < BINS; i += PICK_THREADS) count[i] = low[i] = high[i] = 0;
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
__device__ __forceinline__ uint64_t winner(const T* row, int n_vocab, bool is_whole, float least, uint64_t drawn,
                                           Draw draw, F keeps) {
    const uint32_t token = token_of(drawn);
    const float x = token < uint32_t(n_vocab) ? to_float(row[token]) : -INFINITE;
    if (x >= least && keeps(x)) return drawn;
    each(row, n_vocab, is_whole, least, [&](float x, int id) {
        if (!keeps(x)) return;
        draw.offer(x, id, draw.counter(id));
        draw.raise(draw.best.value);
    });
    return ranked(draw.best);
}

// ---- the kernels -------------------------------------------------------------------------------------

// `adjusted` takes the changed logits of filtered rows; it may be `logits`. Grid: slices of a row, rows.
extern "C" __global__ void __launch_bounds__(THREADS, sizeof(TYPE) == 2 ? 2 : 1)
score(const TYPE* logits, float* adjusted, Rows rows, const int* row_S, const int* length_S, int n_vocab,
      int tiles_per_slice, int is_whole, Partial* partial) {
    __shared__ Changes changes;
    __shared__ Partial scratch[32];
    __shared__ int bar;
    if (threadIdx.x == 0) bar = int(1u << 31);
    __syncthreads();
    let_next_begin();
    wait_for_previous();
    const int s = blockIdx.y;
    const TYPE* from = logits + int64_t(s) * n_vocab;
    const int begin = blockIdx.x * tiles_per_slice * TILE, end = min(begin + tiles_per_slice * TILE, n_vocab);
    // Eight logits; what a ragged row lacks of them repeats the first.
    const auto fetch = [&](int i) {
        Eight<TYPE> x;
        x.clear();
        if (is_whole && i < end) x.load(from + i);
        if (!is_whole && i < end) {
#pragma unroll
            for (int k = 0; k < 8; k += 2)
                x.set(k, to_float(from[i + k < end ? i + k : i]), to_float(from[i + k + 1 < end ? i + k + 1 : i]));
        }
        return x;
    };
    const int row = row_S[s], length = length_S[s];
    const Effects effects(rows, row, length);
    const float temperature = rows.temperature[row];
    const bool draws = temperature > 0.f, is_filtered = draws && Filter(rows, row, n_vocab).any();
    Draw draw(rows.seed[row], length, draws ? temperature : 1.f);
    Best largest;
    Partial mine = NOTHING;
    const auto offer = [&](const float (&x)[8], int i) {
        float most = x[0];
#pragma unroll
        for (int k = 1; k < 8; ++k) most = fmaxf(most, x[k]);
        if (draws && (!(draw.offset < INFINITE) || draw.may_win(most, draw.counter(i)))) {
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (is_whole || i + k < end) draw.offer(x[k], i + k, draw.counter(i) + k * GOLDEN);
        }
        if (draws && !is_filtered) return;
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
    const auto take = [&](float (&x)[8], const Eight<TYPE>& from) {
#pragma unroll
        for (int k = 0; k < 8; ++k) mine.sum += x[k] = from[k];
    };
    if (effects.any()) {
        for (int i = begin + threadIdx.x * 8, tile = begin; tile < end; tile += TILE, i += TILE) {
            float x[8];
            take(x, fetch(i));
            change(x, changes, rows, row, effects, tile);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                if (!is_whole && i + k >= end) x[k] = x[0];
                if (is_filtered && i + k < end) adjusted[int64_t(s) * n_vocab + i + k] = x[k];
            }
            if (i < end) offer(x, i);
            draw.share(bar);
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
                take(x, ahead[a]);
                if (i + a * TILE < end) offer(x, i + a * TILE);
                if (draws) draw.share(bar);
            }
        }
    }
    mine.largest = ranked(largest), mine.drawn = ranked(draw.best);
    mine = over_block(mine, scratch);
    if (threadIdx.x == 0) partial[int64_t(s) * gridDim.x + blockIdx.x] = mine;
}

// The rest of `pick` for a row with a filter: what is drawn of the tokens that the filter leaves.
struct Filtered {
    Counts& counts;
    Bins& bins;
    Scan& scan;
    const Filter& filter;
    const Draw& draw;
    const Distance distance;
    const Partial& all;  // of the whole row
    int n_vocab;
    bool is_whole;

    __device__ __forceinline__ float floor() const {
        return filter.min_p > 0.f ? distance.largest + logf(filter.min_p) : -INFINITE;
    }
    // What is lower does not count, near enough.
    __device__ __forceinline__ float lowest() const { return value_of(all.largest) - REACH * distance.temperature; }

    // False if the bins do not tell.
    template <class T>
    __device__ __forceinline__ bool by_value(const T* row, uint64_t& drawn) const {
        const float most = fabsf(value_of(all.largest));
        const Values values(fminf(most + REACH * distance.temperature, fmaxf(most, fabsf(all.low))));
        float least = lowest();
        if (filter.has_top_k || filter.has_top_p)
            least = least_value(counts, scan, row, n_vocab, is_whole, distance, values, least, filter);
        if (!(least == least)) return false;
        drawn = winner(row, n_vocab, is_whole, least, all.drawn, draw,
                       [&](float x) { return distance.by(x) >= floor(); });
        return true;
    }
    __device__ __forceinline__ uint64_t by_distance(const float* row) const {
        const float per_unit = steps_per_unit(distance, all.low);
        const auto limited = [&](uint32_t limit, uint32_t n_wanted, float fraction) {
            return limit_of(bins, scan, row, n_vocab, is_whole, distance, per_unit, lowest(), limit, n_wanted,
                            fraction);
        };
        uint32_t limit = ~0u;
        if (filter.has_top_k) limit = limited(limit, uint32_t(filter.top_k), INFINITE);
        if (filter.has_top_p) limit = limited(limit, ~0u, filter.top_p);
        return winner(row, n_vocab, is_whole, lowest(), all.drawn, draw, [&](float x) {
            const float below = distance.of(x);
            return below < REACH && uint32_t(below * per_unit) <= limit && distance.by(x) >= floor();
        });
    }
};

// Grid: rows.
extern "C" __global__ void __launch_bounds__(PICK_THREADS)
pick(const TYPE* logits, const float* adjusted, Rows rows, const int* row_S, const int* length_S, int n_vocab,
     int is_whole, const Partial* partial, int n_slices, int64_t* token_S, uint8_t* finite_S) {
    extern __shared__ __align__(16) uint8_t shared[];  // Counts, or Bins
    __shared__ Scan scan;
    __shared__ Partial scratch[32];
    let_next_begin();
    wait_for_previous();
    const int s = blockIdx.x, row = row_S[s], length = length_S[s];
    const int64_t at = int64_t(s) * n_vocab;
    Partial all = NOTHING;
    for (int i = threadIdx.x; i < n_slices; i += PICK_THREADS) all = joined(all, partial[int64_t(s) * n_slices + i]);
    const float temperature = rows.temperature[row];
    const Filter filter(rows, row, n_vocab);
    all = over_block(all, scratch);
    uint64_t rank = temperature > 0.f ? all.drawn : all.largest;
    if (temperature > 0.f && filter.any()) {
        const Draw draw(rows.seed[row], length, temperature);
        const Filtered filtered{*reinterpret_cast<Counts*>(shared), *reinterpret_cast<Bins*>(shared), scan, filter,
                                draw, Distance(temperature, value_of(all.largest)), all, n_vocab, bool(is_whole)};
        bool is_drawn = false;
        if constexpr (sizeof(TYPE) == 2) {
            is_drawn = Effects(rows, row, length).any() ? filtered.by_value(adjusted + at, rank)
                                                        : filtered.by_value(logits + at, rank);
        }
        if (!is_drawn) rank = filtered.by_distance(adjusted + at);
        rank = over_block(Partial{0, rank, 0.f, 0.f}, scratch).drawn;
    }
    if (threadIdx.x != 0) return;
    const uint32_t token = token_of(rank);
    token_S[s] = token < uint32_t(n_vocab) ? token : 0;  // no logit was a number
    finite_S[s] = fabsf(all.sum) < INFINITE;
}
