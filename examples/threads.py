"""An application with one pipeline, several threads, progress and a cancel button: plain threads, no toolkit.

python examples/threads.py [FOLDER]: three pictures at once, the second cancelled on its way.
"""

from __future__ import annotations

import queue
import sys
import threading
from pathlib import Path

import fastldm


class Job(threading.Thread):
    """One picture being made, which `events` hears of at each step; `cancel()` stops it within a step."""

    def __init__(
        self, pipe: fastldm.Pipeline, prompt: str, path: Path, steps: int, events: queue.Queue[Job]
    ) -> None:
        super().__init__()
        self.pipe, self.prompt, self.path, self.steps, self.events = pipe, prompt, path, steps, events
        self.done, self.outcome = 0, ""
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def run(self) -> None:
        try:
            result = self.pipe.generate(self.prompt, steps=self.steps, seed=7, callback=self._step)
            self.outcome = "cancelled" if result.stopped else f"saved {result.save(self.path)[0]}"
        except fastldm.FastLDMError as error:  # one line for the user; the pipeline goes on working
            self.outcome = f"failed: {error}"
        self.events.put(self)

    def _step(self, step: int, preview: object) -> bool:
        """Called by the pipeline after each step, in this thread; False stops it."""
        self.done = step + 1
        self.events.put(self)
        return not self._cancelled.is_set()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pipe, events = fastldm.load(), queue.Queue[Job]()
    jobs = [
        Job(pipe, "a red circle on a white background", folder / "circle.png", 10, events),
        Job(pipe, "a large green square", folder / "square.png", 1000, events),
        Job(pipe, "a blue triangle on a black background", folder / "triangle.png", 10, events),
    ]
    for job in jobs:
        job.start()
    running = len(jobs)
    while running:  # what the event loop of an interface does
        job = events.get()
        print(f"{job.prompt}: {job.outcome or f'step {job.done} of {job.steps}'}")
        running -= bool(job.outcome)
        if job is jobs[1] and job.done == 3:
            job.cancel()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures"))
