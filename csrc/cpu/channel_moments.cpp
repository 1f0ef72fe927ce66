// Mean and variance of every channel over the pixels of a row, in channels-last memory, in one pass.
//
// Sums are of deviations from numbers among which they are. Of 8 pixels, which registers hold, these are the deviations
// from the first; of a block of pixels, from the mean of its first 8. So what is subtracted is a few times the spread
// at most, however far the mean is from 0. Between blocks, the update of Chan, Golub & LeVeque (1983) in double.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int64_t BLOCK = ChannelMoments::BLOCK;
constexpr int64_t CHUNK = 64;  // channels whose blocks one task merges

// P pixels of a vector of channels: the first, and the first two sums of the deviations from it.
struct Sums {
    Floats first, deviations, squares;
};

template <int P>
FASTLDM_INLINE Sums sums_of(const Floats (&x)[P]) {
    Sums sums{x[0], {}, {}};
    for (int p = 1; p < P; ++p) {
        const Floats deviation = x[p] - x[0];
        sums.deviations += deviation;
        sums.squares += deviation * deviation;
    }
    return sums;
}

// Adds P pixels to a block [3, channels]: a centre near the mean, and the first two sums of the deviations from it.
// `part`: how many channels, where they fill no vector.
template <int P, typename... Part>
FASTLDM_INLINE void add(float* block, int64_t channels, bool begins, const Sums& sums, Part... part) {
    float *deviations = block + channels, *squares = deviations + channels;
    if (begins) {
        store(block, part..., sums.first + sums.deviations * (1.0f / P));
        store(deviations, part..., Floats{});
        store(squares, part..., Floats{});
    }
    const Floats offset = sums.first - load(block, part...), sum = sums.deviations + offset * static_cast<float>(P);
    store(deviations, part..., load(deviations, part...) + sum);
    store(squares, part..., load(squares, part...) + (sums.squares + offset * (sums.deviations + sum)));
}

template <int P, typename E>
FASTLDM_INLINE void add_pixels(const E* x, int64_t channels, bool begins, float* block) {
    int64_t c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES) {
        Floats one[P], other[P];
        for (int p = 0; p < P; ++p) load_mixed(x + p * channels + c, one[p], other[p]);
        prefetch<2 * LANES * P>(x + P * (channels + c));  // the next pixels, in the order of memory
        Sums low = sums_of(one), high = sums_of(other);
        unmix<E>(low.first, high.first);
        unmix<E>(low.deviations, high.deviations);
        unmix<E>(low.squares, high.squares);
        add<P>(block + c, channels, begins, low);
        add<P>(block + c + LANES, channels, begins, high);
    }
    for (; c < channels; c += LANES) {
        const int left = channels - c < LANES ? static_cast<int>(channels - c) : LANES;
        Floats pixels[P];
        for (int p = 0; p < P; ++p) pixels[p] = load(x + p * channels + c, left);
        add<P>(block + c, channels, begins, sums_of(pixels), left);
    }
}

template <typename E>
void block_moments(const ChannelMoments& a, int64_t row, int64_t block) {
    constexpr int P = 8;
    const int64_t start = block * BLOCK, left = a.pixels - start, pixels = left < BLOCK ? left : BLOCK;
    const E* x = static_cast<const E*>(a.x) + (row * a.pixels + start) * a.channels;
    float* to = a.blocks + (row * a.blocks_of(a.pixels) + block) * 3 * a.channels;
    int64_t pixel = 0;
    for (; pixel + P <= pixels; pixel += P) add_pixels<P>(x + pixel * a.channels, a.channels, pixel == 0, to);
    for (; pixel < pixels; ++pixel) add_pixels<1>(x + pixel * a.channels, a.channels, pixel == 0, to);
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
