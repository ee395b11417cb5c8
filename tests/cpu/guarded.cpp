// Calls every kernel on buffers of exactly their size, with more threads than cores. Built with sanitizers.
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

extern "C" {
void sf_set_threads(int64_t);
void sf_read_memory(const uint8_t*, int64_t, int32_t*);
void sf_linear_int4(const void*, int64_t, int64_t, int64_t, const uint8_t*, const void*, const void*, int64_t,
                    int64_t, int64_t, int64_t, const void*, int64_t, void*);
void sf_linear_int8(const int8_t*, const float*, int64_t, int64_t, const int8_t*, const float*, int64_t,
                    const void*, int64_t, int64_t, void*);
void sf_linear_bf16(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, const uint16_t*, int64_t,
                    uint16_t*);
}

static int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// bfloat16 and float32 ones alike are finite where every half word is 0x3f80.
static std::vector<uint16_t> ones(int64_t n, bool is_bf16) {
    return std::vector<uint16_t>(is_bf16 ? n : 2 * n, 0x3f80);
}

static int products() {
    int n = 0;
    for (const int64_t n_tokens : {1, 5, 12, 13, 40}) {
        for (const int64_t n_in : {1, 63, 128, 200, 449}) {
            for (const int64_t n_out : {1, 16, 31, 130}) {
                for (const int64_t asked : {32, 64, 128, 1 << 20}) {
                    for (const bool is_bf16 : {false, true}) {
                        const int64_t group = n_in <= asked ? up(n_in, 64) : asked;
                        const int64_t width = up(up(n_in, 64), group), rows = up(n_out, 64);
                        const std::vector<uint8_t> packed(rows * width / 2, 0x9a);
                        const auto scale = ones(rows * width / group, is_bf16), bias = ones(n_out, is_bf16);
                        const auto x = ones(n_tokens * n_in, is_bf16);
                        const int64_t activation = n_out % 16 ? 0 : n % 3;
                        auto out = ones(n_tokens * n_out / (activation ? 2 : 1), is_bf16);
                        sf_linear_int4(x.data(), n_tokens, n_in, is_bf16, packed.data(), scale.data(),
                                       n % 2 ? scale.data() : nullptr, is_bf16, n_out, width, group,
                                       n % 5 ? bias.data() : nullptr, activation, out.data());
                        ++n;
                    }
                }
            }
        }
    }
    return n;
}

static int products_by_rows() {
    int n = 0;
    for (const int64_t n_tokens : {1, 7, 13}) {
        for (const int64_t n_in : {1, 64, 129}) {
            for (const int64_t n_out : {1, 16, 35}) {
                for (const bool is_bf16 : {false, true}) {
                    const std::vector<int8_t> x(n_tokens * n_in, -128), weight(n_out * n_in, 127);
                    const std::vector<float> token_scale(n_tokens, 1), scale(n_out, 1);
                    const auto bias = ones(n_out, is_bf16);
                    const int64_t activation = n_out % 16 ? 0 : n % 3;
                    auto out = ones(n_tokens * n_out / (activation ? 2 : 1), is_bf16);
                    const uint16_t* added = n % 5 ? bias.data() : nullptr;
                    sf_linear_int8(x.data(), token_scale.data(), n_tokens, n_in, weight.data(), scale.data(),
                                   n_out, added, activation, is_bf16, out.data());
                    if (is_bf16) {
                        const auto wide_x = ones(n_tokens * n_in, true), wide = ones(n_out * n_in, true);
                        sf_linear_bf16(wide_x.data(), n_tokens, n_in, wide.data(), n_out, added, activation,
                                       out.data());
                    }
                    ++n;
                }
            }
        }
    }
    return n;
}

int main() {
    sf_set_threads(4);
    const std::vector<uint8_t> bytes(64 * 5000, 1);
    int32_t word = 0;
    sf_read_memory(bytes.data(), int64_t(bytes.size()), &word);
    std::thread other([] { products(); });
    const int n = products() + products_by_rows();
    other.join();
    std::printf("%d products\n", n);
    return word != 0;
}
