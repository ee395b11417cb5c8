// wgmma on 8-bit numbers, both operands in shared memory. INT8: 1 for int8 with int32 sums, 0 for float8 e4m3.
#pragma once
#include "wide.cuh"

#if INT8
using Total = int;
#define WGMMA8_SUM "+r"
#define WGMMA8_IN "r"
#define WGMMA8_KIND ".s32.s8.s8 "
#define WGMMA8_END ", p;\n}"
#else
using Total = float;
#define WGMMA8_SUM "+f"
#define WGMMA8_IN "f"
#define WGMMA8_KIND ".f32.e4m3.e4m3 "
#define WGMMA8_END ", p, 1, 1;\n}"
#endif

#define WGMMA8_4(i) WGMMA8_SUM(d[i]), WGMMA8_SUM(d[i + 1]), WGMMA8_SUM(d[i + 2]), WGMMA8_SUM(d[i + 3])
#define WGMMA8_16(i) WGMMA8_4(i), WGMMA8_4(i + 4), WGMMA8_4(i + 8), WGMMA8_4(i + 12)
#define WGMMA8_32(i) WGMMA8_16(i), WGMMA8_16(i + 16)
#define WGMMA8_64(i) WGMMA8_32(i), WGMMA8_32(i + 32)

// d[64 x N] += a[64 x 32] b[32 x N], or = if not `add`.
template <int N>
__device__ __forceinline__ void wgmma8(Total* d, uint64_t a, uint64_t b, int add);
template <>
__device__ __forceinline__ void wgmma8<64>(Total* d, uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k32" WGMMA8_KIND
                 "{" WGMMA_D64 "}, %32, %33" WGMMA8_END
                 : WGMMA8_32(0)
                 : "l"(a), "l"(b), "r"(add));
}
template <>
__device__ __forceinline__ void wgmma8<128>(Total* d, uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32" WGMMA8_KIND
                 "{" WGMMA_D128 "}, %64, %65" WGMMA8_END
                 : WGMMA8_64(0)
                 : "l"(a), "l"(b), "r"(add));
}
template <>
__device__ __forceinline__ void wgmma8<256>(Total* d, uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k32" WGMMA8_KIND
                 "{" WGMMA_D256 "}, %128, %129" WGMMA8_END
                 : WGMMA8_64(0), WGMMA8_64(64)
                 : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void load_four_in_cluster(Total (&x)[4], uint32_t address) {
    const float4 four = load_in_cluster(address);
#if INT8
    x[0] = __float_as_int(four.x), x[1] = __float_as_int(four.y);
    x[2] = __float_as_int(four.z), x[3] = __float_as_int(four.w);
#else
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
#endif
}
