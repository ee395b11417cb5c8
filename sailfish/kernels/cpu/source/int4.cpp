// Products of activations in 8 bits with weights in 4: y = x @ w.T + bias, x quantised on the way in.
//
// A strip of 16 outputs has, for every 8 inputs, a line of 64 bytes: 32-bit lane r is row r, its bytes' low
// nibbles are inputs 0 to 3, their high nibbles 4 to 7. So a vector of weights is one load, lanes are rows,
// and four activations are broadcast to all of them.
#include <cstdlib>
#include <memory>
#include <utility>

#include "isa.h"
#include "outputs.h"
#include "pool.h"

namespace sailfish {
namespace {

constexpr int kStrip = 16;       // outputs of a strip
constexpr int kLine = 64;        // bytes of a line
constexpr int kLineInputs = 8;   // inputs of a line
constexpr int kBlock = 128;      // inputs that share a scale of the activations, at most
constexpr int kVectors = 2;      // of rows, in registers at once
constexpr int kRows = kVectors * kLanes;
constexpr int kLineVectors = kStrip / kLanes;  // vectors of a line
// Sums in registers are kVectors times as many; AVX-512 has 32 registers, AVX2 has 16.
constexpr int kTokens = kLanes == 16 ? 12 : 4;
constexpr int64_t kChunkBytes = 1 << 15;  // of weights that a thread claims at once, at least

struct Weight {
    const uint8_t* packed;
    const void* scale;  // [strips, groups, 16]
    const void* zero;   // the same, or null: 8 everywhere
    bool has_bf16_scales;
    int64_t n_out, width, group;

    int64_t block() const { return group < kBlock ? group : kBlock; }
    int64_t n_blocks() const { return (width + block() - 1) / block(); }
    int64_t n_groups() const { return width / group; }
};

// Tokens whose activations are quantised together: word w (4 inputs) of token t lies at words[w * n + t].
struct Tokens {
    int64_t first, n;
    int8_t* words;
    float* scale;  // [blocks, n]
    float* sum;    // [blocks, n]: of the quantised activations, times scale
};

template <class T>
void quantise_token(const T* x, int64_t n_in, const Weight& weight, const Tokens& to, int64_t token) {
    const int64_t block = weight.block();
    float values[kBlock];
    int8_t bytes[kBlock];
    for (int64_t b = 0; b < weight.n_blocks(); ++b) {
        const int64_t start = b * block;
        const int64_t n = start + block <= weight.width ? block : weight.width - start;
        int64_t i = 0;
        for (; i + kLanes <= n && start + i + kLanes <= n_in; i += kLanes) store(values + i, load(x + start + i));
        for (; i < n; ++i) values[i] = start + i < n_in ? to_float(x[start + i]) : 0.0f;
        Floats most = splat(0), poison = splat(0);
        for (i = 0; i < n; i += kLanes) {
            const Floats v = load(values + i);
            most = max(abs(v), most);
            poison = fma(v, splat(0), poison);  // NaN where an input is NaN or infinite
        }
        const float largest = max_of(most);
        const float scale = (largest > 0 ? largest / 127 : 1.0f) + sum_of(poison);
        Ints sum = splat_i(0);
        for (i = 0; i < n; i += kLanes) {
            const Ints q = to_ints(div(load(values + i), splat(scale)));
            sum = add(sum, q);
            store_bytes(bytes + i, q);
        }
        for (i = 0; i < n; i += 4) std::memcpy(to.words + (start + i) * to.n + 4 * token, bytes + i, 4);
        to.scale[b * to.n + token] = scale;
        to.sum[b * to.n + token] = scale * float(sum_of(sum));
    }
}

inline Floats load_scales(const void* scales, int64_t at, bool is_bf16) {
    return is_bf16 ? load(static_cast<const uint16_t*>(scales) + at) : load(static_cast<const float*>(scales) + at);
}

// Writes the products of N tokens with kRows rows from `row` on to y[N][kRows].
template <int N>
void multiply(const Weight& weight, int64_t row, const Tokens& tokens, float* y) {
    const int64_t strip_bytes = weight.width / kLineInputs * kLine;
    const uint8_t* rows[kVectors];
    int64_t scales[kVectors];
    SF_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t strip = row / kStrip + v / kLineVectors, lane = v % kLineVectors * kLanes;
        rows[v] = weight.packed + strip * strip_bytes + 4 * lane;
        scales[v] = strip * weight.n_groups() * kStrip + lane;
    }
    for (int i = 0; i < N * kRows; i += kLanes) store(y + i, splat(0));
    const Ints low = splat_i(0x0f0f0f0f);
    const int8_t* words = tokens.words;
    for (int64_t b = 0, start = 0; start < weight.width; ++b, start += weight.block()) {
        const int64_t end = start + weight.block() < weight.width ? start + weight.block() : weight.width;
        Ints sum[N][kVectors];
        SF_UNROLL for (int t = 0; t < N; ++t) {
            SF_UNROLL for (int v = 0; v < kVectors; ++v) sum[t][v] = splat_i(0);
        }
        for (int64_t line = start / kLineInputs; line < end / kLineInputs; ++line, words += 8 * N) {
            Ints codes[kVectors], w[kVectors];
            SF_UNROLL for (int v = 0; v < kVectors; ++v) {
                codes[v] = load_i(rows[v] + line * kLine);
                w[v] = bit_and(codes[v], low);
            }
            SF_UNROLL for (int t = 0; t < N; ++t) {
                const Ints x = splat_bytes(words + 4 * t);
                SF_UNROLL for (int v = 0; v < kVectors; ++v) sum[t][v] = dot(sum[t][v], w[v], x);
            }
            SF_UNROLL for (int v = 0; v < kVectors; ++v) w[v] = bit_and(shift_right_4(codes[v]), low);
            SF_UNROLL for (int t = 0; t < N; ++t) {
                const Ints x = splat_bytes(words + 4 * (N + t));
                SF_UNROLL for (int v = 0; v < kVectors; ++v) sum[t][v] = dot(sum[t][v], w[v], x);
            }
            SF_UNROLL for (int t = 0; t < N; ++t) {
                SF_UNROLL for (int v = 0; v < kVectors; ++v) keep(sum[t][v]);
            }
        }
        const int64_t group = start / weight.group * kStrip;
        SF_UNROLL for (int v = 0; v < kVectors; ++v) {
            const Floats scale = load_scales(weight.scale, scales[v] + group, weight.has_bf16_scales);
            const Floats zero =
                weight.zero ? load_scales(weight.zero, scales[v] + group, weight.has_bf16_scales) : splat(8);
            SF_UNROLL for (int t = 0; t < N; ++t) {
                const Floats dots = mul(to_floats(sum[t][v]), splat(tokens.scale[b * N + t]));
                float* total = y + t * kRows + v * kLanes;  // in memory: registers are for the integers
                store(total, fma(fnma(zero, splat(tokens.sum[b * N + t]), dots), scale, load(total)));
            }
        }
    }
}

using Multiply = void (*)(const Weight&, int64_t, const Tokens&, float*);
template <int... N>
constexpr Multiply multiply_of(int n, std::integer_sequence<int, N...>) {
    constexpr Multiply all[] = {multiply<N + 1>...};
    return all[n - 1];
}

// Memory that a calling thread keeps for the activations of its next product.
uint8_t* scratch(int64_t n_bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<uint8_t, Free> kept;
    thread_local int64_t n_kept = 0;
    if (n_bytes > n_kept) {
        const int64_t n = (n_bytes + 4095) / 4096 * 4096;
        kept.reset(static_cast<uint8_t*>(std::aligned_alloc(4096, n)));
        n_kept = n;
    }
    return kept.get();
}

template <class T>
void linear_int4(const T* x, int64_t n_tokens, int64_t n_in, const Weight& weight, const T* bias,
                 Activation activation, T* out) {
    if (n_tokens == 0) return;
    const int64_t n_tiles = (n_tokens + kTokens - 1) / kTokens, n_blocks = weight.n_blocks();
    const int64_t token_bytes = weight.width + 8 * n_blocks;
    uint8_t* quantised = scratch(n_tokens * token_bytes);
    const auto tile = [&](int64_t i) {
        const int64_t few = n_tokens / n_tiles, more = n_tokens % n_tiles;  // tiles of few + 1 come first
        const int64_t first = i * few + (i < more ? i : more), n = few + (i < more);
        uint8_t* at = quantised + first * token_bytes;
        float* scale = reinterpret_cast<float*>(at + n * weight.width);
        return Tokens{first, n, reinterpret_cast<int8_t*>(at), scale, scale + n * n_blocks};
    };
    parallel_for(n_tiles, [&](int64_t i) {
        const Tokens tokens = tile(i);
        for (int64_t t = 0; t < tokens.n; ++t) {
            quantise_token(x + (tokens.first + t) * n_in, n_in, weight, tokens, t);
        }
    });
    const int64_t part_bytes = kRows * weight.width / 2, n_parts = (weight.n_out + kRows - 1) / kRows;
    const int64_t parts = part_bytes < kChunkBytes ? kChunkBytes / part_bytes : 1;
    parallel_for((n_parts + parts - 1) / parts, [&](int64_t chunk) {
        const int64_t end = (chunk + 1) * parts < n_parts ? (chunk + 1) * parts : n_parts;
        for (int64_t row = chunk * parts * kRows; row < end * kRows; row += kRows) {
            const int64_t n_rows = weight.n_out - row < kRows ? weight.n_out - row : kRows;
            for (int64_t i = 0; i < n_tiles; ++i) {
                const Tokens tokens = tile(i);
                float y[kTokens * kRows];
                multiply_of(int(tokens.n), std::make_integer_sequence<int, kTokens>())(weight, row, tokens, y);
                for (int64_t t = 0; t < tokens.n; ++t) {
                    put_outputs<kRows>(y + t * kRows, bias, activation, out, tokens.first + t, weight.n_out, row,
                                       n_rows);
                }
            }
        }
    });
}

}  // namespace
}  // namespace sailfish

// x [tokens, inputs], bias [outputs] or null and out [tokens, outputs] are bfloat16 or float32; scales and
// zeros (or null) are bfloat16 or float32, [strips, groups, 16]; packed has `width` inputs a row. With an
// activation, 1 silu or 2 gelu_tanh, outputs are gates and ups in turns of 8, and out is [tokens, outputs / 2].
SF_EXPORT void sf_linear_int4(const void* x, int64_t n_tokens, int64_t n_in, int64_t is_bf16,
                              const uint8_t* packed, const void* scale, const void* zero,
                              int64_t has_bf16_scales, int64_t n_out, int64_t width, int64_t group,
                              const void* bias, int64_t activation, void* out) {
    using namespace sailfish;
    const Weight weight{packed, scale, zero, has_bf16_scales != 0, n_out, width, group};
    const auto then = Activation(activation);
    if (is_bf16) {
        linear_int4(static_cast<const uint16_t*>(x), n_tokens, n_in, weight, static_cast<const uint16_t*>(bias),
                    then, static_cast<uint16_t*>(out));
    } else {
        linear_int4(static_cast<const float*>(x), n_tokens, n_in, weight, static_cast<const float*>(bias), then,
                    static_cast<float*>(out));
    }
}
