// Pieces of decode attention: which tiles of the cache a block takes, tensor-core fragments, stored formats.
#pragma once
#include "hopper.cuh"

constexpr int TILE = 16;  // tokens that a warp multiplies at once; no tile crosses a page
constexpr int MAX_SEQUENCES = 512;
constexpr float NEVER = -1e30f;  // a reference that every score exceeds, and finite: no difference is NaN
constexpr uint32_t UNWRITTEN = 0xffffffffu;  // no arithmetic yields this NaN

struct Problem {
    const bf16* q;
    bf16* out;
    const uint8_t* k;
    const uint8_t* v;
    const float* k_scale;  // null unless the cache has 8 bits
    const float* v_scale;
    const int* block_table;
    const int* row;
    const int* kv_len;
    float* partial;        // words of UNWRITTEN between launches
    int64_t q_stride;      // elements from one query's heads to the next's
    int64_t block_stride;  // elements
    int64_t scale_stride;  // elements
    int64_t table_stride;
    int n_sequences;
    int n_group;    // query heads that share a kv head
    int n_queries;  // of each sequence
    int page_shift;
    int window;
    int fewest_tiles;  // of a block, where work is divided among several
    int is_settled;    // tables, and tokens before the newest n_queries, may be read before the wait
    float scale;
    float softcap;  // 0: none
};

// ---- what is to be done -----------------------------------------------------------------------------
// The blocks of one kv head, blockIdx.y, share its tiles; all heads are dealt alike, so that those of the same
// tokens, which are neighbours in memory, are read at about the same time.

// The sequences of the step that have tokens, in order.
struct Sequences {
    int of[MAX_SEQUENCES];
    int row[MAX_SEQUENCES];
    int length[MAX_SEQUENCES];
    int before[MAX_SEQUENCES + 1];  // tiles of all sequences before
    bool is_empty[MAX_SEQUENCES];   // by place in the step
    int n;
    int longest;  // tiles
    int sums[WARPS][2];
};

// First token that any query of the sequence sees.
__device__ __forceinline__ int first_token(const Problem& p, int length) {
    return max(0, length - p.n_queries + 1 - p.window);
}

// a / b for a quotient below 2^20: a fraction of the general division's time.
__device__ __forceinline__ int divide(int a, int b) {
    int quotient = int(__fdividef(float(a), float(b)));
    const int rest = a - quotient * b;
    if (rest < 0) --quotient;
    if (rest >= b) ++quotient;
    return quotient;
}
__device__ __forceinline__ int divide_up(int a, int b) { return divide(a + b - 1, b); }

// A run of tiles for one block, counted as Sequences::before does. Its sequences are taken from the last to the
// first: what lacks its end is then ready early, for the later block that has the end and meets it last.
struct Run {
    int begin, end;
    int sequence;  // index into Sequences, of the last tile
    int split;     // which piece of its sequence, where sequences are cut into pieces

    // The share of a sequence.
    __device__ int first(const Sequences& s, int sequence) const { return max(begin, s.before[sequence]); }
    __device__ int after(const Sequences& s, int sequence) const { return min(end, s.before[sequence + 1]); }
};

// How tiles are dealt out. Either each sequence is cut into `splits` (few, of much the same length: every
// block has one piece), or all tiles in a row are cut into `parts` equal runs.
struct Deal {
    int splits;  // 0: the second way
    int parts;
    int each, extra;  // tiles of a part; the first `extra` have one more

    __device__ Deal(const Sequences& s, const Problem& p, int n_blocks) {
        const int total = s.before[s.n];
        splits = 0, parts = 0, each = 0, extra = 0;
        if (s.n == 0) return;
        const int fair = divide_up(total, n_blocks);
        if (s.n <= n_blocks) {
            const int wanted = s.longest <= 2 * p.fewest_tiles
                                   ? 1
                                   : min(divide(n_blocks, s.n), divide_up(s.longest, p.fewest_tiles));
            if (divide_up(s.longest, wanted) <= max(2 * p.fewest_tiles, fair + fair / 8)) splits = wanted;
        }
        if (splits) return;
        parts = min(n_blocks, divide_up(total, p.fewest_tiles));
        const int rounds = divide_up(s.n, n_blocks), whole = divide(s.n, rounds);
        // Equal lengths: whole sequences for each block, if few are left without, need no sums across blocks.
        if (total == s.n * s.longest && whole * rounds == s.n && whole * 16 >= n_blocks * 15) parts = whole;
        each = divide(total, parts);
        extra = total - each * parts;
    }
    __device__ int start(int part) const { return part * each + min(part, extra); }
    __device__ int owner(int tile) const {
        const int large = extra * (each + 1);
        return tile < large ? divide(tile, each + 1) : extra + divide(tile - large, each);
    }
    __device__ Run run(const Sequences& s, const Problem& p, int block) const {
        Run r{0, 0, 0, 0};
        if (splits) {
            r.sequence = divide(block, splits);
            r.split = block - r.sequence * splits;
            if (r.sequence >= s.n) return r;
            const int n = s.before[r.sequence + 1] - s.before[r.sequence];
            const int of = min(splits, divide_up(n, p.fewest_tiles));
            if (r.split >= of) return r;
            r.begin = s.before[r.sequence] + divide(n * r.split, of);
            r.end = s.before[r.sequence] + divide(n * (r.split + 1), of);
            return r;
        }
        if (block >= parts) return r;
        r.begin = start(block);
        r.end = start(block + 1);
        int after = s.n;  // before[r.sequence] < end <= before[after]
        while (after - r.sequence > 1) {
            const int middle = (r.sequence + after) / 2;
            (s.before[middle] < r.end ? r.sequence : after) = middle;
        }
        return r;
    }
};

// Gather the sequences that have tokens; all threads of the block.
__device__ __forceinline__ void gather(Sequences& s, const Problem& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int n = 0, tiles = 0, longest = 0;
    for (int begin = 0; begin < p.n_sequences; begin += WARPS * 32) {
        const int b = begin + threadIdx.x;
        const int length = b < p.n_sequences ? p.kv_len[b] : 0;
        const int row = b < p.n_sequences ? p.row[b] : 0;
        const int mine = length > 0 ? (length + TILE - 1) / TILE - first_token(p, length) / TILE : 0;
        const uint32_t there = __ballot_sync(ALL_LANES, length > 0);
        int sum = mine;
#pragma unroll
        for (int away = 1; away < 32; away *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, away);
            if (lane >= away) sum += other;
        }
        longest = max(longest, __reduce_max_sync(ALL_LANES, mine));
        if (lane == 31) s.sums[warp][0] = sum, s.sums[warp][1] = __popc(there);
        __syncthreads();
        int tiles_before = tiles, n_before = n;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) tiles_before += s.sums[w][0], n_before += s.sums[w][1];
            tiles += s.sums[w][0], n += s.sums[w][1];
        }
        if (length > 0) {
            const int at = n_before + __popc(there & ((1u << lane) - 1));
            s.of[at] = b, s.row[at] = row, s.length[at] = length;
            s.before[at] = tiles_before + sum - mine;
        }
        if (b < p.n_sequences) s.is_empty[b] = length <= 0;
        if (begin + WARPS * 32 < p.n_sequences) __syncthreads();
    }
    if (threadIdx.x == 0) s.longest = 0, s.n = n, s.before[n] = tiles;
    __syncthreads();
    if (lane == 0) atomicMax(&s.longest, longest);
    __syncthreads();
}

// ---- fragments --------------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ void multiply_add_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float load_shared(uint32_t shared) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(shared) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t shared, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// tanh to a few units of float32's last place; the machine's own is good to 11 bits only.
__device__ __forceinline__ float tanh_exact(float x) {
    return 1.f - __fdividef(2.f, exp2_fast(x * 2.885390081777927f) + 1.f);
}

// ---- stored formats ---------------------------------------------------------------------------------

// Bytes 0 and 2 of a word as a pair of bf16; for int8 exact, for e4m3 times FP8_SHRINK. Shift the word for
// bytes 1 and 3 (`HIGH`).
constexpr float FP8_GROW = 1152921504606846976.f;  // 2^60; twice that is what the format's exponents lack

template <bool HIGH>
__device__ __forceinline__ uint32_t widen(uint32_t w) {
    if constexpr (KV == 1) {
        // 128 + the low seven bits, less 128 or 256: all of them exact in bf16's eight bits of significand.
        const uint32_t x = HIGH ? w >> 8 : w;
        const uint32_t low = (x & 0x007f007fu) | 0x43004300u, base = (x & 0x00800080u) | 0x43004300u;
        uint32_t y;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(base), "r"(0xbf80bf80u), "r"(low));
        return y;
    } else {
        // Sign, exponent and fraction moved to where bf16 has them: 2^-120 of the value, subnormals too.
        const uint32_t x = HIGH ? w : w << 8;
        return (x & 0x80008000u) | ((x >> 4) & 0x07f007f0u);
    }
}

// The same of K. int8 as f16: 1024 + the byte, its sign flipped, is 1152 too much, which the scores make up for.
template <bool HIGH>
__device__ __forceinline__ uint32_t widen_k(uint32_t w) {
    if constexpr (KV != 1) return widen<HIGH>(w);
    return ((HIGH ? w >> 8 : w) & 0x00ff00ffu) ^ 0x64806480u;
}

// ---- sums across blocks -----------------------------------------------------------------------------

__device__ __forceinline__ float written(float x) {
    return __float_as_uint(x) == UNWRITTEN ? __uint_as_float(0x7fffffffu) : x;
}
__device__ __forceinline__ void put(float* at, float2 x) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(written(x.x)), "f"(written(x.y))
                 : "memory");
}
__device__ __forceinline__ uint2 look(const float* at) {
    uint2 x;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(at) : "memory");
    return x;
}

// ---- the bulk copy engine ---------------------------------------------------------------------------

// The box of a map over (N, P, K, E) at these places, its bytes counted by `barrier`.
__device__ __forceinline__ void copy_tile(uint32_t shared, const TensorMap& map, int e, int head, int in_page,
                                          int block, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared),
        "l"(&map), "r"(e), "r"(head), "r"(in_page), "r"(block), "r"(barrier)
        : "memory");
}
// The lane's asynchronous copies so far arrive at `barrier` when they are done.
__device__ __forceinline__ void copies_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
