"""The driver's side of a contender's process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """A contender could not do what it was told; says why in a line."""


class Worker:
    """A process that carries out the orders of `worker.Session`; `began` is the moment it was started."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._complaints = tempfile.TemporaryFile("w+", errors="replace")
        self.began = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastldm.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have something done, and wait; Failed where it did not work."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the end of the process is told below
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._complaints.seek(0)
            last = (self._complaints.read().strip().splitlines() or [""])[-1]
            raise Failed(f"ended with exit code {self._process.wait()}: {last}"[:300])
        reply: dict[str, Any] = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._complaints.close()
