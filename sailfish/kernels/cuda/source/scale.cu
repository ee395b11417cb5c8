// Scales the integer sums of an 8-bit product: Y = sum * x_scale * w_scale + bias. TYPE: bf16 or float.
#include "rows.cuh"

// Eight outputs a thread. Grid: tokens, parts of a row.
extern "C" __global__ void __launch_bounds__(256)
scale(const int* sum_TO, const float* x_scale_T, const float* w_scale_O, const TYPE* bias_O, TYPE* y_TO, int n_out) {
    const int begin = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    const int64_t row = int64_t(blockIdx.x) * n_out;
    let_next_begin();
    wait_for_previous();
    const float x_scale = x_scale_T[blockIdx.x];
    Eight<TYPE> y;
    y.clear();
    const int n = n_out - begin;
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
        float out[2] = {0.f, 0.f};
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (k + j < n) {
                const int o = begin + k + j;
                out[j] = float(sum_TO[row + o]) * x_scale * w_scale_O[o];
                if (bias_O != nullptr) out[j] += to_float(bias_O[o]);
            }
        y.set(k, out[0], out[1]);
    }
    if (n >= 8 && n_out % 8 == 0) {
        y.store(y_TO + row + begin);
    } else if (n > 0) {
        y.store_some(y_TO + row + begin, n);
    }
}
