// Which instruction sets this build carries kernels for, and which of them this CPU and its system can run.
#pragma once

#include <string>
#include <vector>

#include "checks.h"

namespace fastldm {

struct Kernels {
    const char* isa;
    bool (*runs_here)();
    void (*attention)(const Attention&);
    void (*channel_moments)(const ChannelMoments&);
    void (*convolve)(const Convolve&);
    void (*group_norm_silu)(const GroupNormSilu&);
    void (*group_norm_silu_backward)(const GroupNormSiluBackward&);
    void (*guided_step)(const GuidedStep&);
    void (*interleave)(const Interleave&);
    void (*geglu)(const Geglu&);
    void (*layer_norm)(const LayerNorm&);
};

#ifdef FASTLDM_X86
inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define FASTLDM_KERNELS(isa)                                                                                  \
    isa::attention, isa::channel_moments, isa::convolve, isa::group_norm_silu, isa::group_norm_silu_backward, \
        isa::guided_step, isa::interleave, isa::geglu, isa::layer_norm

// From the narrowest to the widest; the first runs everywhere.
inline const std::vector<Kernels>& compiled() {
    static const std::vector<Kernels> all = {
        {"plain", [] { return true; }, FASTLDM_KERNELS(plain)},
#ifdef FASTLDM_X86
        {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, FASTLDM_KERNELS(avx2)},
        {"avx512", has_avx512, FASTLDM_KERNELS(avx512)},
        {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
         FASTLDM_KERNELS(avx512_bf16)},
#endif
    };
    return all;
}

#undef FASTLDM_KERNELS

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
