"""CUDA kernels on raw pointers (csrc/cuda): integer addresses, strides in elements."""

from collections.abc import Sequence

Strides = tuple[int, int, int, int]  # address, then elements between slots, channels and pixels

def group_norm_silu_shared(
    type: str, pixels: int, channels: int, groups: int, groups_per_slice: int, splits: int
) -> int: ...
def group_norm_silu(
    stream: int,
    result: int,
    x: int,
    type: str,
    rows: int,
    pixels: int,
    channels: int,
    weight: int,
    bias: int,
    affine_type: str,
    row_bias: tuple[int, str, int] | None,
    groups: int,
    eps: float,
    silu: bool,
    groups_per_slice: int,
    splits: int,
) -> None: ...
def guided_step(
    stream: int,
    latents: Strides,
    x0: Strides,
    model_input: Strides,
    out: Strides,
    noise: Strides | None,
    type: str,
    slots: int,
    channels: int,
    pixels: int,
    twice: bool,
    guided: bool,
    table: int,
    table_slot: int,
    table_rows: int,
    columns: int,
    step: int,
) -> None: ...

class CompiledKernel:
    def __init__(
        self,
        device: int,
        code: bytes,
        name: str,
        letters: str,
        warps: int,
        shared: int,
        overlaps: bool,
        tiles: Sequence[tuple[int, int, int, Sequence[int]]],
    ) -> None: ...
    def launch(self, stream: int, grid: tuple[int, ...], values: Sequence[object]) -> None: ...
