"""The machine and the software behind a result, so that a number can be judged later."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

from fastldm.doctor import diagnose

KEPT = ("fastldm", "python", "system", "versions", "environment", "cpu", "devices", "backends")


def describe() -> dict[str, Any]:
    """CPU, cores, features, versions, threads, backends, the load just now, the commit."""
    facts = {name: fact for name, fact in diagnose().items() if name in KEPT}
    asked = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {**facts, "threads": torch.get_num_threads(), "load": load, "commit": commit}


def headline(facts: dict[str, Any]) -> str:
    """The most telling of `describe()` in one line."""
    cpu, torch_version = facts["cpu"], facts["versions"]["torch"]
    return (
        f"{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu.get('features', []))}; torch {torch_version}, "
        f"{facts['threads']} threads; load at the end {facts['load']}; commit {facts['commit']}"
    )
