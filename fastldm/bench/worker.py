"""The process of one contender: a line of JSON in, what to do; a line of JSON out, how it went.

Started as `python -m fastldm.bench.worker` by `process.Worker`. Nothing is imported before the first
order, so that a cold start can be timed from outside.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Session:
    """What the orders are carried out on."""

    def load(
        self, contender: str, part: str, model: dict[str, Any], device: str, dtype: str, **options: Any
    ) -> dict[str, Any]:
        """Load a contender of a part, in place of the one before; a dtype as torch names it."""
        import torch

        from fastldm.bench.cases import Model
        from fastldm.bench.contenders import PARTS

        imported = time.time()
        self.contender: Any = None  # frees the one before
        self.calls: dict[tuple[int, int, int], Any] = {}
        place, numbers = torch.device(device), getattr(torch, dtype)
        self.contender = PARTS[part](contender, Model(**model), place, numbers, **options)
        return {"imported": imported, "bytes": memory(place)}

    def exact(self, batch: int, side: int, samples: int, file: str) -> dict[str, Any]:
        """Write what the calls of so many samples make; how long the first took, which may have compiled."""
        import torch

        case, began = self._case(batch, side), time.perf_counter()
        with torch.inference_mode():
            made, first = [], 0.0
            for sample in range(samples):
                made.append(self.contender.exact(case, sample).float().cpu().flatten())
                first = first or time.perf_counter() - began
        torch.save(torch.cat(made), file)
        return {"first": first}

    def time(self, batch: int, side: int, sample: int, calls: int = 1) -> dict[str, Any]:
        """Seconds of a call, the mean of several in a row, until a GPU has done it; parts where it tells."""
        import torch

        with torch.inference_mode():
            key = batch, side, sample
            if key not in self.calls:
                self.calls[key] = self.contender.call(self._case(batch, side), sample)
            run, on_gpu = self.calls[key], self.contender.device.type == "cuda"
            if on_gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                run()
            if on_gpu:
                torch.cuda.synchronize()
            spent = (time.perf_counter() - began) / calls
        return {
            "seconds": spent,
            "parts": self.contender.parts,
            "moment": time.time(),
            "bytes": memory(self.contender.device),
        }

    def kernels(self, batch: int, side: int) -> dict[str, Any]:
        """How many kernels and copies a call runs on a GPU."""
        from torch.profiler import ProfilerActivity, profile

        self.time(batch, side, 0)
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            self.time(batch, side, 0)
        return {"kernels": sum(str(event.device_type) == "DeviceType.CUDA" for event in traced.events())}

    def _case(self, batch: int, side: int) -> Any:
        from fastldm.bench.cases import Case

        return Case(batch, side)


def memory(device: Any) -> dict[str, int]:
    """Bytes at the peak so far: on a GPU what torch had in use and held, on a CPU the process."""
    if device.type == "cuda":
        import torch

        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    try:  # of this program alone; getrusage counts what the process was before it became Python
        with open("/proc/self/status", encoding="ascii") as lines:
            peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"process": peak}


def main() -> None:
    """Carry out orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    session = Session()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            reply = getattr(session, order.pop("do"))(**order)
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
