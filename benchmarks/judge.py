"""From which chance the judge should name a kind or a colour: `python -m benchmarks.judge`.

For each chance, the objects of fresh renders that it reads right, by style; and the spoilt ones, near misses
of our objects, that it takes for ours, by the way in which they are spoilt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from fastldm.scenes import LANDSCAPES, STYLES, Rendered, render, sample_scene
from fastldm.scenes.judge import MIN_CHANCE, Judge, Reading
from fastldm.scenes.marks import objects_right, overlap
from fastldm.training.spoil import NONE, SPOILERS, Spoilt, bounds

CHANCES = (0.6, 0.7, 0.8, 0.85, 0.9)
SMALLEST = 120  # pixels of a spoilt object that is asked about
TOUCHES = 0.3  # overlap from which a reading is one of the spoilt object


def renders(style: str, number: int, seed: int) -> list[Rendered]:
    """Half of them landscapes, one to four objects, a fifth with a pair that models never see."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        place = LANDSCAPES[i // 2 % len(LANDSCAPES)] if i % 2 else None
        scene = sample_scene(rng, 1 + i // 2 % 4, style=style, background=place, held_out=i % 5 == 0)
        made.append(render(scene))
    return made


def share_right(judge: Judge, drawn: Sequence[Rendered]) -> float:
    """Of the objects of renders."""
    readings = judge.read([whole.image for whole in drawn])
    right = sum(objects_right(reading, of.scene) for reading, of in zip(readings, drawn, strict=True))
    return right / sum(len(whole.scene.objects) for whole in drawn)


def spoilt_by(spoiler: int, wholes: Sequence[Rendered], seed: int) -> list[Spoilt]:
    """What SPOILERS[spoiler] makes of renders, where its kind or its colour is none of ours."""
    rng = np.random.default_rng(seed)
    made = (SPOILERS[spoiler](whole, rng) for whole in wholes)
    asked = (one for one in made if one is not None and one.mask.sum() >= SMALLEST)
    return [one for one in asked if NONE in (one.kind, one.colour)]


def fooled(reading: Reading, one: Spoilt) -> bool:
    """Whether the spoilt object is read as one of ours."""
    near = [seen for seen in reading.objects if overlap(seen.box, bounds(one.mask)) > TOUCHES]
    return any(seen.kind is not None and seen.colour is not None for seen in near)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renders", type=int, default=1000, help="of each style (1000)")
    parser.add_argument("--judge", help="another judge's weights (the shipped one's)")
    options = parser.parse_args()
    judges = [Judge.load(options.judge, chance) for chance in CHANCES]
    print(f"{'named from chance':24}" + "".join(f"{chance:>9g}" for chance in CHANCES))

    def line(what: str, shares: Sequence[float], count: int) -> None:
        print(f"{what:24}" + "".join(f"{share:9.2%}" for share in shares) + f"   of {count}", flush=True)

    for style in STYLES:
        drawn = renders(style, options.renders, seed=50)
        objects = sum(len(whole.scene.objects) for whole in drawn)
        line(f"{style}, right", [share_right(judge, drawn) for judge in judges], objects)
    wholes = [whole for style in STYLES for whole in renders(style, options.renders // 4, seed=51)]
    every = []
    for spoiler, function in enumerate(SPOILERS):
        spoilt = spoilt_by(spoiler, wholes, seed=52)
        shares = []
        for judge in judges:
            readings = judge.read([one.image for one in spoilt])
            shares.append(sum(map(fooled, readings, spoilt)) / len(spoilt))
        line(f"{function.__name__}, taken for ours", shares, len(spoilt))
        every.append(shares)
    line("mean of these", [float(np.mean(column)) for column in zip(*every, strict=True)], len(SPOILERS))
    print(f"the judge names from {MIN_CHANCE:g}")


if __name__ == "__main__":
    main()
