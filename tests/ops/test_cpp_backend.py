"""Which instruction set the C++ backend takes, and what happens where it was not built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastldm import ops
from fastldm.errors import BackendUnavailable, InvalidArgument

cpp = pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_a_cap_takes_the_widest_set_below_it() -> None:
    assert cpp._C.isas()[0] == "plain" and set(cpp._C.isas()) <= set(cpp.INSTRUCTION_SETS)
    assert cpp.choose_isa("plain") == "plain"
    assert cpp.choose_isa(None) == cpp.choose_isa("avx512_bf16") == cpp._C.isas()[-1]
    with pytest.raises(InvalidArgument, match="FASTLDM_CPU_ISA='sse9'"):
        cpp.choose_isa("sse9")


def test_the_environment_caps_the_choice() -> None:
    assert python("from fastldm.ops import cpp; print(cpp.ISA)", FASTLDM_CPU_ISA="plain").stdout == "plain\n"


def map_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def a_step() -> tuple[torch.Tensor | None, ...]:
    images = [map_of(2, 4, 4, 4) for _ in range(4)]
    return *images, None, torch.randn(1, 1, 9), torch.zeros(2, dtype=torch.long)


CALLS: dict[str, Callable[[], Any]] = {
    "attention": lambda: ops.attention(*torch.randn(3, 2, 4, 64, 40), key_lengths=torch.tensor([64, 9])),
    "channel_moments": lambda: ops.channel_moments(map_of(1, 8, 4, 4)),
    "geglu": lambda: ops.geglu(torch.randn(4, 8), torch.randn(16, 8), torch.randn(16)),
    "group_norm_silu": lambda: ops.group_norm_silu(map_of(1, 8, 4, 4), torch.ones(8), torch.zeros(8), 4),
    "guided_step": lambda: ops.guided_step(*a_step()),
    "layer_norm": lambda: ops.layer_norm(torch.randn(4, 8)),
    "upsample_conv": lambda: ops.upsample_conv(map_of(1, 8, 4, 4), map_of(8, 8, 3, 3), torch.zeros(8)),
}


@pytest.mark.parametrize(
    "name", sorted({n for n, op in ops.OPS.items() if "cpp" in op.stand_ins} - {"conv2d", "linear"})
)
def test_a_set_that_does_not_run_here_cannot_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so the choice reaches every kernel of ours; convolutions and products are oneDNN's."""
    with ops.use_backends("cpp"):
        CALLS[name]()
        monkeypatch.setattr(cpp.extension, "ISA", "sse9")
        with pytest.raises(ValueError, match="instruction set sse9 is not compiled in or does not run"):
            CALLS[name]()


def test_without_the_extension_the_references_serve_and_the_reason_is_told() -> None:
    """As on a machine without a C++ compiler: automatic choice works, `cpp` by name says what to do."""
    code = """
import sys
sys.modules["fastldm._C"] = None  # the import system's mark for a module that cannot be imported
import torch
from fastldm import ops
x = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
arguments = x, torch.ones(8), torch.zeros(8), 4
assert "cpp" not in ops.resolve(None)
assert torch.equal(ops.group_norm_silu(*arguments), ops.group_norm_silu.reference(*arguments))
try:
    ops.resolve("cpp")
except Exception as error:
    print(type(error).__name__, error)
"""
    result = python(code)
    assert result.stdout.startswith("BackendUnavailable cpp: the compiled extension is missing"), result
    assert "FASTLDM_BUILD=1 pip install" in result.stdout
