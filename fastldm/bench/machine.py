"""The machine and the software behind a result, so that a number can be judged later."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastldm.doctor import diagnose

ROOT = Path(__file__).parents[2]
KEPT = ("fastldm", "python", "system", "versions", "environment", "cpu", "devices", "backends")
GPU = ("name", "driver_version", "clocks.max.sm", "power.limit")


def describe() -> dict[str, Any]:
    """CPU, GPU, cores, features, versions, threads, backends, the load just now, the commit."""
    facts = {name: fact for name, fact in diagnose().items() if name in KEPT}
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    facts |= {"threads": torch.get_num_threads(), "load": load, "commit": _commit()}
    if torch.cuda.is_available():
        facts["gpu"] = dict(zip(GPU, (part.strip() for part in _ask_gpu().split(",")), strict=False))
        facts["gpu"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def headline(facts: dict[str, Any]) -> str:
    """The most telling of `describe()` in one line."""
    cpu, versions, gpu = facts["cpu"], facts["versions"], facts.get("gpu")
    device = f"{', '.join(f'{name} {fact}' for name, fact in gpu.items())}; " if gpu else ""
    return (
        f"{device}{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu.get('features', []))}; torch "
        f"{versions['torch']}, {facts['threads']} threads; load at the end {facts['load']}; "
        f"commit {facts['commit']}"
    )


def _commit() -> str:
    """Of the checkout that runs; an installed package lies in none."""
    if not (ROOT / "setup.py").exists():
        return "unknown"
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return _first_line(asked) or "unknown"


def _ask_gpu() -> str:
    return _first_line(["nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader"])


def _first_line(command: list[str]) -> str:
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    return said.strip().partition("\n")[0]
