// Products in bfloat16 with sums in float32.
#include "isa.h"
#include "outputs.h"
#include "rows.h"

namespace sailfish {
namespace {

struct Bf16 {
    using Weight = uint16_t;
    using X = ActivationBf16;
    using Sum = Floats;
    using Number = float;
    static constexpr int kInputs = kBf16Inputs;
    static Floats zero() { return splat(0); }
    static Floats load(const uint16_t* p) { return load_bf16_weights(p); }
    static Floats dot(Floats sum, Floats w, const X* x) { return dot_bf16(sum, w, x); }
};

}  // namespace
}  // namespace sailfish

// x [tokens, inputs], values [outputs, inputs], bias [outputs] or null and out [tokens, outputs] are bfloat16.
// With an activation, 1 silu or 2 gelu_tanh, outputs are gates and ups in turns of 8, and out is
// [tokens, outputs / 2].
SF_EXPORT void sf_linear_bf16(const uint16_t* x, int64_t n_tokens, int64_t n_in, const uint16_t* values,
                              int64_t n_out, const uint16_t* bias, int64_t activation, uint16_t* out) {
    using namespace sailfish;
    const ByRows<Bf16> weight{values, n_out, n_in};
    const int64_t width = weight.width();
    auto* padded = reinterpret_cast<ActivationBf16*>(kept_bytes(n_tokens * width * sizeof(ActivationBf16)));
    parallel_for(n_tokens, [&](int64_t t) {
        ActivationBf16* to = padded + t * width;
        for (int64_t i = 0; i < n_in; ++i) copy_bf16(to + i, x[t * n_in + i]);
        for (int64_t i = n_in; i < width; ++i) to[i] = 0;
    });
    multiply_by_rows(weight, padded, n_tokens, [&](int64_t t, int64_t row, int64_t n, const float* y) {
        put_outputs<kRowsOut>(y, bias, Activation(activation), out, t, n_out, row, n);
    });
}
