"""What the C++ stand-ins share: the compiled extension, the instruction set, the library they register in."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch  # before _C, which then shares torch's OpenMP runtime
from torch import Tensor

from fastldm.errors import BackendUnavailable, InvalidArgument

try:
    from fastldm import _C
except ImportError as error:
    raise BackendUnavailable(
        f"the compiled extension is missing ({error}); with a C++ compiler installed, "
        "`FASTLDM_BUILD=1 pip install` fastldm again, or read there why it does not build"
    ) from error

__all__ = ["INSTRUCTION_SETS", "ISA", "TAGS", "TYPES", "_C", "choose_isa", "direct", "library", "unwritten"]

INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512_bf16")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def choose_isa(cap: str | None) -> str:
    """The widest instruction set that runs here, at most `cap`; InvalidArgument for an unknown cap."""
    if cap is None:
        return _C.isas()[-1]
    if cap not in INSTRUCTION_SETS:
        raise InvalidArgument("FASTLDM_CPU_ISA", cap, ", ".join(INSTRUCTION_SETS))
    allowed = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(cap) + 1]
    return [isa for isa in _C.isas() if isa in allowed][-1]


ISA = choose_isa(os.environ.get("FASTLDM_CPU_ISA") or None)

# glibc takes memory of this size from the system at each call, which hands it out as it is written: in pages
# of 4 KiB that is several times a kernel's own work.
MAPPED = 32 << 20


def unwritten(result: Tensor) -> Tensor:
    """The tensor, just allocated; if it is large, the system is asked for huge pages."""
    if result.nbytes >= MAPPED:
        _C.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result


library = torch.library.Library("fastldm", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def direct(run: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, past the dispatcher, which costs more than a small call; `op`, the same, for torch.compile."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (op if torch.compiler.is_compiling() else run)(*args, **kwargs)

    return call
