"""Styles and landscapes: repeatable, the map right in each, and every object apart from what it stands on."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.errors import InvalidArgument
from fastldm.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    LANDSCAPES,
    PALETTE,
    RELATIONS,
    SIZES,
    SKIES,
    STYLES,
    UNFIT_COLOURS,
    Scene,
    SceneObject,
    draw_scene,
    is_held_out,
    relation,
    render,
    sample_scene,
)
from fastldm.scenes.landscapes import VARIANTS, landscape
from fastldm.scenes.scene import BLOCK, size_of
from fastldm.scenes.sprites import sprite, sprite_extent
from fastldm.scenes.styles import LINE

PALETTE_RGB = np.array(list(PALETTE.values()), np.float64)
WORLDS = [(style, sky) for style in STYLES for sky in (None, *SKIES)]


def distances(image, colours):
    """RGB distances [h, w, n] of a picture's pixels to n colours."""
    return np.linalg.norm(image[:, :, None].astype(np.float64) - np.asarray(colours, np.float64), axis=-1)


def grown(mask, pixels):
    padded = np.pad(mask, pixels)
    sides = range(2 * pixels + 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in sides for x in sides], axis=0)


def test_styles_and_landscapes_are_the_same_bytes_in_another_process():
    code = (
        "import numpy as np, zlib; from fastldm.scenes import draw_scene, render;"
        "rng = np.random.default_rng(3);"
        "print([zlib.crc32(render(draw_scene(rng, 4)).image.tobytes()) for _ in range(60)])"
    )
    prints = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        ).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    ]
    assert prints[0] == prints[1] and len(set(eval(prints[0]))) == 60


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(WORLDS), st.integers(1, 4))
def test_the_map_is_that_of_the_objects_in_every_style(seed, world, count):
    style, sky = world
    scene = sample_scene(np.random.default_rng(seed), count, style=style, sky=sky)
    rendered = render(scene)
    assert rendered.image.shape == (128, 128, 3) and rendered.image.dtype == np.uint8
    left = rendered.segmentation.copy()
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        window = slice(max(int(y0) - 1, 0), int(y1) + 2), slice(max(int(x0) - 1, 0), int(x1) + 2)
        inside = left[window] == 1 + KINDS.index(thing.kind)
        assert inside.mean() > 0.15
        rows, columns = np.nonzero(inside)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        box = np.subtract(thing.box, (window[1].start, window[0].start) * 2)
        assert np.abs(np.subtract(found, box)).max() <= 4
        left[window][inside] = 0
    assert not left.any()


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(STYLES), st.integers(1, 4))
def test_objects_and_plain_ground_keep_their_colours(seed, style, count):
    scene = sample_scene(np.random.default_rng(seed), count, style=style)
    rendered = render(scene)
    nearest = distances(rendered.image, PALETTE_RGB).argmin(axis=-1)
    ground = ~grown(rendered.segmentation > 0, 2)
    assert (nearest[ground] == COLOURS.index(scene.background)).mean() > 0.99
    for thing in scene.objects:
        (x0, x1), (y0, y1) = ((int(thing.box[i]), int(thing.box[i + 2]) + 1) for i in (0, 1))
        inked = rendered.segmentation[y0:y1, x0:x1] > 0
        share = (nearest[y0:y1, x0:x1][inked] == COLOURS.index(thing.colour)).mean()
        assert share > {"flat": 0.8, "outlined": 0.2, "pixel": 0.999, "watercolour": 0.75}[style], thing


@pytest.mark.parametrize("style", ["outlined", "watercolour", "pixel"])
def test_every_style_draws_the_flat_silhouette(style):
    rng = np.random.default_rng(5)
    for kind in KINDS:
        scene = sample_scene(rng, kind=kind, size="large", style=style)
        mine, flat = (
            render(Scene(scene.objects, scene.background, name)).segmentation > 0 for name in (style, "flat")
        )
        assert (mine & flat).sum() / (mine | flat).sum() > 0.75, kind


@pytest.mark.parametrize("fill", COLOURS)
@pytest.mark.parametrize("ground", COLOURS)
def test_outlines_stand_out_from_object_and_ground(fill, ground):
    if fill == ground:
        return
    thing = SceneObject("square", fill, "large", (24, 24, 104, 104))
    rendered = render(Scene((thing,), ground, "outlined"))
    row = rendered.image[64].astype(np.float64)
    others = np.array([PALETTE[fill], PALETTE[ground]], np.float64)
    line = np.linalg.norm(row[:, None] - others, axis=-1).min(axis=1) > 70
    assert LINE - 1 <= line[:64].sum() <= LINE + 1.5
    assert line[22:28].sum() == line[:64].sum() and not line[30:98].any()
    assert (rendered.segmentation[64] > 0).sum() == pytest.approx(80, abs=1)


@pytest.mark.parametrize("sky", [None, *SKIES])
def test_pixel_art_is_made_of_whole_blocks(sky):
    rng = np.random.default_rng(6)
    for i in range(40):
        scene = sample_scene(rng, 1 + i % 4, style="pixel", sky=sky)
        rendered = render(scene)
        for picture in (rendered.image, rendered.segmentation[..., None]):
            blocks = picture.reshape(32, BLOCK, 32, BLOCK, -1)
            assert (blocks == blocks[:, :1, :, :1]).all()
        for thing in scene.objects:
            assert all(side % BLOCK == 0 for side in thing.box) and thing.angle == 0
            assert size_of(thing.box) == thing.size
        if sky is None:
            colours = {scene.background, *(thing.colour for thing in scene.objects)}
            assert {tuple(pixel) for pixel in rendered.image.reshape(-1, 3).tolist()} == {
                PALETTE[colour] for colour in colours
            }


@pytest.mark.parametrize("kind", KINDS)
def test_sprites_fill_their_extent_and_are_small_objects(kind):
    width, height = sprite_extent(kind)
    drawn = sprite(kind, width, height)
    assert drawn[0].any() and drawn[-1].any() and drawn[:, 0].any() and drawn[:, -1].any()
    low, high = SIZES["small"]
    assert low <= BLOCK * max(width, height) <= high and BLOCK * min(width, height) >= 20
    double = sprite(kind, 2 * width, 2 * height)
    assert (double == drawn.repeat(2, axis=0).repeat(2, axis=1)).all()


@pytest.mark.parametrize("sky", SKIES)
@pytest.mark.parametrize("name", LANDSCAPES)
def test_landscapes_are_apart_from_the_colours_that_objects_may_have(name, sky):
    pictures = [landscape(name, sky, variant) for variant in range(VARIANTS)]
    assert len({picture.tobytes() for picture in pictures}) == VARIANTS
    fit = [colour for colour in COLOURS if colour not in UNFIT_COLOURS[name, sky]]
    assert len(fit) >= 4
    for picture in pictures:
        # A star of the night sky is a few pixels of nearly white.
        near = distances(picture, [PALETTE[colour] for colour in fit]) < 80
        assert near.any(axis=-1).mean() < 0.01


def test_no_object_has_the_colour_that_it_stands_on():
    rng = np.random.default_rng(7)
    seen = set()
    for i in range(1500):
        scene = sample_scene(rng, 1 + i % 3, sky=SKIES[i % 3], style=STYLES[i % 4])
        seen.add((scene.background, scene.sky))
        assert not {thing.colour for thing in scene.objects} & UNFIT_COLOURS[scene.background, scene.sky]
    assert seen == set(UNFIT_COLOURS)


def test_sky_or_landscape_alone_draws_the_other():
    rng = np.random.default_rng(8)
    skies = {sample_scene(rng, background="snow", colour="black").sky for _ in range(100)}
    assert skies == {"day", "sunset"}
    lands = {sample_scene(rng, sky="day", colour="blue").background for _ in range(100)}
    assert lands == {"meadow", "snow", "desert"}


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("background", {"background": "moon"}),
        ("sky", {"sky": "morning"}),
        ("sky", {"sky": "day", "background": "red"}),
        ("style", {"style": "oil"}),
        ("kind", {"background": "meadow", "colour": "green"}),
        ("kind", {"background": "desert", "sky": "night", "colour": "black"}),
    ],
    ids=str,
)
def test_worlds_that_do_not_exist_are_refused(name, facts):
    with pytest.raises(InvalidArgument, match=name):
        sample_scene(np.random.default_rng(0), **facts)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("sky", {"background": "sea"}),
        ("sky", {"background": "red", "sky": "day"}),
        ("background", {"background": "pink"}),
        ("style", {"background": "red", "style": "oil"}),
    ],
    ids=str,
)
def test_scenes_that_cannot_be_drawn_are_refused(name, facts):
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        Scene((), **facts)


@pytest.mark.parametrize("style", STYLES)
def test_objects_may_reach_the_edge_of_the_picture(style):
    thing = SceneObject("square", "red", "large", (0, 0, 128, 128))
    assert (render(Scene((thing,), "white", style)).segmentation > 0).mean() > 0.98


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_the_mixture_of_a_stage(stage):
    rng = np.random.default_rng(stage)
    scenes = [draw_scene(rng, stage) for _ in range(2000)]
    assert not any(is_held_out(scene) for scene in scenes)
    styles = Counter(scene.style for scene in scenes)
    assert set(styles) == set(STYLES[: (1, 3, 3, 4)[stage - 1]])
    assert min(styles.values()) > 300
    lands = Counter((scene.background, scene.sky) for scene in scenes if scene.sky is not None)
    assert len(lands) == (0 if stage < 3 else 15)
    assert sum(lands.values()) / 2000 == pytest.approx(0 if stage < 3 else 0.4, abs=0.05)
    counts = Counter(len(scene.objects) for scene in scenes)
    assert counts[1] / 2000 == pytest.approx(0.5, abs=0.05) and min(counts[3], counts[4]) > 150
    several = [scene for scene in scenes if len(scene.objects) > 1]
    alike = [len({(o.kind, o.colour) for o in scene.objects}) == 1 for scene in several]
    assert np.mean(alike) == pytest.approx(0.5, abs=0.06)
    pairs = {(o.kind, o.colour) for scene in scenes for o in scene.objects}
    assert len(pairs) == len(KINDS) * len(COLOURS) - len(HELD_OUT_PAIRS)


@pytest.mark.parametrize("stage", [1, 4])
def test_arranged_scenes_stand_where_one_expects_them(stage):
    rng = np.random.default_rng(stage)
    scenes = [draw_scene(rng, stage, arranged=1.0) for _ in range(1000)]
    assert not any(is_held_out(scene) for scene in scenes)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    related = Counter()
    for scene in scenes:
        first = scene.objects[0]
        assert {o.size for o in scene.objects} == {"large" if len(scene.objects) == 1 else "medium"}
        assert all(0 <= min(o.box) and max(o.box) <= 128 for o in scene.objects)
        if len(scene.objects) == 1:
            assert first.position == "centre"
        if len(scene.objects) == 2:
            alike = (first.kind, first.colour) == (scene.objects[1].kind, scene.objects[1].colour)
            related[alike, relation(*scene.objects)] += 1
    assert min(related[False, word] for word in RELATIONS) > 15
    assert set(related) == {(False, word) for word in RELATIONS} | {(True, "left of")}


def test_a_share_of_the_mixture_is_arranged_and_none_leaves_it_as_it_was():
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    assert [draw_scene(one, 4) for _ in range(50)] == [draw_scene(other, 4, arranged=0.0) for _ in range(50)]
    rng = np.random.default_rng(5)
    singles = [s for s in (draw_scene(rng, 1, arranged=0.5) for _ in range(1000)) if len(s.objects) == 1]
    calm = np.mean([s.objects[0].position == "centre" and s.objects[0].size == "large" for s in singles])
    assert 0.5 < calm < 0.75


@pytest.mark.parametrize("facts", [{"size": "small"}, {"position": "left"}])
def test_arranged_scenes_have_their_own_sizes_and_places(facts):
    with pytest.raises(InvalidArgument, match="^arranged="):
        sample_scene(np.random.default_rng(0), arranged=True, **facts)


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(InvalidArgument, match="^stage="):
        draw_scene(np.random.default_rng(0), 5)
