"""The reader without learning: right on fresh renders, silent where there is nothing to read."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastldm.scenes import read_object, render, sample_scene


def spoilt(image, rng, blur, sigma):
    if not blur:
        return image
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur))).astype(float)
    return (soft + rng.normal(0, sigma, soft.shape)).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("blur", "sigma", "bar"), [(0, 0, 0.99), (1, 4, 0.95)], ids=["fresh", "blur 1 + noise 4"]
)
def test_reads_renders(blur, sigma, bar):
    rng = np.random.default_rng(11)
    number, right, fields = 600, 0, dict.fromkeys(("kind", "colour", "background", "size", "position"), 0)
    worst = 0.0
    for i in range(number):
        scene = sample_scene(rng, held_out=i % 4 == 0)
        (thing,) = scene.objects
        reading = read_object(spoilt(render(scene).image, rng, blur, sigma))
        fields["background"] += reading.background == scene.background
        for name in ("kind", "colour", "size", "position"):
            fields[name] += getattr(reading, name) == getattr(thing, name)
        right += (reading.kind, reading.colour) == (thing.kind, thing.colour)
        if reading.box is not None:
            worst = max(worst, float(np.abs(np.subtract(reading.box, thing.box)).max()))
    shares = {name: value / number for name, value in fields.items()}
    print(f"kind and colour {right / number:.4f}, {shares}, box {worst:.1f} px")
    assert right / number >= bar
    assert min(shares.values()) >= bar - 0.01
    assert worst <= 5


def noise(rng):
    return rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)


def blots(rng):
    return np.asarray(
        Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize(
            (128, 128), Image.Resampling.BICUBIC
        )
    )


def plain(rng):
    return np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (128, 128, 3))


def two_toned_blots(rng):
    shapes = Image.fromarray(rng.random((7, 7)).astype(np.float32)).resize((90, 90), Image.Resampling.BICUBIC)
    image = np.full((128, 128, 3), 250, np.uint8)
    image[19:109, 19:109][np.asarray(shapes) > 0.55] = (20, 20, 24)
    return image


def speck(rng):
    image = np.full((128, 128, 3), 250, np.uint8)
    image[60:68, 60:68] = (214, 36, 44)
    return image


def two_objects(rng):
    return render(sample_scene(rng, 2)).image


@pytest.mark.parametrize(
    "picture", [noise, blots, two_toned_blots, plain, speck, two_objects], ids=lambda f: f.__name__
)
def test_reads_nothing_where_there_is_no_one_object(picture):
    rng = np.random.default_rng(3)
    readings = [read_object(picture(rng)) for _ in range(40)]
    assert sum(reading.kind is not None for reading in readings) <= 2


def test_a_half_painted_object_scores_low():
    scene = sample_scene(
        np.random.default_rng(0),
        kind="fish",
        colour="red",
        background="white",
        size="large",
        position="centre",
    )
    image = render(scene).image.copy()
    whole = read_object(image)
    image[:, 64:][(image[:, 64:] != 250).any(axis=2)] = (40, 160, 72)
    assert whole.kind == "fish" and whole.score > 0.8
    assert read_object(image).kind is None
