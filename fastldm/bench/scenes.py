"""`fastldm bench scenes`: how often a model draws what it is asked, read by the judge; how far its pictures are
from renders; and what its autoencoder leaves of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm import api, checks
from fastldm.bench import machine
from fastldm.errors import FastLDMError, InvalidArgument
from fastldm.images import write_files
from fastldm.models.vae import AutoencoderKL
from fastldm.pipeline import Pipeline
from fastldm.scenes import STYLES, caption, draw_scene, render, sample_scene
from fastldm.scenes.exam import GENEVAL, PER_CATEGORY, questions
from fastldm.scenes.judge import Judge
from fastldm.scenes.marks import frechet_distance, is_exact, objects_right
from fastldm.scenes.palette import LANDSCAPES
from fastldm.scenes.render import Rendered

BATCH = 8
DISTANCE_PICTURES = 500
TRUSTED = 0.99
"""Share of the objects of fresh renders, in every style, that the judge must read right."""

_SEED = 7


@dataclass(frozen=True)
class Style:
    """Of fresh renders of a style: objects that the judge reads right, pictures that it reads exactly, and the
    same of their reconstructions; PSNR of these in dB.
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
    distance: float
    floor: float  # the same distance between renders and renders
    distance_pictures: int
    styles: dict[str, Style] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.title, f"  {'right, of ' + str(self.pictures):24} {'':>6}  ± 1 deviation"]
        for name, share in {**self.categories, "overall of the first six": self.overall}.items():
            count = self.pictures * (len(GENEVAL) if name.startswith("overall") else 1)
            lines.append(f"  {name:24} {share:6.3f}  ± {(share * (1 - share) / count) ** 0.5:.3f}")
        lines.append(
            f"  Fréchet distance {self.distance:.2f}, of renders {self.floor:.2f}; "
            f"{self.distance_pictures} pictures from captions"
        )
        lines.append(f"  {'autoencoder, on renders':24} {'exact':>6} {'PSNR':>8}  the judge on the renders themselves")
        for name, of in self.styles.items():
            lines.append(
                f"  {name:24} {of.reconstructed:6.3f} {of.psnr:5.1f} dB  {of.objects:.1%} of objects, "
                f"{of.exact:.1%} of pictures"
            )
        return "\n".join(lines)


def run(*, json_file: str | None = None, **asked: Any) -> None:
    """Print the report, `asked` as in `measure`, and write it as JSON. InvalidArgument before any work."""
    if json_file is not None and (not Path(json_file).resolve().parent.is_dir() or Path(json_file).is_dir()):
        raise InvalidArgument("json", json_file, "a file in a folder that exists")
    report = measure(say=lambda text: print(f"fastldm: {text}", file=sys.stderr, flush=True), **asked)
    facts = machine.describe()
    print(report)
    print(machine.headline(facts))
    if json_file is not None:
        found = {"machine": facts, "scenes": asdict(report)}
        write_files({Path(json_file): (json.dumps(found, indent=1) + "\n").encode()})


def measure(
    *,
    model: str = "default",
    dtype: str | None = None,
    device: str | None = None,
    every: int = 1,
    guidance: float = 7.5,
    steps: int = 25,
    judge: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Ask the model every N-th question; picture i is drawn with seed i, so that it repeats.

    model, dtype, device: as in `fastldm.load`; judge: as in `Judge.load`. FastLDMError when the judge reads
    fewer than TRUSTED of the objects of fresh renders.
    """
    every = checks.integer("every", every, 1, PER_CATEGORY)
    steps = checks.integer("steps", steps, 1, 1000)
    guidance = checks.number("guidance", guidance, 0.0, 100.0)
    reader = Judge.load(judge)
    pipe = api.load(model, device=device, dtype=dtype)
    number = PER_CATEGORY // every
    say("the judge on fresh renders")
    styles = {style: style_report(reader, pipe, style, number) for style in STYLES}
    asked = questions(number)

    def draw(prompts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        made = []
        for start in range(0, len(prompts), BATCH):
            part = list(prompts[start : start + BATCH])
            result = pipe.generate(
                part, seed=[start + i for i in range(len(part))], steps=steps, guidance_scale=guidance
            )
            made += [np.asarray(image) for image in result.images]
            say(f"{len(made)} of {len(prompts)} pictures")
        return np.stack(made)

    readings = reader.read(draw([question.prompt for question in asked]))
    right: dict[str, list[bool]] = {}
    for question, reading in zip(asked, readings, strict=True):
        right.setdefault(question.category, []).append(question.is_right(reading))
    shares = {name: sum(marks) / len(marks) for name, marks in right.items()}

    count = DISTANCE_PICTURES // every
    rng = np.random.default_rng(_SEED)
    told, other = ([draw_scene(rng) for _ in range(count)] for _ in range(2))
    fresh = reader.features(_pictures([render(scene) for scene in other]))
    floor = frechet_distance(reader.features(_pictures([render(scene) for scene in told])), fresh)
    distance = frechet_distance(reader.features(draw([caption(scene, rng) for scene in told])), fresh)
    return Report(
        f"Scenes: {model}, {steps} steps, guidance {guidance:g}, {pipe.dtype}, {pipe.device}".replace("torch.", ""),
        number,
        shares,
        sum(shares[name] for name in GENEVAL) / len(GENEVAL),
        distance,
        floor,
        count,
        styles,
    )


def style_report(judge: Judge, pipe: Pipeline, style: str, number: int) -> Style:
    """Of so many fresh renders, half of them landscapes; FastLDMError when the judge cannot be trusted."""
    rng = np.random.default_rng([_SEED, STYLES.index(style)])
    renders = []
    for i in range(number):
        place = LANDSCAPES[i // 2 % len(LANDSCAPES)] if i % 2 else None
        renders.append(render(sample_scene(rng, 1 + i // 2 % 4, style=style, background=place, held_out=i % 5 == 0)))
    pictures = _pictures(renders)
    readings = judge.read(pictures)
    total = sum(len(whole.scene.objects) for whole in renders)
    objects = sum(objects_right(r, whole.scene) for r, whole in zip(readings, renders, strict=True)) / total
    if objects < TRUSTED:
        raise FastLDMError(f"the judge reads {objects:.1%} of the objects of {style} renders; {TRUSTED:.0%} are needed")
    with pipe.turn():
        decoded = reconstructed(pipe.components.vae, torch.from_numpy(pictures), pipe.dtype, pipe.device)
    error = (decoded.double() - torch.from_numpy(pictures)).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
    return Style(
        objects=objects,
        exact=_exact(judge, pictures, renders),
        reconstructed=_exact(judge, decoded, renders),
        psnr=float((10 * torch.log10(255.0**2 / error)).mean()),
    )


@torch.inference_mode()
def reconstructed(vae: AutoencoderKL, pictures: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pictures uint8 [N, H, W, 3] encoded to the posterior mean and decoded."""
    made = []
    for part in pictures.split(BATCH):
        values = (part.permute(0, 3, 1, 2).float() / 127.5 - 1).to(device, dtype)
        shown = vae.decode(vae.encode(values).mean).float().clamp(-1, 1) * 127.5 + 127.5
        made.append(shown.round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(made)


def _exact(judge: Judge, pictures: object, renders: Sequence[Rendered]) -> float:
    """The share of pictures that show the scene's objects and no others."""
    marks = [is_exact(r, whole.scene) for r, whole in zip(judge.read(pictures), renders, strict=True)]
    return sum(marks) / len(marks)


def _pictures(renders: Sequence[Rendered]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([whole.image for whole in renders])
