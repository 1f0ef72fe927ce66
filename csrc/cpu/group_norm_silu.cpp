// Group norm with SiLU and a bias per row, over channels-last memory, from the moments of the channels. The row bias is
// part of a channel's mean, so it costs nothing per element.
#include "group_statistics.h"
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int64_t BLOCK = 64;          // pixels of a task
constexpr int64_t STREAMED = 2 << 20;  // bytes of a result from which on it goes past the caches, as it would not stay

// Merges the channels of a group and writes each one's (mean, scale, bias): result = (x - mean) scale + bias.
void group_coefficients(const GroupNormSilu& a, int64_t row, int64_t group) {
    const int64_t size = a.channels / a.groups, start = group * size;
    const double* mean = a.moments + row * 2 * a.channels + start;
    const double* variance = mean + a.channels;
    const float* row_bias = a.row_bias ? a.row_bias + row * a.channels + start : nullptr;
    const GroupStatistics statistics = group_statistics(mean, variance, row_bias, size, a.eps);
    float* to = a.coefficients + row * 3 * a.channels + start;
    for (int64_t c = 0; c < size; ++c) {
        to[c] = static_cast<float>(statistics.mean - (row_bias ? row_bias[c] : 0.0f));
        to[a.channels + c] = static_cast<float>(statistics.rstd * a.weight[start + c]);
        to[2 * a.channels + c] = a.bias[start + c];
    }
}

// P pixels, which share the coefficients read.
template <int P, bool SILU, bool STREAM, typename E>
FASTLDM_INLINE void pixels_of(const GroupNormSilu& a, const E* x, E* to, const float* mean) {
    const float *scale = mean + a.channels, *bias = scale + a.channels;
    const auto result = [](Floats x, Floats mean, Floats scale, Floats bias) __attribute__((always_inline)) {
        const Floats y = (x - mean) * scale + bias;
        return SILU ? silu<E>(y) : y;
    };
    int64_t c = 0;
    for (; c + 2 * LANES <= a.channels; c += 2 * LANES) {
        const Floats means[] = {load(mean + c), load(mean + c + LANES)};
        const Floats scales[] = {load(scale + c), load(scale + c + LANES)};
        const Floats biases[] = {load(bias + c), load(bias + c + LANES)};
        prefetch<2 * LANES * P>(x + P * (a.channels + c));  // the next pixels, in the order of memory
        for (int p = 0; p < P; ++p) {
            const E* from = x + p * a.channels + c;
            const Floats low = result(load(from), means[0], scales[0], biases[0]);
            const Floats high = result(load(from + LANES), means[1], scales[1], biases[1]);
            if constexpr (STREAM)
                stream(to + p * a.channels + c, low, high);
            else
                store(to + p * a.channels + c, low, high);
        }
    }
    for (; c < a.channels; c += LANES) {
        const int left = a.channels - c < LANES ? static_cast<int>(a.channels - c) : LANES;
        const Floats means = load(mean + c, left), scales = load(scale + c, left), biases = load(bias + c, left);
        for (int p = 0; p < P; ++p) {
            const int64_t at = p * a.channels + c;
            store(to + at, left, result(load(x + at, left), means, scales, biases));
        }
    }
}

template <bool SILU, bool STREAM, typename E>
void normalise(const GroupNormSilu& a, int64_t row, int64_t block) {
    constexpr int P = 4;
    const int64_t start = block * BLOCK, end = start + BLOCK < a.pixels ? start + BLOCK : a.pixels;
    const float* coefficients = a.coefficients + row * 3 * a.channels;
    const E* x = static_cast<const E*>(a.x) + row * a.pixels * a.channels;
    E* to = static_cast<E*>(a.result) + row * a.pixels * a.channels;
    int64_t pixel = start;
    for (; pixel + P <= end; pixel += P)
        pixels_of<P, SILU, STREAM>(a, x + pixel * a.channels, to + pixel * a.channels, coefficients);
    for (; pixel < end; ++pixel)
        pixels_of<1, SILU, STREAM>(a, x + pixel * a.channels, to + pixel * a.channels, coefficients);
    if (STREAM) end_of_stream();
}

template <bool SILU, bool STREAM, typename E>
void run(const GroupNormSilu& a) {
    const int64_t blocks = (a.pixels + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * a.groups; ++task)
            group_coefficients(a, task / a.groups, task % a.groups);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * blocks; ++task)
            normalise<SILU, STREAM, E>(a, task / blocks, task % blocks);
    }
}

template <typename E>
void run(const GroupNormSilu& a) {
    const int64_t pixel = a.channels * static_cast<int64_t>(sizeof(E));
    const bool lines = pixel % 64 == 0 && reinterpret_cast<uintptr_t>(a.result) % 64 == 0;
    const bool streams = lines && a.rows * a.pixels * pixel >= STREAMED;
    if (a.silu)
        streams ? run<true, true, E>(a) : run<true, false, E>(a);
    else
        streams ? run<false, true, E>(a) : run<false, false, E>(a);
}

}  // namespace

void group_norm_silu(const GroupNormSilu& a) {
    if (a.type == Type::bfloat16)
        run<bfloat16>(a);
    else
        run<float>(a);
}

}  // namespace fastldm::FASTLDM_ISA
