// The vector instructions of a level, so that kernels are written once: 16 lanes with AVX-512, else 8.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Before a loop over registers, which an array of them stays in only if the loop is written out.
#if defined(__clang__)
#define SF_UNROLL _Pragma("unroll")
#else
#define SF_UNROLL _Pragma("GCC unroll 32")
#endif

namespace sailfish {

#if defined(__AVX512F__)

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Ints splat_i(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Ints load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
// As in all comparisons of x86, a NaN in either operand gives b.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline float max_of(Floats a) { return _mm512_reduce_max_ps(a); }
inline float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
inline int32_t sum_of(Ints a) { return _mm512_reduce_add_epi32(a); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints shift_right_4(Ints a) { return _mm512_srli_epi32(a, 4); }
inline Ints shift_left_23(Ints a) { return _mm512_slli_epi32(a, 23); }
inline Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
inline Ints xor_of(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
// Stores the low byte of every lane.
inline void store_bytes(int8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
inline Floats load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store_bf16(uint16_t* p, Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i out = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
}
// Adds to every 32-bit lane the sum of its four products, unsigned bytes times signed ones.
inline Ints dot(Ints sum, Ints u8, Ints s8) { return _mm512_dpbusd_epi32(sum, u8, s8); }
inline __m256i halves_of(Ints a) {
    return _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
}
inline __m256 halves_of(Floats a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

#else

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Ints splat_i(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Ints load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline float max_of(Floats a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float sum_of(Floats a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline int32_t sum_of(Ints a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints shift_right_4(Ints a) { return _mm256_srli_epi32(a, 4); }
inline Ints shift_left_23(Ints a) { return _mm256_slli_epi32(a, 23); }
inline Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
inline Ints xor_of(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
inline void store_bytes(int8_t* p, Ints a) {
    const __m256i pairs = _mm256_packs_epi32(a, a);
    const __m256i bytes = _mm256_packs_epi16(pairs, pairs);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}
inline Floats load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store_bf16(uint16_t* p, Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    const __m256i out = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan));
    const __m256i high = _mm256_srli_epi32(out, 16);
    const __m128i both = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), both);
}
inline Ints dot(Ints sum, Ints u8, Ints s8) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, u8, s8);
#else
    // Pairs are summed in 16 bits, which hold them where u8 is below 129.
    const __m256i pairs = _mm256_maddubs_epi16(u8, s8);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
inline __m256i halves_of(Ints a) { return a; }
inline __m256 halves_of(Floats a) { return a; }

#endif

// Writes the sums over lanes of each of four.
inline void store_sums(int32_t* p, Ints a, Ints b, Ints c, Ints d) {
    const __m256i ab = _mm256_hadd_epi32(halves_of(a), halves_of(b));
    const __m256i sums = _mm256_hadd_epi32(ab, _mm256_hadd_epi32(halves_of(c), halves_of(d)));
    const __m128i low = _mm256_castsi256_si128(sums), high = _mm256_extracti128_si256(sums, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_add_epi32(low, high));
}

inline void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    const __m256 ab = _mm256_hadd_ps(halves_of(a), halves_of(b));
    const __m256 sums = _mm256_hadd_ps(ab, _mm256_hadd_ps(halves_of(c), halves_of(d)));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

// Signed bytes times signed ones, exactly: dot_signed adds to every lane its products of kDotInputs weights, as
// load_weights gives them, with activations from x on, and kLift times the activations.
#if defined(__AVX512F__) || defined(__AVXVNNI__)
using Activation8 = int8_t;
constexpr int kDotInputs = 4 * kLanes;
constexpr int kLift = 128;  // which makes weights unsigned
inline Ints load_weights(const int8_t* p) { return xor_of(load_i(p), splat_i(int32_t(0x80808080))); }
inline Ints dot_signed(Ints sum, Ints weights, const Activation8* x) { return dot(sum, weights, load_i(x)); }
#else
using Activation8 = int16_t;
constexpr int kDotInputs = 2 * kLanes;
constexpr int kLift = 0;
inline Ints load_weights(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints dot_signed(Ints sum, Ints weights, const Activation8* x) {
    return add(sum, _mm256_madd_epi16(weights, load_i(x)));
}
#endif

// The same of bfloat16: dot_bf16 adds products of kBf16Inputs weights, as load_bf16_weights gives them.
#if defined(__AVX512BF16__)
using ActivationBf16 = uint16_t;
constexpr int kBf16Inputs = 2 * kLanes;
inline Floats load_bf16_weights(const uint16_t* p) { return as_floats(load_i(p)); }
inline Floats dot_bf16(Floats sum, Floats weights, const ActivationBf16* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)load_i(x));
}
#else
using ActivationBf16 = float;
constexpr int kBf16Inputs = kLanes;
inline Floats load_bf16_weights(const uint16_t* p) { return load_bf16(p); }
inline Floats dot_bf16(Floats sum, Floats weights, const ActivationBf16* x) { return fma(weights, load(x), sum); }
#endif

// Holds x in a register here: GCC otherwise keeps copies of many sums in memory.
inline void keep(Ints& x) { asm("" : "+v"(x)); }
inline void keep(Floats& x) { asm("" : "+v"(x)); }
// e to the x, within 2 units in the last place from -87 to 88 and cut off there: 2^n times a Taylor polynomial
// of what is left, at most ln(2) / 2. NaN stays NaN.
inline Floats exp(Floats x) {
    x = min(splat(88.0f), max(splat(-87.0f), x));
    const Ints n = to_ints(mul(x, splat(1.44269504f)));
    const Floats whole = to_floats(n);
    const Floats r = fnma(whole, splat(-2.12194440e-4f), fnma(whole, splat(0.693359375f), x));
    constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    Floats p = splat(1.0f / 5040);
    for (const float term : kTerms) p = fma(p, r, splat(term));
    return mul(p, as_floats(shift_left_23(add(n, splat_i(127)))));
}
inline Floats sigmoid(Floats x) { return div(splat(1), add(splat(1), exp(sub(splat(0), x)))); }
inline Floats silu(Floats x) { return mul(x, sigmoid(x)); }
// With the tanh approximation: (1 + tanh(u)) / 2 is the sigmoid of 2u.
inline Floats gelu_tanh(Floats x) {
    const Floats cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
    return mul(x, sigmoid(mul(cubic, splat(1.59576912f))));
}
// Four bytes at p in every lane.
inline Ints splat_bytes(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return splat_i(word);
}
inline Floats load(const uint16_t* p) { return load_bf16(p); }
inline void store(uint16_t* p, Floats x) { store_bf16(p, x); }

// One element as float32, rounded to nearest even on the way back.
inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
inline void copy_bf16(float* p, uint16_t x) { *p = to_float(x); }
inline void copy_bf16(uint16_t* p, uint16_t x) { *p = x; }
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *p = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace sailfish
