// The arguments of the CPU kernels and, for each instruction set compiled in, their entry points.
#pragma once

#include <cstdint>

namespace fastldm {

enum class Type : int { float32, bfloat16 };

// Mean and variance of every channel over the pixels of dense channels-last rows [rows, pixels, channels].
struct ChannelMoments {
    const void* x;
    double* moments;  // [rows, 2, channels]
    float* blocks;    // scratch [rows, blocks_of(pixels), 3, channels]
    int64_t rows, pixels, channels;
    Type type;
    int threads;

    // Moments are taken over fixed blocks of pixels, whatever the number of threads, and merged in order: the result
    // does not depend on the threads.
    static constexpr int64_t BLOCK = 64;
    static int64_t blocks_of(int64_t pixels) { return (pixels + BLOCK - 1) / BLOCK; }
};

// silu(group_norm(x + row_bias)) of dense channels-last rows [rows, pixels, channels].
struct GroupNormSilu {
    const void* x;
    void* result;
    const double* moments;  // [rows, 2, channels]: mean and variance of x
    const float* weight;    // [channels]
    const float* bias;      // [channels]
    const float* row_bias;  // [rows, channels], or null
    float* coefficients;    // scratch [rows, 3, channels]
    int64_t rows, pixels, channels, groups;
    double eps;
    bool silu;
    Type type;
    int threads;
};

// The gradients of silu(group_norm(x + row_bias)) of dense channels-last rows [rows, pixels, channels].
struct GroupNormSiluBackward {
    const void* x;
    const void* grad;       // of the result
    void* grad_x;           // of x's type, as grad
    float* grad_affine;     // [2, channels]: of bias, then of weight
    float* grad_row_bias;   // [rows, channels]
    const float* moments;   // [rows, 2, channels]: mean and variance of x
    const float* weight;    // [channels]
    const float* bias;      // [channels]
    const float* row_bias;  // [rows, channels], or null
    float* blocks;          // scratch [rows, blocks_of(pixels), 2, channels]
    float* coefficients;    // scratch [rows, COEFFICIENTS, channels]
    double* rstd;           // scratch [rows, groups]
    double* sums;           // scratch [rows, 2, channels]
    int64_t rows, pixels, channels, groups;
    double eps;
    bool silu;
    Type type;
    int threads;

    static constexpr int64_t BLOCK = 64;  // pixels whose sums are float32; those of blocks are added in double
    static constexpr int64_t COEFFICIENTS = 5;
    static int64_t blocks_of(int64_t pixels) { return (pixels + BLOCK - 1) / BLOCK; }
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
    int64_t table_slot, columns;  // elements between the tables of two slots, and between two rows
    int64_t copies;               // model_input holds the next latents this many times: 1, or 2 when guided
    bool guided;
    Type type;  // of model_input and out
    int threads;
};

// result[n, 2 h + a, 2 w + b] = phases[a][b][n, h, w] for the pixels of dense channels-last maps.
struct Interleave {
    const void* phases[2][2];
    void* result;
    int64_t rows, width, bytes;  // rows of a phase, over all its maps; pixels in a row; bytes in a pixel
    int threads;
};

// x * weight + bias + residual, float32, dense channels-last x and strided result; a product of rows has height 1.
struct Convolve {
    const float* x;         // [maps, height, width, channels]
    const float* weight;    // [panels, window_height * window_width * channels, PANEL], zeros beyond the outputs
    const float* bias;      // [outputs], or null
    const float* residual;  // placed as the result is, or null
    float* result;
    int64_t maps, height, width, channels, outputs;
    int64_t window_height, window_width, stride, top, left;  // lines and columns of zeros before the first
    int64_t out_height, out_width;
    int64_t result_map, result_line, result_pixel;  // elements between maps, lines and pixels of the result
    int threads;

    static constexpr int64_t PANEL = 32;  // columns of the weight that lie together
};

// h gelu(g) of dense rows [h, g].
struct Geglu {
    const void* x;  // [rows, 2 channels]
    void* result;   // [rows, channels]
    int64_t rows, channels;
    Type type;
    int threads;
};

// (layer_norm(x) weight + bias) (1 + scale) + shift of dense rows [rows, channels].
struct LayerNorm {
    const void* x;
    void* result;
    const void* weight;                  // [channels] of affine_type, or null
    const void* bias;                    // alike
    const void* scale;                   // [rows / rows_a_modulation, channels] of x's type, or null
    const void* shift;                   // alike
    int64_t scale_stride, shift_stride;  // elements between their rows
    int64_t rows_a_modulation;           // so many neighbouring rows share one
    int64_t rows, channels;
    double eps;
    Type type, affine_type;  // float32 x has float32 weight and bias
    int threads;
};

// One tensor of attention: where it starts, and how many elements lie between rows, heads and tokens.
struct Heads {
    void* data;
    int64_t row, head, token;
};

// softmax(q k^T scale) v; names as in fastldm/ops/attention.py.
struct Attention {
    Heads q, k, v, result;
    const int64_t* key_lengths;  // [rows], or null
    float* packed;               // scratch [group, packed_size()]
    int64_t rows, heads, queries, keys, head_dim;
    int64_t group;  // heads whose keys and values are packed at a time
    float scale;
    bool causal;
    bool pairs;  // bfloat16 is multiplied in pairs, the weights rounded to it
    Type type;
    int threads;

    static constexpr int64_t HEAD_DIM = 512;  // the largest; all are multiples of 8
    static constexpr int64_t KEYS = 128;      // in a block
    int64_t packed_size() const { return (keys + 15) / 16 * 16 * head_dim * 2; }
};

#define FASTLDM_DECLARE(isa)                                     \
    namespace isa {                                              \
    void attention(const Attention&);                            \
    void channel_moments(const ChannelMoments&);                 \
    void convolve(const Convolve&);                              \
    void group_norm_silu(const GroupNormSilu&);                  \
    void group_norm_silu_backward(const GroupNormSiluBackward&); \
    void guided_step(const GuidedStep&);                         \
    void interleave(const Interleave&);                          \
    void geglu(const Geglu&);                                    \
    void layer_norm(const LayerNorm&);                           \
    }

FASTLDM_DECLARE(plain)
#ifdef FASTLDM_X86
FASTLDM_DECLARE(avx2)
FASTLDM_DECLARE(avx512)
FASTLDM_DECLARE(avx512_bf16)
#endif

#undef FASTLDM_DECLARE

}  // namespace fastldm
