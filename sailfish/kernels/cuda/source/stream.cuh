// The streaming skeleton of y = x W^T for few tokens: every warp streams its own runs of weights through its
// own ring in shared memory into the tensor cores, with no barrier in the loop. A reader (see stream_*.cu)
// says what a stage of weights is and multiplies it.
//
// W is the A operand (16 outputs a strip), x the B operand (8 tokens a tile). The inputs are cut into chunks
// of 128 bytes of an activation row. A block takes some strips and one of SPLITS ranges of chunks, which its WK
// warp columns divide again; what several warps or blocks summed of one output is added up at the end, always
// in the same order.
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
    int quantum;           // chunks that no boundary of a split may cut
    int part_chunks;       // the most that a warp multiplies of a strip
    int strips_per_block;  // the most
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

// ---- clusters: sums travel as stores that the receiver's barrier counts, so nobody fences ----------

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int phase) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier), "r"(phase)
        : "memory");
}
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t address_in(uint32_t shared, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}
__device__ __forceinline__ void send(uint32_t to, uint32_t low, uint32_t high, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "r"(low), "r"(high), "r"(barrier)
                 : "memory");
}
#endif

// ---- the skeleton ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(int x) { return uint32_t(x); }

template <class T>
__device__ __forceinline__ void store_output(const Shape& shape, const Output<T>& out, int row, int token, float v) {
    if (row >= shape.n_out || token >= shape.n_tokens) return;
    if (out.row_scale) v *= out.token_scale[token] * out.row_scale[row];
    if (out.bias) v += to_float(out.bias[row]);
    const int64_t at = int64_t(token) * shape.n_out + row;
    if (out.residual) v = to_float(from_float<T>(v)) + to_float(out.residual[at]);
    out.y[at] = from_float<T>(v);
}

// Copy the block's range of every row of x to shared memory, as the reader wants it, zeros beyond its end.
template <class Reader>
__device__ __forceinline__ void load_activations(const Shape& shape, int first_chunk, int n_chunks,
                                                 uint32_t x_shared) {
    constexpr int AT_ONCE = 8, PIECES = AT_ONCE * 32;  // of 16 bytes; what a warp loads in one go
    const int per_row = n_chunks * (CHUNK_BYTES / 16), gos = (per_row + PIECES - 1) / PIECES;
    const int valid = min(per_row, (shape.row_bytes - first_chunk * CHUNK_BYTES) / 16);
    const int pitch = n_chunks * CHUNK_BYTES + X_PAD_BYTES;
    const uint4* x = static_cast<const uint4*>(shape.x) + first_chunk * (CHUNK_BYTES / 16);
    for (int go = threadIdx.x / 32; go < shape.n_tokens * gos; go += Reader::WARPS) {
        const int token = go / gos, first = go % gos * PIECES + threadIdx.x % 32;
        const uint4* const from = x + int64_t(token) * (shape.row_bytes / 16) + first;
        const uint32_t to = x_shared + token * pitch + first * 16;
        uint4 v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            v[j] = {0, 0, 0, 0};
            if (first + j * 32 < valid) v[j] = from[j * 32];
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (first + j * 32 < per_row) store_shared_16(to + j * 512, Reader::prepared(v[j]));
    }
}

// Sums of the block's strips meet in the block that owns a strip: strip i of a column in block i % OWNERS.
template <class Reader>
struct Meeting {
    using Sum = typename Reader::Sum;
    static constexpr int TOKENS = Reader::NT * 8, WK = Reader::WK;
    static constexpr bool CLUSTER = __CUDA_ARCH__ >= 900 && Reader::SPLITS > 1;
    static constexpr int OWNERS = CLUSTER ? Reader::SPLITS : 1, SOURCES = OWNERS * WK;
    static constexpr bool NEEDED = Reader::SPLITS * WK > 1;
    static constexpr int STRIP_BYTES = STRIP * TOKENS * 4;

    uint32_t partial;  // [SOURCES][slots][STRIP][TOKENS]
    uint32_t barrier;
    int slots;
    int rank, source;

    static __device__ __forceinline__ int bytes(int strips_per_block) {
        return NEEDED ? SOURCES * ((strips_per_block + OWNERS - 1) / OWNERS) * STRIP_BYTES : 0;
    }
    __device__ __forceinline__ int owned(int n_strips) const { return (n_strips - rank + OWNERS - 1) / OWNERS; }

    __device__ __forceinline__ void open(int n_strips) const {
#if __CUDA_ARCH__ >= 900
        if constexpr (CLUSTER) {
            if (threadIdx.x == 0) {
                barrier_init(barrier, 1);
                barrier_expect(barrier, owned(n_strips) * SOURCES * STRIP_BYTES);
            }
            cluster_arrive();
        }
#endif
    }
    // Before the first delivery: the others have opened theirs.
    __device__ __forceinline__ void join() const {
#if __CUDA_ARCH__ >= 900
        if constexpr (CLUSTER) cluster_wait();
#endif
    }
    __device__ __forceinline__ void deliver(int strip, const Sum (&total)[Reader::NT][4]) const {
        const int lane = threadIdx.x % 32;
        const uint32_t at = partial + (source * slots + strip / OWNERS) * STRIP_BYTES +
                            (lane / 4 * TOKENS + lane % 4 * 2) * 4;
#if __CUDA_ARCH__ >= 900
        if constexpr (CLUSTER) {
            const uint32_t to = address_in(at, strip % OWNERS), there = address_in(barrier, strip % OWNERS);
#pragma unroll
            for (int t = 0; t < Reader::NT; ++t) {
                send(to + t * 32, bits_of(total[t][0]), bits_of(total[t][1]), there);
                send(to + t * 32 + 8 * TOKENS * 4, bits_of(total[t][2]), bits_of(total[t][3]), there);
            }
            return;
        }
#endif
#pragma unroll
        for (int t = 0; t < Reader::NT; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at + t * 32 + half * 8 * TOKENS * 4),
                             "r"(bits_of(total[t][half * 2])), "r"(bits_of(total[t][half * 2 + 1]))
                             : "memory");
    }
    // Four sums of neighbouring tokens, of all sources.
    __device__ __forceinline__ void collect(int quad, Sum (&sum)[4]) const {
        uint4 v[SOURCES];
#pragma unroll
        for (int s = 0; s < SOURCES; ++s) v[s] = load_shared_16(partial + s * slots * STRIP_BYTES + quad * 16);
#pragma unroll
        for (int s = 0; s < SOURCES; ++s) {
            const Sum* const from = reinterpret_cast<const Sum*>(&v[s]);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = s == 0 ? from[i] : sum[i] + from[i];
        }
    }
    __device__ __forceinline__ void close() const {
#if __CUDA_ARCH__ >= 900
        if constexpr (CLUSTER) return barrier_wait(barrier, 0);
#endif
        __syncthreads();
    }
};

// Add up what all warps and blocks delivered, and store it.
template <class Reader, class T>
__device__ __forceinline__ void reduce(const Meeting<Reader>& meeting, const Shape& shape, const Output<T>& out,
                                       int column, int first_strip, int n_strips) {
    using Sum = typename Reader::Sum;
    using Here = Meeting<Reader>;
    constexpr int QUADS = Here::TOKENS / 4, STRIP_QUADS = STRIP * QUADS;
    const int total = meeting.owned(n_strips) * STRIP_QUADS;
    const auto store = [&](int quad, const Sum(&sum)[4]) {
        const int strip = first_strip + quad / STRIP_QUADS * Here::OWNERS + meeting.rank;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            store_output(shape, out, strip * STRIP + quad % STRIP_QUADS / QUADS, quad % QUADS * 4 + i, float(sum[i]));
    };
    meeting.close();
    if constexpr (Reader::SPLITS == Here::OWNERS) {
        for (int quad = threadIdx.x; quad < total; quad += Reader::THREADS) {
            Sum sum[4];
            meeting.collect(quad, sum);
            store(quad, sum);
        }
    } else {  // no clusters: the block that arrives last adds up the column
        __shared__ bool is_last;
        const int slab = shape.strips_per_block * STRIP_QUADS * 4;
        Sum* const slabs = reinterpret_cast<Sum*>(out.workspace) + int64_t(column) * Reader::SPLITS * slab;
        for (int quad = threadIdx.x; quad < total; quad += Reader::THREADS) {
            Sum sum[4];
            meeting.collect(quad, sum);
#pragma unroll
            for (int i = 0; i < 4; ++i) slabs[blockIdx.x % Reader::SPLITS * slab + quad * 4 + i] = sum[i];
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicAdd(out.arrived + column, 1) == Reader::SPLITS - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int quad = threadIdx.x; quad < total; quad += Reader::THREADS) {
            Sum sum[4] = {};
#pragma unroll
            for (int s = 0; s < Reader::SPLITS; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] += __ldcg(slabs + s * slab + quad * 4 + i);
            store(quad, sum);
        }
        if (threadIdx.x == 0) out.arrived[column] = 0;
    }
}

template <class Reader, class T>
__device__ __forceinline__ void stream_linear(Reader& reader, const Shape& shape, const Output<T>& out) {
    using Sum = typename Reader::Sum;
    constexpr int NT = Reader::NT, WK = Reader::WK, WN = Reader::WARPS / WK, DEPTH = Reader::DEPTH;
    constexpr int STAGE = Reader::STAGE, STAGE_BYTES = Reader::STAGE_BYTES, SPLITS = Reader::SPLITS;
    constexpr int PARTS = SPLITS * WK, HEAD_BYTES = 16;
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wk = warp % WK, wn = warp / WK;
    const int split = blockIdx.x % SPLITS, column = blockIdx.x / SPLITS, columns = gridDim.x / SPLITS;
    const int first_strip = int(int64_t(shape.strips) * column / columns);
    const int n_strips = int(int64_t(shape.strips) * (column + 1) / columns) - first_strip;
    const int quanta = (shape.chunks + shape.quantum - 1) / shape.quantum;
    const auto boundary = [&](int part) { return min(quanta * part / PARTS * shape.quantum, shape.chunks); };
    const int block_begin = boundary(split * WK), block_chunks = boundary(split * WK + WK) - block_begin;
    const int begin = boundary(split * WK + wk), end = boundary(split * WK + wk + 1);

    const uint32_t ring = shared_address(shared) + HEAD_BYTES + warp * DEPTH * STAGE_BYTES;
    const uint32_t behind_rings = shared_address(shared) + HEAD_BYTES + Reader::WARPS * DEPTH * STAGE_BYTES;
    const int slots = (shape.strips_per_block + Meeting<Reader>::OWNERS - 1) / Meeting<Reader>::OWNERS;
    const Meeting<Reader> meeting{behind_rings, shared_address(shared), slots,
                                  Meeting<Reader>::CLUSTER ? split : 0, Meeting<Reader>::CLUSTER ? split * WK + wk : wk};
    const uint32_t behind_partial = behind_rings + Meeting<Reader>::bytes(shape.strips_per_block);
    const uint32_t sums = behind_partial + warp * Reader::sum_bytes(shape.part_chunks);
    const uint32_t x_shared = behind_partial + Reader::WARPS * Reader::sum_bytes(shape.part_chunks);
    const int pitch = block_chunks * CHUNK_BYTES + X_PAD_BYTES;

    meeting.open(n_strips);
    int next_strip = begin < end ? wn : n_strips, left = end - begin;  // to be copied
    reader.seek(first_strip + next_strip, begin);
    const auto fill = [&](uint32_t slot) {
        if (next_strip < n_strips) {
            reader.fill(slot, min(STAGE, left));
            left -= STAGE;
            if (left <= 0) {
                next_strip += WN, left = end - begin;
                reader.seek(first_strip + next_strip, begin);
            }
        }
        copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < DEPTH; ++i) fill(ring + i * STAGE_BYTES);
    wait_for_previous();
    // Not earlier: then the next kernel finds one block of ours on each processor, and lands evenly.
    let_next_begin();
    load_activations<Reader>(shape, block_begin, block_chunks, x_shared);
    __syncthreads();

    uint32_t x_lane[NT];
#pragma unroll
    for (int t = 0; t < NT; ++t)
        x_lane[t] = x_shared + min(t * 8 + lane % 8, shape.n_tokens - 1) * pitch + lane / 8 * 16 +
                    (begin - block_begin) * CHUNK_BYTES;
    uint32_t slot = ring;
#pragma unroll 1
    for (int strip = wn; strip < n_strips; strip += WN) {
        Sum total[NT][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < end - begin; chunk += STAGE) {
            copy_wait<DEPTH - 1>();
            __syncwarp();
            const int n = min(STAGE, end - begin - chunk);
            if (strip == wn)
                reader.template multiply<true>(slot, x_lane, sums, first_strip + strip, chunk, n, total);
            else
                reader.template multiply<false>(slot, x_lane, sums, first_strip + strip, chunk, n, total);
            __syncwarp();
            fill(slot);
            slot += STAGE_BYTES;
            if (slot == ring + DEPTH * STAGE_BYTES) slot = ring;
        }
        reader.finish(first_strip + strip, total);
        if constexpr (Meeting<Reader>::NEEDED) {
            if (strip == wn) meeting.join();
            meeting.deliver(strip, total);
        } else {
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    store_output(shape, out, (first_strip + strip) * STRIP + lane / 4 + i / 2 * 8,
                                 t * 8 + lane % 4 * 2 + i % 2, float(total[t][i]));
        }
    }
    if constexpr (Meeting<Reader>::NEEDED) {
        if (wn >= n_strips) meeting.join();
        reduce(meeting, shape, out, column, first_strip, n_strips);
    }
}
