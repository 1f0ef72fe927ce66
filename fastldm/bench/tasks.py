"""`fastldm bench tasks`: every task of a model of scenes, read by the judge, beside what the judge reads on
true pictures; and what a step of each task costs beside a step from text alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from fastldm import api, checks
from fastldm.bench.report import publish
from fastldm.errors import InvalidArgument
from fastldm.pipeline import Pipeline
from fastldm.scenes import KINDS, Rendered, Scene, caption, draw_scene, layout_of, render
from fastldm.scenes.judge import Judge, Reading, overlap
from fastldm.scenes.marks import is_exact
from fastldm.scenes.prompts import shares_of

QUESTIONS = 100  # of each task
BATCH = 8
STAGE = 1  # of the world: flat, plain backgrounds
ROUNDS = 5  # of timing, interleaved
TIMED_STEPS = 10
_SEED = 11

Pictures: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Ask: TypeAlias = Callable[[Sequence[dict[str, Any]]], Pictures]


@dataclass(frozen=True)
class Row:
    """A task's figure for the model; for true pictures, its cap; and the bar."""

    task: str
    what: str
    value: float
    cap: float
    bar: float
    step: float  # seconds of a step in relation to one from text alone


@dataclass(frozen=True)
class Report:
    """All of them; shares are of 1, PSNR in dB."""

    title: str
    pictures: int
    rows: tuple[Row, ...]
    psnr: float
    bicubic: float

    def __str__(self) -> str:
        lines = [self.title, f"  {'task':20} {'figure':44} model   true    bar     step"]
        for row in self.rows:
            figures = f"{row.value:6.1%}  {row.cap:6.1%}  {row.bar:4.0%}  × {row.step:.2f}"
            lines.append(f"  {row.task:20} {row.what:44} {figures}")
        lines.append(
            f"  upscaling: PSNR {self.psnr:.1f} dB; bicubic {self.bicubic:.1f} dB; {self.pictures} pictures"
        )
        return "\n".join(lines)


def run(*, json_file: str | None = None, **asked: Any) -> None:
    """Print the report, `asked` as in `measure`, and write it as JSON. InvalidArgument before any work."""
    publish("tasks", measure, json_file, asked)


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
    """Ask every N-th question of each task; question i is drawn with seed i, so that it repeats.

    model, dtype, device: as in `fastldm.load`; judge: as in `Judge.load`. InvalidArgument for a model that
    does not do all the tasks of the shipped one.
    """
    every = checks.integer("every", every, 1, QUESTIONS)
    reader = Judge.load(judge)
    pipe = api.load(model, device=device, dtype=dtype)
    can = pipe.limits.abilities
    if can.labels != KINDS or not (can.layout and can.segmentation and can.inpainting and can.upscaling):
        raise InvalidArgument(
            "model", model, f"a model of scenes for every task; this one does {', '.join(can.tasks)}"
        )
    exam = _Exam(range(0, QUESTIONS, every), can.upscaling)
    plain: dict[str, Any] = {"steps": steps, "guidance_scale": guidance, "eta": eta}

    def ask(task: str) -> Pictures:
        say(task)
        made = [
            pipe.generate(**plain, **question, seed=number).image
            for number, question in zip(exam.numbers, exam.questions[task], strict=True)
        ]
        return np.stack([np.asarray(image) for image in made])

    def row(task: str, what: str, bar: float, score: Callable[[Pictures], float], drawn: Pictures) -> Row:
        return Row(task, what, score(drawn), score(exam.pictures), bar, relative[task])

    relative = _steps(pipe, {task: questions[0] for task, questions in exam.questions.items()})
    drawn = {task: ask(task) for task in exam.questions if task != "text"}
    outside = np.stack([~mask for mask in exam.masks])
    kept = (drawn["inpainting"] == exam.pictures).all(-1)
    assert kept[outside].all()  # to the bit, whatever the model draws
    marks = _Marks(reader, exam)
    rows = (
        row("label", "one object, of the class asked for", 0.95, marks.labels, drawn["label"]),
        row("layout", "boxes that hold their object at IoU ≥ 0.5", 0.90, marks.boxes, drawn["layout"]),
        row("segmentation", "pixels of the map read back", 0.90, marks.pixels, drawn["segmentation"]),
        row("segmentation", "pixels of its objects", 0.90, marks.object_pixels, drawn["segmentation"]),
        row("inpainting", "whole pictures exact", 0.85, marks.exact, drawn["inpainting"]),
        row(
            "upscaling", "pictures exact", 0.95 * marks.exact(exam.pictures), marks.exact, drawn["upscaling"]
        ),
    )
    return Report(
        title=f"Tasks: {model}, {steps} steps, {pipe.device}, {pipe.dtype}",
        pictures=len(exam.numbers),
        rows=rows,
        psnr=_psnr(exam.pictures, drawn["upscaling"]),
        bicubic=_psnr(exam.pictures, exam.enlarged),
    )


class _Exam:
    """Fresh scenes, and for each task what generate() is asked of them."""

    def __init__(self, numbers: range, scale: int) -> None:
        self.numbers = numbers
        renders = [_render(number) for number in numbers]
        self.scenes = [whole.scene for whole in renders]
        self.pictures: Pictures = np.stack([whole.image for whole in renders])
        self.maps = np.stack([whole.segmentation for whole in renders])
        self.masks = [_mask(whole) for whole in renders]
        side = self.pictures.shape[1]
        small = [
            Image.fromarray(image).resize((side // scale,) * 2, Image.Resampling.BOX)
            for image in self.pictures
        ]
        self.enlarged: Pictures = np.stack(
            [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in small]
        )
        said = [
            caption(scene, np.random.default_rng([_SEED, i]))
            for i, scene in zip(numbers, self.scenes, strict=True)
        ]
        self.questions: dict[str, list[dict[str, Any]]] = {
            "text": [{"prompt": text} for text in said],
            "label": [{"label": scene.objects[0].kind} for scene in self.scenes],
            "layout": [{"layout": _boxes(scene)} for scene in self.scenes],
            "segmentation": [{"prompt": t, "segmentation": m} for t, m in zip(said, self.maps, strict=True)],
            "inpainting": [
                {"prompt": text, "image": image, "mask": mask}
                for text, image, mask in zip(said, self.pictures, self.masks, strict=True)
            ],
            "upscaling": [{"prompt": "", "image": image, "upscale": True} for image in small],
        }


def _render(number: int) -> Rendered:
    return render(draw_scene(np.random.default_rng([_SEED, number]), STAGE))


def _boxes(scene: Scene) -> list[tuple[str, tuple[float, ...]]]:
    return [(f"{box.colour} {box.kind}", shares_of(box.box)) for box in layout_of(scene)]


def _mask(whole: Rendered) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The box of the first object, and a little more."""
    x0, y0, x1, y1 = whole.scene.objects[0].box
    mask = np.zeros(whole.segmentation.shape, bool)
    mask[max(int(y0) - 4, 0) : int(y1) + 5, max(int(x0) - 4, 0) : int(x1) + 5] = True
    return mask


class _Marks:
    """What pictures of the exam's scenes are worth."""

    def __init__(self, judge: Judge, exam: _Exam) -> None:
        self.judge, self.exam = judge, exam

    def labels(self, pictures: Pictures) -> float:
        """Of the exam's own pictures only those of one object count: the others show what was not asked."""
        own = pictures is self.exam.pictures
        read = [
            [thing.kind for thing in reading.objects] == [scene.objects[0].kind]
            for reading, scene in self._read(pictures)
            if not own or len(scene.objects) == 1
        ]
        return float(np.mean(read))

    def boxes(self, pictures: Pictures) -> float:
        return float(
            np.mean(
                [
                    any(
                        seen.kind == thing.kind and overlap(seen.box, thing.box) >= 0.5
                        for seen in reading.objects
                    )
                    for reading, scene in self._read(pictures)
                    for thing in scene.objects
                ]
            )
        )

    def pixels(self, pictures: Pictures) -> float:
        return float((self.judge.segment(pictures) == self.exam.maps).mean())

    def object_pixels(self, pictures: Pictures) -> float:
        return float((self.judge.segment(pictures) == self.exam.maps)[self.exam.maps > 0].mean())

    def exact(self, pictures: Pictures) -> float:
        return float(np.mean([is_exact(reading, scene) for reading, scene in self._read(pictures)]))

    def _read(self, pictures: Pictures) -> Iterable[tuple[Reading, Scene]]:
        return zip(self.judge.read(pictures), self.exam.scenes, strict=True)


def _psnr(true: Pictures, drawn: Pictures) -> float:
    """Mean over pictures, in dB."""
    error = np.square(true.astype(np.float64) - drawn).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-12))))


def _steps(pipe: Pipeline, questions: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of a step of each task in relation to one from text: medians of interleaved rounds."""
    seconds: dict[str, list[float]] = {task: [] for task in questions}
    for turn in range(ROUNDS + 1):
        for task, question in questions.items():
            spent = pipe.generate(**question, steps=TIMED_STEPS, output_type="latent").timings["denoise"]
            if turn:  # the first warms up
                seconds[task].append(spent)
    medians = {task: statistics.median(each) for task, each in seconds.items()}
    return {task: median / medians["text"] for task, median in medians.items()}
