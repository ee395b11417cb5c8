// How tiles, by each warp for itself and ahead of its products, and queries come to shared memory.
#pragma once
#include "decode_attention.cuh"

constexpr int ROW_BYTES = HEAD * (KV == 0 ? 2 : 1);
constexpr int PITCH = BULK ? 128 : ROW_BYTES + 16;  // swizzled, or an odd number of 16 bytes: no bank conflicts
constexpr int UNIT_BYTES = BULK ? TILE * ROW_BYTES : TILE * PITCH;  // K or V of a tile
constexpr int RING_BYTES = 2 * STAGES * UNIT_BYTES;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = QUERY_TILES * 8;
constexpr int CHUNKS = HEAD / 16;
constexpr int Q_PITCH = HEAD + 8;    // elements
constexpr int PASS_ROWS = 4;         // rows that are summed over warps at a time
constexpr int SUM_PITCH = HEAD + 4;  // floats; lanes that hold one fragment write to distinct banks

// What q is multiplied by, what scores are to make up for it and for K's form, and what V's form lacks.
constexpr float Q_FACTOR = KV == 0 ? 1.f : KV == 1 ? 1.f / 16 : FP8_GROW;
constexpr float SCORE_FACTOR = KV == 0 ? 1.f : KV == 1 ? 16.f : FP8_GROW;
constexpr float V_FACTOR = KV == 2 ? FP8_GROW : 1.f;

struct Shared {
    alignas(1024) uint8_t ring[WARPS][RING_BYTES];
    alignas(16) float scale[WARPS][STAGES][2 * TILE];  // of K, then of V
    alignas(16) bf16 q[ROWS][Q_PITCH];                 // with 8-bit caches as `widen` pairs elements
    alignas(16) float sums[WARPS][PASS_ROWS][SUM_PITCH];
    float2 stats[WARPS][ROWS];  // reference and sum of each row
    uint64_t arrived[WARPS][STAGES][2];
    Sequences sequences;
};

static_assert(HEAD % (KV == 0 ? 16 : 32) == 0 && STAGES >= 2);
static_assert(MOST_SHARED_BYTES >= sizeof(Shared));
static_assert(BULK ? ROW_BYTES % 128 == 0 : PITCH / 16 % 2 == 1);

struct Maps {
    TensorMap k, v;
};

// Walks a warp's tiles, ahead of the products, and starts their copies. Where the tiles lie is looked up 32 at
// a time, one by each lane, and 32 ahead: tables are often far away.
struct Loader {
    const Problem& p;
    const Maps& maps;
    const Sequences& s;
    const Run& run;
    uint32_t ring, scales, arrived;  // shared addresses of the warp's
    int n_tiles, n_begun;            // of the warp
    int sequence;                    // not before that of the tile looked up next
    int block, place;                // of tile n_begun / 32 * 32 + lane
    int next_block, next_place;      // of the tile 32 after that
    int begun_block, begun_place;    // of the tile begun last

    __device__ Loader(const Problem& p, const Maps& maps, Shared& shared, const Run& run)
        : p(p), maps(maps), s(shared.sequences), run(run), sequence(run.sequence) {
        const int warp = threadIdx.x / 32;
        ring = shared_address(shared.ring[warp]);
        scales = shared_address(shared.scale[warp]);
        arrived = shared_address(shared.arrived[warp]);
        n_begun = 0;
        n_tiles = max(0, run.end - run.begin - warp + WARPS - 1) / WARPS;
        look_up(0);
        block = next_block, place = next_place;
        look_up(32);
    }
    // A tile's place: its first token in the page, bits 0 to 7; the first token that is seen, 8 to 15, and the
    // first after those, 16 to 23, counted from there; bit 24: whether a kernel just ahead may still write some.
    __device__ __forceinline__ void look_up(int number) {
        next_block = next_place = 0;
        number += threadIdx.x % 32;
        int mine = sequence;
        if (number < n_tiles) {
            const int away = threadIdx.x / 32 + number * WARPS;  // tiles of the run before it
            while (run.end - 1 - away < s.before[mine]) --mine;
            const int tile = run.first(s, mine) + away - (run.end - run.after(s, mine));
            const int length = s.length[mine];
            const int token = ((length + TILE - 1) / TILE - s.before[mine + 1] + tile) * TILE;
            next_block = p.block_table[s.row[mine] * p.table_stride + (token >> p.page_shift)];
            next_place = (token & ((1 << p.page_shift) - 1)) | max(0, first_token(p, length) - token) << 8 |
                         min(TILE, length - token) << 16 | (token + TILE > length - p.n_queries) << 24;
        }
        sequence = __shfl_sync(ALL_LANES, mine, 0);
    }
    // The newest token of a sequence, which a kernel just ahead writes, in a tile that was begun before that ended:
    // a lane's 16 bytes of K and of V, and in lanes 0 and 1 their scales. From there to shared memory takes half as
    // long as another turn of the copy engine.
    struct Newest {
        uint4 k, v;
        float scale;
        int row;  // of the tile
    };
    __device__ __forceinline__ Newest newest(int block, int place) const {
        const int lane = threadIdx.x % 32, row = (place >> 16 & 255) - 1;
        const int64_t slot = int64_t((place & 255) + row) * gridDim.x + blockIdx.x;
        const int64_t at = block * p.block_stride * (ROW_BYTES / HEAD) + slot * ROW_BYTES + lane * 16;
        Newest x{{}, {}, 0.f, row};
        if (lane < ROW_BYTES / 16) {
            x.k = *reinterpret_cast<const uint4*>(p.k + at);
            x.v = *reinterpret_cast<const uint4*>(p.v + at);
        }
        if (KV != 0 && lane < 2) x.scale = (lane == 0 ? p.k_scale : p.v_scale)[block * p.scale_stride + slot];
        return x;
    }
    // Put it into the first stage, once what was there before has arrived.
    __device__ __forceinline__ void put(const Newest& x) const {
        const int lane = threadIdx.x % 32;
        const uint32_t to = ring + lane / 8 * (TILE * 128) + x.row * 128 + ((lane ^ x.row) % 8 << 4);
        wait(0, 0, 0);
        wait(0, 1, 0);
        if (lane < ROW_BYTES / 16) store_shared(to, x.k), store_shared(to + UNIT_BYTES, x.v);
        if (KV != 0 && lane < 2)
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(scales + (lane * TILE + x.row) * 4), "f"(x.scale) : "memory");
        fence_async();  // before the engine writes there again
        __syncwarp();
    }
    // Whether a kernel just ahead may still write what is to be read next.
    __device__ __forceinline__ bool is_unsettled() const {
        return n_begun < n_tiles && __shfl_sync(ALL_LANES, place, n_begun % 32) >> 24;
    }
    __device__ __forceinline__ void begin_k(int stage) {
        begun_place = 0;
        if (n_begun < n_tiles) {
            begun_block = __shfl_sync(ALL_LANES, block, n_begun % 32);
            begun_place = __shfl_sync(ALL_LANES, place, n_begun % 32);
            copy(stage, 0);
            if (KV != 0) copy_scales(stage);
            if (++n_begun % 32 == 0) {
                block = next_block, place = next_place;
                look_up(n_begun + 32);
            }
        }
        if (!BULK) copy_commit();
    }
    __device__ __forceinline__ void begin_v(int stage) {
        if (begun_place != 0) copy(stage, 1);
        if (!BULK) copy_commit();
    }
    __device__ __forceinline__ bool is_seen(int row) const {
        return row >= (begun_place >> 8 & 255) && row < (begun_place >> 16 & 255);
    }
    __device__ __forceinline__ void copy(int stage, int is_v) const {
        const uint32_t to = ring + (2 * stage + is_v) * UNIT_BYTES;
        const int in_page = begun_place & 255;
#if BULK
        if (is_elected()) {
            const uint32_t barrier = arrived + (2 * stage + is_v) * 8;
            barrier_expect(barrier, UNIT_BYTES);
#pragma unroll
            for (int i = 0; i < ROW_BYTES / 128; ++i)  // a map's elements are pairs of bytes
                copy_tile(to + i * TILE * 128, is_v ? maps.v : maps.k, i * 64, blockIdx.x, in_page, begun_block,
                          barrier);
        }
#else
        constexpr int WORDS = ROW_BYTES / 16;
        const int lane = threadIdx.x % 32, stride = gridDim.x * ROW_BYTES;
        const uint8_t* from = (is_v ? p.v : p.k) + begun_block * p.block_stride * (ROW_BYTES / HEAD) +
                              (in_page * gridDim.x + blockIdx.x) * ROW_BYTES;
        if (32 % WORDS == 0 && (begun_place >> 8 & 0xffff) == TILE << 8) {
            const uint8_t* mine = from + lane / WORDS * stride + lane % WORDS * 16;
            const uint32_t mine_to = to + lane / WORDS * PITCH + lane % WORDS * 16;
#pragma unroll
            for (int i = 0; i < TILE * WORDS / 32; ++i, mine += 32 / WORDS * stride)
                copy_async_16(mine_to + i * (32 / WORDS) * PITCH, mine);
        } else {
#pragma unroll
            for (int i = lane; i < TILE * WORDS; i += 32) {
                const int row = i / WORDS, word = i % WORDS;
                copy_async_16(to + row * PITCH + word * 16, from + row * stride + word * 16, is_seen(row));
            }
        }
#endif
    }
    __device__ __forceinline__ void copy_scales(int stage) const {
        const int lane = threadIdx.x % 32, in_page = (begun_place & 255) + lane % TILE;
        const float* from = (lane < TILE ? p.k_scale : p.v_scale) + begun_block * p.scale_stride +
                            in_page * gridDim.x + blockIdx.x;
        copy_async_4(scales + (stage * 2 * TILE + lane) * 4, from, is_seen(lane % TILE));
        if (BULK) copies_arrive(arrived + 2 * stage * 8);
    }
    // Wait for K or V of a tile; `round`: how often its stage has been used before.
    __device__ __forceinline__ void wait(int stage, int is_v, int round) const {
        if (BULK) {
            barrier_wait(arrived + (2 * stage + is_v) * 8, round & 1);
        } else {
            copy_wait<2 * STAGES - 2>();
        }
        __syncwarp();
    }
};

// A pair of q's elements, as K's are multiplied: int8 in f16, whose range the factor fits.
__device__ __forceinline__ uint32_t fitted(uint32_t pair) {
    const float low = __uint_as_float(pair << 16) * Q_FACTOR;
    const float high = __uint_as_float(pair & 0xffff0000u) * Q_FACTOR;
    return KV == 1 ? pack<f16>(low, high) : pack<bf16>(low, high);
}

// Bring the queries of a kv head to shared memory, rows past the last as zeros; a part by each thread.
__device__ __forceinline__ void copy_q(bf16 (&to)[ROWS][Q_PITCH], const Problem& p, int sequence) {
#pragma unroll
    for (int item = threadIdx.x; item < ROWS * HEAD / 8; item += THREADS) {
        const int row = item / (HEAD / 8), e = item % (HEAD / 8) * 8;
        const int query = p.n_queries == 1 ? row >= p.n_group : divide(row, p.n_group);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (query < p.n_queries)
            x = *reinterpret_cast<const uint4*>(p.q + (sequence * p.n_queries + query) * p.q_stride +
                                                (blockIdx.x * p.n_group + row - query * p.n_group) * HEAD + e);
        if constexpr (KV == 0) {
            *reinterpret_cast<uint4*>(&to[row][e]) = x;
        } else {  // of each four elements 0 and 2 to the first half of their 16, 1 and 3 to the second
            bf16* half = &to[row][e / 16 * 16 + e % 16 / 2];
            *reinterpret_cast<uint2*>(half) = make_uint2(fitted(__byte_perm(x.x, x.y, 0x5410)),
                                                         fitted(__byte_perm(x.z, x.w, 0x5410)));
            *reinterpret_cast<uint2*>(half + 8) = make_uint2(fitted(__byte_perm(x.x, x.y, 0x7632)),
                                                             fitted(__byte_perm(x.z, x.w, 0x7632)));
        }
    }
}

// Bring the queries of a sequence nearer, before they are wanted.
__device__ __forceinline__ void prefetch_q(const Problem& p, int sequence) {
    const int row = threadIdx.x, query = p.n_queries == 1 ? 0 : divide(row, p.n_group);
    if (row >= p.n_group * p.n_queries) return;
    const bf16* from = p.q + (sequence * p.n_queries + query) * p.q_stride +
                       (blockIdx.x * p.n_group + row - query * p.n_group) * HEAD;
#pragma unroll
    for (int e = 0; e < HEAD; e += 64) asm volatile("prefetch.global.L1 [%0];" ::"l"(from + e));
}
