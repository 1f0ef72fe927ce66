"""What the CUDA stand-ins share: the compiled extension, the library they register in, the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.errors import BackendUnavailable

try:
    from fastldm import _cuda
except ImportError as error:
    raise BackendUnavailable(
        f"the compiled CUDA extension is missing ({error}); with nvcc on the path, "
        "`FASTLDM_BUILD=1 pip install` fastldm again, or read there why it does not build"
    ) from error

__all__ = ["TAGS", "TYPES", "_cuda", "library", "stream"]

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

library = torch.library.Library("fastldm", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def stream(tensor: Tensor) -> int:
    """The stream that PyTorch works on, on the tensor's device: an address."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
