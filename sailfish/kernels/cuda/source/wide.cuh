// wgmma on 16-bit floats, A from registers.
#pragma once
#include "hopper.cuh"

#ifdef F16
#define WGMMA_KIND ".f32.f16.f16 "
#else
#define WGMMA_KIND ".f32.bf16.bf16 "
#endif
#define WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(i) WGMMA_4(i), WGMMA_4(i + 4), WGMMA_4(i + 8), WGMMA_4(i + 12)
#define WGMMA_32(i) WGMMA_16(i), WGMMA_16(i + 16)
#define WGMMA_64(i) WGMMA_32(i), WGMMA_32(i + 32)
#define WGMMA_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_R16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_R32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_R48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_R64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_R80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_R96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_R112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d[64 x N] += a[64 x 16] b[16 x N], or = if not `add`: a from registers, b from shared memory.
template <int N>
__device__ __forceinline__ void wgmma(float* d, const uint32_t* a, uint64_t b, int add);
#define WGMMA_D32 WGMMA_R0
template <>
__device__ __forceinline__ void wgmma<32>(float* d, const uint32_t* a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16" WGMMA_KIND "{" WGMMA_D32
                 "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}"
                 : WGMMA_16(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#define WGMMA_D64 WGMMA_R0 ", " WGMMA_R16
template <>
__device__ __forceinline__ void wgmma<64>(float* d, const uint32_t* a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_KIND "{" WGMMA_D64
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
                 : WGMMA_32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#define WGMMA_D96 WGMMA_D64 ", " WGMMA_R32
template <>
__device__ __forceinline__ void wgmma<96>(float* d, const uint32_t* a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n96k16" WGMMA_KIND "{" WGMMA_D96
                 "}, {%48, %49, %50, %51}, %52, p, 1, 1, 0;\n}"
                 : WGMMA_32(0), WGMMA_16(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#define WGMMA_D128 WGMMA_R0 ", " WGMMA_R16 ", " WGMMA_R32 ", " WGMMA_R48
template <>
__device__ __forceinline__ void wgmma<128>(float* d, const uint32_t* a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_KIND "{" WGMMA_D128
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"
                 : WGMMA_64(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#define WGMMA_D256 \
    WGMMA_D128 ", " WGMMA_R64 ", " WGMMA_R80 ", " WGMMA_R96 ", " WGMMA_R112
template <>
__device__ __forceinline__ void wgmma<256>(float* d, const uint32_t* a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16" WGMMA_KIND "{" WGMMA_D256
                 "}, {%128, %129, %130, %131}, %132, p, 1, 1, 0;\n}"
                 : WGMMA_64(0), WGMMA_64(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
