// Rows of activations in registers, eight elements at a time, and how they are stored: as they are, or in 8 bits.
#pragma once
#include "base.cuh"

// ---- eight elements ---------------------------------------------------------------------------------

template <class T>
struct Eight {
    uint32_t word[2 * sizeof(T)];

    __device__ __forceinline__ float operator[](int i) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(word[i]);
        return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    }
    // Two neighbours, rounded to T; `i` is even.
    __device__ __forceinline__ void set(int i, float low, float high) {
        if constexpr (sizeof(T) == 4) {
            word[i] = __float_as_uint(low), word[i + 1] = __float_as_uint(high);
        } else {
            word[i / 2] = pack<T>(low, high);
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (uint32_t& w : word) w = 0;
    }
    // From 16-byte aligned memory.
    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
            const uint4 v = reinterpret_cast<const uint4*>(from)[i];
            word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
        }
    }
    __device__ __forceinline__ void store(T* to) const {
#pragma unroll
        for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
            const uint4 v{word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]};
            reinterpret_cast<uint4*>(to)[i] = v;
        }
    }
    // From memory of any alignment that holds `n` elements; the rest is zero.
    __device__ __forceinline__ void load_some(const T* from, int n) {
#pragma unroll
        for (int i = 0; i < 8; i += 2)
            set(i, i < n ? to_float(from[i]) : 0.f, i + 1 < n ? to_float(from[i + 1]) : 0.f);
    }
    __device__ __forceinline__ void store_some(T* to, int n) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < n) to[i] = from_float<T>((*this)[i]);
    }
};

// ---- reductions -------------------------------------------------------------------------------------

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
// The larger; NaN if either is, so that a poisoned row stays one.
struct Largest {
    __device__ __forceinline__ float operator()(float a, float b) const {
        float y;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
        return y;
    }
};

// Over groups of `width` neighbouring lanes, a power of two; every lane gets the result.
template <class Op>
__device__ __forceinline__ float over_lanes(float x, Op op, int width = 32) {
    for (int k = width / 2; k > 0; k /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, k));
    return x;
}
// Over the block, for sums and for absolute values: 0 is neutral. `scratch` is used once a kernel.
template <class Op>
__device__ __forceinline__ float over_block(float x, Op op, float (&scratch)[32]) {
    const int lane = threadIdx.x % 32;
    x = over_lanes(x, op);
    if (lane == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return over_lanes(lane < int(blockDim.x) / 32 ? scratch[lane] : 0.f, op);
}

// ---- 8-bit numbers ----------------------------------------------------------------------------------

enum Format { PLAIN, INT8, FP8 };

// Divides by a scale as IEEE does: a product, then corrections by its remainder (Markstein 1990), the second
// because the product may be two steps off. The power of two keeps reciprocals of tiny scales in range.
struct Divider {
    float lift, divisor, inverse;

    __device__ __forceinline__ explicit Divider(float scale)
        : lift(scale < 0x1p-64f ? 0x1p64f : 1.f), divisor(scale * lift), inverse(1.f / divisor) {}
    __device__ __forceinline__ float operator()(float x) const {
        x *= lift;
        float quotient = x * inverse;
        quotient = fmaf(fmaf(-quotient, divisor, x), inverse, quotient);
        return fmaf(fmaf(-quotient, divisor, x), inverse, quotient);
    }
};

__device__ __forceinline__ float scale_of(float largest, int format) {
    return largest == 0.f ? 1.f : largest / (format == INT8 ? 127.f : 448.f);
}

// The nearest float8 e4m3, ties to even, past the largest the largest.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u, size = __float_as_uint(x) & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 0x7fu;
    const float a = fminf(__uint_as_float(size), 448.f);
    if (a < 0x1p-6f) return sign | __float2uint_rn(a * 0x1p9f);
    const uint32_t bits = __float_as_uint(a);
    return sign | ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
}

// Four numbers in one word, the first in the lowest byte.
__device__ __forceinline__ uint32_t to_8bit(float a, float b, float c, float d, int format) {
    if (format == INT8) {
        const uint32_t low = __float2int_rn(a) & 0xff | (__float2int_rn(b) & 0xff) << 8;
        return low | (__float2int_rn(c) & 0xff) << 16 | uint32_t(__float2int_rn(d)) << 24;
    }
#if __CUDA_ARCH__ >= 890
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return low | uint32_t(high) << 16;
#else
    return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
#endif
}
template <class T>
__device__ __forceinline__ uint2 to_8bit(const Eight<T>& x, const Divider& by, int format) {
    return {to_8bit(by(x[0]), by(x[1]), by(x[2]), by(x[3]), format),
            to_8bit(by(x[4]), by(x[5]), by(x[6]), by(x[7]), format)};
}

// ---- a block's row ----------------------------------------------------------------------------------

// N times eight elements a thread, neighbours in neighbouring threads. WHOLE: the width is a multiple of
// eight and rows are aligned to 16 bytes.
template <class T, int N, bool WHOLE>
struct Row {
    Eight<T> part[N];

    __device__ __forceinline__ static int begin(int n) { return (n * blockDim.x + threadIdx.x) * 8; }

    __device__ __forceinline__ void load(const T* from, int width) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int i = begin(n);
            if (!WHOLE) {
                part[n].load_some(from + i, width - i);
            } else if (i < width) {
                part[n].load(from + i);
            } else {
                part[n].clear();
            }
        }
    }
    __device__ __forceinline__ void store(T* to, int width) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int i = begin(n);
            if (!WHOLE) {
                part[n].store_some(to + i, width - i);
            } else if (i < width) {
                part[n].store(to + i);
            }
        }
    }
    // Store as row `row` of the result in its format; 8-bit values with their scale.
    __device__ __forceinline__ void store(void* out, float* scale, int64_t row, int width, int format,
                                          float (&scratch)[32]) const {
        if (format == PLAIN) return store(static_cast<T*>(out) + row * width, width);
        float largest = 0.f;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) largest = Largest()(largest, fabsf(part[n][i]));
        const float step = scale_of(over_block(largest, Largest(), scratch), format);
        if (threadIdx.x == 0) scale[row] = step;
        const Divider by(step);
        uint8_t* to = static_cast<uint8_t*>(out) + row * width;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int i = begin(n);
            if (i >= width) continue;
            const uint2 bytes = to_8bit(part[n], by, format);
            if (WHOLE) {
                *reinterpret_cast<uint2*>(to + i) = bytes;
            } else {
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if (i + k < width) to[i + k] = (k < 4 ? bytes.x : bytes.y) >> (k % 4 * 8);
            }
        }
    }
};

// One kernel for each number of parts a thread holds, and one for widths or addresses that are not whole.
#define KERNEL_OF_ROWS(name, n, threads, declared, given) \
    extern "C" __global__ void __launch_bounds__(threads) name##_##n declared { name<TYPE, n, true> given; }
#define RAGGED_KERNEL_OF_ROWS(name, n, declared, given) \
    extern "C" __global__ void __launch_bounds__(1024) name##_ragged declared { name<TYPE, n, false> given; }
