// The streaming skeleton of y = x W^T for few tokens: every warp streams its own runs of weights through its
// own ring in shared memory into the tensor cores, with no barrier in the loop. A reader (see stream_*.cu)
// says what a stage of weights is and multiplies it.
//
// W is the A operand (16 outputs a strip), x the B operand (8 tokens a tile). The inputs are cut into chunks
// of 128 bytes of an activation row. A block takes some strips and one of `splits` ranges of chunks, which
// its WK warp columns divide again; what several warps or blocks summed of one output is added up at the end,
// always in the same order.
#pragma once
#include "base.cuh"

constexpr int STRIP = 16;
constexpr int CHUNK_BYTES = 128;
constexpr int X_PAD_BYTES = 16;  // rows of x start 4 banks apart: ldmatrix meets no conflict

struct Shape {
    const void* x;
    int n_tokens;
    int row_bytes;  // of x
    int n_out;
    int strips;
    int chunks;
    int quantum;  // chunks that no boundary of a split may cut
    int splits;
    int strips_per_block;
};

template <class T>
struct Output {
    T* y;
    const T* bias;             // or null
    const T* residual;         // or null; laid out as y
    const float* row_scale;    // or null; of each output
    const float* token_scale;  // or null
    float* workspace;          // partial sums of the splits, where blocks form no clusters
    int* arrived;              // zeros; blocks that have delivered, for each column of blocks
};

// ---- tensor cores ---------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t* r, uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

#define SAILFISH_MMA(SHAPE_AND_TYPES, CONSTRAINT)                                                            \
    asm("mma.sync.aligned." SHAPE_AND_TYPES                                                         \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
        : "+" CONSTRAINT(c[0]), "+" CONSTRAINT(c[1]), "+" CONSTRAINT(c[2]), "+" CONSTRAINT(c[3])             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c += a b for 16 outputs x 8 tokens and 32 bytes of inputs.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
    SAILFISH_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "f");
}
template <>
__device__ __forceinline__ void multiply_add<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    SAILFISH_MMA("m16n8k16.row.col.f32.f16.f16.f32", "f");
}
__device__ __forceinline__ void multiply_add_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    SAILFISH_MMA("m16n8k32.row.col.s32.s8.s8.s32", "r");
}
__device__ __forceinline__ void multiply_add_e4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
#if __CUDA_ARCH__ >= 890
    SAILFISH_MMA("m16n8k32.row.col.f32.e4m3.e4m3.f32", "f");
#endif
}

// ---- copies of weights ----------------------------------------------------------------------------

// A read-once stream must not push activations and KV out of L2.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void stream_16(uint32_t shared, const void* global, int valid_bytes, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
                 "r"(valid_bytes), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t shared) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared_16(uint32_t shared, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ---- clusters -------------------------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ uint32_t load_cluster(uint32_t shared, int rank) {
    uint32_t address, value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
#endif

// ---- the skeleton ---------------------------------------------------------------------------------

__device__ __forceinline__ float bits_as(uint32_t bits, float) { return __uint_as_float(bits); }
__device__ __forceinline__ int bits_as(uint32_t bits, int) { return int(bits); }

template <class T>
__device__ __forceinline__ void store_output(const Shape& shape, const Output<T>& out, int row, int token, float v) {
    if (out.row_scale) v *= out.token_scale[token] * out.row_scale[row];
    if (out.bias) v += to_float(out.bias[row]);
    const int64_t at = int64_t(token) * shape.n_out + row;
    if (out.residual) v = to_float(from_float<T>(v)) + to_float(out.residual[at]);
    out.y[at] = from_float<T>(v);
}

// Copy the block's range of every row of x to shared memory, zeros beyond its end, and let the reader sum it.
template <class Reader>
__device__ __forceinline__ void load_activations(const Reader& reader, const Shape& shape, int first_chunk,
                                                 int n_chunks, uint32_t x_shared, float* sums) {
    const int per_row = n_chunks * (CHUNK_BYTES / 16);
    const int pitch = n_chunks * CHUNK_BYTES + X_PAD_BYTES;
    const int total = per_row * shape.n_tokens;
    const char* x = static_cast<const char*>(shape.x) + int64_t(first_chunk) * CHUNK_BYTES;
    const int left = shape.row_bytes - first_chunk * CHUNK_BYTES;
    constexpr int AT_ONCE = 4;
    int token = threadIdx.x / per_row, at = threadIdx.x % per_row;
    for (int first = 0; first < total; first += AT_ONCE * Reader::THREADS) {
        uint4 v[AT_ONCE];
        int tokens[AT_ONCE], ats[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            v[j] = {0, 0, 0, 0}, tokens[j] = token, ats[j] = at;
            if (token < shape.n_tokens && at * 16 < left)
                v[j] = *reinterpret_cast<const uint4*>(x + int64_t(token) * shape.row_bytes + at * 16);
            for (at += Reader::THREADS; at >= per_row; at -= per_row) ++token;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const bool valid = tokens[j] < shape.n_tokens;
            reader.take(v[j], valid, ats[j], tokens[j], sums);
            if (valid) store_shared_16(x_shared + tokens[j] * pitch + ats[j] * 16, v[j]);
        }
    }
}

// Add up what the warps, and the blocks of one column, have summed, and store it.
template <class Reader, class T>
__device__ __forceinline__ void reduce(const Shape& shape, const Output<T>& out, typename Reader::Sum* partial,
                                       int split, int column, int first_strip, int n_strips) {
    using Sum = typename Reader::Sum;
    constexpr int TOKENS = Reader::NT * 8;
    const int rows = n_strips * STRIP, total = rows * shape.n_tokens;
    const int slab = shape.strips_per_block * STRIP * TOKENS;  // sums of one warp column
#if __CUDA_ARCH__ >= 900
    if (shape.splits > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    for (int i = split * Reader::THREADS + threadIdx.x; i < total; i += shape.splits * Reader::THREADS) {
        const int row = i % rows, token = i / rows;
        if (first_strip * STRIP + row >= shape.n_out) continue;
        Sum sum = 0;
        for (int source = 0; source < shape.splits; ++source)
#pragma unroll
            for (int wk = 0; wk < Reader::WK; ++wk) {
                Sum* const at = partial + wk * slab + row * TOKENS + token;
                sum += shape.splits > 1 ? bits_as(load_cluster(shared_address(at), source), Sum()) : *at;
            }
        store_output(shape, out, first_strip * STRIP + row, token, float(sum));
    }
    if (shape.splits > 1) {  // stay until the others have read
        cluster_arrive();
        cluster_wait();
    }
#else
    __shared__ bool is_last;
    Sum* const slabs = reinterpret_cast<Sum*>(out.workspace) + int64_t(column) * shape.splits * slab;
    __syncthreads();
    for (int i = threadIdx.x; i < total; i += Reader::THREADS) {
        const int row = i % rows, token = i / rows;
        Sum sum = 0;
#pragma unroll
        for (int wk = 0; wk < Reader::WK; ++wk) sum += partial[wk * slab + row * TOKENS + token];
        if (shape.splits > 1)
            slabs[split * slab + i] = sum;
        else if (first_strip * STRIP + row < shape.n_out)
            store_output(shape, out, first_strip * STRIP + row, token, float(sum));
    }
    if (shape.splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(out.arrived + column, 1) == shape.splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int i = threadIdx.x; i < total; i += Reader::THREADS) {
        const int row = i % rows, token = i / rows;
        if (first_strip * STRIP + row >= shape.n_out) continue;
        Sum sum = 0;
        for (int source = 0; source < shape.splits; ++source) sum += __ldcg(slabs + source * slab + i);
        store_output(shape, out, first_strip * STRIP + row, token, float(sum));
    }
    if (threadIdx.x == 0) out.arrived[column] = 0;
#endif
}

template <class Reader, class T>
__device__ __forceinline__ void stream_linear(Reader& reader, const Shape& shape, const Output<T>& out) {
    using Sum = typename Reader::Sum;
    constexpr int NT = Reader::NT, WK = Reader::WK, WN = Reader::WARPS / WK, DEPTH = Reader::DEPTH;
    constexpr int STAGE = Reader::STAGE, TOKENS = NT * 8;
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wk = warp % WK, wn = warp / WK;
    const int split = blockIdx.x % shape.splits, column = blockIdx.x / shape.splits;
    const int first_strip = column * shape.strips_per_block;
    const int last_strip = min(first_strip + shape.strips_per_block, shape.strips);
    if (first_strip >= last_strip) {  // hold the place, or the next kernel puts two blocks on this processor
        let_next_begin();
        wait_for_previous();
        return;
    }
    const int quanta = (shape.chunks + shape.quantum - 1) / shape.quantum, parts = shape.splits * WK;
    const auto boundary = [&](int part) { return min(quanta * part / parts * shape.quantum, shape.chunks); };
    const int block_begin = boundary(split * WK), block_chunks = boundary(split * WK + WK) - block_begin;
    const int begin = boundary(split * WK + wk), end = boundary(split * WK + wk + 1);

    const uint32_t ring = shared_address(shared) + warp * DEPTH * Reader::STAGE_BYTES;
    const int pitch = block_chunks * CHUNK_BYTES + X_PAD_BYTES;
    const int n_partial = parts == 1 ? 0 : WK * shape.strips_per_block * STRIP * TOKENS;
    Sum* const partial = reinterpret_cast<Sum*>(shared + Reader::WARPS * DEPTH * Reader::STAGE_BYTES);
    float* const sums = reinterpret_cast<float*>(partial + n_partial);
    const uint32_t x_shared = shared_address(sums) + Reader::sum_bytes(block_chunks);

    int next_strip = begin < end ? first_strip + wn : last_strip, left = end - begin;  // to be copied
    reader.seek(next_strip, begin);
    const auto fill = [&](uint32_t slot) {
        if (next_strip < last_strip) {
            reader.fill(slot, min(STAGE, left));
            left -= STAGE;
            if (left <= 0) {
                next_strip += WN, left = end - begin;
                reader.seek(next_strip, begin);
            }
        }
        copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < DEPTH; ++i) fill(ring + i * Reader::STAGE_BYTES);
    let_next_begin();
    wait_for_previous();
    load_activations(reader, shape, block_begin, block_chunks, x_shared, sums);
    __syncthreads();

    uint32_t x_lane[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n)
        x_lane[n] = x_shared + min(n * 8 + lane % 8, shape.n_tokens - 1) * pitch + lane / 8 * 16;
    const bool whole = parts == 1;
    uint32_t slot = ring;
#pragma unroll 1
    for (int strip = first_strip + wn; strip < last_strip; strip += WN) {
        Sum total[NT][4] = {};
#pragma unroll 1
        for (int chunk = begin; chunk < end; chunk += STAGE) {
            copy_wait<DEPTH - 1>();
            __syncwarp();
            reader.multiply(slot, x_lane, sums, strip, chunk - block_begin,
                            min(STAGE, end - chunk), total);
            __syncwarp();
            fill(slot);
            slot += Reader::STAGE_BYTES;
            if (slot == ring + DEPTH * Reader::STAGE_BYTES) slot = ring;
        }
        reader.finish(strip, total);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, token = n * 8 + lane % 4 * 2 + i % 2;
                if (!whole)
                    partial[((strip - first_strip) * STRIP + row) * TOKENS + token + wk * shape.strips_per_block * STRIP * TOKENS] =
                        total[n][i];
                else if (token < shape.n_tokens && strip * STRIP + row < shape.n_out)
                    store_output(shape, out, strip * STRIP + row, token, float(total[n][i]));
            }
    }
    if (!whole) reduce<Reader>(shape, out, partial, split, column, first_strip, last_strip - first_strip);
}
