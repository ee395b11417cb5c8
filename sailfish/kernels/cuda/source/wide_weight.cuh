// Turns words of 4-bit codes into pairs of 16-bit weights: what both wide products do in registers.
#pragma once
#include "base.cuh"

#ifdef F16
using Element = f16;
constexpr uint32_t MAGIC = 0x64006400, MINUS_MAGIC = 0xE400E400, MINUS_MIDDLE = 0xE408E408;
constexpr uint32_t MINUS_ONE = 0xBC00BC00, ONE = 0x3C003C00;
#define FMA2 "fma.rn.f16x2"
#else
using Element = bf16;
constexpr uint32_t MAGIC = 0x43004300, MINUS_MAGIC = 0xC300C300, MINUS_MIDDLE = 0xC308C308;
constexpr uint32_t MINUS_ONE = 0xBF80BF80, ONE = 0x3F803F80;
#define FMA2 "fma.rn.bf16x2"
#endif

__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm(FMA2 " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// MAGIC plus the lowest code of each half, exactly.
__device__ __forceinline__ uint32_t lowest_codes(uint32_t word) {
    uint32_t pair;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(pair) : "r"(word), "r"(0x000f000fu), "r"(MAGIC));  // (a & b) | c
    return pair;
}
__device__ __forceinline__ uint32_t load_pair_of(uint32_t shared) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(shared) : "memory");
    return __byte_perm(x, 0, 0x1010);
}

// One strip of 16 rows x 64 inputs as a lane has it: a word for each 16 x 16 tile, and for each half of the
// inputs the scales and minus (MAGIC + zero) of its rows lane / 4 and lane / 4 + 8, twice in a register.
struct Strip {
    uint32_t word[4], scale[2][2], minus[2][2];
};

// `codes`, `scales` and `zeros` are addresses in shared memory: 512 bytes, and 16 elements for each of the strip's
// groups, of which there are one or two.
__device__ __forceinline__ Strip load_strip(uint32_t codes, uint32_t scales, uint32_t zeros, int groups, bool has_zero,
                                            int lane) {
    Strip strip;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(strip.word[0]), "=r"(strip.word[1]), "=r"(strip.word[2]), "=r"(strip.word[3])
                 : "r"(codes + lane * 16)
                 : "memory");
    scales += lane / 4 * 2, zeros += lane / 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            strip.scale[half][r] = strip.scale[0][r];
            strip.minus[half][r] = has_zero ? strip.minus[0][r] : MINUS_MIDDLE;
            if (half > 0 && groups == 1) continue;
            strip.scale[half][r] = load_pair_of(scales + half * 32 + r * 16);
            if (has_zero)
                strip.minus[half][r] = fma2(load_pair_of(zeros + half * 32 + r * 16), MINUS_ONE, MINUS_MAGIC);
        }
    return strip;
}

// The A registers of the strip's four 16 x 16 tiles.
__device__ __forceinline__ void dequantise(uint32_t (&a)[4][4], const Strip& strip) {
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            a[t][j] = fma2(fma2(lowest_codes(strip.word[t] >> 4 * j), ONE, strip.minus[t / 2][j % 2]),
                           strip.scale[t / 2][j % 2], 0x80008000);
}
