"""What the shipped judge reads: renders of every style right, and nothing where nothing of ours is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastldm.scenes import LANDSCAPES, STYLES, Rendered, render, sample_scene
from fastldm.scenes.judge import Judge
from fastldm.scenes.marks import objects_right, overlap
from fastldm.training.soften import soften
from fastldm.training.spoil import NONE, SPOILERS, bounds, chaos, spoil


def renders(style: str, number: int, seed: int) -> list[Rendered]:
    """Half of them landscapes, one to four objects, a fifth with a pair that models never see."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        place = LANDSCAPES[i // 2 % len(LANDSCAPES)] if i % 2 else None
        scene = sample_scene(rng, 1 + i // 2 % 4, style=style, background=place, held_out=i % 5 == 0)
        made.append(render(scene))
    return made


@pytest.mark.parametrize("style", STYLES)
def test_fresh_renders(judge: Judge, style: str) -> None:
    drawn = renders(style, 200, seed=40)
    pictures = torch.from_numpy(np.stack([whole.image for whole in drawn]))
    total = sum(len(whole.scene.objects) for whole in drawn)
    for name, bar, images in (
        ("fresh", 0.99, pictures),
        ("soft", 0.97, soften(pictures.repeat(2, 1, 1, 1), torch.Generator().manual_seed(0))[:200]),
    ):
        readings = judge.read(images)
        pairs = [(reading, whole.scene) for reading, whole in zip(readings, drawn, strict=True)]
        right = sum(objects_right(*each) for each in pairs) / total
        seen = sum(len(reading.objects) for reading in readings) / total
        facts = {
            fact: np.mean([getattr(reading, fact) == getattr(scene, fact) for reading, scene in pairs])
            for fact in ("background", "sky", "style")
        }
        print(f"{style}, {name}: {right:.2%} of {total} objects, {seen:.2%} seen, {facts}")
        assert right >= bar and seen <= 2 - bar
        # A plain black or white ground leaves little to tell watercolour from flat by.
        assert min(facts["background"], facts["sky"]) >= bar and facts["style"] >= 0.93


def test_maps(judge: Judge) -> None:
    """Mean over classes of intersection over union, as in semantic segmentation."""
    drawn = [whole for style in STYLES for whole in renders(style, 50, seed=41)]
    maps = judge.segment(np.stack([whole.image for whole in drawn]))
    truth = np.stack([whole.segmentation for whole in drawn])
    ratios = [((maps == c) & (truth == c)).sum() / ((maps == c) | (truth == c)).sum() for c in range(17)]
    print(f"mean IoU {np.mean(ratios):.3f}, least {min(ratios):.3f}")
    assert np.mean(ratios) >= 0.85  # the map is predicted at half resolution


@pytest.mark.parametrize("spoiler", SPOILERS, ids=lambda f: f.__name__)
def test_spoilt_objects_are_none_of_ours(judge: Judge, spoiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastldm.training.spoil.SPOILERS", (spoiler,))
    rng = np.random.default_rng(42)
    spoilt = [spoil(whole, rng) for style in STYLES for whole in renders(style, 100, seed=43)]
    spoilt = [one for one in spoilt if one is not None and NONE in (one.kind, one.colour)]
    fooled = 0
    for one, reading in zip(spoilt, judge.read([one.image for one in spoilt]), strict=True):
        there = [seen for seen in reading.objects if overlap(seen.box, bounds(one.mask)) > 0.3]
        fooled += any(seen.kind is not None and seen.colour is not None for seen in there)
    print(f"{spoiler.__name__}: {fooled} of {len(spoilt)} taken for ours")
    # Many are near the objects that they were: 35 % of another kind or colour is enough to be spoilt.
    assert len(spoilt) >= 60 and fooled <= 0.25 * len(spoilt)


def test_chaos_is_nothing_of_ours(judge: Judge) -> None:
    rng = np.random.default_rng(44)
    readings = judge.read([chaos(rng) for _ in range(100)])
    assert sum(seen.kind is not None for reading in readings for seen in reading.objects) <= 1


def test_blurred_pictures_are_not_guessed(judge: Judge) -> None:
    """Small objects under a blur of a sixteenth of their resolution, which no one could name."""
    rng = np.random.default_rng(45)
    drawn = [render(sample_scene(rng, 1, size="small")) for _ in range(100)]
    pictures = torch.from_numpy(np.stack([whole.image for whole in drawn])).permute(0, 3, 1, 2).float()
    coarse = torch.nn.functional.avg_pool2d(pictures, 16)
    blurred = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bicubic")
    images = blurred.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    named = sum(seen.kind is not None for reading in judge.read(images) for seen in reading.objects)
    print(f"{named} of 100 blurs named")
    assert named <= 5
