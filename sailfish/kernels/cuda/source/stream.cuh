// The streaming skeleton of y = x W^T for few tokens: one warp streams weights through a ring in shared
// memory, the others feed them to the tensor cores, and no barrier of the block stands in the loop. A reader
// (see stream_*.cu) says what a stage of weights is and multiplies it.
//
// W is the A operand (16 outputs a strip), x the B operand (8 tokens a tile). The inputs are cut into chunks
// of 128 bytes of an activation row. A block takes some strips and one of SPLITS ranges of chunks; a stage
// holds WK * CHUNKS chunks of WN strips, and each of the WN x WK warps multiplies CHUNKS of them. What
// several warps or blocks summed of one output is added up at the end, always in the same order.
//
// ACTIVATION: what is stored is activation(gate) * up, of outputs that alternate by eights. NORM: x is made of
// the norm's inputs first; so many groups of 256 of them go through a warp's registers.
#pragma once
#include "gate.cuh"
#include "stream_ops.cuh"

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
    int block_chunks;      // the most
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

// x is rms_norm(x + residual) * (weight + shift): the width is a multiple of 256.
struct SumNorm {
    const void* residual;
    const void* weight;
    void* sum;  // x + residual, which the first block stores
    float eps;
    float shift;
};

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(int x) { return uint32_t(x); }

template <class T>
__device__ __forceinline__ float output_of(const Shape& shape, const Output<T>& out, int row, int token,
                                           float v) {
    if (out.row_scale) v *= out.token_scale[token] * out.row_scale[row];
    if (out.bias) v += to_float(out.bias[row]);
    return v;
}
template <class T>
__device__ __forceinline__ void store_output(const Shape& shape, const Output<T>& out, int row, int token,
                                             float v) {
    if (row >= shape.n_out || token >= shape.n_tokens) return;
    v = output_of(shape, out, row, token, v);
    const int64_t at = int64_t(token) * shape.n_out + row;
    if (out.residual) v = to_float(from_float<T>(v)) + to_float(out.residual[at]);
    out.y[at] = from_float<T>(v);
}
// The same of outputs g and g + 8 of a strip, a gate and what it is multiplied by.
template <class T>
__device__ __forceinline__ void store_gated(const Shape& shape, const Output<T>& out, int strip, int g,
                                            int token, float gate, float up) {
    const int row = strip * STRIP + g;
    if (row >= shape.n_out || token >= shape.n_tokens) return;
    gate = output_of(shape, out, row, token, gate), up = output_of(shape, out, row + 8, token, up);
    const uint32_t y = gated<T>(gate, gate, up, up, ACTIVATION);
    out.y[int64_t(token) * (shape.n_out / 2) + strip * (STRIP / 2) + g] = T{uint16_t(y)};
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

#if NORM
// The inputs of a norm, all of every row, and the gains, which are weights and come before the wait.
template <class Reader, class T>
struct Norm {
    static constexpr int LANES = 32, PIECE = 8;  // inputs of 16 bytes
    uint4 gain[NORM], x[NORM];

    // Group i of this warp: 32 pieces of one token's row.
    static __device__ __forceinline__ int group(int i) { return threadIdx.x / LANES + i * Reader::WARPS; }
    static __device__ __forceinline__ float2 pair(uint32_t v) { return {low_of<T>(v), high_of<T>(v)}; }

    __device__ __forceinline__ void load_gains(const Shape& shape, const SumNorm& norm) {
        const int in_row = shape.row_bytes / (LANES * 16), groups = shape.n_tokens * in_row;
#pragma unroll
        for (int i = 0; i < NORM; ++i)
            if (group(i) < groups)
                gain[i] = static_cast<const uint4*>(norm.weight)[group(i) % in_row * LANES + threadIdx.x % LANES];
    }
    // Keep x + residual; leave each group's sum of squares in shared memory.
    __device__ __forceinline__ void load(const Shape& shape, const SumNorm& norm, float* squares) {
        const int in_row = shape.row_bytes / (LANES * 16), groups = shape.n_tokens * in_row;
        uint4 other[NORM];
#pragma unroll
        for (int i = 0; i < NORM; ++i)
            if (group(i) < groups) {
                const int at = group(i) * LANES + threadIdx.x % LANES;
                x[i] = static_cast<const uint4*>(shape.x)[at];
                other[i] = static_cast<const uint4*>(norm.residual)[at];
            }
#pragma unroll
        for (int i = 0; i < NORM; ++i) {
            if (group(i) >= groups) break;
            uint32_t *const a = &x[i].x, *const b = &other[i].x;
            float sum = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float2 v = pair(a[k]);
                const float2 w = pair(b[k]);
                a[k] = pack<T>(v.x + w.x, v.y + w.y), v = pair(a[k]);
                sum = fmaf(v.x, v.x, fmaf(v.y, v.y, sum));
            }
            if (blockIdx.x == 0) static_cast<uint4*>(norm.sum)[group(i) * LANES + threadIdx.x % LANES] = x[i];
#pragma unroll
            for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
            if (threadIdx.x % LANES == 0) squares[group(i)] = sum;
        }
    }
    // Scale what was kept, and put the block's range of it where load_activations would.
    __device__ __forceinline__ void store(const Shape& shape, const SumNorm& norm, const float* squares,
                                          int first_chunk, int n_chunks, uint32_t x_shared) const {
        const int in_row = shape.row_bytes / (LANES * 16), groups = shape.n_tokens * in_row;
        const int pitch = n_chunks * CHUNK_BYTES + X_PAD_BYTES;
#pragma unroll
        for (int i = 0; i < NORM; ++i) {
            if (group(i) >= groups) break;
            const int token = group(i) / in_row;
            float sum = 0;
#pragma unroll 16
            for (int k = 0; k < in_row; ++k) sum += squares[token * in_row + k];
            const float factor = rsqrtf(sum / (in_row * LANES * PIECE) + norm.eps);
            uint4 y;
            uint32_t* const to = &y.x;
            const uint32_t *const from = &x[i].x, *const by = &gain[i].x;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float2 v = pair(from[k]), w = pair(by[k]);
                to[k] = pack<T>(v.x * factor * (w.x + norm.shift), v.y * factor * (w.y + norm.shift));
            }
            const int at = (group(i) % in_row * LANES + threadIdx.x % LANES) * 16 - first_chunk * CHUNK_BYTES;
            if (at >= 0 && at < n_chunks * CHUNK_BYTES)
                store_shared_16(x_shared + token * pitch + at, Reader::prepared(y));
        }
    }
};
#endif

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

    __device__ __forceinline__ int bytes() const { return NEEDED ? SOURCES * slots * STRIP_BYTES : 0; }
    __device__ __forceinline__ int owned(int n_strips) const {
        return (n_strips - rank + OWNERS - 1) / OWNERS;
    }

    __device__ __forceinline__ void open(int n_strips) const {
#if __CUDA_ARCH__ >= 900
        if constexpr (CLUSTER) {
            if (threadIdx.x == 0) {
                barrier_init(barrier, 1);
                asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
        for (int s = 0; s < SOURCES; ++s)
            v[s] = load_shared_16(partial + s * slots * STRIP_BYTES + quad * 16);
#pragma unroll
        for (int s = 0; s < SOURCES; ++s) {
            const Sum* const from = reinterpret_cast<const Sum*>(&v[s]);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = s == 0 ? from[i] : sum[i] + from[i];
        }
    }
    __device__ __forceinline__ void close() const {
#if __CUDA_ARCH__ >= 900
        if constexpr (CLUSTER) return barrier_wait_cluster(barrier);
#endif
        barrier_of_warps(Reader::THREADS);
    }
};

// Add up what all warps and blocks delivered, and store it.
template <class Reader, class T>
__device__ __forceinline__ void reduce(const Meeting<Reader>& meeting, const Shape& shape,
                                       const Output<T>& out, int column, int first_strip, int n_strips) {
    using Sum = typename Reader::Sum;
    using Here = Meeting<Reader>;
    constexpr int QUADS = Here::TOKENS / 4, ROWS = ACTIVATION ? STRIP / 2 : STRIP;
    // A thread adds up four tokens of an output, or of a gate and its up; tokens beyond the last are left out.
    const int shift = shape.n_tokens > 8 ? 2 : shape.n_tokens > 4 ? 1 : 0;
    const int total = meeting.owned(n_strips) * ROWS << shift;
    const auto each = [&](auto f) {
        for (int i = threadIdx.x; i < total; i += Reader::THREADS) {
            const int row = i >> shift, quad = i & ((1 << shift) - 1);
            f(row / ROWS, row % ROWS, quad, (row / ROWS * STRIP + row % ROWS) * QUADS + quad);
        }
    };
    // Sums come from `add(quad, sum)`.
    const auto store = [&](auto add) {
        each([&](int slot, int row, int quad, int at) {
            const int strip = first_strip + slot * Here::OWNERS + meeting.rank;
            Sum sum[4];
            add(at, sum);
#if ACTIVATION
            Sum up[4];
            add(at + 8 * QUADS, up);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                store_gated(shape, out, strip, row, quad * 4 + i, float(sum[i]), float(up[i]));
#else
#pragma unroll
            for (int i = 0; i < 4; ++i)
                store_output(shape, out, strip * STRIP + row, quad * 4 + i, float(sum[i]));
#endif
        });
    };
    meeting.close();
    if constexpr (Reader::SPLITS == Here::OWNERS) {
        store([&](int at, Sum(&sum)[4]) { meeting.collect(at, sum); });
    } else {  // no clusters: the block that arrives last adds up the column
        __shared__ bool is_last;
        const int slab = shape.strips_per_block * STRIP * Here::TOKENS;
        Sum* const slabs = reinterpret_cast<Sum*>(out.workspace) + int64_t(column) * Reader::SPLITS * slab;
        each([&](int, int, int, int at) {
#pragma unroll
            for (int half = 0; half < STRIP / ROWS; ++half, at += 8 * QUADS) {
                Sum sum[4];
                meeting.collect(at, sum);
#pragma unroll
                for (int i = 0; i < 4; ++i) slabs[blockIdx.x % Reader::SPLITS * slab + at * 4 + i] = sum[i];
            }
        });
        __threadfence();
        barrier_of_warps(Reader::THREADS);
        if (threadIdx.x == 0) is_last = atomicAdd(out.arrived + column, 1) == Reader::SPLITS - 1;
        barrier_of_warps(Reader::THREADS);
        if (!is_last) return;
        __threadfence();
        store([&](int at, Sum(&sum)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = 0;
#pragma unroll
            for (int s = 0; s < Reader::SPLITS; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] += __ldcg(slabs + s * slab + at * 4 + i);
        });
        if (threadIdx.x == 0) out.arrived[column] = 0;
    }
}

// What a block does, and where its pieces lie in shared memory:
// barriers of the ring and of the meeting | ring | partial sums | sums of x | x
template <class Reader>
struct Work {
    static constexpr int DEPTH = Reader::DEPTH, STEP = Reader::WK * Reader::CHUNKS, HEAD_BYTES = 128;

    int split, column, first_strip, n_strips;
    int begin, chunks;  // of the inputs
    uint32_t head;

    __device__ __forceinline__ Work(const Shape& shape, uint32_t shared) : head(shared) {
        split = blockIdx.x % Reader::SPLITS, column = blockIdx.x / Reader::SPLITS;
        const int columns = gridDim.x / Reader::SPLITS;
        first_strip = int(int64_t(shape.strips) * column / columns);
        n_strips = int(int64_t(shape.strips) * (column + 1) / columns) - first_strip;
        const int quanta = (shape.chunks + shape.quantum - 1) / shape.quantum;
        begin = quanta * split / Reader::SPLITS * shape.quantum;
        chunks = min(quanta * (split + 1) / Reader::SPLITS * shape.quantum, shape.chunks) - begin;
    }
    __device__ __forceinline__ uint32_t full(int slot) const { return head + slot * 8; }
    __device__ __forceinline__ uint32_t empty(int slot) const { return head + (DEPTH + slot) * 8; }
    __device__ __forceinline__ uint32_t met() const { return head + 2 * DEPTH * 8; }
    __device__ __forceinline__ uint32_t stage(int slot) const {
        return head + HEAD_BYTES + slot * Reader::STAGE_BYTES;
    }

    // Call f(round, chunk, slot, parity) for each stage, in the order of the stream.
    template <class F>
    __device__ __forceinline__ void each_stage(F f) const {
        int slot = 0, parity = 0;
#pragma unroll 1
        for (int round = 0; round < n_strips; round += Reader::WN)
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; chunk += STEP) {
                f(round, chunk, slot, parity);
                if (++slot == DEPTH) slot = 0, parity ^= 1;
            }
    }
};

// Store the sums of a strip that one warp has alone.
template <class T, class Sum, int NT>
__device__ __forceinline__ void store_strip(const Shape& shape, const Output<T>& out, int strip,
                                            const Sum (&total)[NT][4]) {
    const int g = threadIdx.x % 32 / 4, token = threadIdx.x % 4 * 2;
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float low = float(total[t][i]), high = float(total[t][i + 2]);
#if ACTIVATION
            store_gated(shape, out, strip, g, t * 8 + token + i, low, high);
#else
            store_output(shape, out, strip * STRIP + g, t * 8 + token + i, low);
            store_output(shape, out, strip * STRIP + g + 8, t * 8 + token + i, high);
#endif
        }
}

template <class Reader, class T>
__device__ __forceinline__ void stream_linear(const Reader& reader, const Shape& shape,
                                              const SumNorm& norm, const Output<T>& out) {
    using Sum = typename Reader::Sum;
    using Meet = Meeting<Reader>;
    constexpr int NT = Reader::NT, WK = Reader::WK, WN = Reader::WN, CHUNKS = Reader::CHUNKS;
    extern __shared__ __align__(128) char shared[];
    const Work<Reader> work(shape, shared_address(shared));
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wk = warp % WK, wn = warp / WK;
    const Meet meeting{work.stage(Reader::DEPTH), work.met(),
                       (shape.strips_per_block + Meet::OWNERS - 1) / Meet::OWNERS,
                       Meet::CLUSTER ? work.split : 0, Meet::CLUSTER ? work.split * WK + wk : wk};
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < Reader::DEPTH; ++slot) {
            barrier_init(work.full(slot), Copier::ARRIVALS);
            barrier_init(work.empty(slot), Reader::WARPS);
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    meeting.open(work.n_strips);
    reader.prepare_ring(work.stage(0));
    __syncthreads();

    if (warp == Reader::WARPS) {  // the producer
        work.each_stage([&](int round, int chunk, int slot, int parity) {
            barrier_wait(work.empty(slot), parity ^ 1);
            reader.fill(Copier{work.full(slot), reader.policy, lane}, work.stage(slot),
                        work.first_strip + round, min(WN, work.n_strips - round), work.begin + chunk,
                        min(work.STEP, work.chunks - chunk));
        });
        return;
    }

    const uint32_t sums = meeting.partial + meeting.bytes();
    const uint32_t x_shared = sums + Reader::sum_bytes(shape.block_chunks);
    const int pitch = work.chunks * CHUNK_BYTES + X_PAD_BYTES;
#if NORM
    __shared__ float squares[NORM * Reader::WARPS];
    Norm<Reader, T> inputs;
    if (NORM < 8) inputs.load_gains(shape, norm);  // there are registers for them beside x and residual
    wait_for_previous();
    inputs.load(shape, norm, squares);
    if (NORM == 8) inputs.load_gains(shape, norm);
    barrier_of_warps(Reader::THREADS);
    inputs.store(shape, norm, squares, work.begin, work.chunks, x_shared);
#else
    wait_for_previous();
    load_activations<Reader>(shape, work.begin, work.chunks, x_shared);
#endif
    barrier_of_warps(Reader::THREADS);
    // Not earlier: the next kernel's copies, millions of bytes at once, would stand before ours of x.
    let_next_begin();
    uint32_t x_lane[NT];
#pragma unroll
    for (int t = 0; t < NT; ++t)
        x_lane[t] = x_shared + min(t * 8 + lane % 8, shape.n_tokens - 1) * pitch + lane / 8 * 16;
    reader.sum_activations(x_lane, work.chunks, sums, warp);

    Sum total[NT][4] = {};
    work.each_stage([&](int round, int chunk, int slot, int parity) {
        const int strip = round + wn, mine = chunk + wk * CHUNKS;
        barrier_wait(work.full(slot), parity);
        if (strip < work.n_strips && mine < work.chunks)
            reader.multiply(work.stage(slot), wn, wk, x_lane, sums, work.first_strip + strip, mine,
                            min(CHUNKS, work.chunks - mine), total);
        __syncwarp();
        if (lane == 0) barrier_arrive(work.empty(slot));
        if (chunk + work.STEP < work.chunks) return;
        if (Meet::NEEDED && round == 0) meeting.join();
        if (strip < work.n_strips) {
            reader.finish(work.first_strip + strip, total);
            if constexpr (Meet::NEEDED) meeting.deliver(strip, total);
            else store_strip(shape, out, work.first_strip + strip, total);
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[t][i] = 0;
        }
    });
    if constexpr (Meet::NEEDED) {
        if (work.n_strips == 0) meeting.join();
        reduce(meeting, shape, out, work.column, work.first_strip, work.n_strips);
    }
}
