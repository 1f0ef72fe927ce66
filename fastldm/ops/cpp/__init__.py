"""The backend `cpp`: the CPU kernels of csrc/cpu, float32 and bfloat16, on the widest instruction set here.

Importing this registers them, one module an op, or raises BackendUnavailable where fastldm._C is missing.
FASTLDM_CPU_ISA caps the choice: plain, avx2, avx512 or avx512_bf16. group_norm_silu alone has a backward;
the reference serves any other call that autograd records.
"""

from fastldm.ops.cpp import (
    attention,
    conv2d,
    extension,
    geglu,
    group_norm_silu,
    guided_step,
    layer_norm,
    linear,
    onednn,
    packed,
    upsample_conv,
)
from fastldm.ops.cpp.extension import _C, INSTRUCTION_SETS, ISA, TYPES, choose_isa

__all__ = [
    "INSTRUCTION_SETS",
    "ISA",
    "TYPES",
    "_C",
    "attention",
    "choose_isa",
    "conv2d",
    "extension",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "layer_norm",
    "linear",
    "onednn",
    "packed",
    "upsample_conv",
]
