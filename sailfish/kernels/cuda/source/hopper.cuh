// Hopper's clusters, barriers in shared memory, bulk copies and register hand-over, as functions.
#pragma once
#include "base.cuh"

// ---- clusters -------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t block_of_cluster() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ uint32_t blocks_of_cluster() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// Every thread of the cluster arrives and waits. It orders no memory, which would fence the whole GPU.
__device__ __forceinline__ void meet_in_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The address, as another block of the cluster has it, of what lies at `shared` here.
__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, uint32_t block) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(block));
    return address;
}
// One word, or four, to a block of the cluster; their bytes count towards a barrier of that block.
__device__ __forceinline__ void send(uint32_t address, uint32_t x, uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address), "r"(x),
                 "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void send(uint32_t address, const uint32_t (&x)[4], uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     address),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(barrier)
                 : "memory");
}

// ---- barriers in shared memory ---------------------------------------------------------------------

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra AGAIN;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// The threads of one group of `n` meet at the block's barrier `id`.
__device__ __forceinline__ void meet_in_group(uint32_t id, uint32_t n) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}
// True in one lane of a converged warp; the compiler knows that the rest is uniform.
__device__ __forceinline__ bool is_leader() {
    uint32_t is_it;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is_it));
    return is_it;
}

// ---- the bulk copy engine --------------------------------------------------------------------------

struct alignas(64) BoxMap {
    uint64_t words[16];
};
// The box of `map` at (x, y) to shared memory; its bytes count towards `barrier`.
__device__ __forceinline__ void fetch_box(uint32_t shared, const BoxMap& map, int x, int y, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
        "l"(&map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
// Shared memory to the box of `map` at (x, y), clipped at the tensor's edges.
__device__ __forceinline__ void put_box(const BoxMap& map, int x, int y, uint32_t shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
                 "r"(y), "r"(shared)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Wait until all but the last N boxes that were put have left shared memory.
template <int N>
__device__ __forceinline__ void wait_for_boxes() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Ordinary writes to shared memory are seen by the copy engine.
__device__ __forceinline__ void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers -------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
