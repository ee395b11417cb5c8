// Products with weights that lie row by row, of any element: inputs are in lanes, whose sums are added up last.
//
// A kernel K names the elements K::Weight and K::X, K::kInputs of which make a vector, and K::Sum, whose lanes
// are K::Number; it has zero(), load(weights) and dot(sum, loaded, x).
#pragma once

#include <utility>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace sailfish {

constexpr int kRowsOut = 16;   // outputs that are written together
constexpr int kRowsAtOnce = 4;  // of the weight, in registers
// Sums in registers are kRowsAtOnce times as many; AVX-512 has 32 registers, AVX2 has 16.
constexpr int kTokensAtOnce = kLanes == 16 ? 6 : 2;
// Of so few tokens products wait for the weights, and ask early for those of the next rows: short rows otherwise
// take nearly twice as long.
constexpr int kStreamed = kLanes == 16 ? 2 : 1;
constexpr int64_t kClaimBytes = 1 << 18;  // of weights that a thread claims at once and keeps in its L2, at most

template <class K>
struct ByRows {
    const typename K::Weight* values;  // [n_out, n_in]
    int64_t n_out, n_in;

    int64_t width() const { return (n_in + K::kInputs - 1) / K::kInputs * K::kInputs; }
};

// Writes the products of N rows of x, which are `width` long and end with zeros, with the kRowsOut rows of the
// weight from `row` on to y[N][kRowsOut]. Past the last row of the weight they are those of the last.
template <class K, int N>
void multiply_rows(const ByRows<K>& weight, int64_t row, const typename K::X* x, typename K::Number* y) {
    const int64_t n_whole = weight.n_in / K::kInputs * K::kInputs, width = weight.width();
    for (int first = 0; first < kRowsOut; first += kRowsAtOnce) {
        const typename K::Weight* rows[kRowsAtOnce];
        typename K::Sum sum[N][kRowsAtOnce];
        SF_UNROLL for (int r = 0; r < kRowsAtOnce; ++r) {
            const int64_t at = row + first + r < weight.n_out ? row + first + r : weight.n_out - 1;
            rows[r] = weight.values + at * weight.n_in;
            SF_UNROLL for (int t = 0; t < N; ++t) sum[t][r] = K::zero();
        }
        const auto step = [&](int64_t at_x, int64_t at_row) __attribute__((always_inline)) {
            typename K::Sum w[kRowsAtOnce];
            SF_UNROLL for (int r = 0; r < kRowsAtOnce; ++r) {
                w[r] = K::load(rows[r] + at_row);
                if (N <= kStreamed) _mm_prefetch(rows[r] + at_row + kRowsAtOnce * weight.n_in, _MM_HINT_T1);
            }
            SF_UNROLL for (int t = 0; t < N; ++t) {
                SF_UNROLL for (int r = 0; r < kRowsAtOnce; ++r) {
                    sum[t][r] = K::dot(sum[t][r], w[r], x + t * width + at_x);
                }
            }
            SF_UNROLL for (int t = 0; t < N; ++t) {
                SF_UNROLL for (int r = 0; r < kRowsAtOnce; ++r) keep(sum[t][r]);
            }
        };
        for (int64_t i = 0; i < n_whole; i += K::kInputs) step(i, i);
        if (n_whole < weight.n_in) {
            typename K::Weight rest[kRowsAtOnce][K::kInputs] = {};
            for (int r = 0; r < kRowsAtOnce; ++r) {
                std::memcpy(rest[r], rows[r] + n_whole, (weight.n_in - n_whole) * sizeof(rest[0][0]));
                rows[r] = rest[r];
            }
            step(n_whole, 0);
        }
        SF_UNROLL for (int t = 0; t < N; ++t) {
            store_sums(y + t * kRowsOut + first, sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        }
    }
}

template <class K>
using MultiplyRows = void (*)(const ByRows<K>&, int64_t, const typename K::X*, typename K::Number*);
template <class K, int... N>
constexpr MultiplyRows<K> multiply_rows_of(int64_t n, std::integer_sequence<int, N...>) {
    constexpr MultiplyRows<K> all[] = {multiply_rows<K, N + 1>...};
    return all[n - 1];
}

// Multiplies all rows of x with the weight on all threads: calls put(token, row, n_rows, y) for every token and
// every kRowsOut rows, or what is left of them.
template <class K, class Put>
void multiply_by_rows(const ByRows<K>& weight, const typename K::X* x, int64_t n_tokens, Put&& put) {
    const int64_t n_strips = (weight.n_out + kRowsOut - 1) / kRowsOut;
    const int64_t most = kClaimBytes / (kRowsOut * weight.n_in * int64_t(sizeof(typename K::Weight))) + 1;
    const int64_t even = n_strips / (4 * n_threads()) + 1;  // for threads to end together
    const int64_t strips = even < most ? even : most;
    parallel_for((n_strips + strips - 1) / strips, [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * strips < n_strips ? (chunk + 1) * strips : n_strips;
        for (int64_t token = 0; token < n_tokens; token += kTokensAtOnce) {
            const int64_t n = n_tokens - token < kTokensAtOnce ? n_tokens - token : kTokensAtOnce;
            const auto multiply = multiply_rows_of<K>(n, std::make_integer_sequence<int, kTokensAtOnce>());
            for (int64_t row = chunk * strips * kRowsOut; row < end * kRowsOut; row += kRowsOut) {
                typename K::Number y[kTokensAtOnce * kRowsOut];
                multiply(weight, row, x + token * weight.width(), y);
                const int64_t n_rows = weight.n_out - row < kRowsOut ? weight.n_out - row : kRowsOut;
                for (int64_t t = 0; t < n; ++t) put(token + t, row, n_rows, y + t * kRowsOut);
            }
        }
    });
}

// Memory that a calling thread keeps for the activations of its next product, by lines of the caches.
struct alignas(64) Line {
    char bytes[64];
};
inline char* kept_bytes(int64_t n_bytes) {
    thread_local std::vector<Line> kept;
    kept.resize((n_bytes + 63) / 64);
    return reinterpret_cast<char*>(kept.data());
}

}  // namespace sailfish
