#include "isa.h"
#include "pool.h"

namespace {
constexpr int64_t kChunkBytes = 1 << 18;
}

// Reads n_bytes, a multiple of 64, and writes the exclusive or of their 32-bit words to *out: how fast any
// kernel can stream weights.
SF_EXPORT void sf_read_memory(const uint8_t* bytes, int64_t n_bytes, int32_t* out) {
    using namespace sailfish;
    const int64_t n_chunks = (n_bytes + kChunkBytes - 1) / kChunkBytes;
    *out = 0;
    parallel_for(n_chunks, [&](int64_t chunk) {
        const int64_t end = n_bytes < (chunk + 1) * kChunkBytes ? n_bytes : (chunk + 1) * kChunkBytes;
        constexpr int kVectors = 64 / (4 * kLanes);
        Ints seen[kVectors];
        for (Ints& x : seen) x = splat_i(0);
        for (int64_t at = chunk * kChunkBytes; at < end; at += 64) {
            for (int v = 0; v < kVectors; ++v) {
                seen[v] = xor_of(seen[v], load_i(bytes + at + v * 4 * kLanes));
            }
        }
        int32_t words[kLanes], sum = 0;
        for (const Ints& x : seen) {
            std::memcpy(words, &x, sizeof words);
            for (const int32_t word : words) sum ^= word;
        }
        __atomic_fetch_xor(out, sum, __ATOMIC_RELAXED);
    });
}
