// Layer norm with its affine map and the modulation of an adaptive one, a row of channels at a time.
//
// A row is read three times, from the cache after the first: for a centre near the mean, for the first two sums of the
// deviations from it, which therefore lose no digits to a large mean, and for the result.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int64_t SERIAL = 1 << 14;  // fewer numbers than this are done before other threads wake up

FASTLDM_INLINE float sum(Floats values) {
    float total = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) total += values[lane];
    return total;
}

// The first `count` lanes are `value`, the others zero.
FASTLDM_INLINE Floats splat(float value, int count) {
    Floats values = {};
    for (int lane = 0; lane < count; ++lane) values[lane] = value;
    return values;
}

// Calls each(offset, accumulator, part...) for the vectors of a row: four accumulators in turn, the last vector in
// part.
template <typename Each>
FASTLDM_INLINE void over_row(int64_t channels, Each each) {
    int64_t c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES)
        for (int v = 0; v < 4; ++v) each(c + v * LANES, v);
    for (; c + LANES <= channels; c += LANES) each(c, 0);
    if (c < channels) each(c, 0, static_cast<int>(channels - c));
}

template <typename E, typename A>
void normalise(const LayerNorm& a, int64_t row) {
    const E* x = static_cast<const E*>(a.x) + row * a.channels;
    const double channels = static_cast<double>(a.channels);

    Floats sums[4] = {};
    over_row(a.channels,
             [&](int64_t c, int v, auto... part) __attribute__((always_inline)) { sums[v] += load(x + c, part...); });
    const float centre = static_cast<float>(sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / channels);

    Floats first[4] = {}, second[4] = {};
    over_row(a.channels, [&](int64_t c, int v, auto... part) __attribute__((always_inline)) {
        Floats deviation;
        if constexpr (sizeof...(part) == 0)
            deviation = load(x + c) - centre;
        else
            deviation = load(x + c, part...) - splat(centre, static_cast<int>(a.channels - c));
        first[v] += deviation;
        second[v] += deviation * deviation;
    });
    const double offset = sum((first[0] + first[1]) + (first[2] + first[3])) / channels;
    const double square = sum((second[0] + second[1]) + (second[2] + second[3])) / channels;
    const double variance = square - offset * offset;
    const double rstd = 1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + a.eps);
    const float factor = static_cast<float>(rstd), constant = static_cast<float>(-offset * rstd);

    const A* weight = static_cast<const A*>(a.weight);
    const A* bias = static_cast<const A*>(a.bias);
    const int64_t modulated = row / a.rows_a_modulation;
    const E* scale = a.scale ? static_cast<const E*>(a.scale) + modulated * a.scale_stride : nullptr;
    const E* shift = a.shift ? static_cast<const E*>(a.shift) + modulated * a.shift_stride : nullptr;
    E* to = static_cast<E*>(a.result) + row * a.channels;
    over_row(a.channels, [&](int64_t c, int, auto... part) __attribute__((always_inline)) {
        Floats y = (load(x + c, part...) - centre) * factor + constant;
        if (weight) y *= load(weight + c, part...);
        if (bias) y += load(bias + c, part...);
        if (scale) y = y * load(scale + c, part...) + y;
        if (shift) y += load(shift + c, part...);
        if constexpr (sizeof...(part) == 0)
            store(to + c, y);
        else
            store(to + c, part..., y);
    });
}

template <typename E, typename A>
void run(const LayerNorm& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.rows * a.channels > SERIAL)
    for (int64_t row = 0; row < a.rows; ++row) normalise<E, A>(a, row);
}

}  // namespace

void layer_norm(const LayerNorm& a) {
    if (a.type == Type::float32)
        run<float, float>(a);
    else if (a.affine_type == Type::float32)
        run<bfloat16, float>(a);
    else
        run<bfloat16, bfloat16>(a);
}

}  // namespace fastldm::FASTLDM_ISA
