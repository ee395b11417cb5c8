// Rows of the embedding by token, plain or in int8, and the soft-cap of logits: the two ends of a model. TYPE: bf16 or float.
// The embedding lets nobody begin before it has waited itself: whatever comes behind it, however early it begins,
// finds the step's tables written.
#include "rows.cuh"

// Eight elements a thread. Grid: tokens, parts of a row.
extern "C" __global__ void __launch_bounds__(256)
embed(const int64_t* token, const TYPE* weight, TYPE* out, int width, float scale, int is_whole) {
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8, n = width - i;
    wait_for_previous();
    let_next_begin();
    if (n <= 0) return;
    const TYPE* from = weight + token[blockIdx.x] * width + i;
    TYPE* to = out + int64_t(blockIdx.x) * width + i;
    Eight<TYPE> x;
    if (is_whole) {
        x.load(from);
    } else {
        x.load_some(from, n);
    }
#pragma unroll
    for (int k = 0; k < 8; k += 2) x.set(k, x[k] * scale, x[k + 1] * scale);
    if (is_whole) {
        x.store(to);
    } else {
        x.store_some(to, n);
    }
}

// The same of a table in int8, one scale a row. Rounded once: value * (scale of the row * scale).
extern "C" __global__ void __launch_bounds__(256)
embed_int8(const int64_t* token, const int8_t* values, const float* row_scale, TYPE* out, int width, float scale,
           int is_whole) {
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8, n = width - i;
    wait_for_previous();
    let_next_begin();
    if (n <= 0) return;
    const int64_t row = token[blockIdx.x];
    const int8_t* from = values + row * width + i;
    TYPE* to = out + int64_t(blockIdx.x) * width + i;
    const float factor = row_scale[row] * scale;
    uint32_t word[2] = {0, 0};
    if (is_whole) {
        const uint2 eight = *reinterpret_cast<const uint2*>(from);
        word[0] = eight.x, word[1] = eight.y;
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (k < n) word[k / 4] |= uint32_t(uint8_t(from[k])) << 8 * (k % 4);
    }
    const auto number = [&](int k) { return float(int(word[k / 4] << 24 - 8 * (k % 4)) >> 24) * factor; };
    Eight<TYPE> x;
#pragma unroll
    for (int k = 0; k < 8; k += 2) x.set(k, number(k), number(k + 1));
    if (is_whole) {
        x.store(to);
    } else {
        x.store_some(to, n);
    }
}

// Eight elements a thread of `count`.
extern "C" __global__ void __launch_bounds__(256)
softcap(const TYPE* x, TYPE* out, int64_t count, float cap, int is_whole) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    const int n = int(count - i < 8 ? count - i : 8);
    let_next_begin();
    wait_for_previous();
    if (n <= 0) return;
    Eight<TYPE> y;
    if (is_whole) {
        y.load(x + i);
    } else {
        y.load_some(x + i, n);
    }
#pragma unroll
    for (int k = 0; k < 8; k += 2) y.set(k, tanhf(y[k] / cap) * cap, tanhf(y[k + 1] / cap) * cap);
    if (is_whole) {
        y.store(out + i);
    } else {
        y.store_some(out + i, n);
    }
}
