"""Compiled kernels on raw pointers (csrc/bindings): integer addresses, strides in elements."""

Strides = tuple[int, int, int, int]  # address, then elements between the op's outer axes

def isas() -> list[str]: ...
def attention(
    isa: str,
    result: Strides,
    q: Strides,
    k: Strides,
    v: Strides,
    type: str,
    rows: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    key_lengths: int,
    causal: bool,
    pairs: bool,
    threads: int,
) -> None: ...
def group_norm_silu(
    isa: str,
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
    moments: int,
    threads: int,
) -> None: ...
def group_norm_silu_backward(
    isa: str,
    grad_x: int,
    grad_affine: int,
    grad_row_bias: int,
    grad: int,
    x: int,
    type: str,
    rows: int,
    pixels: int,
    channels: int,
    moments: int,
    weight: int,
    bias: int,
    row_bias: int,
    groups: int,
    eps: float,
    silu: bool,
    threads: int,
) -> None: ...
def channel_moments(
    isa: str, result: int, x: int, type: str, rows: int, pixels: int, channels: int, threads: int
) -> None: ...
def convolve(
    isa: str,
    result: Strides,
    x: int,
    weight: int,
    bias: int,
    residual: int,
    maps: int,
    size: tuple[int, int] | list[int],
    channels: int,
    outputs: int,
    window: tuple[int, int] | list[int],
    stride: int,
    padding: tuple[int, int],
    result_size: tuple[int, int],
    threads: int,
) -> None: ...
def pack_panels(
    result: int,
    weight: int,
    outputs: int,
    channels: int,
    window: tuple[int, int],
    strides: Strides,
    threads: int,
) -> None: ...
def guided_step(
    isa: str,
    latents: Strides,
    x0: Strides,
    model_input: Strides,
    out: Strides,
    noise: Strides | None,
    type: str,
    slots: int,
    channels: int,
    pixels: int,
    copies: int,
    guided: bool,
    table: int,
    table_slot: int,
    table_rows: int,
    columns: int,
    step: int,
    threads: int,
) -> None: ...
def interleave(
    isa: str,
    result: int,
    phases: list[int],  # four addresses
    rows: int,
    width: int,
    bytes: int,
    threads: int,
) -> None: ...
def geglu(isa: str, result: int, x: int, type: str, rows: int, channels: int, threads: int) -> None: ...
def layer_norm(
    isa: str,
    result: int,
    x: int,
    type: str,
    rows: int,
    channels: int,
    weight: int,
    bias: int,
    affine_type: str,
    eps: float,
    scale: int,
    scale_stride: int,
    shift: int,
    shift_stride: int,
    rows_a_modulation: int,
    threads: int,
) -> None: ...
def prefer_huge_pages(address: int, bytes: int) -> None: ...
