"""Masks and maps from everything that may hold one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.errors import InvalidArgument
from fastldm.maps import load_maps, load_masks, resized

NAMES = ("background", "cat", "dog")
MASK = np.arange(12).reshape(3, 4) % 3 == 0
MAP = np.arange(12).reshape(3, 4) % 3


def test_masks_of_every_kind_are_the_same(tmp_path: Path) -> None:
    grey = MASK.astype(np.uint8) * 255
    Image.fromarray(grey).save(tmp_path / "mask.png")
    kinds = [
        *(MASK, grey, MASK.astype(np.uint8), MASK.astype(np.float64), MASK * np.float16(0.5)),
        *(torch.from_numpy(MASK), torch.from_numpy(MASK).to(torch.bfloat16), [torch.from_numpy(MASK)]),
        *(Image.fromarray(grey), Image.fromarray(grey).convert("1"), Image.fromarray(grey).convert("RGB")),
        *(tmp_path / "mask.png", str(tmp_path / "mask.png"), MASK[None]),
    ]
    for kind in kinds:
        [made] = load_masks(kind, 5)
        assert made.dtype == np.bool_ and np.array_equal(made, MASK)
    assert len(load_masks([MASK, ~MASK], 2)) == len(load_masks(np.stack([MASK, ~MASK]), 2)) == 2


def test_maps_of_every_kind_are_the_same(tmp_path: Path) -> None:
    palette = Image.fromarray(MAP.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "map.png")
    grey = Image.fromarray(MAP.astype(np.uint8))
    kinds = [MAP, MAP.astype(np.uint8), torch.from_numpy(MAP), palette, grey, tmp_path / "map.png", [MAP]]
    for kind in kinds:
        [made] = load_maps(kind, 3, NAMES)
        assert np.array_equal(made, MAP)


def test_sixteen_bit_masks_have_the_range_of_sixteen_bits(tmp_path: Path) -> None:
    levels = np.array([[0, 1000, 32767], [32768, 60000, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "mask.png")
    for kind in (Image.fromarray(levels), tmp_path / "mask.png"):
        assert np.array_equal(load_masks(kind, 1)[0], levels >= 2**15)


def test_masks_and_maps_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned = {"mask.png": MASK.astype(np.uint8) * 255, "map.png": MAP.astype(np.uint8)}
    for name, plane in turned.items():
        Image.fromarray(plane).save(tmp_path / name, exif=exif)
    assert np.array_equal(load_masks(tmp_path / "mask.png", 1)[0], np.rot90(MASK, -1))
    assert np.array_equal(load_maps(tmp_path / "map.png", 1, NAMES)[0], np.rot90(MAP, -1))


def test_what_was_given_is_not_shared() -> None:
    mask = MASK.copy()
    [made] = load_masks(mask, 1)
    mask[:] = False
    assert np.array_equal(made, MASK)


def test_resized_takes_the_nearest() -> None:
    assert np.array_equal(resized(MAP, 8, 6), MAP.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(resized(MAP.repeat(3, 0).repeat(3, 1), 4, 3), MAP)
    assert resized(MAP, 4, 3) is MAP


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "nothing.png",
        MASK[0],
        MASK[None, None],
        MASK[:0],
        MASK.astype(np.int64),
        MASK * np.nan,
        MASK * 1.01,
        MASK - 0.01,
        [MASK, MASK],
        [],
        torch.zeros(3, 4, device="meta"),
        torch.zeros(3, 4).to_sparse(),
        np.array([["a"]]),
        Image.new("I", (4, 3), 70_000),
        Image.new("F", (4, 3), 0.5),
    ],
)
def test_wrong_masks_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="^mask=") as caught:
        load_masks(value, 3)
    assert caught.value.name == "mask"


@pytest.mark.parametrize("value", [MAP + 1, MAP - 1, MAP * 1.0, MAP > 0, MAP[0], Image.new("RGB", (4, 4))])
def test_wrong_maps_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="^segmentation="):
        load_maps(value, 3, NAMES)


def test_damaged_and_huge_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "map.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-200])
    huge = tmp_path / "huge.png"
    Image.new("1", (9000, 9000)).save(huge)
    for file in (cut, huge, tmp_path):
        with pytest.raises(InvalidArgument, match="^mask="):
            load_masks(file, 1)
        with pytest.raises(InvalidArgument, match="^segmentation="):
            load_maps(file, 1, NAMES)
