// The gated activation of an MLP, which is a kernel of its own or the epilogue of a product.
#pragma once
#include "base.cuh"

enum Activation { NO_ACTIVATION, SILU, GELU_TANH };

// Both are x times a sigmoid: 0.5 * (1 + tanh(y)) is the sigmoid of 2 y, without its cancellation.
template <class T>
__device__ __forceinline__ float activate(float x, int activation) {
    const float z = activation == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
    if constexpr (sizeof(T) == 4) return x / (1.f + expf(-z));
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-z * 1.4426950409f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
    return x * inverse;
}

template <class T>
__device__ __forceinline__ float low_of(uint32_t pair) { return to_float(T{uint16_t(pair)}); }
template <class T>
__device__ __forceinline__ float high_of(uint32_t pair) { return to_float(T{uint16_t(pair >> 16)}); }

// The products of two pairs, rounded once.
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<bf16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
    return y;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<f16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
    return y;
}

// activation(gate) * up of two neighbours, for products whose rows alternate, eight gates, eight ups: gate, up and
// activation(gate) are rounded to T, as the ops one by one do.
template <class T>
__device__ __forceinline__ uint32_t gated(float gate_low, float gate_high, float up_low, float up_high,
                                          int activation) {
    const uint32_t gate = pack<T>(gate_low, gate_high), up = pack<T>(up_low, up_high);
    const uint32_t factor =
        pack<T>(activate<T>(low_of<T>(gate), activation), activate<T>(high_of<T>(gate), activation));
    return multiply_pairs<T>(factor, up);
}
