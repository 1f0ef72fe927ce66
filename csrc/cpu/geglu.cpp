// The gate of a GEGLU: h gelu(g) with the exact GELU, in one pass over the output of the linear layer before it.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

constexpr int64_t SERIAL = 1 << 14;  // fewer numbers than this are done before other threads wake up

constexpr int64_t AHEAD = 256;  // so many numbers later are fetched: the two streams are short for the processor

// exp(a^2 / 2) (1 - Phi(a)) for a in [0, 13.2] and Phi the normal distribution: the minimax polynomial, in relative
// error, of t = 1 / (1 + a / 4). For results of type bfloat16, degree 5: 2.6e-5. For float, degree 7: 8.5e-8 times
// 1 + a^2 / 4, by which the rounding of a^2 is amplified too.
template <typename E>
FASTLDM_INLINE Floats scaled_tail(Floats t) {
    if (sizeof(E) == sizeof(float)) {
        const Floats high = ((t * -0x1.8eafe6p-4f + 0x1.7a5e46p-2f) * t + -0x1.4b5ba0p-2f) * t + 0x1.5f4234p-2f;
        const Floats middle = (high * t + -0x1.d53990p-7f) * t + 0x1.02e8bap-3f;
        return (middle * t + 0x1.89953ap-4f) * t + 0x1.ba0c4cp-13f;
    }
    const Floats high = ((t * 0x1.fcd396p-3f + -0x1.f5d918p-4f) * t + 0x1.98b7aep-3f) * t + 0x1.23c918p-4f;
    return (high * t + 0x1.a7c466p-4f) * t + -0x1.7a7cc4p-13f;
}

// exp(-a^2 / 2), to be stored as E; 0 from 14.8 on.
template <typename E>
FASTLDM_INLINE Floats bell(Floats a) {
#ifdef __AVX512F__
    return exp_of_minus<E>(a * a, 0.5f);
#else
    const Floats exponent = a * a * -0.5f, least = splat(-87.0f);
    const Floats value = exp_in_range<E>(exponent < least ? least : exponent);
    return exponent < least ? Floats{} : value;
#endif
}

// x Phi(x), to be stored as E. NaN at -infinity, as in PyTorch.
template <typename E>
FASTLDM_INLINE Floats gelu(Floats x) {
    const Floats magnitude = reinterpret_cast<Floats>(reinterpret_cast<Words>(x) & 0x7fffffff);
    const Floats bounded = smaller(splat(14.8f), magnitude);
    const Floats upper = bell<E>(bounded) * scaled_tail<E>(quotient<E>(splat(1.0f), 1.0f + 0.25f * bounded));
    return x * (x > Floats{} ? 1.0f - upper : upper);
}

template <typename E>
void gate(const Geglu& a, int64_t row) {
    const E* hidden = static_cast<const E*>(a.x) + row * 2 * a.channels;
    const E* gates = hidden + a.channels;
    E* to = static_cast<E*>(a.result) + row * a.channels;
    const auto result = [&](int64_t c, auto... part) __attribute__((always_inline)) {
        return load(hidden + c, part...) * gelu<E>(load(gates + c, part...));
    };
    int64_t c = 0;
    for (; c + 2 * LANES <= a.channels; c += 2 * LANES) {
        __builtin_prefetch(hidden + c + AHEAD);
        __builtin_prefetch(gates + c + AHEAD);
        store(to + c, result(c), result(c + LANES));
    }
    for (; c < a.channels; c += LANES) {
        const int left = a.channels - c < LANES ? static_cast<int>(a.channels - c) : LANES;
        store(to + c, left, result(c, left));
    }
}

template <typename E>
void run(const Geglu& a) {
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.rows * a.channels > SERIAL)
    for (int64_t row = 0; row < a.rows; ++row) gate<E>(a, row);
}

}  // namespace

void geglu(const Geglu& a) {
    if (a.type == Type::bfloat16)
        run<bfloat16>(a);
    else
        run<float>(a);
}

}  // namespace fastldm::FASTLDM_ISA
