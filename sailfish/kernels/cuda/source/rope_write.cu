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
