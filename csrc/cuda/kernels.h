// The arguments of the CUDA kernels and their launches; compiled by nvcc, called from module.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastldm {

enum class Type : int { float32, bfloat16, float16 };

// silu(group_norm(x + row_bias)) of dense channels-last rows [rows, pixels, channels] in one pass over memory.
//
// A thread-block cluster takes all pixels of a slice of neighbouring groups of one row; each of its `splits` blocks
// keeps its share of the pixels in shared memory, and they add up their sums through distributed shared memory.
struct GroupNormSilu {
    const void* x;
    void* result;
    const void* weight;    // [channels]
    const void* bias;      // [channels]
    const void* row_bias;  // [rows, channels], or null
    int64_t row_bias_stride;
    int64_t rows, pixels, channels;
    int groups, groups_per_slice, splits;
    float eps;
    bool silu;
    Type type, affine_type, row_bias_type;
};

// One tensor of a guided step: where it starts, and how many elements lie between slots, channels and pixels.
struct Plane {
    void* data;
    int64_t slot, channel, pixel;
};

// One row of every slot's sampler table applied in place; names as in fastldm/ops/sampling.py.
struct GuidedStep {
    Plane latents, x0, model_input, out, noise;  // noise.data may be null
    const float* table;                          // [slots or 1, table_rows, columns]
    const int64_t* step;                         // [slots]
    int64_t slots, channels, pixels;
    int64_t table_slot, table_rows, columns;
    bool twice;   // model_input holds the next latents twice
    bool guided;  // out holds the unconditional half, then the conditional one
    Type type;    // of model_input and out
};

cudaError_t launch(const GroupNormSilu&, cudaStream_t);
cudaError_t launch(const GuidedStep&, cudaStream_t);

// Dynamic shared memory of one block of a GroupNormSilu, in bytes.
int64_t shared_bytes(const GroupNormSilu&);

}  // namespace fastldm
