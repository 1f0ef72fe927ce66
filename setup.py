"""Builds fastldm._C, the CPU kernels once for each instruction set, and with nvcc at hand fastldm._cuda.

FASTLDM_BUILD=1 makes a failed build an error, FASTLDM_BUILD=0 builds nothing; otherwise a machine without a
C++ compiler gets a warning and an installation that runs on the PyTorch references.
"""

import os
import platform
import shutil
import subprocess
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

# A compiled version for each GPU generation, and code that later ones compile when they load it.
GENERATIONS = {"group_norm_silu": (90, 100)}  # thread-block clusters
ANY_GENERATION = (80, 90, 100)
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))

OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FLAGS = ["-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *OPENMP]
# Contraction to fused multiply-adds is asked for, since -std=c++17 alone may turn it off.
KERNEL_FLAGS = [*FLAGS, "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
KERNEL_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own immintrin.h


class BuildKernels(build_ext):
    """Compiles every kernel source once for each instruction set, then the bindings, and links them."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: present when building, not when reading metadata

        ext.include_dirs.append(pybind11.get_include())
        self.build_cpu(ext) if ext.name == "fastldm._C" else self.build_cuda(ext)
        super().build_extension(ext)

    def build_cpu(self, ext: Extension) -> None:
        sources = sorted(glob("csrc/cpu/*.cpp"))
        for name, (lanes, flags) in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                sources,
                output_dir=str(Path(self.build_temp, name)),
                macros=[("FASTLDM_ISA", name), ("FASTLDM_LANES", str(lanes))],
                extra_postargs=[*KERNEL_FLAGS, *flags],
            )

    def build_cuda(self, ext: Extension) -> None:
        assert NVCC is not None
        plan = subprocess.run(
            [NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        (toolkit,) = (Path(line.split("TOP=")[1]) for line in plan.splitlines() if "TOP=" in line)
        ext.include_dirs += map(str, [toolkit / "include", *toolkit.glob("targets/*/include")])
        ext.library_dirs += map(str, [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")])
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(glob("csrc/cuda/*.cu")):
            name = Path(source).stem
            generations = GENERATIONS.get(name, ANY_GENERATION)
            targets = [f"arch=compute_{n},code=sm_{n}" for n in generations]
            targets.append("arch=compute_{0},code=compute_{0}".format(generations[-1]))
            flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            made = str(folder / f"{name}.o")
            self.spawn(
                [NVCC, *flags, *[f"-gencode={target}" for target in targets], "-c", source, "-o", made]
            )
            ext.extra_objects.append(made)


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
cuda_extension = Extension(
    "fastldm._cuda",
    sorted(glob("csrc/cuda/*.cpp")),
    depends=glob("csrc/cuda/*"),
    extra_compile_args=["-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-O1"],
    libraries=["cudart_static", "rt", "dl", "pthread"],
    language="c++",
    optional=choice != "1",
)
extensions = [extension, cuda_extension] if NVCC and sys.platform == "linux" else [extension]

setup(
    # A top-level package named `kernels` would overwrite the PyPI project of that name.
    packages=[*find_packages(include=["fastldm", "fastldm.*"]), "fastldm.kernels"],
    package_dir={"fastldm": "fastldm", "fastldm.kernels": "kernels"},
    ext_modules=[] if choice == "0" else extensions,
    cmdclass={"build_ext": BuildKernels},
)
