// What prefill attention asks of Hopper: boxes of Q and of pages, wgmma with A in registers.
#pragma once
#include "hopper.cuh"

// A loop that the compiler sees makes less code of this kernel than one in assembly.
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
    while (!barrier_is_past(barrier, parity)) {}
}

// ---- the copy engine --------------------------------------------------------------------------------

// A box of Q: 64 columns from `column` of the heads from `head` of the tokens from `token`.
__device__ __forceinline__ void copy_rows(uint32_t to, const TensorMap& map, int column, int head, int token,
                                          uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(&map), "r"(column), "r"(head), "r"(token),
                 "r"(barrier) : "memory");
}
// A box of a cache: 64 columns of one head, in the tokens from `token` of a page. With peers, to the same
// place in every block of the cluster; each one's own barrier counts the bytes.
template <int N_PEERS>
__device__ __forceinline__ void copy_tokens(uint32_t to, const TensorMap& map, int column, int token, int head,
                                            int page, uint32_t barrier) {
    if constexpr (N_PEERS == 1)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to), "l"(&map), "r"(column), "r"(token), "r"(head),
                     "r"(page), "r"(barrier) : "memory");
    else
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to), "l"(&map), "r"(column), "r"(token),
                     "r"(head), "r"(page), "r"(barrier), "h"(uint16_t((1 << N_PEERS) - 1)) : "memory");
}

// ---- wgmma ------------------------------------------------------------------------------------------

// A descriptor's halves: the low one adds up in 32 bits, the high one is a constant. Broadcast, although all
// lanes have the same, so that the compiler keeps it in uniform registers: an add between products, not eight.
constexpr uint32_t SWIZZLED_128 = 1u << 30 | 64;  // rows of 128 bytes, 1024 from 8 rows to the next 8
__device__ __forceinline__ uint32_t descriptor(uint32_t shared, uint32_t leading_bytes) {
    return __shfl_sync(ALL_LANES, (shared & 0x3FFFF) >> 4 | leading_bytes >> 4 << 16, 0);
}

#define SUM_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUM_16(i) SUM_4(i), SUM_4(i + 4), SUM_4(i + 8), SUM_4(i + 12)
#define SUM_32(i) SUM_16(i), SUM_16(i + 16)
#define NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
             "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64 x N] += a[64 x 16] b[16 x N], or = if not `add`; a in registers, b in shared memory with the 16
// (COLUMNS false) or the N (COLUMNS true) innermost. N is twice the length of d.
template <bool COLUMNS>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t* a, uint32_t b, int add) {
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %69, 0;\nmov.b64 b, {%68, %70};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64
                 "}, {%64, %65, %66, %67}, b, p, 1, 1, %71;\n}"
                 : SUM_32(0), SUM_32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(SWIZZLED_128), "n"(COLUMNS));
}
template <bool COLUMNS>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t* a, uint32_t b, int add) {
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %37, 0;\nmov.b64 b, {%36, %38};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32
                 "}, {%32, %33, %34, %35}, b, p, 1, 1, %39;\n}"
                 : SUM_32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(SWIZZLED_128), "n"(COLUMNS));
}
