// Attention of single queries over pages in place: a task is one key/value head of one sequence.
#include <algorithm>
#include <cmath>

#include "isa.h"
#include "pool.h"

namespace sailfish {
namespace {

constexpr int kTokens = 64;   // whose scores are softened together
constexpr int kHeads = 4;     // queries that read a key or value at once
constexpr int kWidth = 256;   // elements of a head, at most

template <class T>
struct Span {
    const T* q;  // [sequences, heads, width]
    const T *k, *v;  // [blocks, page, kv_heads, width]
    const int32_t* table;  // [rows, table_width]: the block of each page
    const int32_t *row, *length;  // [sequences]
    int64_t table_width, n_heads, n_kv_heads, width, page;
    int64_t window;  // 0: none
    float scale;
    T* out;  // as q

    // Where a token's key lies in k, and its value in v.
    int64_t at(int64_t sequence, int64_t head, int64_t token) const {
        const int64_t block = table[row[sequence] * table_width + token / page];
        return ((block * page + token % page) * n_kv_heads + head) * width;
    }
};

// Attends with N heads from `head` on, which share the key/value head.
template <class T, int N>
void attend(const Span<T>& span, int64_t sequence, int64_t kv_head, int64_t head) {
    const int64_t width = span.width, first_q = (sequence * span.n_heads + head) * width;
    float q[N][kWidth], total[N][kWidth], sum[N], most[N], score[N][kTokens];
    for (int n = 0; n < N; ++n) {
        sum[n] = 0;
        most[n] = -INFINITY;
        for (int64_t e = 0; e < width; e += kLanes) {
            store(q[n] + e, mul(load(span.q + first_q + n * width + e), splat(span.scale)));
            store(total[n] + e, splat(0));
        }
    }
    const int64_t length = span.length[sequence];
    const int64_t begin = span.window && length > span.window ? length - span.window : 0;
    for (int64_t start = begin; start < length; start += kTokens) {
        const int n_tokens = int(std::min<int64_t>(kTokens, length - start));
        int64_t at[kTokens];
        for (int t = 0; t < kTokens; ++t) at[t] = span.at(sequence, kv_head, start + std::min(t, n_tokens - 1));
        for (int t = 0; t < n_tokens; t += 4) {
            Floats dots[N][4];
            SF_UNROLL for (int n = 0; n < N; ++n) {
                SF_UNROLL for (int i = 0; i < 4; ++i) dots[n][i] = splat(0);
            }
            for (int64_t e = 0; e < width; e += kLanes) {
                SF_UNROLL for (int i = 0; i < 4; ++i) {
                    const Floats k = load(span.k + at[t + i] + e);
                    SF_UNROLL for (int n = 0; n < N; ++n) dots[n][i] = fma(k, load(q[n] + e), dots[n][i]);
                }
            }
            SF_UNROLL for (int n = 0; n < N; ++n) {
                store_sums(score[n] + t, dots[n][0], dots[n][1], dots[n][2], dots[n][3]);
            }
        }
        for (int n = 0; n < N; ++n) {
            for (int t = n_tokens; t < kTokens; ++t) score[n][t] = -INFINITY;
            Floats highest = splat(most[n]);
            for (int t = 0; t < kTokens; t += kLanes) highest = max(highest, load(score[n] + t));
            const float now = max_of(highest), fade = std::exp(most[n] - now);
            Floats added = splat(0);
            for (int t = 0; t < kTokens; t += kLanes) {
                const Floats weight = exp(sub(load(score[n] + t), splat(now)));
                store(score[n] + t, weight);
            }
            for (int t = n_tokens; t < kTokens; ++t) score[n][t] = 0;
            for (int t = 0; t < kTokens; t += kLanes) added = add(added, load(score[n] + t));
            sum[n] = sum[n] * fade + sum_of(added);
            most[n] = now;
            for (int64_t e = 0; e < width; e += kLanes) {
                store(total[n] + e, mul(load(total[n] + e), splat(fade)));
            }
        }
        for (int64_t e = 0; e < width; e += kLanes) {
            Floats sums[N];
            SF_UNROLL for (int n = 0; n < N; ++n) sums[n] = load(total[n] + e);
            for (int t = 0; t < n_tokens; ++t) {
                const Floats v = load(span.v + at[t] + e);
                SF_UNROLL for (int n = 0; n < N; ++n) sums[n] = fma(v, splat(score[n][t]), sums[n]);
            }
            SF_UNROLL for (int n = 0; n < N; ++n) store(total[n] + e, sums[n]);
        }
    }
    for (int n = 0; n < N; ++n) {
        const float by = length ? 1 / sum[n] : 0;
        for (int64_t e = 0; e < width; e += kLanes) {
            store(span.out + first_q + n * width + e, mul(load(total[n] + e), splat(by)));
        }
    }
}

template <class T>
void attention(const Span<T>& span, int64_t n_sequences) {
    const int64_t of_group = span.n_heads / span.n_kv_heads;
    parallel_for(n_sequences * span.n_kv_heads, [&](int64_t task) {
        const int64_t sequence = task / span.n_kv_heads, kv_head = task % span.n_kv_heads;
        for (int64_t head = kv_head * of_group, left = of_group; left > 0;) {
            const int n = int(std::min<int64_t>(left, kHeads));
            if (n == 4) attend<T, 4>(span, sequence, kv_head, head);
            if (n == 3) attend<T, 3>(span, sequence, kv_head, head);
            if (n == 2) attend<T, 2>(span, sequence, kv_head, head);
            if (n == 1) attend<T, 1>(span, sequence, kv_head, head);
            head += n;
            left -= n;
        }
    });
}

}  // namespace
}  // namespace sailfish

// q and out [sequences, heads, width], k and v [blocks, page, kv_heads, width], all bfloat16 or all float32; a
// sequence's blocks are those of its row in the table. Width: a multiple of 16, at most 256.
SF_EXPORT void sf_attention(const void* q, const void* k, const void* v, int64_t is_bf16, const int32_t* table,
                            int64_t table_width, const int32_t* row, const int32_t* length, int64_t n_sequences,
                            int64_t n_heads, int64_t n_kv_heads, int64_t width, int64_t page, int64_t window,
                            float scale, void* out) {
    using namespace sailfish;
    const auto run = [&](auto of) {
        using T = decltype(of);
        const Span<T> span{static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), table, row,
                           length, table_width, n_heads, n_kv_heads, width, page, window, scale,
                           static_cast<T*>(out)};
        attention(span, n_sequences);
    };
    if (is_bf16) {
        run(uint16_t{});
    } else {
        run(float{});
    }
}
