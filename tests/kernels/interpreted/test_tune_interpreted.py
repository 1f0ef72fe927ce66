"""The search of `fastldm tune` over the real kernels, interpreted; its times come from a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from fastldm import ops
from fastldm.errors import BackendUnavailable
from fastldm.kernels import tune, tuned
from fastldm.ops.recording import recording

CPU = torch.device("cpu")


def record(name: str) -> list:
    x = torch.randn(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    heads, affine = torch.randn(1, 20, 2, 40).transpose(1, 2), torch.randn(2, 32)
    filters = torch.randn(16, 32, 3, 3).contiguous(memory_format=torch.channels_last)
    latents = [torch.randn(rows, 4, 4, 4) for rows in (1, 1, 2, 2)]
    with recording() as calls:
        {
            "attention": lambda: ops.attention(heads, heads, heads),
            "conv2d": lambda: ops.conv2d(x, filters, None, padding=1),
            "geglu": lambda: ops.geglu(torch.randn(2, 5, 16), torch.randn(32, 16), torch.randn(32)),
            "group_norm_silu": lambda: ops.group_norm_silu(x, *affine, 8),
            "guided_step": lambda: ops.guided_step(
                *latents, None, torch.rand(1, 2, 9), torch.zeros(1, dtype=torch.long)
            ),
            "layer_norm": lambda: ops.layer_norm(torch.randn(2, 3, 32), *affine),
        }[name]()
    return calls


@pytest.mark.parametrize("name", tune.KERNELS)
def test_every_kernel_is_searched_and_right_at_all_sizes(name: str) -> None:
    """The clock ends the search after its first step; no size that is tried gives wrong numbers."""
    tried: list[int] = []
    said: list[str] = []

    def race(contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        tried.append(len(contenders))
        return {key: 2.0 if key == "PyTorch" else 1.0 for key in contenders}

    calls = record(name)
    found = tune.tune(
        calls, device=CPU, race=race, seconds=4.0, now=lambda: float(len(tried)), report=said.append
    )
    ((key, entry),) = found[name].items()
    assert entry["seconds"]["triton"] == 1.0 and "sizes" in entry
    assert tried[1] >= 1 and not [line for line in said if "WRONG" in line or "fail" in line], said

    with ops.use_backends("triton"):
        with tuned.using(found):
            made = tune.outcome(name, ops.OPS[name], calls[0].arguments)
        plain = tune.outcome(name, ops.OPS[name].reference, calls[0].arguments)
        made, plain = (each if isinstance(each, tuple) else (each,) for each in (made, plain))
        for ours, theirs in zip(made, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        with tuned.using({name: {key: {"rival": "PyTorch"}}}):
            with pytest.raises(
                BackendUnavailable, match=f"{name}: triton: PyTorch was measured to be faster"
            ):
                tune.outcome(name, ops.OPS[name], calls[0].arguments)
