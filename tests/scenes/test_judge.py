"""What the judge makes of its network's outputs, its file, what it refuses; all without trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.scenes import draw_scene, relation, render, sample_scene
from fastldm.scenes.judge import CLASSES, FACTS, Judge, new_net
from fastldm.scenes.judge_net import Cells, JudgeNet
from fastldm.scenes.marks import is_exact, objects_right, overlap
from fastldm.training.judge import Targets, collate, folded, save_judge


class Knowing(JudgeNet):
    """Answers what the targets say, as sure as a logit of ±9."""

    def __init__(self, targets: Targets) -> None:
        super().__init__(16, 8, tuple(map(len, FACTS.values())))
        self.targets = targets

    def cells(self, merged: torch.Tensor) -> Cells:
        t = self.targets
        # Each object's peak is the cell of its centre, its neighbours are less sure.
        heat = torch.where(t.heat == 1, 9.0, torch.where(t.heat > 0, t.heat, -9.0))
        return Cells(heat[:, None], t.box, self.sure(t.kind, 17), self.sure(t.colour, 9))

    def whole(self, pooled: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            nn.functional.one_hot(labels, count).float()
            for labels, count in zip(self.targets.facts.T, self.facts, strict=True)
        )

    @staticmethod
    def sure(labels: torch.Tensor, count: int) -> torch.Tensor:
        return 9.0 * nn.functional.one_hot(labels.clamp_min(0), count).movedim(-1, 1)


def test_what_the_targets_say_is_read_as_the_scene() -> None:
    rng = np.random.default_rng(0)
    renders = [render(draw_scene(rng)) for _ in range(40)]
    renders.append(render(sample_scene(rng, 4, size="small", style="pixel")))
    targets = collate(renders)
    # One batch, for the network answers for all pictures at once.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastldm.scenes.judge._BATCH", 41)
        readings = Judge(Knowing(targets)).read(targets.images)
    for whole, reading in zip(renders, readings, strict=True):
        scene = whole.scene
        assert is_exact(reading, scene) and objects_right(reading, scene) == len(scene.objects)
        assert (reading.background, reading.sky, reading.style) == (scene.background, scene.sky, scene.style)
        for thing in scene.objects:
            seen = max(reading.objects, key=lambda seen: overlap(seen.box, thing.box))
            assert seen.box == pytest.approx(thing.box, abs=1e-3)
            assert seen.position == thing.position
        if len(scene.objects) == 2:
            first, second = (
                max(reading.objects, key=lambda seen: overlap(seen.box, o.box)) for o in scene.objects
            )
            assert relation(first, second) == relation(*scene.objects)


def test_unsure_kinds_and_colours_are_none_and_faint_objects_are_not_there() -> None:
    scene = sample_scene(np.random.default_rng(1))
    targets = collate([render(scene)])

    class Unsure(Knowing):
        heat = 9.0

        def cells(self, merged: torch.Tensor) -> Cells:
            heat, box, kind, colour = super().cells(merged)
            return Cells(heat.clamp_max(self.heat), box, kind * 0.3, colour)

    (reading,) = Judge(Unsure(targets)).read(targets.images)
    (seen,) = reading.objects
    assert seen.kind is None and seen.colour == scene.objects[0].colour
    assert not is_exact(reading, scene)
    Unsure.heat = -1.0
    assert Judge(Unsure(targets)).read(targets.images)[0].objects == ()


def trained_a_little() -> JudgeNet:
    torch.manual_seed(3)
    net = new_net(norm=nn.BatchNorm2d)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def test_norms_fold_into_convolutions() -> None:
    net = trained_a_little()
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    plain = folded(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    with torch.no_grad():
        for ours, theirs in zip(plain.levels(images), net.levels(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_size_and_file(tmp_path: Path) -> None:
    net = trained_a_little()
    file = tmp_path / "new" / "judge.safetensors"
    save_judge(net, file)
    assert sum(parameter.numel() for parameter in net.parameters()) <= 800_000
    assert file.stat().st_size <= 1_600_000
    pictures = torch.randint(256, (3, 128, 128, 3), dtype=torch.uint8)
    features = Judge.load(file).features(pictures)
    assert features.shape == (3, 128)
    # Weights are kept in float16: half an ulp is 2⁻¹¹ of each, less of their sums over some ten layers.
    exact = Judge(folded(net)).features(pictures)
    assert (features - exact).norm() <= 2e-3 * exact.norm()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "judge.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Judge.load(file)
    save_judge(trained_a_little(), file)
    weights = load_file(file)
    save_file(weights, file, CLASSES | {"colours": "red,blue"})
    with pytest.raises(CheckpointError, match="other colours: red,blue"):
        Judge.load(file)
    save_file({key: value for key, value in weights.items() if "deep" not in key}, file, CLASSES)
    with pytest.raises(CheckpointError, match="another network"):
        Judge.load(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Judge.load(file)


PICTURE = np.zeros((128, 128, 3), np.uint8)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 64, 64, 3), np.uint8),
        np.zeros((2, 128, 128, 3), np.float32),
        torch.zeros(2, 3, 128, 128),
        np.zeros((0, 128, 128, 3), np.uint8),
        PICTURE,
        [],
        [PICTURE, PICTURE[:64]],
        [Image.new("L", (128, 128))],
        [Image.new("RGB", (128, 64))],
        "a picture",
        None,
    ],
    ids=[
        "size",
        "dtype",
        "planes",
        "none of them",
        "one alone",
        "empty",
        "one small",
        "grey",
        "flat",
        "text",
        "None",
    ],
)
def test_other_than_pictures_is_refused(images: object) -> None:
    judge = Judge(new_net())
    for method in (judge.read, judge.features, judge.segment):
        with pytest.raises(InvalidArgument, match="^images=.*: allowed is RGB pictures of 128 x 128"):
            method(images)


def test_pictures_come_in_several_forms() -> None:
    judge = Judge(folded(trained_a_little()))
    rng = np.random.default_rng(2)
    array = np.stack([render(draw_scene(rng)).image for _ in range(3)])
    forms = [array, torch.from_numpy(array), list(array), [Image.fromarray(image) for image in array]]
    features = [judge.features(form) for form in forms]
    assert all(torch.equal(features[0], other) for other in features[1:])
    maps = judge.segment(array)
    assert maps.shape == (3, 128, 128) and maps.dtype == np.uint8
