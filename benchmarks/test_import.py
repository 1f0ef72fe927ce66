"""What `import fastldm` costs a program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from fastldm.bench.race import Table, seconds

ROOT = Path(__file__).parents[1]
ALLOWED = 0.15  # seconds, on an idle core
IMPORT = """
import sys, time
began = time.perf_counter()
import fastldm
print(time.perf_counter() - began)
assert "torch" not in sys.modules
"""


def python(code: str) -> str:
    """What a fresh Python prints."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_import(race: Callable[..., Table]) -> None:
    spent: list[float] = []

    def importing() -> None:
        spent.append(float(python(IMPORT)))

    def bare() -> None:
        python("pass")

    contenders = {"python, import fastldm": importing, "python": bare}
    table = race("processes that import fastldm, or nothing", contenders, budget=4.0)
    told = "met" if median(spent[1:]) <= ALLOWED else "MISSED"
    table.notes.append(
        f"import fastldm, without torch: median {seconds(median(spent[1:]))}, bar {ALLOWED} s {told}"
    )
