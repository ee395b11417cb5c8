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
    static constexpr int NT = TILES, WARPS = N_WARPS, WK = WARP_SPLITS, DEPTH = RING;
    static constexpr int SPLITS = BLOCK_SPLITS, THREADS = WARPS * 32;
    static constexpr int STAGE = 4;                              // chunks
    static constexpr int SPAN = GROUP ? GROUP : CHUNK;           // inputs that are summed before scaling
    static constexpr int SPANS = STAGE * CHUNK / SPAN;           // of a stage
    static constexpr int CODE_BYTES = STAGE * UNIT_BYTES;
    static constexpr int SCALE_BYTES = GROUP ? SPANS * STRIP * 2 : 0;
    static constexpr int STAGE_BYTES = CODE_BYTES + 2 * SCALE_BYTES;
    static constexpr int CHAINS = NT == 1 ? 2 : 1;  // sums in flight: one would wait for the tensor cores

    static constexpr int BATCH = NT >= 8 ? 1 : 8 / NT;  // pairs of tiles whose fragments load at once

    const char* packed;
    const char* scale;
    const char* zero;  // or null
    int units;         // of a strip
    uint64_t policy;
    int lane;
    const char* codes;  // what to copy next
    const char* plane;  // scales for the lower half of the lanes, zeros for the upper
    bool copies;

    static __device__ __forceinline__ int sum_bytes(int chunks) { return chunks * CHUNK / SPAN * NT * 8 * 4; }

    static __device__ __forceinline__ uint4 prepared(uint4 v) {
#if DTYPE == 0
        uint32_t* const pairs = &v.x;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pairs[i]) : "r"(0x6f806f80), "r"(0x80008000));
#endif
        return v;
    }

    __device__ __forceinline__ void seek(int strip, int chunk) {
        codes = packed + (int64_t(strip) * units + chunk) * UNIT_BYTES + lane * 16;
        if constexpr (GROUP != 0) {
            copies = lane < 16 || zero;
            plane = (lane < 16 ? scale : zero) + (int64_t(strip) * (units * CHUNK / GROUP) + chunk * CHUNK / GROUP) * (STRIP * 2) + lane % 16 * 16;
        }
    }

    // Copy the next n chunks.
    __device__ __forceinline__ void fill(uint32_t slot, int n) {
        const uint32_t to = slot + lane * 16;
        if (n == STAGE) {
#pragma unroll
            for (int u = 0; u < STAGE; ++u) stream_16(to + u * UNIT_BYTES, codes + u * UNIT_BYTES, 16, policy);
        } else {
            for (int u = 0; u < n; ++u) stream_16(to + u * UNIT_BYTES, codes + u * UNIT_BYTES, 16, policy);
        }
        codes += STAGE * UNIT_BYTES;
        if constexpr (GROUP != 0) {
            if (copies && lane % 16 < n * CHUNK / GROUP * 2)
                stream_16(slot + CODE_BYTES + lane / 16 * SCALE_BYTES + lane % 16 * 16, plane, 16, policy);
            plane += SCALE_BYTES;
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

    // A span ends: what its codes have too much goes, the rest is scaled. `ones` are the products with code 1.
    template <bool FIRST>
    __device__ __forceinline__ void end(uint32_t planes, int span, uint32_t sums, int strip,
                                        const float (&part)[CHAINS][NT][4], const float (&ones)[NT][4],
                                        float (&total)[NT][4]) const {
        float2 middle{MIDDLE, MIDDLE}, factor{1.f, 1.f};
        if (zero) middle = GROUP ? rows_of(planes + SCALE_BYTES, span) : rows_of(zero, strip);
        if constexpr (GROUP != 0) factor = rows_of(planes, span);
        factor = {factor.x * (1 / UNIT), factor.y * (1 / UNIT / 16)};
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            const uint32_t at = sums + (span * NT * 8 + t * 8 + lane % 4 * 2) * 4;
            float2 one{ones[t][0], ones[t][1]};
            if constexpr (!FIRST)
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(one.x), "=f"(one.y) : "r"(at) : "memory");
            else if (lane < 4)
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(one.x), "f"(one.y) : "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float p = part[0][t][i];
                if constexpr (CHAINS == 2) p += part[1][t][i];
                p -= (i < 2 ? middle.x : 16 * middle.y) * (i % 2 ? one.y : one.x);
                total[t][i] += (i < 2 ? factor.x : factor.y) * p;
            }
        }
    }

    // Multiply CHUNKS chunks: `codes` and `planes` of them in the ring, `x` and `sums` of theirs.
    template <bool FIRST, int CHUNKS>
    __device__ __forceinline__ void multiply_chunks(uint32_t codes, uint32_t planes, const uint32_t (&x)[NT],
                                                    int at, uint32_t sums, int strip,
                                                    float (&total)[NT][4]) const {
        constexpr int N = CHUNKS * 2 < BATCH ? CHUNKS * 2 : BATCH;
        uint4 words[(N + 1) / 2];
        uint32_t b[N][NT][4];
        float part[CHAINS][NT][4], ones[NT][4];
#pragma unroll
        for (int pair = 0; pair < CHUNKS * 2; ++pair) {  // of 16 x 16 tiles
            if (pair % N == 0) {
#pragma unroll
                for (int u = 0; u < (N + 1) / 2; ++u)
                    if (pair % 2 == 0) words[u] = load_shared_16(codes + (pair / 2 + u) * UNIT_BYTES + lane * 16);
#pragma unroll
                for (int p = 0; p < N; ++p)
#pragma unroll
                    for (int t = 0; t < NT; ++t)
                        load_matrices(b[p][t], x[t] + at + (pair + p) * (CHUNK_BYTES / 2));
            }
            const uint4 w = words[pair % N / 2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int input = pair * 32 + half * 16;
                if (input % SPAN == 0) clear(part), clear(ones);
                const uint32_t word = pair % 2 ? (half ? w.w : w.z) : (half ? w.y : w.x), next = word >> 8;
                const uint32_t a[4] = {word & 0x000f000f, word & 0x00f000f0, next & 0x000f000f, next & 0x00f000f0};
                constexpr uint32_t one[4] = {0x00010001, 0x00010001, 0x00010001, 0x00010001};
#pragma unroll
                for (int t = 0; t < NT; ++t) {
                    const uint32_t* const x_tile = b[pair % N][t] + half * 2;
                    multiply_add<T>(part[half % CHAINS][t], a, x_tile[0], x_tile[1]);
                    if constexpr (FIRST) multiply_add<T>(ones[t], one, x_tile[0], x_tile[1]);
                }
                if ((input + 16) % SPAN == 0) end<FIRST>(planes, input / SPAN, sums, strip, part, ones, total);
            }
        }
    }
    static __device__ __forceinline__ void clear(float (&part)[CHAINS][NT][4]) {
#pragma unroll
        for (int chain = 0; chain < CHAINS; ++chain) clear(part[chain]);
    }
    static __device__ __forceinline__ void clear(float (&part)[NT][4]) {
#pragma unroll
        for (int t = 0; t < NT; ++t) part[t][0] = part[t][1] = part[t][2] = part[t][3] = 0;
    }

    // Multiply a stage of n chunks, the warp's chunk-th and on; FIRST: its first strip, which also sums x.
    template <bool FIRST>
    __device__ __forceinline__ void multiply(uint32_t slot, const uint32_t (&x)[NT], uint32_t sums, int strip,
                                             int chunk, int n, float (&total)[NT][4]) const {
        constexpr int LEAST = SPAN > CHUNK ? SPAN / CHUNK : 1;
        sums += chunk * CHUNK / SPAN * NT * 32;
        const uint32_t planes = slot + CODE_BYTES;
        if (NT < 8 && n == STAGE)  // more tiles leave no registers to look ahead
            return multiply_chunks<FIRST, STAGE>(slot, planes, x, chunk * CHUNK_BYTES, sums, strip, total);
#pragma unroll 1
        for (int u = 0; u < n; u += LEAST)
            multiply_chunks<FIRST, LEAST>(slot + u * UNIT_BYTES, planes + u * CHUNK / SPAN * STRIP * 2, x,
                                          (chunk + u) * CHUNK_BYTES, sums + u * CHUNK / SPAN * NT * 32, strip,
                                          total);
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
    Int4 reader{packed, scale, zero, shape.chunks, evict_first(), int(threadIdx.x % 32), nullptr, nullptr, false};
    stream_linear(reader, shape, out);
}
