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

// Rotate the leading 2 * n_pairs elements. `begin` is the lane's first element; the cos of all pairs lie
// before their sin. Halves of whole lanes exchange through shuffles, others through the head's memory.
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
    const bool is_first = begin < n_pairs;
    float partner[8], turned[8];
    if (n_pairs % 8 == 0) {
        const bool turns = begin < 2 * n_pairs;
        Eight<float> c, s;
        c.clear();
        s.clear();
        if (turns) c.load(cos + (is_first ? begin : begin - n_pairs));
        if (turns) s.load(sin + (is_first ? begin : begin - n_pairs));
        const int lane = threadIdx.x % 32, source = is_first ? lane + n_pairs / 8 : lane - n_pairs / 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) partner[i] = __shfl_sync(ALL_LANES, x[i], turns ? source : lane);
#pragma unroll
        for (int i = 0; i < 8; ++i) turned[i] = x[i] * c[i] + (is_first ? -partner[i] : partner[i]) * s[i];
        if (!turns) return;
    } else {
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

// n_lanes lanes a head, eight elements a lane; lanes past the head's width idle. Grid: tokens, parts of the heads.
extern "C" __global__ void __launch_bounds__(256, 4)
rope_write(const TYPE* qkv, TYPE* q, const TYPE* q_norm, const TYPE* k_norm, const float* table,
           const int64_t* position, const int64_t* slot, void* k_values, float* k_scale, void* v_values,
           float* v_scale, int n_heads, int n_kv_heads, int head_dim, int n_lanes, int n_pairs,
           int is_interleaved, float eps, float shift) {
    __shared__ float shared[256 * 8];
    const int head = (blockIdx.y * blockDim.x + threadIdx.x) / n_lanes;
    const int begin = threadIdx.x % n_lanes * 8;
    const int64_t token = blockIdx.x;
    const bool is_there = head < n_heads + 2 * n_kv_heads && begin < head_dim;
    const bool is_q = head < n_heads, is_v = head >= n_heads + n_kv_heads;
    Eight<TYPE> x, gain;
    x.clear();
    gain.clear();
    const TYPE* norm = is_q ? q_norm : k_norm;
    if (q_norm != nullptr && is_there && !is_v) gain.load(norm + begin);
    let_next_begin();
    wait_for_previous();
    if (is_there) x.load(qkv + (token * (n_heads + 2 * n_kv_heads) + head) * head_dim + begin);
    const float* cos_sin = table + position[token] * 2 * n_pairs;
    const int64_t place = slot[token];
    // Whole warps stay together: shuffles want every lane, also those that hold a value or nothing.
    Eight<TYPE> turned = x;
    if (q_norm != nullptr) norm_head(turned, gain, head_dim, n_lanes, eps, shift);
    rotate(turned, begin, n_pairs, is_interleaved, cos_sin, shared + threadIdx.x / n_lanes * n_lanes * 8);
    if (!is_v) x = turned;
    if (is_q && is_there) x.store(q + (token * n_heads + head) * head_dim + begin);
    const Cache cache = is_v ? Cache{v_values, v_scale} : Cache{k_values, k_scale};
    const int kv_head = head - n_heads - (is_v ? n_kv_heads : 0);
    write(x, cache, place * n_kv_heads + kv_head, begin, head_dim, n_lanes, is_there && !is_q && place >= 0);
}
