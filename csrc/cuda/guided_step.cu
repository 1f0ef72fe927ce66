// Guidance, update and the model's next input in one launch: each element is read once and written once.
#include "elements.cuh"

namespace fastldm {

namespace {

enum Column { T, X0_X, X0_OUT, NEXT_X, NEXT_X0, NEXT_PREV, NOISE, GUIDANCE, CLAMP };

constexpr int THREADS = 256;

template <typename E>
__device__ E& at(const Plane& plane, int64_t slot, int64_t channel, int64_t pixel) {
    return static_cast<E*>(plane.data)[slot * plane.slot + channel * plane.channel + pixel * plane.pixel];
}

template <typename E>
__global__ void __launch_bounds__(THREADS) guided_step(const GuidedStep a) {
    const int64_t size = a.channels * a.pixels;
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= a.slots * size) return;
    const int64_t slot = i / size, rest = i % size;
    // Neighbouring threads take neighbours in memory.
    const bool channels_last = a.latents.channel == 1;
    const int64_t channel = channels_last ? rest % a.channels : rest / a.pixels;
    const int64_t pixel = channels_last ? rest / a.channels : rest % a.pixels;

    const int64_t step = a.step[slot];
    if (step < 0 || step >= a.table_rows) __trap();  // as an index error in PyTorch
    const float* row = a.table + slot * a.table_slot + step * a.columns;

    float e = to_float(at<E>(a.out, slot, channel, pixel));
    if (a.guided) e += row[GUIDANCE] * (to_float(at<E>(a.out, slot + a.slots, channel, pixel)) - e);
    float& x = at<float>(a.latents, slot, channel, pixel);
    float& x0 = at<float>(a.x0, slot, channel, pixel);
    float clean = row[X0_X] * x + row[X0_OUT] * e;
    clean = clean < -row[CLAMP] ? -row[CLAMP] : clean;  // NaN stays NaN
    clean = clean > row[CLAMP] ? row[CLAMP] : clean;
    float next = row[NEXT_X] * x + row[NEXT_X0] * clean + row[NEXT_PREV] * x0;
    if (a.noise.data) next += row[NOISE] * at<float>(a.noise, slot, channel, pixel);
    x = next;
    x0 = clean;
    at<E>(a.model_input, slot, channel, pixel) = from_float<E>(next);
    if (a.twice) at<E>(a.model_input, slot + a.slots, channel, pixel) = from_float<E>(next);
}

}  // namespace

cudaError_t launch(const GuidedStep& a, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>((a.slots * a.channels * a.pixels + THREADS - 1) / THREADS);
    with_type(a.type, [&](auto element) { guided_step<decltype(element)><<<blocks, THREADS, 0, stream>>>(a); });
    return cudaGetLastError();
}

}  // namespace fastldm
