"""What this machine has, which backend serves which op here, and why another does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import fastldm
from fastldm.errors import FastLDMError

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pillow", "tqdm", "huggingface_hub")
ENVIRONMENT = (
    "FASTLDM_BACKENDS FASTLDM_CPU_ISA FASTLDM_CACHE HF_HOME HF_HUB_OFFLINE "
    "OMP_NUM_THREADS CUDA_VISIBLE_DEVICES TRITON_INTERPRET"
).split()
# What the kernels of fastldm and PyTorch choose by, of all that a CPU can.
FEATURES = "avx2 fma avx512f avx512vl avx512_bf16 amx_bf16 amx_tile asimd bf16 sve".split()


def diagnose() -> dict[str, Any]:
    """All facts as one nested dict of texts and lists; a missing part is a text that says so, no error."""
    facts: dict[str, Any] = {
        "fastldm": f"{fastldm.__version__} ({os.path.dirname(os.path.abspath(__file__))})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "cpu": _cpu(),
    }
    try:
        import torch
    except ImportError as error:
        return facts | {"devices": f"torch cannot be imported: {error}"}
    capability = torch.backends.cpu.get_cpu_capability()
    facts["cpu"]["torch uses"] = f"{capability}, {torch.get_num_threads()} threads"
    from fastldm.runtime import graphs

    why = graphs.missing()
    facts |= {"devices": _devices(torch), "cuda graphs": "available" if why is None else f"no: {why}"}
    return facts | _backends() | {"tuned": _tuned(torch)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, Any]:
    """Name, cores that this process may use, features, memory, as far as the system tells."""
    facts: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            fields = dict(line.split(":", 1) for line in stream if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        facts["name"] = named.get("model name", facts["name"])
        flags = named.get("flags", named.get("Features", "")).split()
        facts["features"] = [name for name in FEATURES if name in flags]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["cores"] = f"{usable} of {os.cpu_count()}"
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return facts


def _devices(torch: Any) -> dict[str, str]:
    """Each device of torch with its name and memory; without CUDA, the reason."""
    devices = {"cpu": "available"}
    if torch.version.cuda is None:
        devices["cuda"] = "no: this torch is built without CUDA"
    elif not torch.cuda.is_available():
        devices["cuda"] = "no: torch finds no NVIDIA driver or no device"
    else:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = f"{found.total_memory / 2**30:.0f} GiB"
            devices[f"cuda:{index}"] = f"{found.name}, sm_{found.major}{found.minor}, {memory}"
    return devices


def _tuned(torch: Any) -> dict[str, Any]:
    """For each CUDA device, the shapes that `fastldm tune` measured, by op; a kernel refuses those left to a
    rival.
    """
    from fastldm.kernels import tuned

    names = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return {
        device: tuned.summary(name) or "nothing measured: `fastldm tune`" for device, name in names.items()
    }


def _backends() -> dict[str, Any]:
    """Which backends this process can use, and for each op those that serve it, in the order they are tried.

    A stand-in may still decline a single call (a dtype, a layout, a device); the next one then takes it.
    """
    from fastldm import ops  # noqa: F401  registers every op
    from fastldm.ops import registry

    named = os.environ.get("FASTLDM_BACKENDS") or None
    try:
        order = registry.resolve(named)
    except FastLDMError as error:
        return {"backends": f"cannot be used: {error}"}
    able = {name: registry.missing(name) for name in registry.AUTOMATIC}
    backends = {name: "available" if why is None else f"no: {why}" for name, why in able.items()}
    if able["cpp"] is None:
        from fastldm.ops import cpp

        backends["cpp"] = f"available, with kernels for {cpp.ISA}"
    for name, why in able.items():
        if why is None and name not in order:
            backends[name] = f"available, but FASTLDM_BACKENDS={named} leaves it out"
    found = sorted(registry.OPS.items())
    return {
        "backends": backends,
        "ops": {name: _serving(op, order, registry.REFERENCE) for name, op in found},
    }


def _serving(op: Any, order: tuple[str, ...], reference: str) -> str:
    names = [name for name in order if name in op.stand_ins or name == reference] or [reference]
    lacking = [name for name in order if name not in op.stand_ins and name != reference]
    return ", then ".join(names) + (f" ({', '.join(lacking)} has no kernel for it)" if lacking else "")
