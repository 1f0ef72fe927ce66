"""What the judge learns from: targets, softened pictures, spoilt objects; and its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastldm.errors import InvalidArgument
from fastldm.scenes import KINDS, STYLES, Rendered, Scene, SceneObject, render, sample_scene
from fastldm.scenes.judge import Judge
from fastldm.training import run
from fastldm.training.config import JudgeConfig, read_config
from fastldm.training.judge import IGNORED, collate, draw
from fastldm.training.soften import soften
from fastldm.training.spoil import (
    LIKE,
    NONE,
    OURS,
    SAME,
    SPOILERS,
    Spoilt,
    bent,
    blob,
    chaos,
    chimera,
    cut,
    fade,
    likeness,
    two_colours,
)


def renders(number: int, **facts: object) -> list[Rendered]:
    rng = np.random.default_rng(3)
    return [render(sample_scene(rng, 1 + i % 3, style=STYLES[i % 4], **facts)) for i in range(number)]


def spoilt(spoiler, number: int = 60) -> list[tuple[Rendered, Spoilt]]:
    rng = np.random.default_rng(4)
    made = [(whole, spoiler(whole, rng)) for whole in renders(number)]
    return [(whole, one) for whole, one in made if one is not None]


@pytest.mark.parametrize("spoiler", SPOILERS, ids=lambda f: f.__name__)
def test_spoilers_change_the_first_object_alone(spoiler) -> None:
    found = spoilt(spoiler)
    assert len(found) >= 20
    assert sum(NONE in (one.kind, one.colour) for _, one in found) >= 8
    for whole, one in found:
        changed = np.abs(one.image.astype(int) - whole.image).max(axis=2)
        assert changed.max() >= 16 or one.kind != NONE
        # Where the others are it is as before, but for paper of a watercolour and bends nearby.
        others = np.zeros((128, 128), bool)
        for thing in whole.scene.objects[1:]:
            x0, y0, x1, y1 = map(round, thing.box)
            others[y0:y1, x0:x1] = True
        assert not one.mask[others].any()
        if whole.scene.style != "watercolour" and spoiler is not bent:
            assert changed[others & (whole.segmentation > 0)].max(initial=0) <= 1


def test_likeness_is_of_shapes_not_of_sizes_or_places() -> None:
    things = (
        SceneObject("fish", "red", "small", (10, 10, 45, 37)),
        SceneObject("fish", "red", "large", (30, 40, 115, 102)),
        SceneObject("star", "red", "large", (30, 40, 115, 120)),
    )
    masks = [render(Scene((thing,), "white")).segmentation > 0 for thing in things]
    assert likeness(masks[0], masks[1]) > SAME > LIKE > likeness(masks[1], masks[2])
    assert likeness(masks[0], masks[0]) == 1 and likeness(masks[0], np.zeros_like(masks[0])) == 0


def test_what_is_left_is_unlike_what_it_was() -> None:
    for spoiler in (chimera, cut, bent):
        for whole, one in spoilt(spoiler):
            x0, y0, x1, y1 = map(round, whole.scene.objects[0].box)
            mask = np.zeros((128, 128), bool)
            mask[y0:y1, x0:x1] = whole.segmentation[y0:y1, x0:x1] > 0
            if one.kind == NONE:
                assert likeness(one.mask, mask) <= LIKE + 0.02  # boxes are rounded here


def test_two_colours_and_fades_show_both() -> None:
    for whole, one in spoilt(two_colours):
        inside = one.image[one.mask].astype(int)
        old = (np.abs(inside - whole.image[one.mask]).max(axis=1) <= 2).mean()
        assert (one.kind, one.colour) == (OURS, NONE)
        assert 0.3 <= old <= 0.7 or whole.scene.style == "outlined"  # where both have the same lines
    assert all(one.kind == NONE for _, one in spoilt(fade))
    assert all(one.mask.any() and one.rendered.scene.objects[0].kind == "square" for _, one in spoilt(blob))


def test_targets_ask_nothing_of_what_is_unclear() -> None:
    whole, one = next(each for each in spoilt(two_colours) if len(each[0].scene.objects) == 1)
    noise = chaos(np.random.default_rng(0))
    targets = collate([whole, one, noise])
    assert targets.heat.flatten(1).max(1).values.tolist() == [1, 1, 0]
    kind = KINDS.index(whole.scene.objects[0].kind)
    assert set(targets.kind[0].unique().tolist()) == {IGNORED, kind} == set(targets.kind[1].unique().tolist())
    assert set(targets.colour[1].unique().tolist()) == {IGNORED, 8}
    assert set(targets.kind[2].unique().tolist()) == {16} and (targets.facts[2] == IGNORED).all()
    assert (targets.segmentation[2] == IGNORED).all() and (targets.segmentation[1] == IGNORED).any()
    assert torch.equal(targets.segmentation[0], torch.from_numpy(whole.segmentation).long())


def test_softened_pictures_are_near_and_the_second_half_is_whole() -> None:
    pictures = torch.from_numpy(np.stack([whole.image for whole in renders(48)]))
    soft = soften(pictures, torch.Generator().manual_seed(0))
    off = (soft.float() - pictures.float()).square().mean(dim=(1, 2, 3)).sqrt()
    assert torch.equal(soft[24:], pictures[24:])
    assert 3 < off[:24].mean() < 20 and off.max() < 50
    assert torch.equal(soft, soften(pictures, torch.Generator().manual_seed(0)))


CONFIG = """
folder = "{folder}"
output = "{folder}/judge.safetensors"
threads = 1
[judge]
fit = {{ steps = {steps}, batch = 4, learning_rate = 1e-3, warmup = 2, save_every = 2 }}
"""


def test_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for name, stops in (("unbroken", []), ("broken", [2])):
        config = tmp_path / f"{name}.toml"
        config.write_text(CONFIG.format(folder=tmp_path / name, steps=4))
        for stop in stops:
            drawn = []

            def stopping(*arguments, drawn=drawn, stop=stop, **keywords):
                if len(drawn) == stop:
                    raise KeyboardInterrupt
                drawn.append(1)
                return draw(*arguments, **keywords)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("fastldm.training.judge.draw", stopping)
                run.main(config, report=lambda text: None)
        files.append(run.main(config, report=lambda text: None))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(Judge.load(files[0]).read(np.zeros((1, 128, 128, 3), np.uint8))) == 1


def test_the_recipe_is_readable_and_its_keys_are_checked(tmp_path: Path) -> None:
    recipe = Path(run.__file__).with_name("judge.toml")
    config = read_config(recipe)
    assert isinstance(config, JudgeConfig) and config.judge.fit.steps > 0
    wrong = tmp_path / "judge.toml"
    wrong.write_text(recipe.read_text().replace("[judge]", "[judge]\nspoiled = 0.5"))
    with pytest.raises(InvalidArgument, match="judge.spoiled=0.5.*did you mean spoilt"):
        read_config(wrong)
    wrong.write_text(recipe.read_text().replace("[judge]", "[judge]\nspoilt = 1.5"))
    with pytest.raises(InvalidArgument, match="judge.spoilt=1.5"):
        read_config(wrong)
