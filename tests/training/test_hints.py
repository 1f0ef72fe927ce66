"""The hint block: what stands in its channels, and that zeros mean no hint."""

from __future__ import annotations

import torch

from fastldm.models.hints import hint_channels, inpainting_hint, map_hint, upscaling_hint
from fastldm.models.unet import UNet, UNetConfig
from fastldm.scenes import KINDS
from fastldm.training.data import SceneData
from fastldm.training.hints import make_hints, random_masks


def test_a_unet_without_a_hint_is_one_with_zeros() -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=4 + hint_channels(4),
        block_out_channels=(8, 16),
        layers_per_block=1,
        heads=(1, 2),
        transformer_depth=(0, 1),
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    unet = UNet(config).eval()
    latents, context, times = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.tensor([3.0])
    step = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        zeros = torch.zeros(2, hint_channels(4), 8, 8)
        none = unet(latents, unet.condition(context, times), step)
        torch.testing.assert_close(none, unet(latents, unet.condition(context, times, zeros), step))
        some = unet(latents, unet.condition(context, times, zeros + 1), step)
    assert (some - none).abs().max() > 1e-3


def test_every_class_of_a_map_has_a_colour_and_none_means_no_hint() -> None:
    classes = torch.arange(1 + len(KINDS))
    hints = map_hint(classes[:, None, None].expand(-1, 8, 8), 4, (1, 1))
    assert hints.shape == (17, 8, 1, 1) and (hints[:, 0] == 1).all() and not hints[:, 1:5].any()
    colours = {tuple(colour) for colour in hints[:, 5:, 0, 0].tolist()}
    assert len(colours) == 17 and (0.0, 0.0, 0.0) not in colours


def test_masks_are_rectangles_of_the_promised_size() -> None:
    masks = random_masks(200, 128, torch.Generator().manual_seed(0))
    assert masks.shape == (200, 1, 128, 128) and set(masks.unique().tolist()) == {0.0, 1.0}
    for mask in masks[:, 0]:
        rows, columns = mask.amax(1).nonzero(), mask.amax(0).nonzero()
        height, width = len(rows), len(columns)
        assert 31 <= height <= 97 and 31 <= width <= 97 and int(mask.sum()) == height * width


def test_hints_of_the_three_kinds_in_turn() -> None:
    data = SceneData.draw(7, 3, stage=4)
    asked: list[torch.Tensor] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        asked.append(images)
        return images.permute(0, 3, 1, 2).float().unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2)) / 255

    generator = torch.Generator().manual_seed(2)
    hints = make_hints(data, 7, encode, generator)
    assert hints.shape == (7, hint_channels(3), 16, 16)
    masks = random_masks(3, 128, torch.Generator().manual_seed(2))
    hidden, enlarged = asked
    for row in range(3):
        inside = masks[row, 0].bool()
        assert torch.equal(hidden[row][~inside], data.images[3 * row][~inside])
        assert (hidden[row][inside] == 128).all()
    torch.testing.assert_close(hints[0::3], inpainting_hint(masks, encode(hidden)))
    torch.testing.assert_close(hints[1::3], map_hint(data.segmentation[1:7:3], 3, (16, 16)))
    small = (
        data.images[2:7:3]
        .permute(0, 3, 1, 2)
        .float()
        .unflatten(2, (32, 4))
        .unflatten(4, (32, 4))
        .mean((3, 5))
    )
    torch.testing.assert_close(hints[2::3], upscaling_hint(small / 127.5 - 1, encode(enlarged)))
