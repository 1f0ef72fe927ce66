"""Every task of the shipped model once: python examples/tasks.py FOLDER

Draws the input pictures with fastldm's renderer, then runs the commands of docs/tasks.md in that folder.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastldm import cli
from fastldm.scenes import render, sample_scene

COMMANDS = (
    'fastldm generate "a red circle on a white background" -o text.png',
    "fastldm generate --label star -o label.png",
    "fastldm generate --layout 'red circle:0.1,0.1,0.4,0.4' --layout 'blue house:0.5,0.4,0.9,0.9'"
    " -o layout.png",
    'fastldm generate "a green tree" --segmentation map.png -o segmentation.png',
    'fastldm generate "" --image small.png --upscale -o upscaled.png',
    'fastldm generate "a blue circle" --image scene.png --mask mask.png -o inpainted.png',
    'fastldm generate "two green trees" --image scene.png --pad 0 0 64 0 --blend 4 -o outpainted.png',
    'fastldm generate "a purple tree" --image scene.png --strength 0.7 -o changed.png',
    'fastldm generate "a red circle" "a blue circle" --interpolate 8 -o walk.gif',
)


def inputs() -> dict[str, Image.Image]:
    """A scene, the box of its object as a mask, its map, and the scene at a quarter of its size."""
    whole = render(sample_scene(np.random.default_rng(4), kind="tree", colour="green", size="large"))
    scene = Image.fromarray(whole.image)
    x0, y0, x1, y1 = (int(edge) for edge in whole.scene.objects[0].box)
    mask = np.zeros(whole.segmentation.shape, np.uint8)
    mask[max(y0 - 4, 0) : y1 + 5, max(x0 - 4, 0) : x1 + 5] = 255
    small = scene.resize((scene.width // 4, scene.height // 4), Image.Resampling.BOX)
    maps = Image.fromarray(whole.segmentation)
    return {"scene": scene, "mask": Image.fromarray(mask), "map": maps, "small": small}


def main(folder: str) -> None:
    """Write the inputs and run the commands."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    for name, picture in inputs().items():
        picture.save(Path(f"{name}.png"))
    for command in COMMANDS:
        print(command, flush=True)
        if code := cli.main([*shlex.split(command)[1:], "--quiet"]):
            sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
