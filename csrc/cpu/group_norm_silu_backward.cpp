// The gradients of group norm with SiLU and a bias per row, over channels-last memory, in two passes.
//
// With d = x + row_bias - mean, y = weight rstd d + bias and e = grad silu'(y), the first pass sums e and e d for every
// channel of a row. They give the gradients of weight, bias and row_bias, and a group's give the two numbers of
// grad_x = weight rstd e + linear d + constant, the second pass, which finds e again: that costs less than keeping it.
// Sums are taken over fixed blocks of pixels and merged in order, so that no bit depends on the threads.
#include "group_statistics.h"
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

using Arguments = GroupNormSiluBackward;

constexpr int64_t CHUNK = 64;  // numbers that one task adds over the rows

// What a row holds for each channel, as rows of its coefficients: d = x - MEAN, y = d SCALE + BIAS.
enum { MEAN, SCALE, BIAS, LINEAR, CONSTANT };
static_assert(CONSTANT + 1 == Arguments::COEFFICIENTS);

// silu'(x) = s + x s (1 - s) with s = 1 / (1 + exp(-x)), to be multiplied into a result of type E. It is 0 or 1, to
// less than 1e-35, beyond 87.
template <typename E>
FASTLDM_INLINE Floats silu_slope(Floats x) {
#ifdef __AVX512F__
    if (sizeof(E) == 2) {
        x = larger(splat(-87.0f), x);
        const Floats growth = exp_of_minus<E>(x);
        const Floats s = _mm512_rcp14_ps(1.0f + growth);
        return s + x * s * (growth * s);
    }
#endif
    x = clamp(x, splat(-87.0f), splat(87.0f));
    const Floats growth = exp_in_range<E>(-x);
    const Floats s = quotient<E>(splat(1.0f), 1.0f + growth);
    return s + x * s * (growth * s);
}

struct Block {
    int64_t row, start, pixels;
};

Block block_of(const Arguments& a, int64_t task) {
    const int64_t blocks = Arguments::blocks_of(a.pixels), start = task % blocks * Arguments::BLOCK;
    const int64_t left = a.pixels - start;
    return {task / blocks, start, left < Arguments::BLOCK ? left : Arguments::BLOCK};
}

// Calls each(e, d, pixel, v) for the pixels of a block and V vectors of channels from c on. `part`: how many channels,
// where they fill no vector.
template <int V, bool SILU, typename E, typename Each, typename... Part>
FASTLDM_INLINE void over_pixels(const Arguments& a, const Block& block, int64_t c, Each each, Part... part) {
    const float* coefficients = a.coefficients + block.row * Arguments::COEFFICIENTS * a.channels + c;
    Floats mean[V], scale[V], bias[V];
    for (int v = 0; v < V; ++v) {
        mean[v] = load(coefficients + MEAN * a.channels + v * LANES, part...);
        scale[v] = load(coefficients + SCALE * a.channels + v * LANES, part...);
        bias[v] = load(coefficients + BIAS * a.channels + v * LANES, part...);
    }
    const int64_t start = (block.row * a.pixels + block.start) * a.channels + c;
    const E *x = static_cast<const E*>(a.x) + start, *grad = static_cast<const E*>(a.grad) + start;
    for (int64_t pixel = 0; pixel < block.pixels; ++pixel)
        for (int v = 0; v < V; ++v) {
            const int64_t at = pixel * a.channels + v * LANES;
            const Floats d = load(x + at, part...) - mean[v];
            Floats e = load(grad + at, part...);
            if (SILU) e *= silu_slope<E>(d * scale[v] + bias[v]);
            each(e, d, start + at, v);
        }
}

// Calls each(Vectors<V>, c, part...) for all channels.
template <int V>
struct Vectors {
    static constexpr int COUNT = V;
};

template <typename Each>
FASTLDM_INLINE void over_channels(int64_t channels, Each each) {
    int64_t c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES) each(Vectors<2>(), c);
    for (; c + LANES <= channels; c += LANES) each(Vectors<1>(), c);
    if (c < channels) each(Vectors<1>(), c, static_cast<int>(channels - c));
}

template <int V, bool SILU, typename E, typename... Part>
FASTLDM_INLINE void sum_channels(const Arguments& a, const Block& block, float* to, int64_t c, Part... part) {
    Floats first[V] = {}, second[V] = {};
    over_pixels<V, SILU, E>(
        a, block, c,
        [&](Floats e, Floats d, int64_t, int v) __attribute__((always_inline)) {
            first[v] += e;
            second[v] += e * d;
        },
        part...);
    for (int v = 0; v < V; ++v) {
        store(to + c + v * LANES, part..., first[v]);
        store(to + c + v * LANES + a.channels, part..., second[v]);
    }
}

template <int V, bool SILU, typename E, typename... Part>
FASTLDM_INLINE void differentiate_channels(const Arguments& a, const Block& block, int64_t c, Part... part) {
    const float* coefficients = a.coefficients + block.row * Arguments::COEFFICIENTS * a.channels + c;
    Floats scale[V], linear[V], constant[V];
    for (int v = 0; v < V; ++v) {
        scale[v] = load(coefficients + SCALE * a.channels + v * LANES, part...);
        linear[v] = load(coefficients + LINEAR * a.channels + v * LANES, part...);
        constant[v] = load(coefficients + CONSTANT * a.channels + v * LANES, part...);
    }
    E* to = static_cast<E*>(a.grad_x);
    over_pixels<V, SILU, E>(
        a, block, c,
        [&](Floats e, Floats d, int64_t at, int v)
            __attribute__((always_inline)) { store(to + at, part..., e * scale[v] + (d * linear[v] + constant[v])); },
        part...);
}

template <bool SILU, typename E>
void sum(const Arguments& a, int64_t task) {
    float* to = a.blocks + task * 2 * a.channels;
    const Block block = block_of(a, task);
    over_channels(a.channels, [&](auto vectors, int64_t c, auto... part) __attribute__((always_inline)) {
        sum_channels<decltype(vectors)::COUNT, SILU, E>(a, block, to, c, part...);
    });
}

template <bool SILU, typename E>
void differentiate(const Arguments& a, int64_t task) {
    const Block block = block_of(a, task);
    over_channels(a.channels, [&](auto vectors, int64_t c, auto... part) __attribute__((always_inline)) {
        differentiate_channels<decltype(vectors)::COUNT, SILU, E>(a, block, c, part...);
    });
}

// What the first pass needs: MEAN, SCALE and BIAS, and the groups' rstd.
void prepare(const Arguments& a, int64_t row) {
    const int64_t size = a.channels / a.groups;
    const float *means = a.moments + row * 2 * a.channels, *variances = means + a.channels;
    const float* row_bias = a.row_bias ? a.row_bias + row * a.channels : nullptr;
    float* to = a.coefficients + row * Arguments::COEFFICIENTS * a.channels;
    for (int64_t group = 0; group < a.groups; ++group) {
        const int64_t start = group * size;
        const GroupStatistics statistics =
            group_statistics(means + start, variances + start, row_bias ? row_bias + start : nullptr, size, a.eps);
        a.rstd[row * a.groups + group] = statistics.rstd;
        for (int64_t c = start; c < start + size; ++c) {
            to[MEAN * a.channels + c] = static_cast<float>(statistics.mean - (row_bias ? row_bias[c] : 0.0f));
            to[SCALE * a.channels + c] = static_cast<float>(statistics.rstd * a.weight[c]);
            to[BIAS * a.channels + c] = a.bias[c];
        }
    }
}

// What the first pass leaves: a row's part of the gradients of weight and bias as its sums, the gradient of its row
// bias, and what the second pass needs, LINEAR and CONSTANT.
void merge(const Arguments& a, int64_t row) {
    double* __restrict grad_bias = a.sums + row * 2 * a.channels;
    double* __restrict grad_weight = grad_bias + a.channels;
    for (int64_t c = 0; c < 2 * a.channels; ++c) grad_bias[c] = 0.0;
    const int64_t blocks = Arguments::blocks_of(a.pixels);
    for (int64_t block = 0; block < blocks; ++block) {
        const float* from = a.blocks + (row * blocks + block) * 2 * a.channels;
        for (int64_t c = 0; c < 2 * a.channels; ++c) grad_bias[c] += from[c];
    }

    const int64_t size = a.channels / a.groups;
    const double pixels = static_cast<double>(a.pixels), numbers = pixels * static_cast<double>(size);
    const float* means = a.moments + row * 2 * a.channels;
    float* coefficients = a.coefficients + row * Arguments::COEFFICIENTS * a.channels;
    for (int64_t group = 0; group < a.groups; ++group) {
        const int64_t start = group * size;
        const double rstd = a.rstd[row * a.groups + group];
        double first = 0.0, second = 0.0;
        for (int64_t c = start; c < start + size; ++c) {
            grad_weight[c] *= rstd;
            first += a.weight[c] * grad_bias[c];
            second += a.weight[c] * grad_weight[c];
        }
        const double linear = -rstd * rstd * second / numbers, constant = -rstd * first / numbers;
        for (int64_t c = start; c < start + size; ++c) {
            coefficients[LINEAR * a.channels + c] = static_cast<float>(linear);
            coefficients[CONSTANT * a.channels + c] = static_cast<float>(constant);
            const double offset = means[c] - static_cast<double>(coefficients[MEAN * a.channels + c]);
            a.grad_row_bias[row * a.channels + c] =
                static_cast<float>(a.weight[c] * rstd * grad_bias[c] + pixels * (linear * offset + constant));
        }
    }
}

// Adds the rows' parts of the gradients of bias and weight, `count` of their 2 x channels numbers from `start` on.
void add_rows(const Arguments& a, int64_t start, int64_t count) {
    double total[CHUNK] = {};
    for (int64_t row = 0; row < a.rows; ++row)
        for (int64_t i = 0; i < count; ++i) total[i] += a.sums[row * 2 * a.channels + start + i];
    for (int64_t i = 0; i < count; ++i) a.grad_affine[start + i] = static_cast<float>(total[i]);
}

template <bool SILU, typename E>
void run(const Arguments& a) {
    const int64_t tasks = a.rows * Arguments::blocks_of(a.pixels), numbers = 2 * a.channels;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) prepare(a, row);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) sum<SILU, E>(a, task);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) merge(a, row);
#pragma omp for schedule(static) nowait
        for (int64_t start = 0; start < numbers; start += CHUNK)
            add_rows(a, start, numbers - start < CHUNK ? numbers - start : CHUNK);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) differentiate<SILU, E>(a, task);
    }
}

}  // namespace

void group_norm_silu_backward(const Arguments& a) {
    if (a.type == Type::bfloat16)
        a.silu ? run<true, bfloat16>(a) : run<false, bfloat16>(a);
    else
        a.silu ? run<true, float>(a) : run<false, float>(a);
}

}  // namespace fastldm::FASTLDM_ISA
