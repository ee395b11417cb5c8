// What streamed products ask of the hardware: tensor cores, copies that run ahead, barriers that count them.
#pragma once
#include "base.cuh"

// ---- tensor cores ---------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t* r, uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

#define SAILFISH_MMA(SHAPE_AND_TYPES, CONSTRAINT)                                                \
    asm("mma.sync.aligned." SHAPE_AND_TYPES                                                      \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
        : "+" CONSTRAINT(c[0]), "+" CONSTRAINT(c[1]), "+" CONSTRAINT(c[2]), "+" CONSTRAINT(c[3]) \
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
__device__ __forceinline__ void multiply_add_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
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
__device__ __forceinline__ void stream_16(uint32_t shared, const void* global, int valid_bytes,
                                          uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared),
                 "l"(global), "r"(valid_bytes), "l"(policy)
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
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

// ---- barriers in shared memory --------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
#endif
// Wait for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
#if __CUDA_ARCH__ >= 900
#define SAILFISH_WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define SAILFISH_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile(
        "{ .reg .pred done;\n"
        "again: " SAILFISH_WAIT
        " done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void barrier_of_warps(int threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

struct Run {
    uint32_t to;
    const void* from;
    int bytes;
};

// Copies of one stage by the producing warp, counted by the stage's barrier: in bulk where the card can.
struct Copier {
    uint32_t full;
    uint64_t policy;
    int lane;

#if __CUDA_ARCH__ >= 900
    static constexpr int ARRIVALS = 1;
    // `bytes` in all are to come.
    __device__ __forceinline__ void begin(int bytes) const {
        if (lane == 0) barrier_expect(full, bytes);
        __syncwarp();
    }
    // Copy runs 0 .. n, each a multiple of 16 bytes, that `run` describes. All lanes issue at once: one lane
    // after the other reached 70% of that rate where a stage has 16 runs.
    template <class F>
    __device__ __forceinline__ void runs(int n, F run) const {
        for (int i = lane; i < n; i += 32) {
            const Run r = run(i);
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                "[%0], [%1], %2, [%3], %4;" ::"r"(r.to),
                "l"(r.from), "r"(r.bytes), "r"(full), "l"(policy)
                : "memory");
        }
    }
    __device__ __forceinline__ void end() const {}
#else
    static constexpr int ARRIVALS = 32;
    __device__ __forceinline__ void begin(int) const {}
    template <class F>
    __device__ __forceinline__ void runs(int n, F run) const {
#pragma unroll 1
        for (int i = 0; i < n; ++i) {
            const Run r = run(i);
            for (int at = lane * 16; at < r.bytes; at += 512)
                stream_16(r.to + at, static_cast<const char*>(r.from) + at, 16, policy);
        }
    }
    __device__ __forceinline__ void end() const {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full) : "memory");
    }
#endif
};

// ---- clusters: sums travel as stores that the receiver's barrier counts, so nobody fences ----------

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again; }" ::"r"(barrier)
        : "memory");
}
__device__ __forceinline__ uint32_t address_in(uint32_t shared, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}
__device__ __forceinline__ void send(uint32_t to, uint32_t low, uint32_t high, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
        "r"(low), "r"(high), "r"(barrier)
        : "memory");
}
#endif
