"""Builds fastldm._C: bindings once, and the CPU kernels once for each instruction set.

FASTLDM_BUILD=1 makes a failed build an error, FASTLDM_BUILD=0 builds nothing; otherwise a machine without a
C++ compiler gets a warning and an installation that runs on the PyTorch references.
"""

import os
import platform
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
# name → floats in a vector, and the flags that let the compiler use the set
INSTRUCTION_SETS: dict[str, tuple[int, list[str]]] = {"plain": (4, [])}
if X86:
    INSTRUCTION_SETS["avx2"] = 8, ["-mavx2", "-mfma"]
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx512"] = 16, AVX512
    INSTRUCTION_SETS["avx512_bf16"] = 16, [*AVX512, "-mavx512bf16"]

OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FLAGS = ["-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *OPENMP]
# Contraction to fused multiply-adds is asked for, since -std=c++17 alone may turn it off.
KERNEL_FLAGS = [*FLAGS, "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


class BuildKernels(build_ext):
    """Compiles every kernel source once for each instruction set, then the bindings, and links them."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: present when building, not when reading metadata

        ext.include_dirs.append(pybind11.get_include())
        sources = sorted(glob("csrc/cpu/*.cpp"))
        for name, (lanes, flags) in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                sources,
                output_dir=str(Path(self.build_temp, name)),
                macros=[("FASTLDM_ISA", name), ("FASTLDM_LANES", str(lanes))],
                extra_postargs=[*KERNEL_FLAGS, *flags],
            )
        super().build_extension(ext)


choice = os.environ.get("FASTLDM_BUILD", "")
if choice not in ("", "0", "1"):
    sys.exit(f"FASTLDM_BUILD={choice!r}: allowed is 0, 1 or unset")

extension = Extension(
    "fastldm._C",
    sorted(glob("csrc/bindings/*.cpp")),
    depends=[*glob("csrc/*.h"), *glob("csrc/*/*")],
    define_macros=[("FASTLDM_X86", None)] if X86 else [],
    extra_compile_args=[*FLAGS, "-O1"],  # nothing in the bindings is hot
    extra_link_args=OPENMP,
    language="c++",
    optional=choice != "1",
)

setup(
    # A top-level package named `kernels` would overwrite the PyPI project of that name.
    packages=[*find_packages(include=["fastldm", "fastldm.*"]), "fastldm.kernels"],
    package_dir={"fastldm": "fastldm", "fastldm.kernels": "kernels"},
    ext_modules=[] if choice == "0" else [extension],
    cmdclass={"build_ext": BuildKernels},
)
