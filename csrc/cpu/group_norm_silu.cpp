// Group norm with SiLU and a bias per row, over channels-last memory: one pass for the statistics, one for the rest.
//
// Statistics never subtract large sums: within a block of pixels, deviations from the mean of every fourth of them, so
// that the squares summed are at most four times the spread; between blocks and channels, the update of Chan, Golub &
// LeVeque (1983) in double. The row bias shifts a channel's mean and leaves its spread alone, so it costs nothing per
// element.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int64_t BLOCK = GroupNormSilu::BLOCK;
constexpr int64_t SAMPLE = 4;  // every fourth pixel of a block gives the centre of its sums
constexpr int64_t CHUNK = 64;  // channels whose blocks one task merges

// One block of pixels, V vectors of channels (or `count` < LANES channels of one vector): a centre near the mean, and
// the first two sums of the deviations from it.
template <int V, typename E>
FASTLDM_INLINE void block_of_channels(const E* x, int64_t pixels, int64_t channels, float* to, int count) {
    const auto at = [&](int64_t pixel, int v) __attribute__((always_inline)) {
        const E* from = x + pixel * channels + v * LANES;
        return count == LANES ? load(from) : load(from, 1, count);
    };
    Floats centre[V] = {}, first[V] = {}, second[V] = {};
    for (int64_t pixel = 0; pixel < pixels; pixel += SAMPLE)
        for (int v = 0; v < V; ++v) centre[v] += at(pixel, v);
    const float samples = static_cast<float>((pixels + SAMPLE - 1) / SAMPLE);
    for (int v = 0; v < V; ++v) centre[v] *= 1.0f / samples;
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
        for (int v = 0; v < V; ++v) {
            const Floats deviation = at(pixel, v) - centre[v];
            first[v] += deviation;
            second[v] += deviation * deviation;
        }
    for (int v = 0; v < V; ++v) {
        store(to + v * LANES, 1, count, centre[v]);
        store(to + v * LANES + channels, 1, count, first[v]);
        store(to + v * LANES + 2 * channels, 1, count, second[v]);
    }
}

template <typename E>
void block_moments(const GroupNormSilu& a, int64_t row, int64_t block) {
    const int64_t start = block * BLOCK, left = a.pixels - start, pixels = left < BLOCK ? left : BLOCK;
    const E* x = static_cast<const E*>(a.x) + (row * a.pixels + start) * a.channels;
    float* to = a.block_moments + (row * a.blocks(a.pixels) + block) * 3 * a.channels;
    int64_t c = 0;
    for (; c + 4 * LANES <= a.channels; c += 4 * LANES) block_of_channels<4>(x + c, pixels, a.channels, to + c, LANES);
    for (; c + LANES <= a.channels; c += LANES) block_of_channels<1>(x + c, pixels, a.channels, to + c, LANES);
    if (c < a.channels) block_of_channels<1>(x + c, pixels, a.channels, to + c, static_cast<int>(a.channels - c));
}

// Mean and spread (the sum of squared deviations) of the channels of a row, merged over its blocks.
void channel_moments(const GroupNormSilu& a, int64_t row, int64_t chunk) {
    const int64_t start = chunk * CHUNK, left = a.channels - start, channels = left < CHUNK ? left : CHUNK;
    double* __restrict mean = a.channel_moments + row * 2 * a.channels + start;
    double* __restrict spread = mean + a.channels;
    for (int64_t c = 0; c < channels; ++c) mean[c] = spread[c] = 0.0;
    for (int64_t pixel = 0, block = 0; pixel < a.pixels; pixel += BLOCK, ++block) {
        const double before = static_cast<double>(pixel);
        const double count = static_cast<double>(a.pixels - pixel < BLOCK ? a.pixels - pixel : BLOCK);
        const double share = count / (before + count), weight = before * share, reciprocal = 1.0 / count;
        const float* centre = a.block_moments + (row * a.blocks(a.pixels) + block) * 3 * a.channels + start;
        const float *first = centre + a.channels, *second = first + a.channels;
        for (int64_t c = 0; c < channels; ++c) {
            const double offset = first[c] * reciprocal, delta = centre[c] + offset - mean[c];
            mean[c] += delta * share;
            spread[c] += second[c] - offset * first[c] + delta * delta * weight;
        }
    }
}

// Merges the channels of a group and writes each one's (mean, scale, bias): result = (x - mean) scale + bias.
void group_coefficients(const GroupNormSilu& a, int64_t row, int64_t group) {
    const int64_t size = a.channels / a.groups, start = group * size;
    const double* mean = a.channel_moments + row * 2 * a.channels + start;
    const double* spread = mean + a.channels;
    const float* row_bias = a.row_bias ? a.row_bias + row * a.channels + start : nullptr;
    const double pixels = static_cast<double>(a.pixels);
    double group_mean = 0.0, group_spread = 0.0;
    for (int64_t c = 0; c < size; ++c) {
        const double share = 1.0 / static_cast<double>(c + 1);
        const double delta = mean[c] + (row_bias ? row_bias[c] : 0.0f) - group_mean;
        group_mean += delta * share;
        group_spread += spread[c] + delta * delta * pixels * static_cast<double>(c) * share;
    }
    const double rstd = 1.0 / __builtin_sqrt(group_spread / (pixels * static_cast<double>(size)) + a.eps);
    float* to = a.coefficients + row * 3 * a.channels + start;
    for (int64_t c = 0; c < size; ++c) {
        to[c] = static_cast<float>(group_mean - (row_bias ? row_bias[c] : 0.0f));
        to[a.channels + c] = static_cast<float>(rstd * a.weight[start + c]);
        to[2 * a.channels + c] = a.bias[start + c];
    }
}

template <bool SILU, typename E>
void normalise(const GroupNormSilu& a, int64_t row, int64_t block) {
    const int64_t start = block * BLOCK, end = start + BLOCK < a.pixels ? start + BLOCK : a.pixels;
    const float* mean = a.coefficients + row * 3 * a.channels;
    const float *scale = mean + a.channels, *bias = scale + a.channels;
    for (int64_t pixel = start; pixel < end; ++pixel) {
        const E* x = static_cast<const E*>(a.x) + (row * a.pixels + pixel) * a.channels;
        E* to = static_cast<E*>(a.result) + (row * a.pixels + pixel) * a.channels;
        const auto result = [&](int64_t c, auto... part) __attribute__((always_inline)) {
            const Floats centred = load(x + c, part...) - load(mean + c, part...);
            const Floats y = centred * load(scale + c, part...) + load(bias + c, part...);
            return SILU ? silu<E>(y) : y;
        };
        int64_t c = 0;
        for (; c + 2 * LANES <= a.channels; c += 2 * LANES) store(to + c, result(c), result(c + LANES));
        for (; c < a.channels; c += LANES) {
            const int left = a.channels - c < LANES ? static_cast<int>(a.channels - c) : LANES;
            store(to + c, 1, left, result(c, 1, left));
        }
    }
}

template <typename E>
void run(const GroupNormSilu& a) {
    const int64_t blocks = a.blocks(a.pixels), chunks = (a.channels + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * blocks; ++task) block_moments<E>(a, task / blocks, task % blocks);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * chunks; ++task) channel_moments(a, task / chunks, task % chunks);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * a.groups; ++task)
            group_coefficients(a, task / a.groups, task % a.groups);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * blocks; ++task)
            if (a.silu)
                normalise<true, E>(a, task / blocks, task % blocks);
            else
                normalise<false, E>(a, task / blocks, task % blocks);
    }
}

}  // namespace

void group_norm_silu(const GroupNormSilu& a) {
    if (a.type == Type::bfloat16)
        run<bfloat16>(a);
    else
        run<float>(a);
}

}  // namespace fastldm::FASTLDM_ISA
