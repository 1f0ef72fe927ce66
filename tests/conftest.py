"""Fixtures and the error rule that every kernel test shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor

from fastldm.scenes.judge import Judge

# The same examples in every run, and no deadline: a loaded machine is not a failure.
settings.register_profile("fastldm", derandomize=True, deadline=None)
settings.load_profile("fastldm")


class ErrorRule:
    """A kernel's errors beside those of plain PyTorch in the same dtype, both against a float64 truth.

    One result: largest error ≤ 2 × PyTorch's + 4 · eps(dtype) · max|truth| · slack, as PyTorch is exact by
    luck on small shapes. All of a case together: RMS error ≤ 1.5 × PyTorch's, each scaled by its max|truth|
    and slack, or the one problem that amplifies rounding most would speak for all.
    """

    def __init__(self) -> None:
        self.kernel = self.torch = 0.0
        self.count = 0

    def add(
        self, result: Tensor, plain: Tensor, truth: Tensor, slack: float = 1.0, label: object = ""
    ) -> None:
        """Check one result; `slack` ≥ 1 tells how much the problem itself amplifies rounding."""
        assert result.dtype == plain.dtype and result.shape == truth.shape
        strides = zip(result.shape, result.stride(), plain.stride(), strict=True)
        assert all(ours == torchs for size, ours, torchs in strides if size > 1)
        scale = truth.abs().max().item() or 1.0
        error, allowed = (result.double() - truth).abs(), (plain.double() - truth).abs()
        bound = 2 * allowed.max().item() + 4 * torch.finfo(result.dtype).eps * scale * slack
        assert error.max().item() <= bound, f"{label}: error {error.max().item():.3g} above {bound:.3g}"
        self.kernel += (error / (scale * slack)).square().mean().item()
        self.torch += (allowed / (scale * slack)).square().mean().item()
        self.count += 1

    def close(self, at_least: int) -> None:
        """Check the case as a whole, and that it had this many results."""
        assert self.count >= at_least
        assert self.kernel <= 1.5**2 * self.torch, (
            f"RMS error {(self.kernel / self.torch) ** 0.5:.2f} × PyTorch's"
        )


@pytest.fixture
def error_rule() -> type[ErrorRule]:
    """One instance checks one case of one kernel."""
    return ErrorRule


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is full of NaN, so that a store a kernel leaves out is seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def judge() -> Judge:
    """The judge of scenes that fastldm ships."""
    return Judge.load()


def sane_weights(*networks: torch.nn.Module) -> None:
    """Draw the weights of these networks so that activations keep their size, and every part matters."""
    for network in networks:
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


class Recorded:
    """A network or loss recorded from the original code: its arguments, and tensors by name."""

    def __init__(self, name: str) -> None:
        self.groups: dict[str, dict[str, Tensor]] = {"weight": {}, "in": {}, "out": {}, "truth64": {}}
        with safe_open(Path(__file__).parent / "fixtures" / f"{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tolerance = float(file.metadata()["tol"])
            for key in file.keys():
                group, _, rest = key.partition(".")
                tensor = file.get_tensor(key).clone()  # views of the file may be unaligned
                self.groups[group][rest] = tensor.float() if group == "weight" else tensor
        self.weight, self.input, self.out = (self.groups[group] for group in ("weight", "in", "out"))

    def holds(self, name: str, got: Tensor) -> None:
        """`got` is the recorded output: integers equal, floats within the file's tolerance."""
        want = self.out[name]
        assert got.shape == want.shape, f"{name}: {got.shape} instead of {want.shape}"
        if not want.is_floating_point():
            assert torch.equal(got, want), name
            return
        error = (got.double() - want.double()).abs().max().item() / max(1.0, want.abs().max().item())
        assert error <= self.tolerance, f"{name}: {error:.2e} > {self.tolerance:.0e}"


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], Any]:
    """Reads a case of tests/fixtures by its path without the ending."""
    return Recorded
