"""Compiled kernels, and where they lie: `$FASTLDM_CACHE/cubins`, by default ~/.cache/fastldm/cubins.

An entry goes by a hash of all that its machine code depends on: the kernel's source with what it calls,
signature, constants, options, GPU generation and Triton's version. It is a line of JSON, then the code; one
that is damaged, or another's, counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

__all__ = ["Cubin", "Variant", "folder", "make", "obtain", "read", "store"]

# A parameter in PTX → its letter: p a pointer, i and l integers of 32 and 64 bits, f float32, T a tensor map.
LETTERS = {"u64 ptr": "p", "u32": "i", "u64": "l", "f32": "f", "b8 128": "T"}
FORMAT = 1  # counts up when the line of JSON changes
ELEMENTS = {"fp32": 7, "fp16": 6, "bf16": 9}  # CUtensorMapDataType


@dataclass(frozen=True)
class Variant:
    """A kernel as specialised for some calls, by the rules of Triton's JIT."""

    kernel: Any  # fastldm.kernels.launch.Kernel
    types: tuple[str, ...]  # of each parameter, "constexpr" for a constant
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]  # the parameters known to be multiples of 16
    warps: int
    stages: int
    pdl: bool

    @property
    def letters(self) -> str:
        """The parameters that a launch passes; a tensor map is followed by its sizes and strides."""
        made = []
        for name in self.types:
            if name.startswith("tensordesc"):
                rank = name.count(",") + 1
                made.append("T" + "i" * rank + "l" * rank)
            elif name != "constexpr":
                made.append("p" if name.startswith("*") else {"i32": "i", "i64": "l", "fp32": "f"}[name])
        return "".join(made)

    def compile(self, capability: int) -> CompiledKernel:
        """Machine code for GPUs of this compute capability, 90 for 9.0; it needs no GPU."""
        function = self.kernel.function
        source = ASTSource(
            function,
            dict(zip(function.arg_names, self.types, strict=True)),
            {(index,): value for index, value in self.constants},
            {(index,): [["tt.divisibility", 16]] for index in self.aligned},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages, "launch_pdl": self.pdl}
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})

    def digest(self, capability: int) -> str:
        """What its entry in the cache goes by."""
        parts = self.types, self.constants, self.aligned, self.warps, self.stages, self.pdl
        text = f"{FORMAT} {self.kernel.function.cache_key} {parts} {capability} {triton.__version__}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Cubin:
    """Machine code and what a launch has to know about it."""

    code: bytes
    name: str
    letters: str  # of all parameters; pointers beyond the variant's own are null
    warps: int
    shared: int  # bytes of dynamic shared memory
    tiles: tuple[tuple[Any, ...], ...]  # of each tensor map, as `fastldm._cuda` takes them


def make(variant: Variant, capability: int) -> Cubin | None:
    """Compile it; None where a launch would need more than its parameters: scratch memory, several CTAs."""
    compiled = variant.compile(capability)
    known = compiled.metadata
    letters = parameters(compiled.asm["ptx"])
    hidden = letters[len(variant.letters) :]  # Triton's pointers to scratch memory
    needs = known.global_scratch_size, known.profile_scratch_size, known.launch_cooperative_grid
    if letters != variant.letters + "p" * len(hidden) or any(needs) or known.num_ctas != 1:
        return None
    mapped = [name for name in variant.types if name.startswith("tensordesc")]
    described = known.tensordesc_meta or ()
    if len(described) != len(mapped):  # the GPU has none
        return None
    tiles = tuple(
        (ELEMENTS[name[11:15]], each["elem_size"], each["swizzle"], tuple(each["block_size"]))
        for name, each in zip(mapped, described, strict=True)
    )
    return Cubin(compiled.asm["cubin"], known.name, letters, known.num_warps, known.shared, tiles)


def obtain(variant: Variant, capability: int) -> Cubin | None:
    """The entry, made if it lacks; None as `make`. Where it cannot be stored, only this process has it."""
    found = read(variant, capability)
    if found is None:
        found = make(variant, capability)
        if found is not None:
            with contextlib.suppress(OSError):
                store(variant, capability, found)
    return found


def parameters(ptx: str) -> str:
    """The letters of the kernel's parameters; "?" for a type that no kernel of ours has."""
    (declared,) = re.findall(r"\.visible \.entry \w+\(([^)]*)\)", ptx)
    found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)( \.ptr)?[^,\[]*(?:\[(\d+)\])?", declared)
    return "".join(
        LETTERS.get(kind + (" ptr" if pointer else "") + (f" {size}" if size else ""), "?")
        for kind, pointer, size in found
    )


def folder() -> Path:
    """Where the entries lie."""
    return Path(os.environ.get("FASTLDM_CACHE") or Path.home() / ".cache" / "fastldm") / "cubins"


def path(variant: Variant, capability: int) -> Path:
    """The file of this entry."""
    return folder() / f"{variant.kernel.__name__}-sm{capability}-{variant.digest(capability)[:32]}.cubin"


def read(variant: Variant, capability: int) -> Cubin | None:
    """The entry, or None where there is none, or one that `store` has not left so."""
    try:
        line, _, code = path(variant, capability).read_bytes().partition(b"\n")
    except OSError:
        return None
    try:
        head = json.loads(line)
    except ValueError:
        return None
    if not isinstance(head, dict) or head.pop("key", None) != variant.digest(capability):
        return None
    if head.pop("sha256", None) != _checksum(head, code):
        return None
    head["tiles"] = tuple((*rest, tuple(block)) for *rest, block in head["tiles"])
    return Cubin(code=code, **head)


def store(variant: Variant, capability: int, cubin: Cubin) -> None:
    """Leave the entry for other processes, whole or not at all; OSError where the folder refuses it."""
    head = {name: value for name, value in vars(cubin).items() if name != "code"}
    head |= {"key": variant.digest(capability), "sha256": _checksum(head, cubin.code)}
    file = path(variant, capability)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_bytes(json.dumps(head).encode() + b"\n" + cubin.code)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _checksum(head: dict[str, Any], code: bytes) -> str:
    """Of the code and of what is said about it."""
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode() + b"\n" + code).hexdigest()
