"""The tests in interpreted/, in a process of their own where TRITON_INTERPRET makes Triton run in NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("marks", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_under_the_interpreter(marks: str) -> None:
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", marks]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER)],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout and "skipped" not in ran.stdout, ran.stdout


def test_fastldm_imports_and_runs_without_triton() -> None:
    """As where Triton has no build: automatic choice works, `triton` by name says what is missing."""
    code = """
import sys
sys.modules["triton"] = None  # the import system's mark for a module that cannot be imported
import torch
torch.cuda.is_available = lambda: True
from fastldm import ops
assert "triton" not in ops.resolve("reference") and "triton" not in ops.resolve(None)
ops.attention(*torch.randn(3, 1, 2, 4, 8))
print(ops.missing("triton"))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("triton cannot be imported"), result


def test_importing_the_ops_leaves_triton_alone() -> None:
    code = "import sys, fastldm.ops; fastldm.ops.resolve(None); print('triton.language' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "FASTLDM_BACKENDS"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, cwd=ROOT, env=environment, text=True) == "False\n"
