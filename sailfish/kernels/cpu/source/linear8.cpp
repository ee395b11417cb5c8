// Products of activations in 8 bits with weights in 8, both with a scale a row, as they lie: integers are summed
// exactly, so that what comes out does not depend on how the work is cut.
#include <vector>

#include "isa.h"
#include "pool.h"

namespace sailfish {
namespace {

constexpr int kStrip = 16;  // outputs that are written together
constexpr int kRows = 4;    // of the weight, in registers at once
// Sums in registers are kRows times as many; AVX-512 has 32 registers, AVX2 has 16.
constexpr int kTokens = kLanes == 16 ? 6 : 2;
constexpr int64_t kChunkBytes = 1 << 18;  // of weights that a thread claims at once and keeps in its L2, at most

struct Weight {
    const int8_t* values;  // [n_out, n_in]
    const float* scale;    // [n_out]
    int64_t n_out, n_in;
};

// All activations: rows of `width`, padded with zeros.
struct Tokens {
    const Activation8* values;
    const int32_t* sum;  // of each row
    const float* scale;
    int64_t width;
};

// Writes the sums of products of N tokens from `token` on with the strip from `row` on to y[N][kStrip]. Past the
// last row of the weight they are those of the last.
template <int N>
void multiply(const Weight& weight, int64_t row, const Tokens& tokens, int64_t token, int32_t* y) {
    const Activation8* x = tokens.values + token * tokens.width;
    const int64_t n_whole = weight.n_in / kDotInputs * kDotInputs, n_rest = weight.n_in - n_whole;
    for (int first = 0; first < kStrip; first += kRows) {
        const int8_t* rows[kRows];
        Ints sum[N][kRows];
        SF_UNROLL for (int r = 0; r < kRows; ++r) {
            const int64_t at = row + first + r < weight.n_out ? row + first + r : weight.n_out - 1;
            rows[r] = weight.values + at * weight.n_in;
            SF_UNROLL for (int t = 0; t < N; ++t) sum[t][r] = splat_i(0);
        }
        const auto step = [&](int64_t at_x, int64_t at_row) __attribute__((always_inline)) {
            Ints w[kRows];
            SF_UNROLL for (int r = 0; r < kRows; ++r) w[r] = load_weights(rows[r] + at_row);
            SF_UNROLL for (int t = 0; t < N; ++t) {
                SF_UNROLL for (int r = 0; r < kRows; ++r) {
                    sum[t][r] = dot_signed(sum[t][r], w[r], x + t * tokens.width + at_x);
                }
            }
            SF_UNROLL for (int t = 0; t < N; ++t) {
                SF_UNROLL for (int r = 0; r < kRows; ++r) keep(sum[t][r]);
            }
        };
        for (int64_t i = 0; i < n_whole; i += kDotInputs) step(i, i);
        if (n_rest) {
            int8_t rest[kRows][kDotInputs] = {};
            for (int r = 0; r < kRows; ++r) {
                std::memcpy(rest[r], rows[r] + n_whole, n_rest);
                rows[r] = rest[r];
            }
            step(n_whole, 0);
        }
        SF_UNROLL for (int t = 0; t < N; ++t) {
            store_sums(y + t * kStrip + first, sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        }
    }
}

using Multiply = void (*)(const Weight&, int64_t, const Tokens&, int64_t, int32_t*);
template <int... N>
constexpr Multiply multiply_of(int64_t n, std::integer_sequence<int, N...>) {
    constexpr Multiply all[] = {multiply<N + 1>...};
    return all[n - 1];
}

// Writes the outputs of a strip, n of them, from its sums.
template <class T>
void put_strip(const int32_t* y, int32_t lift, float scale, const float* scales, const float* bias, T* out,
               int64_t n) {
    T rows[kStrip];
    for (int i = 0; i < kStrip; i += kLanes) {
        const Floats dots = to_floats(add(load_i(y + i), splat_i(-lift)));
        store(rows + i, add(mul(mul(dots, splat(scale)), load(scales + i)), load(bias + i)));
    }
    std::memcpy(out, rows, n * sizeof(T));
}

struct alignas(64) Line {
    char bytes[64];
};

template <class T>
void linear_int8(const int8_t* x, const float* x_scale, int64_t n_tokens, const Weight& weight, const T* bias,
                 T* out) {
    const int64_t width = (weight.n_in + kDotInputs - 1) / kDotInputs * kDotInputs;
    const int64_t n_values = n_tokens * width * int64_t(sizeof(Activation8));  // a multiple of a vector's bytes
    thread_local std::vector<Line> kept;
    kept.resize((n_values + 4 * n_tokens + 63) / 64);
    auto* values = reinterpret_cast<Activation8*>(kept.data());
    auto* sums = reinterpret_cast<int32_t*>(reinterpret_cast<char*>(kept.data()) + n_values);
    for (int64_t t = 0; t < n_tokens; ++t) {
        int32_t sum = 0;
        for (int64_t i = 0; i < weight.n_in; ++i) {
            const int8_t value = x[t * weight.n_in + i];
            values[t * width + i] = value;
            sum += value;
        }
        for (int64_t i = weight.n_in; i < width; ++i) values[t * width + i] = 0;
        sums[t] = sum;
    }
    const Tokens tokens{values, sums, x_scale, width};
    const int64_t n_strips = (weight.n_out + kStrip - 1) / kStrip, strip_bytes = kStrip * weight.n_in;
    const int64_t most = strip_bytes < kChunkBytes ? kChunkBytes / strip_bytes : 1;
    const int64_t even = n_strips / (4 * n_threads()) + 1;  // for threads to end together
    const int64_t strips = even < most ? even : most;
    parallel_for((n_strips + strips - 1) / strips, [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * strips < n_strips ? (chunk + 1) * strips : n_strips;
        for (int64_t token = 0; token < n_tokens; token += kTokens) {
            const int64_t n = n_tokens - token < kTokens ? n_tokens - token : kTokens;
            for (int64_t row = chunk * strips * kStrip; row < end * kStrip; row += kStrip) {
                const int64_t n_rows = weight.n_out - row < kStrip ? weight.n_out - row : kStrip;
                float scales[kStrip] = {}, added[kStrip] = {};
                std::memcpy(scales, weight.scale + row, 4 * n_rows);
                for (int64_t r = 0; bias && r < n_rows; ++r) added[r] = to_float(bias[row + r]);
                int32_t y[kTokens * kStrip];
                multiply_of(n, std::make_integer_sequence<int, kTokens>())(weight, row, tokens, token, y);
                for (int64_t t = 0; t < n; ++t) {
                    put_strip(y + t * kStrip, kLift * sums[token + t], x_scale[token + t], scales, added,
                              out + (token + t) * weight.n_out + row, n_rows);
                }
            }
        }
    });
}

}  // namespace
}  // namespace sailfish

// x [tokens, inputs] has a scale for each token, values [outputs, inputs] one for each output; bias [outputs] or
// null and out [tokens, outputs] are bfloat16 or float32.
SF_EXPORT void sf_linear_int8(const int8_t* x, const float* x_scale, int64_t n_tokens, int64_t n_in,
                              const int8_t* values, const float* scale, int64_t n_out, const void* bias,
                              int64_t is_bf16, void* out) {
    using namespace sailfish;
    const Weight weight{values, scale, n_out, n_in};
    if (is_bf16) {
        linear_int8(x, x_scale, n_tokens, weight, static_cast<const uint16_t*>(bias),
                    static_cast<uint16_t*>(out));
    } else {
        linear_int8(x, x_scale, n_tokens, weight, static_cast<const float*>(bias), static_cast<float*>(out));
    }
}
