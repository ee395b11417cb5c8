// Starts rows, builds a step's inputs and appends its draws, from the words that one copy brought.
// kernels/step_words.py draws the layout of the words; the plain twin is kernels/plain/step_inputs.py.
#include "base.cuh"

struct Start {
    int row, n_prompt, n_tokens, tokens_at, n_blocks, blocks_at;
    int n_barred, barred_at, n_bias, bias_at;
    int top_k, min_length, seed_low, seed_high;
    float temperature, top_p, min_p, repetition, presence, frequency;
};
struct Run {
    int row, start, query;
};

// Grid: (starts, parts of the copying). rows' columns as kernels/rows.py declares them.
extern "C" __global__ void start_rows(
    const int* words, int starts_at, int* token_RC, int n_positions, int* block_RW, int n_blocks,
    int* n_prompt_R, float* temperature_R, int* top_k_R, float* top_p_R, float* min_p_R, int64_t* seed_R,
    float* penalties_R3, int* min_length_R, int* barred_RS, int max_barred, int* n_barred_R,
    int* bias_id_RB, float* bias_RB, int max_bias, int* n_bias_R) {
    const Start& start = reinterpret_cast<const Start*>(words + starts_at)[blockIdx.x];
    const int64_t row = start.row;
    const int first = blockIdx.y * blockDim.x + threadIdx.x, stride = gridDim.y * blockDim.x;
    for (int i = first; i < start.n_tokens; i += stride)
        token_RC[row * n_positions + i] = words[start.tokens_at + i];
    for (int i = first; i < start.n_blocks; i += stride)
        block_RW[row * n_blocks + i] = words[start.blocks_at + i];
    for (int i = first; i < start.n_barred; i += stride)
        barred_RS[row * max_barred + i] = words[start.barred_at + i];
    for (int i = first; i < start.n_bias; i += stride) {
        bias_id_RB[row * max_bias + i] = words[start.bias_at + i];
        bias_RB[row * max_bias + i] = __int_as_float(words[start.bias_at + start.n_bias + i]);
    }
    if (first != 0) return;
    n_prompt_R[row] = start.n_prompt;
    temperature_R[row] = start.temperature;
    top_k_R[row] = start.top_k;
    top_p_R[row] = start.top_p;
    min_p_R[row] = start.min_p;
    seed_R[row] = int64_t(uint64_t(uint32_t(start.seed_high)) << 32 | uint32_t(start.seed_low));
    penalties_R3[row * 3] = start.repetition;
    penalties_R3[row * 3 + 1] = start.presence;
    penalties_R3[row * 3 + 2] = start.frequency;
    min_length_R[row] = start.min_length;
    n_barred_R[row] = start.n_barred;
    n_bias_R[row] = start.n_bias;
}

// The run that owns token t: the last whose first query is not behind t.
__device__ __forceinline__ int run_of(const Run* runs, int n_runs, int t) {
    int low = 0, high = n_runs - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (runs[middle].query <= t) low = middle;
        else high = middle - 1;
    }
    return low;
}

// One thread for each token, run and sample. Every block appends all blocks itself, the same values to the
// same places, so that it may read them without waiting for another.
extern "C" __global__ void build_inputs(
    const int* words, int n_runs, int n_tokens, int n_samples, int is_decode, const int* token_RC,
    int n_positions, int* block_RW, int n_blocks, int page_tokens, int64_t* token_T, int64_t* position_T,
    int64_t* slot_T, int* row_B, int* kv_len_B, int* query_start_B1, int64_t* at_S, int* row_S,
    int* length_S) {
    const Run* runs = reinterpret_cast<const Run*>(words + RUNS_AT);
    const int* samples = words + RUNS_AT + RUN_WORDS * (n_runs + 1);
    const int* appended = samples + (is_decode ? 0 : n_samples);
    for (int i = threadIdx.x; i < words[0]; i += blockDim.x) {
        const int* block = appended + 3 * i;
        block_RW[int64_t(block[0]) * n_blocks + block[1]] = block[2];
    }
    __syncthreads();
    let_next_begin();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n_tokens) {
        const Run run = runs[is_decode ? i : run_of(runs, n_runs, i)];
        const int position = run.start + i - run.query;
        const bool is_real = position >= 0;
        const int at = is_real ? position : 0;
        const int block = block_RW[int64_t(run.row) * n_blocks + at / page_tokens];
        token_T[i] = token_RC[int64_t(run.row) * n_positions + at];
        position_T[i] = at;
        slot_T[i] = is_real ? int64_t(block) * page_tokens + at % page_tokens : -1;
    }
    if (i <= n_runs) query_start_B1[i] = runs[i].query;
    if (i < n_runs) {
        row_B[i] = runs[i].row;
        kv_len_B[i] = runs[i].start + runs[i + 1].query - runs[i].query;
    }
    if (!is_decode && i < n_samples) {
        const int run = samples[i], end = runs[run + 1].query;
        at_S[i] = end - 1;
        row_S[i] = runs[run].row;
        length_S[i] = runs[run].start + end - runs[run].query;
    }
}

extern "C" __global__ void append_draws(
    const int64_t* token_S, const uint8_t* finite_S, const int* row_S, const int* length_S, int n_samples,
    int* token_RC, int n_positions, int* drawn_S2) {
    wait_for_previous();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_samples) return;
    const int token = int(token_S[i]);
    token_RC[int64_t(row_S[i]) * n_positions + length_S[i]] = token;
    drawn_S2[2 * i] = token;
    drawn_S2[2 * i + 1] = finite_S[i];
}
