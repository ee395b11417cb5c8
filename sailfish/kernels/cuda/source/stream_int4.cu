// y = x W^T for few tokens with 4-bit weights: codes become 16-bit floats in registers, and group scales are
// applied to the sums. The layout of W is that of kernels/int4.py.
//
// A code q enters the tensor cores as the bare bits it is: a subnormal float, q or 16 q times the smallest one
// (bits 0 to 7 of a 16-bit float with small exponent are linear even in bfloat16, whose mantissa has 7). So a
// fragment costs one `and`: row g takes the low nibble of a byte, row g + 8 the high one, whose factor 16 goes
// into its scale. bfloat16 activations are scaled up by 2^96, or the products would be subnormal too. What
// each code has too much, its zero, times the sum of the group's activations, is what the group's sum starts
// from, negative: so no weight costs an addition.
#include "stream.cuh"

#if DTYPE == 16
using T = f16;
constexpr float UNIT = 0x1p-24f;  // of a product with a code
#else
using T = bf16;
constexpr float UNIT = 0x1p-37f;  // 2^96 * 2^-133
#endif
constexpr float MIDDLE = 8.f;  // the code that means zero where no other is given
constexpr int CHUNK = 64;      // inputs
constexpr int UNIT_BYTES = 512;

// GROUP 0: one scale for a whole row, applied at its end.
struct Int4 {
    using Sum = float;
    static constexpr int NT = TILES, WARPS = N_WARPS, WK = WARP_SPLITS, DEPTH = RING, THREADS = WARPS * 32;
    static constexpr int STAGE = 4;                              // chunks
    static constexpr int SPAN = GROUP ? GROUP : CHUNK;           // inputs that are summed before scaling
    static constexpr int SPANS = STAGE * CHUNK / SPAN;           // of a stage
    static constexpr int CODE_BYTES = STAGE * UNIT_BYTES;
    static constexpr int SCALE_BYTES = GROUP ? SPANS * STRIP * 2 : 0;
    static constexpr int STAGE_BYTES = CODE_BYTES + 2 * SCALE_BYTES;
    static constexpr int CHAINS = NT == 1 ? 2 : 1;  // sums in flight: one would wait for the tensor cores

    static constexpr int BATCH = NT == 1 ? 4 : NT == 2 ? 2 : 1;  // chunks whose fragments load at once

    const char* packed;
    const char* scale;
    const char* zero;  // or null
    int units;         // of a strip
    uint64_t policy;
    int lane;
    const char* codes;  // what to copy next
    const char* plane;  // scales for the lower half of the lanes, zeros for the upper, or null

    static __device__ __forceinline__ int sum_bytes(int chunks) { return chunks * CHUNK / SPAN * NT * 8 * 4; }

    // Sum the inputs of each span: 8 of them lie in `v`, the other lanes hold the rest.
    __device__ __forceinline__ void take(uint4& v, bool valid, int at, int token, float* sums) const {
        float s = 0;
        uint32_t* const pairs = &v.x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s += to_float(T{uint16_t(pairs[i])}) + to_float(T{uint16_t(pairs[i] >> 16)});
            if constexpr (DTYPE == 0)
                asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pairs[i]) : "r"(0x6f806f80), "r"(0x80008000));
        }
        constexpr int LANES = SPAN / 8;
#pragma unroll
        for (int away = 1; away < LANES; away *= 2) s += __shfl_xor_sync(ALL_LANES, s, away);
        if (valid && at % LANES == 0) sums[at / LANES * NT * 8 + token] = s;
    }

    __device__ __forceinline__ void seek(int strip, int chunk) {
        codes = packed + (int64_t(strip) * units + chunk) * UNIT_BYTES + lane * 16;
        if constexpr (GROUP != 0) {
            plane = lane < 16 ? scale : zero;
            if (plane)
                plane += (int64_t(strip) * (units * CHUNK / GROUP) + chunk * CHUNK / GROUP) * (STRIP * 2) + lane % 16 * 16;
        }
    }

    // Copy the next n chunks.
    __device__ __forceinline__ void fill(uint32_t slot, int n) {
#pragma unroll
        for (int u = 0; u < STAGE; ++u)
            if (u < n) stream_16(slot + u * UNIT_BYTES + lane * 16, codes + u * UNIT_BYTES, 16, policy);
        codes += STAGE * UNIT_BYTES;
        if constexpr (GROUP != 0) {
            if (lane % 16 < n * CHUNK / GROUP * 2 && plane)
                stream_16(slot + CODE_BYTES + lane / 16 * SCALE_BYTES + lane % 16 * 16, plane, 16, policy);
            if (plane) plane += SCALE_BYTES;
        }
    }

    // The scale or zero of rows g and g + 8, of a span or of the whole strip.
    __device__ __forceinline__ float2 rows_of(uint32_t plane, int span) const {
        T low, high;
        const uint32_t at = plane + span * STRIP * 2 + lane / 4 * 2;
        asm volatile("ld.shared.b16 %0, [%1];" : "=h"(low.bits) : "r"(at) : "memory");
        asm volatile("ld.shared.b16 %0, [%1];" : "=h"(high.bits) : "r"(at + 16) : "memory");
        return {to_float(low), to_float(high)};
    }

    __device__ __forceinline__ float2 rows_of(const char* plane, int strip) const {
        const T* const row = reinterpret_cast<const T*>(plane) + strip * STRIP + lane / 4;
        return {to_float(row[0]), to_float(row[8])};
    }

    // Where a span begins and ends: zeros and scales of rows g and g + 8, the latter's codes being 16-fold.
    __device__ __forceinline__ void begin(uint32_t planes, int span, const float* sums, int strip,
                                          float (&part)[CHAINS][NT][4]) const {
        float2 middle{MIDDLE, MIDDLE};
        if (zero) middle = GROUP ? rows_of(planes + SCALE_BYTES, span) : rows_of(zero, strip);
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            const float2 sum = *reinterpret_cast<const float2*>(sums + span * NT * 8 + t * 8 + lane % 4 * 2);
            part[0][t][0] = -UNIT * middle.x * sum.x, part[0][t][1] = -UNIT * middle.x * sum.y;
            part[0][t][2] = -16 * UNIT * middle.y * sum.x, part[0][t][3] = -16 * UNIT * middle.y * sum.y;
            if constexpr (CHAINS == 2) part[1][t][0] = part[1][t][1] = part[1][t][2] = part[1][t][3] = 0;
        }
    }
    __device__ __forceinline__ void end(uint32_t planes, int span, const float (&part)[CHAINS][NT][4],
                                        float (&total)[NT][4]) const {
        float2 factor{1.f, 1.f};
        if constexpr (GROUP != 0) factor = rows_of(planes, span);
        factor = {factor.x * (1 / UNIT), factor.y * (1 / UNIT / 16)};
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float p = part[0][t][i];
                if constexpr (CHAINS == 2) p += part[1][t][i];
                total[t][i] += (i < 2 ? factor.x : factor.y) * p;
            }
    }

    // Multiply CHUNKS chunks: `codes` and `planes` of them in the ring, `x` and `sums` of theirs.
    template <int CHUNKS>
    __device__ __forceinline__ void multiply_chunks(uint32_t codes, uint32_t planes, const uint32_t (&x)[NT],
                                                    int at, const float* sums, int strip,
                                                    float (&total)[NT][4]) const {
        constexpr int N = CHUNKS < BATCH ? CHUNKS : BATCH;
        uint4 words[N];
        uint32_t b[N][NT][8];
        float part[CHAINS][NT][4];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (c % N == 0) {
#pragma unroll
                for (int u = 0; u < N; ++u) words[u] = load_shared_16(codes + (c + u) * UNIT_BYTES + lane * 16);
#pragma unroll
                for (int u = 0; u < N; ++u)
#pragma unroll
                    for (int t = 0; t < NT; ++t) {
                        load_matrices(b[u][t], x[t] + at + (c + u) * CHUNK_BYTES);
                        load_matrices(b[u][t] + 4, x[t] + at + (c + u) * CHUNK_BYTES + 64);
                    }
            }
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
                const int input = c * CHUNK + tile * 16, span = input / SPAN;
                if (input % SPAN == 0) begin(planes, span, sums, strip, part);
                const uint4 w = words[c % N];
                const uint32_t word = tile == 0 ? w.x : tile == 1 ? w.y : tile == 2 ? w.z : w.w, next = word >> 8;
                const uint32_t a[4] = {word & 0x000f000f, word & 0x00f000f0, next & 0x000f000f, next & 0x00f000f0};
#pragma unroll
                for (int t = 0; t < NT; ++t)
                    multiply_add<T>(part[tile % CHAINS][t], a, b[c % N][t][tile * 2], b[c % N][t][tile * 2 + 1]);
                if ((input + 16) % SPAN == 0) end(planes, span, part, total);
            }
        }
    }

    __device__ __forceinline__ void multiply(uint32_t slot, const uint32_t (&x)[NT], const float* sums, int strip,
                                             int chunk, int n, float (&total)[NT][4]) const {
        constexpr int LEAST = SPAN > CHUNK ? SPAN / CHUNK : 1;
        sums += chunk * CHUNK / SPAN * NT * 8;
        const uint32_t planes = slot + CODE_BYTES;
        if (n == STAGE)
            return multiply_chunks<STAGE>(slot, planes, x, chunk * CHUNK_BYTES, sums, strip, total);
        for (int u = 0; u < n; u += LEAST)
            multiply_chunks<LEAST>(slot + u * UNIT_BYTES, planes + u * CHUNK / SPAN * STRIP * 2, x,
                                   (chunk + u) * CHUNK_BYTES, sums + u * CHUNK / SPAN * NT * 8, strip, total);
    }

    __device__ __forceinline__ void finish(int strip, float (&total)[NT][4]) const {
        if constexpr (GROUP == 0) {
            const float2 factor = rows_of(scale, strip);
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[t][i] *= i < 2 ? factor.x : factor.y;
        }
    }
};

extern "C" __global__ void __launch_bounds__(Int4::THREADS, 1)
    stream_int4(Shape shape, Output<T> out, const char* packed, const char* scale, const char* zero) {
    Int4 reader{packed, scale, zero, shape.chunks, evict_first(), int(threadIdx.x % 32), nullptr, nullptr};
    stream_linear(reader, shape, out);
}
