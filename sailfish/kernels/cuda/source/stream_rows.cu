// y = x W^T for few tokens with weights that lie row by row, as in a checkpoint: 16-bit floats, or 8-bit
// integers and floats (e4m3) with activations of the same kind, one scale a token and one an output.
//
// A chunk of 128 bytes of inputs means the same fragments in all formats: ldmatrix moves bytes, and only the
// product differs.
#include "stream.cuh"

#if DTYPE == 16
using T = f16;
#else
using T = bf16;
#endif

#define PLAIN 0
#define INT8 1
#define FP8 2

struct Rows {
#if FORMAT == INT8
    using Sum = int;
#else
    using Sum = float;
#endif
    static constexpr int NT = TILES, WN = STRIP_WARPS, WK = CHUNK_WARPS, DEPTH = RING, SPLITS = BLOCK_SPLITS;
    static constexpr int WARPS = WN * WK, THREADS = WARPS * 32, CHUNKS = 2;
    static constexpr int PITCH = WK * CHUNKS * CHUNK_BYTES + 16;  // rows start 4 banks apart
    static constexpr int STRIP_BYTES = STRIP * PITCH, STAGE_BYTES = WN * STRIP_BYTES;
    static constexpr int CHAINS = NT == 1 ? 2 : 1;  // sums in flight: one would wait for the tensor cores

    const char* weight;
    int row_bytes;
    int last_row;
    uint64_t policy;
    int lane;

    static __device__ __forceinline__ int sum_bytes(int) { return 0; }
    static __device__ __forceinline__ uint4 prepared(uint4 v) { return v; }
    __device__ __forceinline__ void sum_activations(const uint32_t (&)[NT], int, uint32_t, int) const {}
    __device__ __forceinline__ void finish(int, Sum (&total)[NT][4]) const {
#if FORMAT == FP8 && __CUDA_ARCH__ < 890
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) total[t][i] *= 0x1p16f;  // see halves_of
#endif
    }

    // What lies beyond the end of a row is multiplied by zeros, and must be a number.
    __device__ __forceinline__ void prepare_ring(uint32_t ring) const {
        if (row_bytes % CHUNK_BYTES == 0) return;
        for (int at = threadIdx.x * 16; at < DEPTH * STAGE_BYTES; at += (THREADS + 32) * 16)
            store_shared_16(ring + at, {0, 0, 0, 0});
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    }

    __device__ __forceinline__ void fill(const Copier& copy, uint32_t slot, int strip, int n_strips,
                                         int chunk, int n_chunks) const {
        const int at = chunk * CHUNK_BYTES, bytes = min(n_chunks * CHUNK_BYTES, row_bytes - at);
        copy.begin(n_strips * STRIP * bytes);
        copy.runs(n_strips * STRIP, [&](int i) {
            const char* const row = weight + int64_t(min(strip * STRIP + i, last_row)) * row_bytes;
            return Run{slot + i / STRIP * STRIP_BYTES + i % STRIP * PITCH, row + at, bytes};
        });
        copy.end();
    }

    // Four e4m3 as two pairs of f16, each value times 2^-8, exactly.
    static __device__ __forceinline__ void halves_of(uint32_t bytes, uint32_t& low, uint32_t& high) {
        low = __byte_perm(bytes, 0, 0x1404), high = __byte_perm(bytes, 0, 0x3424);
        low = (low & 0x80008000) | (low & 0x7f007f00) >> 1;
        high = (high & 0x80008000) | (high & 0x7f007f00) >> 1;
    }

    static __device__ __forceinline__ void add(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
#if FORMAT == PLAIN
        multiply_add<T>(c, a, b0, b1);
#elif FORMAT == INT8
        multiply_add_s8(c, a, b0, b1);
#elif __CUDA_ARCH__ >= 890
        multiply_add_e4m3(c, a, b0, b1);
#else
        uint32_t first[4], second[4], x[2][2];
        halves_of(a[0], first[0], first[2]), halves_of(a[1], first[1], first[3]);
        halves_of(a[2], second[0], second[2]), halves_of(a[3], second[1], second[3]);
        halves_of(b0, x[0][0], x[0][1]), halves_of(b1, x[1][0], x[1][1]);
        multiply_add<f16>(c, first, x[0][0], x[0][1]);
        multiply_add<f16>(c, second, x[1][0], x[1][1]);
#endif
    }

    // Multiply n chunks, the block's chunk-th and on, with the weights of warp (wn, wk) in the stage.
    __device__ __forceinline__ void multiply(uint32_t stage, int wn, int wk, const uint32_t (&x)[NT],
                                             uint32_t, int, int chunk, int n, Sum (&total)[NT][4]) const {
        const uint32_t from =
            stage + wn * STRIP_BYTES + lane % 16 * PITCH + wk * CHUNKS * CHUNK_BYTES + lane / 16 * 16;
        Sum other[NT][4] = {};
#pragma unroll
        for (int u = 0; u < CHUNKS; ++u) {
            if (u >= n) break;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                uint32_t b[NT][4];
#pragma unroll
                for (int t = 0; t < NT; ++t)
                    load_matrices(b[t], x[t] + (chunk + u) * CHUNK_BYTES + pair * 64);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t a[4];
                    load_matrices(a, from + u * CHUNK_BYTES + pair * 64 + half * 32);
#pragma unroll
                    for (int t = 0; t < NT; ++t)
                        add(half % CHAINS ? other[t] : total[t], a, b[t][half * 2], b[t][half * 2 + 1]);
                }
            }
        }
        if constexpr (CHAINS == 2)
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[t][i] += other[t][i];
    }
};

extern "C" __global__ void __launch_bounds__(Rows::THREADS + 32, BLOCKS_PER_PROCESSOR)
    stream_rows(Shape shape, SumNorm norm, Output<T> out, const char* weight) {
    const Rows reader{weight, shape.row_bytes, shape.n_out - 1, evict_first(), int(threadIdx.x % 32)};
    stream_linear(reader, shape, norm, out);
}
