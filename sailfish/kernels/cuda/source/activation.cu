// The gated activation of an MLP, stored in the model's type or in 8 bits. TYPE: bf16 or float.
#include "gate.cuh"
#include "hopper.cuh"
#include "rows.cuh"

// activation(gate) is rounded to T before the product, as in the reference.
template <class T>
__device__ __forceinline__ Eight<T> gated(const Eight<T>& gate, const Eight<T>& up, int activation) {
    Eight<T> y;
#pragma unroll
    for (int i = 0; i < 8; i += 2) y.set(i, activate<T>(gate[i], activation), activate<T>(gate[i + 1], activation));
#pragma unroll
    for (int i = 0; i < 8; i += 2) y.set(i, y[i] * up[i], y[i + 1] * up[i + 1]);
    return y;
}

// Eight gates of a row from `i` on, and what they are multiplied by. They alternate, eight by eight, unless
// the width is no multiple of that; then all gates come first.
template <class T, bool WHOLE>
__device__ __forceinline__ void load_both(Eight<T>& gate, Eight<T>& up, const T* row, int i, int width) {
    const bool alternates = WHOLE || width % 8 == 0;
    const T* from = row + (alternates ? 2 * i : i);
    const int distance = alternates ? 8 : width, n = width - i;
    if (!WHOLE) {
        gate.load_some(from, n);
        up.load_some(from + distance, n);
    } else if (n > 0) {
        gate.load(from);
        up.load(from + distance);
    } else {
        gate.clear();
        up.clear();
    }
}

// A block's row, for results in 8 bits, whose scale needs the whole of it.
template <class T, int N, bool WHOLE>
__device__ __forceinline__ void act_mul(const T* gate_up, void* out, float* scale, int width, int activation,
                                        int format) {
    __shared__ float scratch[32];
    const T* from = gate_up + int64_t(blockIdx.x) * 2 * width;
    Row<T, N, WHOLE> row, up;
    let_next_begin();
    wait_for_previous();
#pragma unroll
    for (int n = 0; n < N; ++n) load_both<T, WHOLE>(row.part[n], up.part[n], from, row.begin(n), width);
#pragma unroll
    for (int n = 0; n < N; ++n) row.part[n] = gated(row.part[n], up.part[n], activation);
    row.store(out, scale, blockIdx.x, width, format, scratch);
}

#define DECLARED (const TYPE* gate_up, void* out, float* scale, int width, int activation, int format)
#define GIVEN (gate_up, out, scale, width, activation, format)
KERNEL_OF_ROWS(act_mul, 1, 1024, DECLARED, GIVEN)
KERNEL_OF_ROWS(act_mul, 2, 1024, DECLARED, GIVEN)
#if PARTS >= 4
KERNEL_OF_ROWS(act_mul, 4, 1024, DECLARED, GIVEN)
#endif
RAGGED_KERNEL_OF_ROWS(act_mul, 2, DECLARED, GIVEN)

#if __CUDA_ARCH__ >= 900
// The same by a cluster of blocks, each with a part of the row: with few rows one block would wait for its loads.
// A block tells the others its largest value by copies that count towards a barrier of theirs.
extern "C" __global__ void __launch_bounds__(1024)
act_mul_cluster(const TYPE* gate_up, void* out, float* scale, int width, int activation, int format) {
    constexpr int MOST_BLOCKS = 8;
    __shared__ float scratch[32], largest_of[MOST_BLOCKS];
    __shared__ __align__(8) uint64_t all_told;
    const int n_blocks = cluster_size(), rank = cluster_rank(), part = width / n_blocks;
    const uint32_t barrier = shared_address(&all_told);
    let_next_begin();
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_done();
        barrier_expect(barrier, n_blocks * sizeof(float));
    }
    cluster_meet();
    wait_for_previous();
    const int64_t row = blockIdx.x / n_blocks;
    const int i = threadIdx.x * 8;
    Eight<TYPE> gate, up;
    load_both<TYPE, true>(gate, up, gate_up + (row * width + rank * part) * 2, i, part);
    const Eight<TYPE> y = gated(gate, up, activation);
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = Largest()(largest, fabsf(y[k]));
    largest = over_block(largest, Largest(), scratch);
    if (threadIdx.x < n_blocks)
        send(address_in(shared_address(largest_of + rank), threadIdx.x), __float_as_uint(largest),
             address_in(barrier, threadIdx.x));
    barrier_wait(barrier, 0);
    for (int block = 0; block < n_blocks; ++block) largest = Largest()(largest, largest_of[block]);
    const float step = scale_of(largest, format);
    if (rank == 0 && threadIdx.x == 0) scale[row] = step;
    uint8_t* to = static_cast<uint8_t*>(out) + row * width + rank * part;
    if (i < part) *reinterpret_cast<uint2*>(to + i) = to_8bit(y, Divider(step), format);
}
#endif

// Eight elements a thread of any row, for results in the model's type. Grid: rows, parts of a row.
extern "C" __global__ void __launch_bounds__(256)
act_mul_plain(const TYPE* gate_up, TYPE* out, int width, int activation, int is_whole) {
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8, n = width - i;
    const TYPE* from = gate_up + int64_t(blockIdx.x) * 2 * width;
    TYPE* to = out + int64_t(blockIdx.x) * width + i;
    let_next_begin();
    wait_for_previous();
    if (n <= 0) return;
    Eight<TYPE> gate, up;
    if (is_whole) {
        load_both<TYPE, true>(gate, up, from, i, width);
        gated(gate, up, activation).store(to);
    } else {
        load_both<TYPE, false>(gate, up, from, i, width);
        gated(gate, up, activation).store_some(to, n);
    }
}
