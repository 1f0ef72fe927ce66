"""group_norm_silu on the GPU in one pass over memory, where a group fits into a cluster's shared memory.

Compute capability 9.0 and later. Larger maps go to the next backend.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastldm.ops.cuda.extension import TAGS, TYPES, _cuda, library, stream
from fastldm.ops.norm import group_norm_silu
from fastldm.ops.raw import records, refuses_group_norm_silu

CLUSTERS = 9  # the compute capability that brought thread-block clusters
SPLITS = (1, 2, 4, 8)  # blocks of a cluster; 8 is the most that every device grants
FEWEST_PIXELS = 32  # of a block: below, a cluster's barriers cost more than its blocks gain


@functools.lru_cache(maxsize=4096)
def plan(
    dtype: torch.dtype,
    rows: int,
    pixels: int,
    channels: int,
    groups: int,
    multiprocessors: int,
    shared_memory: int,
) -> tuple[int, int] | None:
    """Groups a slice and blocks a cluster: the first split that gives every multiprocessor a block.

    A slice is at least 64 bytes wide where the channels allow, so that little is read in vain, and each of
    its rows begins at a multiple of 16 bytes. None when no division fits into `shared_memory` bytes a block.
    """
    width = channels // groups * dtype.itemsize
    slices = [
        n for n in range(1, groups + 1) if groups % n == 0 and n * width % 16 == 0 and n * width <= 4096
    ]
    best, most = None, 0
    for slice_groups in [n for n in slices if n * width >= 64] or slices[-1:]:
        for splits in SPLITS:
            if splits > 1 and pixels < splits * FEWEST_PIXELS:
                break
            needed = _cuda.group_norm_silu_shared(
                TYPES[dtype], pixels, channels, groups, slice_groups, splits
            )
            blocks = rows * groups // slice_groups * splits
            if needed <= shared_memory and blocks > most:
                best, most = (slice_groups, splits), blocks
                if blocks >= multiprocessors:
                    return best
    return best


def _plan(x: Tensor, groups: int) -> tuple[int, int] | None:
    device = torch.cuda.get_device_properties(x.device)
    rows, channels, height, width = x.shape
    return plan(
        x.dtype,
        rows,
        height * width,
        channels,
        groups,
        device.multi_processor_count,
        device.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


library.define(
    "cuda_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps=1e-5, bool silu=True,"
    " Tensor? row_bias=None, Tensor? moments=None) -> Tensor",
    tags=TAGS,
)


@torch.library.impl(library, "cuda_group_norm_silu", "CUDA")
def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    found = _plan(x, groups)
    assert found is not None  # asked before
    result = torch.empty_like(x)
    rows, channels, height, width = x.shape
    with torch.cuda.device(x.device):
        _cuda.group_norm_silu(
            stream(x),
            result.data_ptr(),
            x.data_ptr(),
            TYPES[x.dtype],
            rows,
            height * width,
            channels,
            weight.data_ptr(),
            bias.data_ptr(),
            TYPES[weight.dtype],
            None if row_bias is None else (row_bias.data_ptr(), TYPES[row_bias.dtype], row_bias.stride(0)),
            groups,
            eps,
            silu,
            *found,
        )
    return result


@torch.library.impl(library, "cuda_group_norm_silu", "Meta")
def _shape(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _refuses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    row_bias: Tensor | None = None,
    moments: Tensor | None = None,
) -> str | None:
    if moments is not None:
        return "the kernel takes its own moments"
    why = refuses_group_norm_silu("cuda", TYPES, x, weight, bias, groups, row_bias)
    if why is not None:
        return why
    if records(x, weight, bias, row_bias):
        return "autograd records the call"
    if torch.cuda.get_device_capability(x.device)[0] < CLUSTERS:
        return "the device has no thread-block clusters (compute capability 9.0)"
    if x.data_ptr() % 16 or x.shape[1] * x.element_size() % 16:
        return "x or its pixels do not begin at multiples of 16 bytes"
    if x.shape[0] >= 65536:
        return "x has more than 65535 rows"
    if _plan(x, groups) is None:
        return "a group does not fit into the shared memory of a cluster"
    return None


group_norm_silu.register("cuda", _refuses)(torch.ops.fastldm.cuda_group_norm_silu.default)
