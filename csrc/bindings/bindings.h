// What the bindings share: one file an op, each with a function that adds it to the module fastldm._C.
// fastldm/ops/cpp checks the tensors and calls these; addresses are integers, sizes and strides count elements.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "../isa.h"

namespace fastldm {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_attention(pybind11::module_&);
void bind_convolve(pybind11::module_&);
void bind_group_norm_silu(pybind11::module_&);
void bind_group_norm_silu_backward(pybind11::module_&);
void bind_guided_step(pybind11::module_&);
void bind_interleave(pybind11::module_&);
void bind_geglu(pybind11::module_&);
void bind_layer_norm(pybind11::module_&);
void bind_memory(pybind11::module_&);

}  // namespace fastldm
