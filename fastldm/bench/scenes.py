"""`fastldm bench scenes`: how often a model draws what it is asked, read by the judge; how far its pictures
are from renders; and what its autoencoder leaves of renders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from fastldm import api, checks
from fastldm.bench.report import publish
from fastldm.errors import FastLDMError
from fastldm.pipeline import Pipeline
from fastldm.scenes import LANDSCAPES, STYLES, Rendered, Scene, caption, draw_scene, render, sample_scene
from fastldm.scenes.exam import CATEGORIES, GENEVAL, PER_CATEGORY, questions
from fastldm.scenes.judge import Judge, Reading
from fastldm.scenes.marks import is_exact, objects_right
from fastldm.training.reconstruction import frechet_distance, given_back, psnr

BATCH = 8
RENDERS = 200  # of each style
DISTANCE_PICTURES = 500
TRUSTED = 0.99
"""Share of the objects of fresh renders, in every style, that the judge must read right."""

_SEED = 7

Pictures: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Draw: TypeAlias = Callable[[Sequence[str], Sequence[int]], Pictures]


@dataclass(frozen=True)
class Style:
    """Of fresh renders of a style: shares of objects and of pictures that the judge reads right, of their
    reconstructions that it reads right, and the PSNR of these in dB.
    """

    objects: float
    exact: float
    reconstructed: float
    psnr: float


@dataclass(frozen=True)
class Report:
    """What a model of scenes can do; shares are of 1."""

    title: str
    pictures: int
    categories: dict[str, float]
    overall: float
    found: float  # of the objects that the first six categories ask for
    distance: float
    floor: float  # the same distance between renders and renders
    distance_pictures: int
    styles: dict[str, Style]

    def __str__(self) -> str:
        lines = [self.title, f"  {f'right, of {self.pictures} each':24}  share   deviation"]
        for name, share in self.categories.items():
            lines.append(_line(name, share, self.pictures))
        lines += [
            _line("overall of the first six", self.overall, self.pictures * len(GENEVAL)),
            f"  {self.found:.1%} of the objects that the first six ask for are there, whatever else is",
            f"  Fréchet distance {self.distance:.2f}, between renders {self.floor:.2f}; "
            f"{self.distance_pictures} pictures from captions",
            f"  {'renders':24}  objects and pictures read right; pictures after the autoencoder, and PSNR",
        ]
        for name, of in self.styles.items():
            lines.append(
                f"  {name:24}  {of.objects:6.1%} {of.exact:6.1%}; {of.reconstructed:6.1%} {of.psnr:5.1f} dB"
            )
        return "\n".join(lines)


def _line(name: str, share: float, count: int) -> str:
    return f"  {name:24} {share:6.3f}     {(share * (1 - share) / count) ** 0.5:.3f}"


def run(*, json_file: str | None = None, **asked: Any) -> None:
    """Print the report, `asked` as in `measure`, and write it as JSON. InvalidArgument before any work."""
    publish("scenes", measure, json_file, asked)


def measure(
    *,
    model: str = "default",
    dtype: str | None = None,
    device: str | None = None,
    every: int = 1,
    guidance: float | None = None,
    eta: float = 0.0,
    steps: int = 25,
    judge: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Ask the model every N-th question; question i is drawn with seed i, so that it repeats.

    model, dtype, device: as in `fastldm.load`; judge: as in `Judge.load`. FastLDMError when the judge reads
    fewer than TRUSTED of the objects of fresh renders.
    """
    every = checks.integer("every", every, 1, PER_CATEGORY)
    steps = checks.integer("steps", steps, 1, 1000)
    reader = Judge.load(judge)
    pipe = api.load(model, device=device, dtype=dtype)
    if guidance is None:
        guidance = pipe.limits.abilities.guidance_scale
    guidance = checks.number("guidance", guidance, 0.0, 100.0)
    sampled = {"steps": steps, "guidance_scale": guidance, "eta": checks.number("eta", eta, 0, 1)}
    number = len(range(0, PER_CATEGORY, every))

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
        made: list[Any] = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            made += pipe.generate(list(prompts[part]), seed=list(seeds[part]), **sampled).images
            say(f"{len(made)} of {len(prompts)} pictures")
        return np.stack([np.asarray(image) for image in made])

    say("renders of each style")
    styles = {style: style_report(reader, pipe, style, number) for style in STYLES}
    asked = {i: question for i, question in enumerate(questions()) if i % PER_CATEGORY % every == 0}
    readings = reader.read(draw([question.prompt for question in asked.values()], list(asked)))
    answers = list(zip(asked.values(), readings, strict=True))
    right = Counter(question.category for question, reading in answers if question.is_right(reading))
    found = [question.found(reading) for question, reading in answers if question.category in GENEVAL]
    shares = {name: right[name] / number for name in CATEGORIES}
    pictures = len(range(0, DISTANCE_PICTURES, every))
    distance, floor = _distances(reader, draw, pictures)
    return Report(
        title=f"Scenes: {model}, {steps} steps, eta {eta:g}, guidance {guidance:g}, "
        f"{pipe.device}, {pipe.dtype}",
        pictures=number,
        categories=shares,
        overall=sum(shares[name] for name in GENEVAL) / len(GENEVAL),
        found=sum(found) / len(found),
        distance=distance,
        floor=floor,
        distance_pictures=pictures,
        styles=styles,
    )


def style_report(judge: Judge, pipe: Pipeline, style: str, number: int) -> Style:
    """Of fresh renders, half of them landscapes; the autoencoder has the first `number`.

    FastLDMError when the judge reads fewer than TRUSTED of their objects right.
    """
    rng = np.random.default_rng([_SEED, STYLES.index(style)])
    renders = []
    for i in range(RENDERS):
        place = LANDSCAPES[i // 2 % len(LANDSCAPES)] if i % 2 else None
        count = 1 + i // 2 % 4
        renders.append(render(sample_scene(rng, count, style=style, background=place, held_out=i % 5 == 0)))
    pictures = _pictures(renders)
    readings = judge.read(pictures)
    total = sum(len(whole.scene.objects) for whole in renders)
    objects = sum(objects_right(*each) for each in _with_scenes(readings, renders)) / total
    if objects < TRUSTED:
        why = f"{objects:.1%} of the objects of {style} renders; {TRUSTED:.0%} are needed"
        raise FastLDMError(f"the judge reads {why}")
    kept = torch.from_numpy(pictures[:number])
    with pipe.turn():
        decoded = given_back(pipe.components.vae, kept, BATCH, pipe.dtype, pipe.device)
    return Style(
        objects=objects,
        exact=_exact(readings, renders),
        reconstructed=_exact(judge.read(decoded), renders[:number]),
        psnr=float(psnr(kept, decoded).mean()),
    )


def _distances(judge: Judge, draw: Draw, count: int) -> tuple[float, float]:
    """From renders of so many scenes to the pictures that a model draws from captions of others, and to
    renders of these others.
    """
    rng = np.random.default_rng(_SEED)
    scenes, others = ([draw_scene(rng) for _ in range(count)] for _ in range(2))
    pictures = draw([caption(scene, rng) for scene in others], range(count))
    sets = _pictures(map(render, scenes)), pictures, _pictures(map(render, others))
    fresh, drawn, rendered = map(judge.features, sets)
    return frechet_distance(fresh, drawn), frechet_distance(fresh, rendered)


def _exact(readings: Sequence[Reading], renders: Sequence[Rendered]) -> float:
    """The share of pictures that show the scene's objects and no others."""
    return sum(is_exact(*each) for each in _with_scenes(readings, renders)) / len(renders)


def _with_scenes(readings: Iterable[Reading], renders: Iterable[Rendered]) -> Iterator[tuple[Reading, Scene]]:
    return ((reading, whole.scene) for reading, whole in zip(readings, renders, strict=True))


def _pictures(renders: Iterable[Rendered]) -> Pictures:
    return np.stack([whole.image for whole in renders])
