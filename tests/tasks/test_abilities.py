"""What a model says it can be asked for: read, written, kept by both layouts, shown by `fastldm info`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastldm
from fastldm.abilities import Abilities
from fastldm.checkpoint import convert, inspect, load_components, save_folder
from fastldm.errors import CheckpointError, InvalidArgument
from tests.pipeline.conftest import save_tiny
from tests.tasks.conftest import ABILITIES, components


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, place = components(), tmp_path_factory.mktemp("abilities") / "model"
    save_folder(
        place,
        unet=made.unet,
        vae=made.vae,
        text_encoder=made.text_encoder,
        tokenizer=made.tokenizer,
        scheduler=made.scheduler,
        abilities=ABILITIES,
    )
    return place


def test_both_layouts_keep_them(folder: Path, tmp_path: Path) -> None:
    single, again = tmp_path / "model.safetensors", tmp_path / "again"
    convert(folder, single)
    convert(single, again)
    for place in (folder, single, again):
        assert load_components(place).abilities == ABILITIES
        assert inspect(place).tasks == (
            *("text to image", "class to image", "layout to image", "image to image"),
            *("semantic synthesis", "inpainting", "upscaling ×4"),
        )


def test_diffusers_reads_the_folder_as_ever(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    save_tiny(tmp_path / "model", "epsilon")
    told = replace(ABILITIES, segmentation=(), upscaling=0)  # without a hint block
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_fastldm": told.to_dict()}))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    assert pipe.unet.config.in_channels == 4
    assert fastldm.load(tmp_path / "model").limits.abilities == told


def test_of_a_plain_model(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "epsilon")
    pipe = fastldm.load(tmp_path / "model")
    assert pipe.limits.abilities.tasks == ("text to image", "image to image", "inpainting")
    for name, value in (("label", 1), ("layout", []), ("segmentation", 1), ("upscale", True)):
        with pytest.raises(InvalidArgument, match="None: this model does text to image, image to image, inp"):
            pipe.generate(**{"prompt": None if name in ("label", "layout") else "a", name: value})


def test_guidance() -> None:
    from tests.test_arguments import LIMITS, check_generate

    mild = replace(LIMITS, abilities=Abilities(guidance_scale=3.0))
    assert check_generate(mild, prompt="a").guidance_scale == 3.0
    assert check_generate(mild, prompt="a", guidance_scale=2).guidance_scale == 2.0
    alone = replace(LIMITS, abilities=Abilities(prompt=False, guides=False))
    assert check_generate(alone).guidance_scale == check_generate(alone, guidance_scale=1).guidance_scale == 1
    with pytest.raises(InvalidArgument, match="nothing to be guided by"):
        check_generate(alone, guidance_scale=7.5)


def test_classes_without_text() -> None:
    from tests.test_arguments import LIMITS, check_generate

    imagenet = replace(LIMITS, abilities=Abilities(prompt=False, classes=1000, needs="label"))
    made = check_generate(imagenet, label=[207, 3], num_images=2)
    assert made.labels == [207, 207, 3, 3] and made.prompts is None and made.count == 4
    assert made.arguments(2)["label"] == 3
    for label in (None, 1000, "dog"):
        with pytest.raises(InvalidArgument, match="^label=.*an integer 0…999"):
            check_generate(imagenet, label=label)


def test_numbers_of_classes_that_have_no_name_are_no_words() -> None:
    from tests.test_arguments import LIMITS, check_generate

    nameless = replace(LIMITS, abilities=Abilities(classes=5, layout=True))
    for told in ({"label": 0}, {"layout": [(0, (0, 0, 1, 1))]}):
        with pytest.raises(InvalidArgument, match=f"^{next(iter(told))}"):
            check_generate(nameless, **told)
    assert check_generate(nameless, layout=[("a cat", (0, 0, 1, 1))]).count == 1


@pytest.mark.parametrize(
    ("stated", "key"),
    [
        (3, "_fastldm"),
        ({"magic": True}, "_fastldm.magic"),
        ({"prompt": 1}, "_fastldm.prompt"),
        ({"labels": ["a", 3]}, "_fastldm.labels"),
        ({"labels": ["a"], "classes": 2}, "_fastldm.classes"),
        ({"classes": -1}, "_fastldm.classes"),
        ({"upscaling": 1000}, "_fastldm.upscaling"),
        ({"guidance_scale": "3"}, "_fastldm.guidance_scale"),
        ({"guidance_scale": 1e9}, "_fastldm.guidance_scale"),
        ({"needs": 3}, "_fastldm.needs"),
    ],
)
def test_what_no_model_can_say_is_refused(folder: Path, tmp_path: Path, stated: Any, key: str) -> None:
    place = tmp_path / "model"
    convert(folder, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", place)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, "_fastldm": stated}))
    with pytest.raises(CheckpointError) as caught:
        load_components(place)
    assert caught.value.key == key
