"""The renderer: repeatable, true to the scene, and never a held-out pair in training."""

import numpy as np
import pytest

from fastldm.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    IMAGE_SIZE,
    KINDS,
    PALETTE,
    POSITIONS,
    RELATIONS,
    SIZES,
    contact_sheet,
    is_held_out,
    relation,
    render,
    sample_scene,
)
from fastldm.scenes.scene import MARGIN, size_of

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def sampled(seed: int, number: int, **facts):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **facts) for _ in range(number)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_same_seed_gives_the_same_bytes(count):
    first, second = (sampled(7, 20, count=count) for _ in range(2))
    assert first == second
    assert len(set(first)) == 20
    for a, b in zip(first, second, strict=True):
        one, two = render(a), render(b)
        assert one.image.tobytes() == two.image.tobytes()
        assert one.segmentation.tobytes() == two.segmentation.tobytes()


@pytest.mark.parametrize("alike", [False, True], ids=["mixed", "alike"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_objects_keep_clear_of_each_other_and_of_the_edge(count, alike):
    for scene in sampled(1, 60, count=count, alike=alike):
        assert len(scene.objects) == count
        for i, thing in enumerate(scene.objects):
            x0, y0, x1, y1 = thing.box
            assert min(x0, y0) >= MARGIN - 1e-6 and max(x1, y1) <= IMAGE_SIZE - MARGIN + 1e-6
            assert min(x1 - x0, y1 - y0) >= 20
            assert size_of(thing.box) == thing.size
            assert thing.colour != scene.background
            for other in scene.objects[:i]:
                a0, b0, a1, b1 = other.box
                assert max(a0 - x1, x0 - a1, b0 - y1, y0 - b1) >= MARGIN - 1e-6
        if alike:
            assert len({(thing.kind, thing.colour) for thing in scene.objects}) == 1


def test_picture_holds_the_two_colours_and_their_blends_only():
    for scene in sampled(2, 60):
        (thing,) = scene.objects
        rendered = render(scene)
        x0, y0, x1, y1 = (round(side) for side in thing.box)
        ground, ink = (np.array(PALETTE[name]) for name in (scene.background, thing.colour))
        assert (rendered.image[[0, -1]] == ground).all() and (rendered.image[:, [0, -1]] == ground).all()
        apart = ink - ground
        share = (rendered.image - ground) @ apart / (apart @ apart)
        assert np.abs(rendered.image - (ground + share[..., None] * apart)).max() <= 1
        assert set(np.unique(rendered.segmentation)) == {0, 1 + KINDS.index(thing.kind)}
        assert (rendered.segmentation[share > 0.51] > 0).all()
        assert (rendered.segmentation[share < 0.49] == 0).all()
        rows, columns = np.nonzero(share > 0.02)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.subtract(found, (x0, y0, x1, y1))).max() <= 2


@pytest.mark.parametrize("count", [2, 4])
def test_map_shows_every_object_in_its_box(count):
    for scene in sampled(3, 30, count=count):
        segmentation = render(scene).segmentation
        for thing in scene.objects:
            x0, y0, x1, y1 = (int(side) for side in thing.box)
            inside = segmentation[y0 : y1 + 1, x0 : x1 + 1]
            assert set(np.unique(inside)) == {0, 1 + KINDS.index(thing.kind)} or thing.kind == "square"
            assert (inside > 0).mean() > 0.2


def test_a_tenth_of_the_pairs_is_held_out_evenly():
    assert len(HELD_OUT_PAIRS) == 13
    assert {kind: [k for k, _ in HELD_OUT_PAIRS].count(kind) for kind in KINDS}.keys() == set(KINDS)
    assert max([k for k, _ in HELD_OUT_PAIRS].count(kind) for kind in KINDS) == 1
    assert max([c for _, c in HELD_OUT_PAIRS].count(colour) for colour in COLOURS) == 2


def test_held_out_triples_are_a_tenth_and_closed_under_swapping():
    assert 0.08 <= len(HELD_OUT_TRIPLES) / (len(KINDS) * (len(KINDS) - 1) * len(RELATIONS)) <= 0.12
    assert all((b, INVERSE[r], a) in HELD_OUT_TRIPLES for a, r, b in HELD_OUT_TRIPLES)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_training_scenes_never_show_what_is_held_out(count):
    scenes = sampled(4, 2500 if count == 1 else 120, count=count)
    seen = {(thing.kind, thing.colour) for scene in scenes for thing in scene.objects}
    assert not seen & HELD_OUT_PAIRS
    assert not any(is_held_out(scene) for scene in scenes)
    if count == 1:
        assert len(seen) == len(KINDS) * len(COLOURS) - len(HELD_OUT_PAIRS)
        assert {scene.background for scene in scenes} == set(COLOURS)
        assert {scene.objects[0].size for scene in scenes} == set(SIZES)


def test_held_out_scenes_show_only_held_out_pairs():
    seen = {(thing.kind, thing.colour) for scene in sampled(5, 300, held_out=True) for thing in scene.objects}
    assert seen == HELD_OUT_PAIRS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("position", POSITIONS)
def test_asked_size_and_position_are_what_the_scene_has(size, position):
    for scene in sampled(6, 20, size=size, position=position, kind="fish", colour="red", background="white"):
        (thing,) = scene.objects
        assert (thing.size, thing.position) == (size, position)
        assert (thing.kind, thing.colour, scene.background) == ("fish", "red", "white")


@pytest.mark.parametrize("related", RELATIONS)
def test_asked_relation_holds_and_its_inverse_too(related):
    for scene in sampled(8, 20, count=2, related=related):
        first, second = scene.objects
        assert relation(first, second) == related
        assert relation(second, first) == INVERSE[related]
        axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[related]
        assert sign * (second.centre[axis] - first.centre[axis]) > 0


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("count", {"count": 5}),
        ("size", {"size": "huge"}),
        ("position", {"position": "north"}),
        ("position", {"position": "left", "count": 2}),
        ("related", {"related": "above"}),
        ("background", {"background": "pink"}),
        ("kind", {"kind": "circle", "colour": "red"}),
        ("kind", {"colour": "red", "background": "red"}),
        ("kind", {"kind": "dog"}),
    ],
    ids=str,
)
def test_facts_that_fit_no_scene_are_refused(name, facts):
    with pytest.raises(ValueError, match=name):
        sample_scene(np.random.default_rng(0), **facts)


def test_contact_sheet_lays_pictures_row_by_row():
    images = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = np.asarray(contact_sheet(images, columns=2, gap=1))
    assert sheet.shape == (17, 17, 3)
    assert [sheet[0, 0, 0], sheet[0, 9, 0], sheet[9, 0, 0], sheet[9, 9, 0]] == [10, 20, 30, 128]
