// How sums in float32 become outputs of an op: with a bias, and with the activation behind a product.
#pragma once

#include "isa.h"

namespace sailfish {

enum Activation : int64_t { kNone, kSilu, kGeluTanh };
constexpr int kTurn = 8;  // gates that follow each other before as many ups do

// Writes n of y to out, with their bias where there is one.
template <class T>
void put_rows(const float* y, const T* bias, T* out, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Floats v = load(y + i);
        store(out + i, bias ? add(v, load(bias + i)) : v);
    }
    for (; i < n; ++i) put(out + i, bias ? y[i] + to_float(bias[i]) : y[i]);
}

// Writes activation(gate) * up of n rows, in turns of 8, to out[n / 2], rounding where the op's contract does.
// n is at most kRows, a multiple of 16.
template <int kRows, class T>
void put_gated(const float* y, const T* bias, Activation activation, T* out, int64_t n) {
    T rows[kRows] = {}, gates[kLanes] = {}, ups[kLanes] = {};
    put_rows(y, bias, rows, n);
    for (int strip = 0; strip < kRows / (2 * kTurn); ++strip) {
        std::memcpy(gates + kTurn * strip, rows + 2 * kTurn * strip, kTurn * sizeof(T));
        std::memcpy(ups + kTurn * strip, rows + 2 * kTurn * strip + kTurn, kTurn * sizeof(T));
    }
    const Floats gate = load(gates);
    store(gates, activation == kSilu ? silu(gate) : gelu_tanh(gate));
    store(gates, mul(load(gates), load(ups)));
    std::memcpy(out, gates, n / 2 * sizeof(T));
}

// Writes n outputs of a token from `row` on, whose sums are y, to its place in out [tokens, n_out], or with an
// activation [tokens, n_out / 2].
template <int kRows, class T>
void put_outputs(const float* y, const T* bias, Activation activation, T* out, int64_t token, int64_t n_out,
                 int64_t row, int64_t n) {
    const T* added = bias ? bias + row : nullptr;
    if (activation) {
        put_gated<kRows>(y, added, activation, out + (token * n_out + row) / 2, n);
    } else {
        put_rows(y, added, out + token * n_out + row, n);
    }
}

}  // namespace sailfish
