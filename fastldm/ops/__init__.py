"""The operations that the models and the sampler are made of; each is its PyTorch reference plus faster
stand-ins.
"""

from fastldm.ops.attention import attention
from fastldm.ops.linear import conv2d, geglu, linear
from fastldm.ops.norm import channel_moments, group_norm_silu, layer_norm
from fastldm.ops.registry import AUTOMATIC, OPS, Op, missing, op, resolve, use_backends
from fastldm.ops.resample import upsample_conv
from fastldm.ops.sampling import guided_step, learned_noise

__all__ = [
    "AUTOMATIC",
    "OPS",
    "Op",
    "attention",
    "channel_moments",
    "conv2d",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "layer_norm",
    "learned_noise",
    "linear",
    "missing",
    "op",
    "resolve",
    "upsample_conv",
    "use_backends",
]
