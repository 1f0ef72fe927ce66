"""One small call of each of a backend's kernels beside its reference, before any of them is used."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.ops.norm import group_norm_silu
from fastldm.ops.sampling import guided_step

TOLERANCE = 1e-4  # float32, values of size 1


def run_trial(backend: str, device: str) -> None:
    """BackendUnavailable that says which kernel does not run on this device or gives other numbers."""
    try:
        _run_all(backend, device)
    except BackendUnavailable:
        raise
    except (RuntimeError, AssertionError) as error:  # the second from a build of torch without CUDA
        raise BackendUnavailable(f"a kernel does not run on this device: {error}") from error


def _run_all(backend: str, device: str) -> None:
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    x = normal(2, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    norm = x, normal(64), normal(64), 16, 1e-5, True, normal(2, 64)
    stand_in = group_norm_silu.stand_ins[backend]
    if stand_in.refuses(*norm) is None:  # the kernel may want a newer device
        _compare("group_norm_silu", stand_in.run(*norm), group_norm_silu.reference(*norm))

    slots = normal(2, 4, 8, 8), normal(2, 4, 8, 8), normal(4, 4, 8, 8), normal(4, 4, 8, 8), normal(2, 4, 8, 8)
    table, rows = normal(2, 3, 9).abs(), torch.tensor([0, 2], device=device)
    latents, x0, model_input, out, noise = wanted = [tensor.clone() for tensor in slots]
    guided_step.reference(latents, x0, model_input, out, noise, table, rows)
    guided_step.stand_ins[backend].run(*slots, table, rows)
    for got, want in zip(slots, wanted, strict=True):
        _compare("guided_step", got, want)


def _compare(name: str, got: Tensor, want: Tensor) -> None:
    error = float((got - want).abs().max())
    if not error <= TOLERANCE * float(want.abs().max()):
        raise BackendUnavailable(f"{name} is {error:.2g} off its reference on this device")
