// wgmma with both operands in shared memory. INT8: int8 with int32 sums; BF16: bfloat16; else float8 e4m3.
#pragma once
#include "hopper.cuh"

#if INT8
using Total = int;
#define SUM_AT "+r"
#define KIND "k32.s32.s8.s8 "
#define END ", p;\n}"
__device__ __forceinline__ uint32_t bits_of(Total x) { return uint32_t(x); }
__device__ __forceinline__ Total total_of(uint32_t bits) { return int(bits); }
#else
using Total = float;
#define SUM_AT "+f"
#if BF16
#define KIND "k16.f32.bf16.bf16 "
#define END ", p, 1, 1, 0, 0;\n}"
#else
#define KIND "k32.f32.e4m3.e4m3 "
#define END ", p, 1, 1;\n}"
#endif
__device__ __forceinline__ uint32_t bits_of(Total x) { return __float_as_uint(x); }
__device__ __forceinline__ Total total_of(uint32_t bits) { return __uint_as_float(bits); }
#endif

#define SUMS_4(i) SUM_AT(d[i]), SUM_AT(d[i + 1]), SUM_AT(d[i + 2]), SUM_AT(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NAMED_16 NAMES_0
#define NAMED_32 NAMES_0 ", " NAMES_16
#define NAMED_64 NAMED_32 ", " NAMES_32 ", " NAMES_48
#define NAMED_128 NAMED_64 ", " NAMES_64 ", " NAMES_80 ", " NAMES_96 ", " NAMES_112

// d[64 x N] += a b of 32 bytes of inputs, or = if not `add`.
template <int N>
__device__ __forceinline__ void wgmma(Total* d, uint64_t a, uint64_t b, int add);
template <>
__device__ __forceinline__ void wgmma<32>(Total* d, uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32" KIND
                 "{" NAMED_16 "}, %16, %17" END
                 : SUMS_16(0)
                 : "l"(a), "l"(b), "r"(add));
}
template <>
__device__ __forceinline__ void wgmma<64>(Total* d, uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64" KIND
                 "{" NAMED_32 "}, %32, %33" END
                 : SUMS_32(0)
                 : "l"(a), "l"(b), "r"(add));
}
template <>
__device__ __forceinline__ void wgmma<128>(Total* d, uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128" KIND
                 "{" NAMED_64 "}, %64, %65" END
                 : SUMS_64(0)
                 : "l"(a), "l"(b), "r"(add));
}
template <>
__device__ __forceinline__ void wgmma<256>(Total* d, uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256" KIND
                 "{" NAMED_128 "}, %128, %129" END
                 : SUMS_64(0), SUMS_64(64)
                 : "l"(a), "l"(b), "r"(add));
}
