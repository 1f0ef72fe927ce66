"""What a generate() call returns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastldm import images as pictures
from fastldm.errors import InvalidArgument
from fastldm.shortcuts import Shortcuts

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Result:
    """The images of one call, and how they came about.

    images    "pil": list of PIL images; "np": float32 [n, H, W, 3] in 0…1; "pt": tensor [n, 3, H, W] in 0…1;
              "latent": float32 tensor [n, C, h, w]
    seeds     one an image; with it, the image alone is made again
    timings   seconds: text, condition, denoise, decode, total
    warnings  what was mapped, guessed or truncated, or runs without the CUDA graph that it should have
    stopped   the callback ended it early: `images` show the clean latents as estimated then
    shortcuts what was left out to be faster; the defaults: nothing
    """

    images: Any
    seeds: list[int]
    timings: dict[str, float]
    warnings: tuple[str, ...] = ()
    stopped: bool = False
    shortcuts: Shortcuts = Shortcuts()
    describe: Callable[[int], Mapping[str, Any]] | None = field(default=None, repr=False)

    @property
    def image(self) -> Any:
        """The first image."""
        return self.images[0]

    def save(self, path: str | os.PathLike[str], *, as_grid: bool = False) -> list[Path]:
        """Write PNG files that say how they were made: `path`, or path-0, path-1, … for several; or, where
        `path` ends in .gif, an animation of several. Returns their paths.

        Raises InvalidArgument where a file cannot be made, FastLDMError where writing fails, as on a full
        disk; nothing is left half written.
        """
        if not isinstance(self.images, list):
            raise InvalidArgument(
                "output_type", type(self.images).__name__, "pil, for a result that is to be saved"
            )
        made: list[Mapping[str, Any] | None] = [
            self.describe(i) if self.describe else None for i in range(len(self.images))
        ]
        return pictures.save_pictures(path, self.images, made, as_grid=as_grid)

    def _repr_png_(self) -> bytes | None:
        """Shown inline in a notebook."""
        if not isinstance(self.images, list):
            return None
        shown: Image.Image = self.images[0] if len(self.images) == 1 else pictures.grid(self.images)
        return pictures.encode_png(shown)


class Clock:
    """Seconds spent in named stages, and in all."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._spent: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on `stage`."""
        now = time.perf_counter()
        self._spent[stage] = self._spent.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """The stages and the total."""
        return {**self._spent, "total": self._last - self._began}
