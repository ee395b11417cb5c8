// Y = X W^T + bias for many tokens and a 4-bit weight, or activation(gate) * up of it, on mma.sync: for GPUs before
// Hopper.
//
// The product is made transposed, Y^T = W X^T, so that a word of the weight becomes A registers as it is. A block
// makes 128 rows of Y^T for TOKENS tokens, or `splits` blocks do so together, each for a share of the inputs: they
// leave their sums in `part`, and the last to arrive adds them up in order.
#include "gate.cuh"
#include "wide_weight.cuh"

#ifndef TOKENS
#define TOKENS 128  // tokens of a tile
#define SLOTS 3     // slots of the ring: 64 inputs of the tile's tokens and rows each
#endif

constexpr int THREADS = 256, STRIPS = 8, ROWS = 128;
constexpr int WARP_TOKENS = TOKENS / 2, OCTETS = WARP_TOKENS / 8;  // 4 x 2 warps, of 32 rows each
constexpr int X_BYTES = TOKENS * 128, W_BYTES = STRIPS * 512, SCALE_BYTES = STRIPS * 64;
constexpr int SLOT_BYTES = X_BYTES + W_BYTES + 2 * SCALE_BYTES;
constexpr int Y_ROW_BYTES = ROWS * 2 + 16;  // padded, against bank conflicts

static_assert(TOKENS * Y_ROW_BYTES <= SLOTS * SLOT_BYTES, "the result is turned where the ring was");

struct Problem {
    const Element* x_TI;
    const uint8_t* packed;
    const Element* scale;
    const Element* zero;
    const Element* bias_O;
    Element* y_TO;
    float4* part;
    int* arrived;
    int n_tokens, n_in, x_stride, n_out, y_stride, strips, units, n_groups, group, splits;
    int activation;  // of gates and ups that alternate by eights of the rows: Y has half as many
};

__device__ __forceinline__ void copy_slot(const Problem& p, uint32_t slot, int unit, int token, int strip) {
    for (int i = threadIdx.x; i < TOKENS * 8; i += THREADS) {
        const int row = i / 8, piece = i % 8, k = unit * 64 + piece * 8;
        const bool valid = token + row < p.n_tokens && k < p.n_in;
        copy_async_16(slot + row * 128 + (piece ^ row % 8) * 16,
                      valid ? p.x_TI + int64_t(token + row) * p.x_stride + k : p.x_TI, valid);
    }
    for (int i = threadIdx.x; i < STRIPS * 32; i += THREADS) {
        const int row = min(strip + i / 32, p.strips - 1);
        copy_async_16(slot + X_BYTES + i * 16, p.packed + (int64_t(row) * p.units + unit) * 512 + i % 32 * 16);
    }
    const int groups = p.group == 32 ? 2 : 1, pieces = 2 * groups;
    if (threadIdx.x < STRIPS * pieces) {
        const int row = min(strip + int(threadIdx.x) / pieces, p.strips - 1);
        const int64_t from = (int64_t(row) * p.n_groups + unit * 64 / p.group) * 16 + threadIdx.x % pieces * 8;
        const uint32_t to = slot + X_BYTES + W_BYTES + threadIdx.x * 16;
        copy_async_16(to, p.scale + from);
        if (p.zero != nullptr) copy_async_16(to + SCALE_BYTES, p.zero + from);
    }
}

__device__ __forceinline__ void load_tokens(uint32_t (&b)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(shared)
                 : "memory");
}

#ifdef F16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Adds the products of one slot to this warp's 32 rows x WARP_TOKENS tokens.
__device__ __forceinline__ void multiply_slot(const Problem& p, float (&sum)[2][OCTETS][4], uint32_t slot, int warp,
                                              int lane) {
    const int groups = p.group == 32 ? 2 : 1;
    uint32_t a[2][4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int strip = warp % 4 * 2 + i;
        const uint32_t scale = slot + X_BYTES + W_BYTES + strip * 32 * groups;
        const uint32_t codes = slot + X_BYTES + strip * 512;
        dequantise(a[i], load_strip(codes, scale, scale + SCALE_BYTES, groups, p.zero != nullptr, lane));
    }
    const int row = warp / 4 * WARP_TOKENS + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const uint32_t at = slot + row * 128 + ((2 * t + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
        for (int octet = 0; octet < OCTETS; octet += 2) {
            uint32_t b[4];
            load_tokens(b, at + octet * 1024);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                mma(sum[i][octet], a[i][t], b[0], b[1]);
                mma(sum[i][octet + 1], a[i][t], b[2], b[3]);
            }
        }
    }
}

// Leaves this block's sums in `part`. Says whether it is the tile's last, which then holds them all.
__device__ __forceinline__ bool gather(const Problem& p, float (&sum)[2][OCTETS][4], int tile, int split) {
    constexpr int PIECES = 2 * OCTETS;
    float4* mine = p.part + int64_t(tile) * p.splits * PIECES * THREADS + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const float(&s)[4] = sum[i / OCTETS][i % OCTETS];
        mine[(split * PIECES + i) * THREADS] = {s[0], s[1], s[2], s[3]};
    }
    __threadfence();
    __shared__ int is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&p.arrived[tile], 1) == p.splits - 1;
        if (is_last) p.arrived[tile] = 0;  // as the next launch wants it
    }
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        float4 total = {0, 0, 0, 0};
        for (int q = 0; q < p.splits; ++q) {
            const float4 s = __ldcg(&mine[(q * PIECES + i) * THREADS]);
            total.x += s.x, total.y += s.y, total.z += s.z, total.w += s.w;
        }
        float(&s)[4] = sum[i / OCTETS][i % OCTETS];
        s[0] = total.x, s[1] = total.y, s[2] = total.z, s[3] = total.w;
    }
    return true;
}

// Turns Y^T to rows of tokens in shared memory, and stores those 16 bytes at a time.
__device__ __forceinline__ void store(const Problem& p, const float (&sum)[2][OCTETS][4], uint8_t* shared, int token,
                                      int first_row, int warp, int lane) {
    const int rows_of_one = p.activation == NO_ACTIVATION ? 1 : 2, n_rows = ROWS / rows_of_one;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (warp % 4 * 2 + i) * 16 + lane / 4;
        float bias[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = first_row + row + r * 8;
            bias[r] = p.bias_O != nullptr && at < p.n_out ? to_float(p.bias_O[at]) : 0.f;
        }
#pragma unroll
        for (int octet = 0; octet < OCTETS; ++octet) {
            const float(&s)[4] = sum[i][octet];
            uint8_t* to = shared + (warp / 4 * WARP_TOKENS + octet * 8 + lane % 4 * 2) * Y_ROW_BYTES;
            const auto put = [to](int at, uint32_t pair) {
                reinterpret_cast<uint16_t*>(to)[at] = uint16_t(pair);
                reinterpret_cast<uint16_t*>(to + Y_ROW_BYTES)[at] = uint16_t(pair >> 16);
            };
            if (p.activation == NO_ACTIVATION) {
                put(row, pack<Element>(s[0] + bias[0], s[1] + bias[0]));
                put(row + 8, pack<Element>(s[2] + bias[1], s[3] + bias[1]));
            } else {
                put((warp % 4 * 2 + i) * 8 + lane / 4, gated<Element>(s[0] + bias[0], s[1] + bias[0], s[2] + bias[1],
                                                                      s[3] + bias[1], p.activation));
            }
        }
    }
    __syncthreads();
    first_row /= rows_of_one;
    for (int i = threadIdx.x; i < TOKENS * n_rows / 8; i += THREADS) {
        const int column = i / (n_rows / 8), row = i % (n_rows / 8) * 8;
        if (token + column < p.n_tokens && first_row + row < p.y_stride)
            *reinterpret_cast<int4*>(p.y_TO + int64_t(token + column) * p.y_stride + first_row + row) =
                *reinterpret_cast<const int4*>(shared + column * Y_ROW_BYTES + row * 2);
    }
}

// Grid: token tiles fastest, then row tiles; splits.
extern "C" __global__ void __launch_bounds__(THREADS, TOKENS == 128 ? 1 : 2) wide_linear_int4(const Problem p) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t ring = shared_address(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token_tiles = (p.n_tokens + TOKENS - 1) / TOKENS, tile = blockIdx.x, split = blockIdx.y;
    const int token = tile % token_tiles * TOKENS, strip = tile / token_tiles * STRIPS;
    const int first = int(int64_t(p.units) * split / p.splits), last = int(int64_t(p.units) * (split + 1) / p.splits);
    float sum[2][OCTETS][4] = {};
#pragma unroll
    for (int i = 0; i < SLOTS - 1; ++i) {
        if (first + i < last) copy_slot(p, ring + i * SLOT_BYTES, first + i, token, strip);
        copy_commit();
    }
    int slot = 0;
    for (int unit = first; unit < last; ++unit) {
        copy_wait<SLOTS - 2>();
        __syncthreads();
        const int ahead = unit + SLOTS - 1, free = slot == 0 ? SLOTS - 1 : slot - 1;
        if (ahead < last) copy_slot(p, ring + free * SLOT_BYTES, ahead, token, strip);
        copy_commit();
        multiply_slot(p, sum, ring + slot * SLOT_BYTES, warp, lane);
        if (++slot == SLOTS) slot = 0;
    }
    copy_wait<0>();
    __syncthreads();
    if (p.splits > 1 && !gather(p, sum, tile, split)) return;
    store(p, sum, shared, token, strip * 16, warp, lane);
}
