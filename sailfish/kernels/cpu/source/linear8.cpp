// Products of activations in 8 bits with weights in 8, both with a scale a row, as they lie: integers are summed
// exactly, so that what comes out does not depend on how the work is cut.
#include "isa.h"
#include "outputs.h"
#include "rows.h"

namespace sailfish {
namespace {

struct Int8 {
    using Weight = int8_t;
    using X = Activation8;
    using Sum = Ints;
    using Number = int32_t;
    static constexpr int kInputs = kDotInputs;
    static Ints zero() { return splat_i(0); }
    static Ints load(const int8_t* p) { return load_weights(p); }
    static Ints dot(Ints sum, Ints w, const X* x) { return dot_signed(sum, w, x); }
};

// Writes a token padded with zeros, and kLift times the sum of its values.
void pad(const int8_t* x, int64_t n_in, Activation8* out, int64_t width, int32_t* lift) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n_in; ++i) {
        out[i] = x[i];
        sum += x[i];
    }
    for (int64_t i = n_in; i < width; ++i) out[i] = 0;
    *lift = kLift * sum;
}

template <class T>
void linear_int8(const int8_t* x, const float* x_scale, int64_t n_tokens, const ByRows<Int8>& weight,
                 const float* scale, const T* bias, Activation activation, T* out) {
    const int64_t width = weight.width(), n_bytes = n_tokens * width * int64_t(sizeof(Activation8));
    char* kept = kept_bytes(n_bytes + 4 * n_tokens);
    auto* padded = reinterpret_cast<Activation8*>(kept);
    auto* lift = reinterpret_cast<int32_t*>(kept + n_bytes);
    parallel_for(n_tokens, [&](int64_t t) {
        pad(x + t * weight.n_in, weight.n_in, padded + t * width, width, lift + t);
    });
    multiply_by_rows(weight, padded, n_tokens, [&](int64_t t, int64_t row, int64_t n, const int32_t* sums) {
        float scales[kRowsOut] = {}, y[kRowsOut];
        std::memcpy(scales, scale + row, n * sizeof(float));
        for (int i = 0; i < kRowsOut; i += kLanes) {
            const Floats dots = to_floats(add(load_i(sums + i), splat_i(-lift[t])));
            store(y + i, mul(mul(dots, splat(x_scale[t])), load(scales + i)));
        }
        put_outputs<kRowsOut>(y, bias, activation, out, t, weight.n_out, row, n);
    });
}

}  // namespace
}  // namespace sailfish

// x [tokens, inputs] has a scale for each token, values [outputs, inputs] one for each output; bias [outputs] or
// null and out [tokens, outputs] are bfloat16 or float32. With an activation, 1 silu or 2 gelu_tanh, outputs are
// gates and ups in turns of 8, and out is [tokens, outputs / 2].
SF_EXPORT void sf_linear_int8(const int8_t* x, const float* x_scale, int64_t n_tokens, int64_t n_in,
                              const int8_t* values, const float* scale, int64_t n_out, const void* bias,
                              int64_t activation, int64_t is_bf16, void* out) {
    using namespace sailfish;
    const ByRows<Int8> weight{values, n_out, n_in};
    const auto then = Activation(activation);
    if (is_bf16) {
        linear_int8(x, x_scale, n_tokens, weight, scale, static_cast<const uint16_t*>(bias), then,
                    static_cast<uint16_t*>(out));
    } else {
        linear_int8(x, x_scale, n_tokens, weight, scale, static_cast<const float*>(bias), then,
                    static_cast<float*>(out));
    }
}
