// Guidance, update and the model's next input in one pass: each element is read once and written once.
#include "kernels.h"
#include "vector.h"

namespace fastldm::FASTLDM_ISA {

namespace {

enum Column { T, X0_X, X0_OUT, NEXT_X, NEXT_X0, NEXT_PREV, NOISE, GUIDANCE, CLAMP };

constexpr int64_t RUN = 4096;  // pixels that one task covers

// The pixels of one channel of one tensor.
template <typename E>
struct Pixels {
    E* first;
    int64_t stride;

    Pixels(const Plane& plane, int64_t slot, int64_t channel)
        : first(static_cast<E*>(plane.data) + slot * plane.slot + channel * plane.channel), stride(plane.pixel) {}
};

// `whole`: a vector of neighbours. Else up to LANES pixels, wherever they lie.
template <typename E>
FASTLDM_INLINE Floats read(const Pixels<E>& pixels, int64_t pixel, bool whole, int count) {
    const E* from = pixels.first + pixel * pixels.stride;
    return whole ? load(from) : load(from, pixels.stride, count);
}

template <typename E>
FASTLDM_INLINE void write(const Pixels<E>& pixels, int64_t pixel, bool whole, int count, Floats values) {
    E* to = pixels.first + pixel * pixels.stride;
    if (whole)
        store(to, values);
    else
        store(to, pixels.stride, count, values);
}

template <typename E>
void advance(const GuidedStep& a, int64_t slot, int64_t channel, int64_t pixel, int64_t end, bool neighbours) {
    const float* row = a.table + slot * a.table_slot + a.step[slot] * a.columns;
    const Floats x0_x = splat(row[X0_X]), x0_out = splat(row[X0_OUT]), guidance = splat(row[GUIDANCE]);
    const Floats next_x = splat(row[NEXT_X]), next_x0 = splat(row[NEXT_X0]), next_prev = splat(row[NEXT_PREV]);
    const Floats noise_scale = splat(row[NOISE]), high = splat(row[CLAMP]), low = -high;

    const Pixels<float> latents(a.latents, slot, channel), x0(a.x0, slot, channel);
    const Pixels<float> noise(a.noise.data ? a.noise : a.latents, slot, channel);
    const Pixels<E> out(a.out, slot, channel), conditional(a.out, a.guided ? slot + a.slots : slot, channel);
    const Pixels<E> input(a.model_input, slot, channel);
    const Pixels<E> second_input(a.model_input, a.copies == 2 ? slot + a.slots : slot, channel);

    const auto step = [&](bool whole, int count) __attribute__((always_inline)) {
        Floats e = read(out, pixel, whole, count);
        if (a.guided) e += guidance * (read(conditional, pixel, whole, count) - e);
        const Floats x = read(latents, pixel, whole, count);
        const Floats clean = clamp(x0_x * x + x0_out * e, low, high);
        Floats next = next_x * x + next_x0 * clean + next_prev * read(x0, pixel, whole, count);
        if (a.noise.data) next += noise_scale * read(noise, pixel, whole, count);
        write(latents, pixel, whole, count, next);
        write(x0, pixel, whole, count, clean);
        write(input, pixel, whole, count, next);
        if (a.copies == 2) write(second_input, pixel, whole, count, next);
    };
    if (neighbours)
        for (; pixel + LANES <= end; pixel += LANES) step(true, LANES);
    for (; pixel < end; pixel += LANES) step(false, end - pixel < LANES ? static_cast<int>(end - pixel) : LANES);
}

template <typename E>
void run(const GuidedStep& a) {
    const bool neighbours = a.latents.pixel == 1 && a.x0.pixel == 1 && a.model_input.pixel == 1 && a.out.pixel == 1 &&
                            (!a.noise.data || a.noise.pixel == 1);
    const int64_t runs = (a.pixels + RUN - 1) / RUN, tasks = a.slots * a.channels * runs;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t plane = task / runs, pixel = task % runs * RUN;
        const int64_t end = pixel + RUN < a.pixels ? pixel + RUN : a.pixels;
        advance<E>(a, plane / a.channels, plane % a.channels, pixel, end, neighbours);
    }
}

}  // namespace

void guided_step(const GuidedStep& a) {
    if (a.type == Type::bfloat16)
        run<bfloat16>(a);
    else
        run<float>(a);
}

}  // namespace fastldm::FASTLDM_ISA
