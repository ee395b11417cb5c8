// Quantises each row to 8 bits with one scale. TYPE: bf16 or float.
#include "rows.cuh"

template <class T, int N, bool WHOLE>
__device__ __forceinline__ void quantise(const T* x, void* out, float* scale, int width, int format) {
    __shared__ float scratch[32];
    Row<T, N, WHOLE> row;
    let_next_begin();
    wait_for_previous();
    row.load(x + int64_t(blockIdx.x) * width, width);
    row.store(out, scale, blockIdx.x, width, format, scratch);
}

#define DECLARED (const TYPE* x, void* out, float* scale, int width, int format)
#define GIVEN (x, out, scale, width, format)
KERNEL_OF_ROWS(quantise, 1, 1024, DECLARED, GIVEN)
KERNEL_OF_ROWS(quantise, 2, 1024, DECLARED, GIVEN)
KERNEL_OF_ROWS(quantise, 4, 1024, DECLARED, GIVEN)
RAGGED_KERNEL_OF_ROWS(quantise, 4, DECLARED, GIVEN)
