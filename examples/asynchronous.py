"""fastldm under asyncio: the loop stays free, progress arrives as it comes, and a cancelled task stops within
a step.

python examples/asynchronous.py [FOLDER]: two pictures made, one given up after a time limit.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastldm


async def generate(
    pipe: fastldm.Pipeline, prompt: str, report: Callable[[int], None] | None = None, **arguments: Any
) -> fastldm.Result:
    """pipe.generate in a thread. `report(steps done)` runs in the loop; cancelling this stops the thread."""
    loop, cancelled = asyncio.get_running_loop(), threading.Event()

    def step(number: int, preview: object) -> bool:
        if report is not None and not cancelled.is_set():
            loop.call_soon_threadsafe(report, number + 1)
        return not cancelled.is_set()

    work = asyncio.create_task(asyncio.to_thread(pipe.generate, prompt, callback=step, **arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait([work])  # the pipeline is free again when this returns
        raise


async def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pipe = await asyncio.to_thread(fastldm.load)

    async def make(prompt: str, name: str) -> str:
        result = await generate(pipe, prompt, lambda done: print(f"{name}: step {done}"), steps=10, seed=7)
        await asyncio.to_thread(result.save, folder / name)
        return f"saved {folder / name}"

    for line in await asyncio.gather(make("a red circle", "red.png"), make("a blue square", "blue.png")):
        print(line)
    try:
        await asyncio.wait_for(generate(pipe, "a green star", steps=1000), timeout=0.5)
    except asyncio.TimeoutError:
        print("the third took too long and was stopped")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures")))
