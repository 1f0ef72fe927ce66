"""Importing this registers the CUDA kernels, each tried once on this device beside its reference.

Raises BackendUnavailable where fastldm._cuda is missing, does not run or disagrees.
"""

from fastldm.ops.cuda import group_norm_silu, guided_step
from fastldm.ops.trial import run_trial

__all__ = ["group_norm_silu", "guided_step"]

run_trial("cuda", "cuda")
