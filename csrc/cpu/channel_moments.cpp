// Mean and variance of every channel over the pixels of a row, in channels-last memory, in one pass.
//
// They never subtract large sums: within a block of pixels, deviations from the mean of every fourth of them, so that
// the squares summed are at most four times the spread; between blocks, the update of Chan, Golub & LeVeque (1983) in
// double.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int64_t BLOCK = ChannelMoments::BLOCK;
constexpr int64_t SAMPLE = 4;  // every fourth pixel of a block gives the centre of its sums
constexpr int64_t CHUNK = 64;  // channels whose blocks one task merges

// One block of pixels, V vectors of channels (or `count` < LANES channels of one vector): a centre near the mean, and
// the first two sums of the deviations from it.
template <int V, typename E>
FASTLDM_INLINE void block_of_channels(const E* x, int64_t pixels, int64_t channels, float* to, int count) {
    const auto at = [&](int64_t pixel, int v) __attribute__((always_inline)) {
        const E* from = x + pixel * channels + v * LANES;
        return count == LANES ? load(from) : load(from, count);
    };
    Floats centre[V] = {}, first[V] = {}, second[V] = {};
    for (int64_t pixel = 0; pixel < pixels; pixel += SAMPLE)
        for (int v = 0; v < V; ++v) centre[v] += at(pixel, v);
    const float samples = static_cast<float>((pixels + SAMPLE - 1) / SAMPLE);
    for (int v = 0; v < V; ++v) centre[v] *= 1.0f / samples;
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
        for (int v = 0; v < V; ++v) {
            if (V > 1) __builtin_prefetch(x + pixel * channels + (v + V) * LANES);  // the channels after these
            const Floats deviation = at(pixel, v) - centre[v];
            first[v] += deviation;
            second[v] += deviation * deviation;
        }
    for (int v = 0; v < V; ++v) {
        store(to + v * LANES, count, centre[v]);
        store(to + v * LANES + channels, count, first[v]);
        store(to + v * LANES + 2 * channels, count, second[v]);
    }
}

template <typename E>
void block_moments(const ChannelMoments& a, int64_t row, int64_t block) {
    const int64_t start = block * BLOCK, left = a.pixels - start, pixels = left < BLOCK ? left : BLOCK;
    const E* x = static_cast<const E*>(a.x) + (row * a.pixels + start) * a.channels;
    float* to = a.blocks + (row * a.blocks_of(a.pixels) + block) * 3 * a.channels;
    int64_t c = 0;
    for (; c + 4 * LANES <= a.channels; c += 4 * LANES) block_of_channels<4>(x + c, pixels, a.channels, to + c, LANES);
    for (; c + LANES <= a.channels; c += LANES) block_of_channels<1>(x + c, pixels, a.channels, to + c, LANES);
    if (c < a.channels) block_of_channels<1>(x + c, pixels, a.channels, to + c, static_cast<int>(a.channels - c));
}

// Mean and spread (the sum of squared deviations), then variance, of the channels of a row, merged over its blocks.
void merge(const ChannelMoments& a, int64_t row, int64_t chunk) {
    const int64_t start = chunk * CHUNK, left = a.channels - start, channels = left < CHUNK ? left : CHUNK;
    double* __restrict mean = a.moments + row * 2 * a.channels + start;
    double* __restrict spread = mean + a.channels;
    for (int64_t c = 0; c < channels; ++c) mean[c] = spread[c] = 0.0;
    for (int64_t pixel = 0, block = 0; pixel < a.pixels; pixel += BLOCK, ++block) {
        const double before = static_cast<double>(pixel);
        const double count = static_cast<double>(a.pixels - pixel < BLOCK ? a.pixels - pixel : BLOCK);
        const double share = count / (before + count), weight = before * share, reciprocal = 1.0 / count;
        const float* centre = a.blocks + (row * a.blocks_of(a.pixels) + block) * 3 * a.channels + start;
        const float *first = centre + a.channels, *second = first + a.channels;
        for (int64_t c = 0; c < channels; ++c) {
            const double offset = first[c] * reciprocal, delta = centre[c] + offset - mean[c];
            mean[c] += delta * share;
            spread[c] += second[c] - offset * first[c] + delta * delta * weight;
        }
    }
    for (int64_t c = 0; c < channels; ++c) spread[c] /= static_cast<double>(a.pixels);
}

template <typename E>
void run(const ChannelMoments& a) {
    const int64_t blocks = a.blocks_of(a.pixels), chunks = (a.channels + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * blocks; ++task) block_moments<E>(a, task / blocks, task % blocks);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * chunks; ++task) merge(a, task / chunks, task % chunks);
    }
}

}  // namespace

void channel_moments(const ChannelMoments& a) {
    if (a.type == Type::bfloat16)
        run<bfloat16>(a);
    else
        run<float>(a);
}

}  // namespace fastldm::FASTLDM_ISA
