// Splits qkv into heads, norms and rotates q and k, and writes k and v to the paged cache. TYPE: bf16 or
// float; CACHE: the format of the cache, 0 that of TYPE, 1 int8, 2 float8 e4m3.
#include "rows.cuh"

struct Cache {
    void* values;
    float* scale;
};

// The norm of a head that LANES lanes hold, rounded to T.
template <class T>
__device__ __forceinline__ void norm_head(Eight<T>& x, const Eight<T>& gain, int head_dim, int n_lanes,
                                          float eps, float shift) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(x[i], x[i], squares);
    const float factor = rsqrtf(over_lanes(squares, Sum(), n_lanes) / head_dim + eps);
#pragma unroll
    for (int i = 0; i < 8; i += 2)
        x.set(i, x[i] * factor * (gain[i] + shift), x[i + 1] * factor * (gain[i + 1] + shift));
}

// The angles of a lane's eight elements where halves of whole lanes turn together.
struct Angles {
    Eight<float> cos, sin;
    bool turns, is_first;
    int partner;  // lane

    __device__ __forceinline__ Angles(const float* cos_sin, int begin, int n_pairs, bool is_read)
        : turns(begin < 2 * n_pairs), is_first(begin < n_pairs) {
        cos.clear();
        sin.clear();
        const float* from = cos_sin + (is_first ? begin : begin - n_pairs);
        if (turns && is_read) cos.load(from), sin.load(from + n_pairs);
        const int lane = threadIdx.x % 32;
        partner = !turns ? lane : is_first ? lane + n_pairs / 8 : lane - n_pairs / 8;
    }
    template <class T>
    __device__ __forceinline__ void rotate(Eight<T>& x) const {
        float turned[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float other = __shfl_sync(ALL_LANES, x[i], partner);
            turned[i] = x[i] * cos[i] + (is_first ? -other : other) * sin[i];
        }
        if (!turns) return;
#pragma unroll
        for (int i = 0; i < 8; i += 2) x.set(i, turned[i], turned[i + 1]);
    }
};

// Rotate the leading 2 * n_pairs elements of any layout. `begin` is the lane's first element; the cos of all
// pairs lie before their sin; `shared` is the head's memory.
template <class T>
__device__ __forceinline__ void rotate(Eight<T>& x, int begin, int n_pairs, bool is_interleaved,
                                       const float* cos_sin, float* shared) {
    const float *cos = cos_sin, *sin = cos_sin + n_pairs;
    if (is_interleaved) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const int f = (begin + i) / 2;
            if (f < n_pairs) x.set(i, x[i] * cos[f] - x[i + 1] * sin[f], x[i + 1] * cos[f] + x[i] * sin[f]);
        }
        return;
    }
    float turned[8];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) shared[begin + i] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int e = begin + i, f = e < n_pairs ? e : e - n_pairs;
        turned[i] = x[i];
        if (e < n_pairs) turned[i] = x[i] * cos[f] - shared[e + n_pairs] * sin[f];
        if (e >= n_pairs && e < 2 * n_pairs) turned[i] = x[i] * cos[f] + shared[f] * sin[f];
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) x.set(i, turned[i], turned[i + 1]);
}

// Write eight elements of a head to its place in the cache, `head` counted over all slots.
template <class T>
__device__ __forceinline__ void write(const Eight<T>& x, Cache cache, int64_t head, int begin, int head_dim,
                                      int n_lanes, bool is_written) {
    const int64_t at = head * head_dim + begin;
#if CACHE == 0
    if (is_written) x.store(static_cast<T*>(cache.values) + at);
#else
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = Largest()(largest, fabsf(x[i]));
    const float scale = scale_of(over_lanes(largest, Largest(), n_lanes), CACHE);
    if (!is_written) return;
    *reinterpret_cast<uint2*>(static_cast<uint8_t*>(cache.values) + at) = to_8bit(x, Divider(scale), CACHE);
    if (begin == 0) cache.scale[head] = scale;
#endif
}

constexpr int THREADS = 256;

// n_lanes lanes a head, eight elements a lane; lanes past the head's width idle. A thread has EACH heads, which
// share the token's angles. Grid: tokens, parts of the heads.
template <int EACH>
__device__ __forceinline__ void rope_write(const TYPE* qkv, TYPE* q, const TYPE* q_norm, const TYPE* k_norm,
                                           const float* table, const int64_t* position, const int64_t* slot,
                                           void* k_values, float* k_scale, void* v_values, float* v_scale,
                                           int n_heads, int n_kv_heads, int head_dim, int n_lanes, int n_pairs,
                                           int is_interleaved, float eps, float shift) {
    __shared__ float shared[THREADS * 8];
    const int heads_at_once = THREADS / n_lanes, n_all = n_heads + 2 * n_kv_heads;
    const int first = blockIdx.y * EACH * heads_at_once + threadIdx.x / n_lanes;
    const int begin = threadIdx.x % n_lanes * 8;
    const int64_t token = blockIdx.x;
    Eight<TYPE> x[EACH], q_gain, k_gain;
    if (q_norm != nullptr && begin < head_dim) q_gain.load(q_norm + begin), k_gain.load(k_norm + begin);
    let_next_begin();
    wait_for_previous();
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int head = first + j * heads_at_once;
        x[j].clear();
        if (head < n_all && begin < head_dim) x[j].load(qkv + (token * n_all + head) * head_dim + begin);
    }
    const float* cos_sin = table + position[token] * 2 * n_pairs;
    const int64_t place = slot[token];
    const bool is_plain = !is_interleaved && n_pairs % 8 == 0;
    const Angles angles(cos_sin, begin, n_pairs, is_plain);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int head = first + j * heads_at_once;
        const bool is_there = head < n_all && begin < head_dim;
        const bool is_q = head < n_heads, is_v = head >= n_heads + n_kv_heads;
        // Whole warps stay together: shuffles want every lane, also those that hold a value or nothing.
        Eight<TYPE> turned = x[j];
        if (q_norm != nullptr) norm_head(turned, is_q ? q_gain : k_gain, head_dim, n_lanes, eps, shift);
        if (is_plain)
            angles.rotate(turned);
        else
            rotate(turned, begin, n_pairs, is_interleaved, cos_sin, shared + threadIdx.x / n_lanes * n_lanes * 8);
        if (!is_v) x[j] = turned;
        if (is_q && is_there) x[j].store(q + (token * n_heads + head) * head_dim + begin);
        const Cache cache = is_v ? Cache{v_values, v_scale} : Cache{k_values, k_scale};
        const int kv_head = head - n_heads - (is_v ? n_kv_heads : 0);
        write(x[j], cache, place * n_kv_heads + kv_head, begin, head_dim, n_lanes, is_there && !is_q && place >= 0);
    }
}

#define DECLARED                                                                                              \
    (const TYPE* qkv, TYPE* q, const TYPE* q_norm, const TYPE* k_norm, const float* table,                    \
     const int64_t* position, const int64_t* slot, void* k_values, float* k_scale, void* v_values,            \
     float* v_scale, int n_heads, int n_kv_heads, int head_dim, int n_lanes, int n_pairs, int is_interleaved, \
     float eps, float shift)
#define GIVEN                                                                                               \
    (qkv, q, q_norm, k_norm, table, position, slot, k_values, k_scale, v_values, v_scale, n_heads, n_kv_heads, \
     head_dim, n_lanes, n_pairs, is_interleaved, eps, shift)
extern "C" __global__ void __launch_bounds__(THREADS, 4) rope_write_1 DECLARED { rope_write<1> GIVEN; }
extern "C" __global__ void __launch_bounds__(THREADS, sizeof(TYPE) == 2 ? 3 : 2) rope_write_3 DECLARED {
    rope_write<3> GIVEN;
}

// ---- heads of which halves turn whole ----------------------------------------------------------------

constexpr int PAIR_THREADS = 128;

// The norm of a head that n_lanes lanes hold by halves, rounded to T; all lanes of a warp call it.
template <class T>
__device__ __forceinline__ void norm_pairs(Eight<T>& x, Eight<T>& y, const T* weight, int begin, int n_lanes,
                                           bool is_v, float eps, float shift) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(x[i], x[i], fmaf(y[i], y[i], squares));
    const float factor = rsqrtf(over_lanes(squares, Sum(), n_lanes) / (n_lanes * 16) + eps);
    if (is_v) return;
    Eight<T> x_gain, y_gain;
    x_gain.load(weight + begin), y_gain.load(weight + n_lanes * 8 + begin);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        x.set(i, x[i] * factor * (x_gain[i] + shift), x[i + 1] * factor * (x_gain[i + 1] + shift));
        y.set(i, y[i] * factor * (y_gain[i] + shift), y[i + 1] * factor * (y_gain[i + 1] + shift));
    }
}

// Write a lane's elements of both halves of a head to its place in the cache; all lanes of a warp call it.
template <class T>
__device__ __forceinline__ void write_pairs(const Eight<T>& x, const Eight<T>& y, Cache cache, int64_t head,
                                            int begin, int n_lanes, bool is_written) {
    const int half = n_lanes * 8;
    const int64_t at = head * 2 * half + begin;
#if CACHE == 0
    if (is_written) x.store(static_cast<T*>(cache.values) + at), y.store(static_cast<T*>(cache.values) + at + half);
#else
    if (!__any_sync(ALL_LANES, is_written)) return;
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = Largest()(Largest()(largest, fabsf(x[i])), fabsf(y[i]));
    const float scale = scale_of(over_lanes(largest, Largest(), n_lanes), CACHE);
    if (!is_written) return;
    uint8_t* to = static_cast<uint8_t*>(cache.values) + at;
    *reinterpret_cast<uint2*>(to) = to_8bit(x, Divider(scale), CACHE);
    *reinterpret_cast<uint2*>(to + half) = to_8bit(y, Divider(scale), CACHE);
    if (begin == 0) cache.scale[head] = scale;
#endif
}

// A lane has eight elements of a head's first half and the eight they turn with: no shuffles, and half the
// angles to read. n_lanes lanes a head, n_parts * n_lanes threads, whole warps, a token, EACH heads a thread.
template <int EACH>
__device__ __forceinline__ void rope_write_pairs(const TYPE* qkv, TYPE* q, const TYPE* q_norm, const TYPE* k_norm,
                                                 const float* table, const int64_t* position, const int64_t* slot,
                                                 void* k_values, float* k_scale, void* v_values, float* v_scale,
                                                 int n_tokens, int n_heads, int n_kv_heads, int n_lanes, int n_parts,
                                                 float eps, float shift) {
    const int half = n_lanes * 8, head_dim = 2 * half, n_all = n_heads + 2 * n_kv_heads;
    const int item = blockIdx.x * PAIR_THREADS + threadIdx.x, token = item / (n_parts * n_lanes);
    const int part = (item - token * n_parts * n_lanes) / n_lanes, begin = item % n_lanes * 8;
    let_next_begin();
    wait_for_previous();
    if (token >= n_tokens) return;
    const float* cos_sin = table + position[token] * head_dim + begin;
    const int64_t place = slot[token];
    Eight<TYPE> x[EACH], y[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int head = part + j * n_parts;
        const TYPE* from = qkv + (int64_t(token) * n_all + head) * head_dim + begin;
        x[j].clear(), y[j].clear();
        if (head < n_all) x[j].load(from), y[j].load(from + half);
    }
    Eight<float> cos, sin;
    cos.load(cos_sin), sin.load(cos_sin + half);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int head = part + j * n_parts;
        const bool is_there = head < n_all, is_q = head < n_heads, is_v = head >= n_heads + n_kv_heads;
        if (q_norm != nullptr) norm_pairs(x[j], y[j], is_q ? q_norm : k_norm, begin, n_lanes, is_v, eps, shift);
        if (!is_v)
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const float x0 = x[j][i], x1 = x[j][i + 1], y0 = y[j][i], y1 = y[j][i + 1];
                x[j].set(i, x0 * cos[i] - y0 * sin[i], x1 * cos[i + 1] - y1 * sin[i + 1]);
                y[j].set(i, y0 * cos[i] + x0 * sin[i], y1 * cos[i + 1] + x1 * sin[i + 1]);
            }
        if (is_q && is_there) {
            TYPE* to = q + (int64_t(token) * n_heads + head) * head_dim + begin;
            x[j].store(to), y[j].store(to + half);
        }
        const Cache cache = is_v ? Cache{v_values, v_scale} : Cache{k_values, k_scale};
        const int64_t kv_head = place * n_kv_heads + head - n_heads - (is_v ? n_kv_heads : 0);
        write_pairs(x[j], y[j], cache, kv_head, begin, n_lanes, is_there && !is_q && place >= 0);
    }
}

#define PAIRS_KERNEL(each, blocks)                                                                               \
    extern "C" __global__ void __launch_bounds__(PAIR_THREADS, blocks) rope_write_pairs_##each(                  \
        const TYPE* qkv, TYPE* q, const TYPE* q_norm, const TYPE* k_norm, const float* table,                    \
        const int64_t* position, const int64_t* slot, void* k_values, float* k_scale, void* v_values,            \
        float* v_scale, int n_tokens, int n_heads, int n_kv_heads, int n_lanes, int n_parts, float eps,          \
        float shift) {                                                                                           \
        rope_write_pairs<each>(qkv, q, q_norm, k_norm, table, position, slot, k_values, k_scale, v_values,       \
                               v_scale, n_tokens, n_heads, n_kv_heads, n_lanes, n_parts, eps, shift);            \
    }
PAIRS_KERNEL(1, 8)
PAIRS_KERNEL(2, sizeof(TYPE) == 2 ? 7 : 4)
