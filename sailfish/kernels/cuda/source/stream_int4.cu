// y = x W^T for few tokens with 4-bit weights: codes become 16-bit floats in registers, and group scales are
// applied to the sums. The layout of W is that of kernels/int4.py.
//
// A code q enters the tensor cores as the bare bits it is: a subnormal float, q or 16 q times the smallest
// one (bits 0 to 7 of a 16-bit float with small exponent are linear even in bfloat16, whose mantissa has 7).
// So a fragment costs one `and`: row g takes the low nibble of a byte, row g + 8 the high one, whose factor
// 16 goes into its scale. bfloat16 activations are scaled up by 2^96, or the products would be subnormal too.
// What each code has too much, its zero, times the sum of the group's activations, is what the group's sum
// starts from, negative: so no weight costs an addition.
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

template <int N>
struct Count {
    static constexpr int value = N;
};

// GROUP 0: one scale for a whole row, applied at its end.
struct Int4 {
    using Sum = float;
    static constexpr int NT = TILES, WN = STRIP_WARPS, WK = CHUNK_WARPS, DEPTH = RING, SPLITS = BLOCK_SPLITS;
    static constexpr int WARPS = WN * WK, THREADS = WARPS * 32, CHUNKS = 4;
    static constexpr int SPAN = GROUP ? GROUP : CHUNK;  // inputs that are summed before scaling
    static constexpr int SPANS = CHUNKS * CHUNK / SPAN;
    static constexpr int CODE_BYTES = CHUNKS * UNIT_BYTES;             // of a warp in a stage
    static constexpr int SCALE_BYTES = GROUP ? SPANS * STRIP * 2 : 0;  // likewise
    // Of a strip in a stage: codes, scales, zeros.
    static constexpr int STRIP_BYTES = WK * (CODE_BYTES + 2 * SCALE_BYTES);
    static constexpr int STAGE_BYTES = WN * STRIP_BYTES;
    // Sums in flight: too few would wait for the tensor cores; chunks in registers: more would spill.
    static constexpr int CHAINS = NT == 1 && SPANS <= 2 ? 2 : 1, BATCH = NT == 1 ? 4 : 2;

    const char* packed;
    const char* scale;
    const char* zero;  // or null
    int units;         // of a strip
    uint64_t policy;
    int lane;

    static __device__ __forceinline__ int sum_bytes(int chunks) { return chunks * CHUNK / SPAN * NT * 32; }
    static __device__ __forceinline__ void prepare_ring(uint32_t) {}
    static __device__ __forceinline__ uint4 prepared(uint4 v) {
#if DTYPE == 0
        uint32_t* const pairs = &v.x;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pairs[i]) : "r"(0x6f806f80), "r"(0x80008000));
#endif
        return v;
    }

    __device__ __forceinline__ void fill(const Copier& copy, uint32_t slot, int strip, int n_strips,
                                         int chunk, int n_chunks) const {
        const int scale_bytes = GROUP ? n_chunks * CHUNK / (GROUP ? GROUP : 1) * STRIP * 2 : 0;
        const int64_t unit = int64_t(strip) * units + chunk;
        const int planes = GROUP == 0 ? 0 : zero ? 2 : 1;
        copy.begin(n_strips * (n_chunks * UNIT_BYTES + planes * scale_bytes));
        copy.runs(n_strips * (1 + planes), [&](int i) {
            const int plane = (i >= n_strips) + (i >= 2 * n_strips);
            i -= plane * n_strips;
            const int64_t from = unit + int64_t(i) * units;
            const uint32_t to = slot + i * STRIP_BYTES;
            if (GROUP == 0 || plane == 0) return Run{to, packed + from * UNIT_BYTES, n_chunks * UNIT_BYTES};
            const int64_t at = from * CHUNK / (GROUP ? GROUP : 1) * (STRIP * 2);
            return Run{to + WK * (CODE_BYTES + (plane - 1) * SCALE_BYTES), (plane == 1 ? scale : zero) + at,
                       scale_bytes};
        });
        copy.end();
    }

    // Sum the activations of each span, times minus a code's UNIT, on the tensor cores.
    __device__ __forceinline__ void sum_activations(const uint32_t (&x)[NT], int chunks, uint32_t sums,
                                                    int warp) const {
        constexpr uint32_t one[4] = {0x00010001, 0x00010001, 0x00010001, 0x00010001};
        const int spans = chunks * CHUNK / SPAN;
#pragma unroll 4
        for (int span = warp; span < spans; span += WARPS)
#pragma unroll
            for (int t = 0; t < NT; ++t) {
                float sum[2][4] = {};
#pragma unroll
                for (int pair = 0; pair < SPAN / 32; ++pair) {
                    uint32_t b[4];
                    load_matrices(b, x[t] + (span * (SPAN / 32) + pair) * (CHUNK_BYTES / 2));
                    multiply_add<T>(sum[0], one, b[0], b[1]);
                    multiply_add<T>(sum[1], one, b[2], b[3]);
                }
                if (lane < 4)
                    asm volatile(
                        "st.shared.v2.f32 [%0], {%1, %2};" ::"r"(sums + (span * NT + t) * 32 + lane * 8),
                        "f"(-sum[0][0] - sum[1][0]), "f"(-sum[0][1] - sum[1][1])
                        : "memory");
            }
        barrier_of_warps(THREADS);
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

    // What a span's codes will have too much, its zero times the sum of x, negative: where its sum starts.
    __device__ __forceinline__ void begin(uint32_t planes, int span, uint32_t sums, int strip,
                                          float (&part)[NT][4], float2& factor) const {
        float2 middle{MIDDLE, MIDDLE};
        if (zero) middle = GROUP ? rows_of(planes + WK * SCALE_BYTES, span) : rows_of(zero, strip);
        factor = {1.f, 1.f};
        if constexpr (GROUP != 0) factor = rows_of(planes, span);
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            float2 sum;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(sum.x), "=f"(sum.y)
                         : "r"(sums + (span * NT + t) * 32 + lane % 4 * 8)
                         : "memory");
            part[t][0] = middle.x * sum.x, part[t][1] = middle.x * sum.y;
            part[t][2] = 16 * middle.y * sum.x, part[t][3] = 16 * middle.y * sum.y;
        }
    }

    static __device__ __forceinline__ uint32_t word_of(uint4 v, int i) {
        return i < 2 ? (i == 0 ? v.x : v.y) : (i == 2 ? v.z : v.w);
    }

    // Multiply N chunks: `codes`, `planes`, `x` and `sums` are where theirs begin.
    template <int N>
    __device__ __forceinline__ void multiply_chunks(uint32_t codes, uint32_t planes, const uint32_t (&x)[NT],
                                                    int at, uint32_t sums, int strip,
                                                    float (&total)[NT][4]) const {
        constexpr int HERE = N * CHUNK / SPAN;      // spans
        constexpr int PAIRS = SPAN / 32;            // of 16 x 16 tiles in each
        constexpr int AHEAD = NT == 1 ? PAIRS : 1;  // pairs whose x is loaded at once
        uint4 words[N];
        uint32_t b[HERE][AHEAD][NT][4];
        float part[HERE][CHAINS][NT][4];
        float2 factor[HERE];
#pragma unroll
        for (int u = 0; u < N; ++u) words[u] = load_shared_16(codes + u * UNIT_BYTES + lane * 16);
#pragma unroll
        for (int span = 0; span < HERE; ++span) {
            begin(planes, span, sums, strip, part[span][0], factor[span]);
#pragma unroll
            for (int chain = 1; chain < CHAINS; ++chain)
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) part[span][chain][t][i] = 0;
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            if (pair % AHEAD == 0) {
#pragma unroll
                for (int p = 0; p < AHEAD; ++p)
#pragma unroll
                    for (int span = 0; span < HERE; ++span)
#pragma unroll
                        for (int t = 0; t < NT; ++t)
                            load_matrices(b[span][p][t],
                                          x[t] + at + (span * PAIRS + pair + p) * (CHUNK_BYTES / 2));
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int span = 0; span < HERE; ++span) {  // one after the other: none waits for its own sum
                    const int tile = (span * PAIRS + pair) * 2 + half;
                    const uint32_t word = word_of(words[tile / 4], tile % 4), next = word >> 8;
                    const uint32_t a[4] = {word & 0x000f000f, word & 0x00f000f0, next & 0x000f000f,
                                           next & 0x00f000f0};
#pragma unroll
                    for (int t = 0; t < NT; ++t)
                        multiply_add<T>(part[span][half % CHAINS][t], a, b[span][pair % AHEAD][t][half * 2],
                                        b[span][pair % AHEAD][t][half * 2 + 1]);
                }
        }
#pragma unroll
        for (int span = 0; span < HERE; ++span)
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float sum = part[span][0][t][i];
                    if constexpr (CHAINS == 2) sum += part[span][1][t][i];
                    total[t][i] += (i < 2 ? factor[span].x : factor[span].y) * sum;
                }
    }

    // Multiply n chunks, the block's chunk-th and on, with the weights of warp (wn, wk) in the stage.
    __device__ __forceinline__ void multiply(uint32_t stage, int wn, int wk, const uint32_t (&x)[NT],
                                             uint32_t sums, int strip, int chunk, int n,
                                             float (&total)[NT][4]) const {
        constexpr int LEAST = SPAN > CHUNK ? SPAN / CHUNK : 1, MOST = BATCH > LEAST ? BATCH : LEAST;
        uint32_t codes = stage + wn * STRIP_BYTES + wk * CODE_BYTES;
        uint32_t planes = stage + wn * STRIP_BYTES + WK * CODE_BYTES + wk * SCALE_BYTES;
        int at = chunk * CHUNK_BYTES;
        sums += chunk * CHUNK / SPAN * NT * 32;
        const auto some = [&](auto count) {
            constexpr int N = decltype(count)::value;
            multiply_chunks<N>(codes, planes, x, at, sums, strip, total);
            codes += N * UNIT_BYTES, at += N * CHUNK_BYTES;
            planes += N * CHUNK / SPAN * STRIP * 2, sums += N * CHUNK / SPAN * NT * 32;
        };
        if (n == CHUNKS) {
#pragma unroll
            for (int i = 0; i < CHUNKS; i += MOST) some(Count<MOST>());
        } else {
#pragma unroll 1
            for (int i = 0; i < n; i += LEAST) some(Count<LEAST>());
        }
    }

    // Rows g + 8 had codes 16-fold.
    __device__ __forceinline__ void finish(int strip, float (&total)[NT][4]) const {
        float2 factor{1.f, 1.f};
        if constexpr (GROUP == 0) factor = rows_of(scale, strip);
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                total[t][i] *= i < 2 ? factor.x * (1 / UNIT) : factor.y * (1 / UNIT / 16);
    }
};

extern "C" __global__ void __launch_bounds__(Int4::THREADS + 32, BLOCKS_PER_PROCESSOR)
    stream_int4(Shape shape, SumNorm norm, Output<T> out, const char* packed, const char* scale, const char* zero) {
    const Int4 reader{packed, scale, zero, shape.chunks, evict_first(), int(threadIdx.x % 32)};
    stream_linear(reader, shape, norm, out);
}
