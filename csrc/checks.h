// Checks at the border to Python: a wrong call raises ValueError before any memory is touched.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fastldm {

inline void require(bool holds, const char* otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

inline Type parse_type(const std::string& name) {
    if (name == "float32") return Type::float32;
    require(name == "bfloat16", "a dtype is float32 or bfloat16");
    return Type::bfloat16;
}

}  // namespace fastldm
