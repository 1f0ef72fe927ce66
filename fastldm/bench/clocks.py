"""Whether a GPU kept its clocks while others were timed on it: a hot card is no fair judge."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median

ALLOWED_DROP = 0.03
_EVERY_MS, _BUSY = 200, 50  # of a sample; percent of the time in use, below which clocks fall by design
_QUERY = [
    "nvidia-smi",
    "--query-gpu=clocks.sm,power.draw,utilization.gpu",
    "--format=csv,noheader,nounits",
    "--id=0",
    f"--loop-ms={_EVERY_MS}",
]


class Clocks:
    """Megahertz and watts of a card in use, in order of time."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []

    @property
    def drop(self) -> float:
        """By what share the clock of the last quarter is below that of the first."""
        quarter = len(self.samples) // 4
        if quarter == 0:
            return 0.0
        first, last = self.samples[:quarter], self.samples[-quarter:]
        return 1 - median(clock for clock, _ in last) / median(clock for clock, _ in first)

    def __str__(self) -> str:
        if not self.samples:
            return "clocks unknown"
        clocks, powers = zip(*self.samples, strict=True)
        return f"{min(clocks):.0f} to {max(clocks):.0f} MHz, {median(powers):.0f} W"


@contextmanager
def watched() -> Iterator[Clocks]:
    """Clocks of the block, known at its end; none where nvidia-smi does not tell."""
    clocks = Clocks()
    try:
        process = subprocess.Popen(_QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield clocks
        return
    try:
        yield clocks
    finally:
        process.terminate()
        said, _ = process.communicate()
        for line in said.splitlines():
            with suppress(ValueError):  # "[N/A]", half a last line
                clock, power, used = map(float, line.split(","))
                if used >= _BUSY:
                    clocks.samples.append((clock, power))
