// RMS norm of each row, alone or after the residual add, stored in the model's type or in 8 bits. TYPE: bf16
// or float.
#include "rows.cuh"

// The weight is read before the wait: with few rows the norm is all latency.
template <class T, int N, bool WHOLE>
__device__ __forceinline__ void norm(const T* x, const T* residual, const T* weight, T* sum, void* out,
                                     float* scale, int width, float eps, float shift, int format) {
    __shared__ float scratch[2][32];
    const int64_t at = int64_t(blockIdx.x) * width;
    Row<T, N, WHOLE> row, gain;
    gain.load(weight, width);
    let_next_begin();
    wait_for_previous();
    row.load(x + at, width);
    if (residual != nullptr) {
        Row<T, N, WHOLE> other;
        other.load(residual + at, width);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 8; i += 2)
                row.part[n].set(i, row.part[n][i] + other.part[n][i], row.part[n][i + 1] + other.part[n][i + 1]);
        row.store(sum + at, width);
    }
    float squares = 0.f;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 8; ++i) squares = fmaf(row.part[n][i], row.part[n][i], squares);
    squares = over_block(squares, Sum(), scratch[0]);
    const float factor = rsqrtf(squares / width + eps);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 8; i += 2)
            row.part[n].set(i, row.part[n][i] * factor * (gain.part[n][i] + shift),
                            row.part[n][i + 1] * factor * (gain.part[n][i + 1] + shift));
    row.store(out, scale, blockIdx.x, width, format, scratch[1]);
}

#define DECLARED                                                                                              \
    (const TYPE* x, const TYPE* residual, const TYPE* weight, TYPE* sum, void* out, float* scale, int width, \
     float eps, float shift, int format)
#define GIVEN (x, residual, weight, sum, out, scale, width, eps, shift, format)
KERNEL_OF_ROWS(norm, 1, 1024, DECLARED, GIVEN)
KERNEL_OF_ROWS(norm, 2, 1024, DECLARED, GIVEN)
RAGGED_KERNEL_OF_ROWS(norm, 1, DECLARED, GIVEN)
