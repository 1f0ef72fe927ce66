// The Python module fastldm._C: kernels on raw pointers, with no torch headers, so that one build serves every torch.
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of fastldm on raw pointers; call them through fastldm.ops.";
    module.def("isas", &fastldm::isas, "Instruction sets with kernels that run on this CPU, narrowest first.");
    fastldm::bind_attention(module);
    fastldm::bind_convolve(module);
    fastldm::bind_group_norm_silu(module);
    fastldm::bind_group_norm_silu_backward(module);
    fastldm::bind_guided_step(module);
    fastldm::bind_interleave(module);
    fastldm::bind_geglu(module);
    fastldm::bind_layer_norm(module);
    fastldm::bind_memory(module);
}
