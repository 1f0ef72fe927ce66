"""A model with a hint block through generate(): maps, small pictures, labels, layouts."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastldm.errors import InvalidArgument
from fastldm.models.hints import inpainting_hint, map_hint, upscaling_hint
from fastldm.pipeline import Pipeline
from fastldm.runtime import Batcher
from fastldm.shortcuts import Shortcuts

MAP = np.zeros((16, 16), np.uint8)
MAP[2:9, 4:12] = 3
SMALL = np.zeros((4, 4, 3), np.uint8)


def generate(pipe: Pipeline, prompt: str | None = "a cat", **arguments: Any) -> np.ndarray:
    made: np.ndarray = pipe.generate(prompt, **{"steps": 2, "output_type": "np", **arguments}).images
    return made


def beside(pipe: Pipeline, **arguments: Any) -> torch.Tensor | None:
    with torch.inference_mode():
        return pipe.pictures.beside(pipe.check("a cat", **arguments), range(1), [])


def signed(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).float().permute(2, 0, 1)[None] / 127.5 - 1


def scaled(pipe: Pipeline, pictures: torch.Tensor) -> torch.Tensor:
    vae = pipe.components.vae
    with torch.inference_mode():
        return (vae.encode(pictures).mean - vae.config.shift_factor) * vae.config.scaling_factor


def test_each_task_fills_its_channels(pipe: Pipeline, picture: np.ndarray, mask: np.ndarray) -> None:
    """As training fills them: fastldm.models.hints."""
    assert beside(pipe) is None and beside(pipe, image=picture) is None
    got = beside(pipe, segmentation=MAP)
    assert torch.equal(got, map_hint(torch.from_numpy(MAP)[None], 4, (8, 8)))

    hole = torch.from_numpy(mask)[None, None]
    want = inpainting_hint(hole, scaled(pipe, signed(picture).masked_fill(hole, 0)))
    assert torch.allclose(beside(pipe, image=picture, mask=mask), want, atol=1e-5)

    small = picture[:4, :6]
    large = F.interpolate(signed(small), (16, 24), mode="bicubic", antialias=True).clamp(-1, 1)
    want = upscaling_hint(signed(small), scaled(pipe, large))
    assert torch.allclose(beside(pipe, image=small, upscale=True), want, atol=1e-5)


def test_a_map_changes_the_picture_and_its_size_is_the_pictures(pipe: Pipeline) -> None:
    plain, mapped = generate(pipe), generate(pipe, segmentation=MAP)
    assert mapped.shape == plain.shape and not np.array_equal(mapped, plain)
    assert not np.array_equal(mapped, generate(pipe, segmentation=MAP.T))
    wide = np.zeros((10, 24), np.int64)
    assert generate(pipe, segmentation=wide).shape == (1, 10, 24, 3)
    odd = pipe.generate("a cat", segmentation=np.ones((11, 25), np.int64), steps=1)
    assert odd.image.size == (24, 10)
    assert odd.warnings == ("segmentation resized from 25x11 to 24x10 (nearest)",)


def test_upscaling_takes_any_size(pipe: Pipeline, picture: np.ndarray) -> None:
    for height, width in ((4, 4), (3, 5), (1, 7)):
        large = generate(pipe, image=picture[:height, :width], upscale=True)
        assert large.shape == (1, 4 * height, 4 * width, 3)
    same = generate(pipe, image=picture[:3, :5], upscale=True, width=20, height=12)
    assert np.array_equal(same, generate(pipe, image=picture[:3, :5], upscale=True))


def test_labels_and_layouts_are_prompts(pipe: Pipeline) -> None:
    assert np.array_equal(generate(pipe, None, label="dog"), generate(pipe, "label dog"))
    both = generate(pipe, None, label=["cat", 2])
    assert np.array_equal(both, generate(pipe, ["label cat", "label fish"]))
    boxes = [("red cat", (0.25, 0.0, 0.5, 1.0)), (1, (0.6, 0.5, 1.0, 1.0))]
    words = "layout red cat p8 p0 p15 p31 , dog p19 p16 p31 p31"
    assert np.array_equal(generate(pipe, None, layout=boxes), generate(pipe, words))
    assert pipe.generate(layout=[boxes, boxes[:1]], steps=1).seeds == [0, 1]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("label", {"label": "horse"}),
        ("label", {"label": 3}),
        ("label", {"label": True}),
        ("label", {"label": []}),
        ("label[1]", {"label": ["cat", -1]}),
        ("prompt", {"label": "cat", "prompt": "a cat"}),
        ("layout", {"layout": []}),
        ("layout", {"layout": "cat"}),
        ("layout[0]", {"layout": [("cat", (0.5, 0, 0.5, 1))]}),
        ("layout[0]", {"layout": [("cat", (0, 0, 2, 1))]}),
        ("layout[0]", {"layout": [("cat", (0, 0, 1))]}),
        ("layout[1]", {"layout": [("cat", (0, 0, 0.4, 1)), ("horse", (0.5, 0, 1, 1))]}),
        ("layout[0]", {"layout": [("cat",)]}),
        ("layout", {"layout": [("cat", (0, 0, 0.6, 1)), ("dog", (0.5, 0, 1, 1))]}),
        ("layout[1][0]", {"layout": [[("cat", (0, 0, 1, 1))], [("cat", (1, 0, 0, 1))]]}),
        ("segmentation", {"prompt": "a", "segmentation": MAP + 2}),
        ("segmentation", {"prompt": "a", "segmentation": MAP.astype(np.float32)}),
        ("segmentation", {"prompt": "a", "segmentation": MAP[None, None]}),
        ("segmentation", {"prompt": "a", "segmentation": [MAP, MAP]}),
        ("segmentation", {"prompt": "a", "segmentation": "nothing.png"}),
        ("mask", {"prompt": "a", "image": np.zeros((16, 16, 3), np.uint8), "mask": np.ones((8, 8), bool)}),
        ("mask", {"prompt": "a", "image": SMALL, "mask": np.full((4, 4), 1.5)}),
        ("mask", {"prompt": "a", "image": SMALL, "mask": np.zeros((4, 4), bool)}),
        ("image", {"prompt": "a", "mask": np.ones((8, 8), bool)}),
        ("image", {"prompt": "a", "upscale": True}),
        ("upscale", {"prompt": "a", "upscale": 4}),
        ("blend", {"prompt": "a", "blend": 3}),
        ("width", {"prompt": "a", "image": SMALL, "upscale": True, "width": 32}),
        (
            "strength",
            {"prompt": "a", "image": np.zeros((4, 4, 3), np.uint8), "upscale": True, "strength": 0.5},
        ),
    ],
)
def test_bad_input_is_refused_by_name(pipe: Pipeline, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pipe.generate(**arguments)
    assert caught.value.name == name


def test_a_picture_says_what_it_was_made_from(pipe: Pipeline, picture: np.ndarray, mask: np.ndarray) -> None:
    def recorded(**arguments: Any) -> dict[str, Any]:
        made: dict[str, Any] = pipe.check("a cat", **arguments).arguments(0)
        return made

    made = recorded(image=picture, mask=mask, blend=2)
    assert made["blend"] == 2 and made["strength"] == 1.0
    assert set(made["not_recorded"]) == {"image", "mask"}
    assert set(recorded(segmentation=MAP)["not_recorded"]) == {"segmentation"}
    made = recorded(image=picture[:3, :5], upscale=True)
    assert made["upscale"] is True and (made["width"], made["height"]) == (20, 12)
    assert pipe.check(layout=[("cat", (0, 0, 1, 1))]).arguments(0)["prompt"] == "layout cat p0 p0 p31 p31"


def test_shortcuts_and_batcher_carry_the_hint(pipe: Pipeline, picture: np.ndarray, mask: np.ndarray) -> None:
    hinted = {"image": picture, "mask": mask, "steps": 3, "output_type": "np"}
    shortcuts = Shortcuts(guidance_interval=(0.0, 0.5), whole_every=2)
    short = pipe.generate("a cat", shortcuts=shortcuts, **hinted).images
    assert np.abs(short - pipe.generate("a cat", **hinted).images).max() < 1
    alone = pipe.generate("a cat", **hinted).images
    with Batcher(pipe, slots=2) as batcher:
        futures: list[Future[Any]] = [
            batcher.submit("a cat", **hinted),
            batcher.submit("a dog", steps=2, output_type="np"),
            batcher.submit("a cat", **hinted),
        ]
        first, plain, last = (future.result().images for future in futures)
    assert np.array_equal(first, last)
    assert np.abs(first - alone).max() < 1e-4
    assert np.abs(plain - generate(pipe, "a dog")).max() < 1e-4
