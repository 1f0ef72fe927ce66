// Elements of tensors as float32: one at a time, and 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace fastldm {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename E>
__device__ E from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

__device__ inline float read(const void* from, int64_t index, Type type) {
    switch (type) {
        case Type::float32:
            return static_cast<const float*>(from)[index];
        case Type::bfloat16:
            return to_float(static_cast<const __nv_bfloat16*>(from)[index]);
        default:
            return to_float(static_cast<const __half*>(from)[index]);
    }
}

// 16 bytes of neighbouring elements, moved as one.
template <typename E>
struct alignas(16) Vector {
    static constexpr int SIZE = 16 / sizeof(E);
    E values[SIZE];
};

// function.template operator()<E>() for the element type that `type` names.
template <typename Function>
auto with_type(Type type, const Function& function) {
    switch (type) {
        case Type::float32:
            return function(float{});
        case Type::bfloat16:
            return function(__nv_bfloat16{});
        default:
            return function(__half{});
    }
}

}  // namespace fastldm
