// Which instruction sets this build carries kernels for, and which of them this CPU and its system can run.
#pragma once

#include <string>
#include <vector>

#include "checks.h"

namespace fastldm {

struct Kernels {
    const char* isa;
    bool (*runs_here)();
    void (*group_norm_silu)(const GroupNormSilu&);
    void (*guided_step)(const GuidedStep&);
    void (*interleave)(const Interleave&);
    void (*geglu)(const Geglu&);
    void (*layer_norm)(const LayerNorm&);
};

// From the narrowest to the widest; the first runs everywhere.
inline const std::vector<Kernels>& compiled() {
    static const std::vector<Kernels> all = {
        {"plain", [] { return true; }, plain::group_norm_silu, plain::guided_step, plain::interleave, plain::geglu,
         plain::layer_norm},
#ifdef FASTLDM_X86
        {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::group_norm_silu,
         avx2::guided_step, avx2::interleave, avx2::geglu, avx2::layer_norm},
        {"avx512",
         [] {
             return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
         },
         avx512::group_norm_silu, avx512::guided_step, avx512::interleave, avx512::geglu, avx512::layer_norm},
#endif
    };
    return all;
}

inline std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels& kernels : compiled())
        if (kernels.runs_here()) names.push_back(kernels.isa);
    return names;
}

inline const Kernels& kernels_of(const std::string& isa) {
    for (const Kernels& kernels : compiled())
        if (isa == kernels.isa && kernels.runs_here()) return kernels;
    throw std::invalid_argument("instruction set " + isa + " is not compiled in or does not run on this CPU");
}

}  // namespace fastldm
