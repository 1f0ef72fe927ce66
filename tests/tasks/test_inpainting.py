"""Inpainting: Stable Diffusion's models as diffusers runs them, the picture outside the mask, its edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastldm
from fastldm.errors import InvalidArgument
from fastldm.pipeline import Pipeline
from fastldm.tasks.pictures import paste
from tests.pipeline.conftest import save_tiny

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD1 of tests/pipeline: four channels."""
    folder = tmp_path_factory.mktemp("inpainting")
    save_tiny(folder / "plain", "epsilon")
    return folder / "plain"


@pytest.fixture(scope="module")
def inpainting_folder(plain_folder: Path) -> Path:
    """The same with nine channels, saved by diffusers."""
    folder = plain_folder.parent
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder / "plain", safety_checker=None)
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel.from_config({**plain.unet.config, "in_channels": 9})
    diffusers.StableDiffusionInpaintPipeline(
        **{**plain.components, "unet": unet}, requires_safety_checker=False
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("channels", "sampler"), [(4, "ddim"), (4, "euler"), (9, "ddim"), (9, "euler_a")])
def test_equals_diffusers_inside_the_mask(
    plain_folder: Path, inpainting_folder: Path, channels: int, strength: float, sampler: str
) -> None:
    folder = inpainting_folder if channels == 9 else plain_folder
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[13:50, 20:41] = 255
    oracle = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    if kind := {"euler": "EulerDiscrete", "euler_a": "EulerAncestralDiscrete"}.get(sampler):
        oracle.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(oracle.scheduler.config)
    oracle.set_progress_bar_config(disable=True)
    want = oracle(
        "a red fish",
        image=Image.fromarray(picture),
        mask_image=Image.fromarray(mask),
        width=64,
        height=64,
        strength=strength,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(9),
        output_type="np",
    ).images[0]
    pipe = fastldm.load(folder)
    got = pipe.generate(
        "a red fish",
        sampler=sampler,
        image=picture,
        mask=mask,
        strength=strength,
        steps=8,
        guidance_scale=4.0,
        seed=9,
        output_type="np",
    ).images[0]
    inside = mask > 0
    assert np.abs(got[inside] - want[inside]).max() <= 1e-4
    assert np.array_equal(got[~inside], (picture / np.float32(255))[~inside])


def test_a_model_that_inpaints_needs_a_mask(inpainting_folder: Path) -> None:
    pipe = fastldm.load(inpainting_folder)
    assert pipe.limits.abilities.tasks == ("inpainting",)
    with pytest.raises(InvalidArgument, match="mask=None: allowed is not None: this model does inpainting"):
        pipe.generate("a fish")
    with pytest.raises(InvalidArgument, match="image=None"):
        pipe.generate("a fish", mask=np.ones((64, 64), bool))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("blend", [0, 2])
def test_outside_the_mask_every_bit_stays(
    pipe: Pipeline, picture: np.ndarray, mask: np.ndarray, output_type: str, blend: int
) -> None:
    images = pipe.generate(
        "a cat", image=picture, mask=mask, blend=blend, steps=2, num_images=3, output_type=output_type
    ).images
    for image in images:
        got = image.permute(1, 2, 0).numpy() if output_type == "pt" else np.asarray(image)
        want = picture if output_type == "pil" else picture / np.float32(255)
        assert np.array_equal(got[~mask], want[~mask])
        assert not np.array_equal(got[mask], want[mask])


def test_the_mask_and_what_it_hides_reach_the_model(
    pipe: Pipeline, picture: np.ndarray, mask: np.ndarray
) -> None:
    def drawn(**changes: object) -> np.ndarray:
        arguments = {"image": picture, "mask": mask, "steps": 2, "output_type": "np"} | changes
        return pipe.generate("a cat", **arguments).images[0]

    other = picture.copy()
    other[mask] = 255 - other[mask]
    assert np.array_equal(drawn()[mask], drawn(image=other)[mask])  # what is hidden cannot matter
    assert not np.array_equal(drawn()[mask], drawn(image=255 - picture)[mask])
    assert not np.array_equal(
        drawn()[mask], pipe.generate("a cat", steps=2, output_type="np").images[0][mask]
    )
    partly = drawn(image=other, strength=0.5)
    assert not np.array_equal(drawn(strength=0.5)[mask], partly[mask])  # then the start shows through


def test_long_runs_batches_and_unguided_steps_keep_it_too(plain_folder: Path) -> None:
    """Two windows of steps, two masks side by side, segments without guidance: the end has the given part."""
    pipe = fastldm.load(plain_folder)
    rng = np.random.default_rng(4)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2)]
    masks = [np.zeros((64, 64), bool) for _ in range(2)]
    masks[0][:32], masks[1][:, 20:60] = True, True
    asked = {"image": pictures, "mask": masks, "steps": 40, "output_type": "latent", "guidance_scale": 3.0}
    shortcuts = fastldm.Shortcuts(guidance_interval=(0.2, 0.7))
    got = pipe.generate(["a cat", "a dog"], shortcuts=shortcuts, **asked).images
    table = pipe.table(pipe.check("a cat", steps=40))
    vae = pipe.components.vae
    for i, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        generator = torch.Generator("cpu").manual_seed(i)
        signed = torch.from_numpy(picture).float().permute(2, 0, 1)[None] / 127.5 - 1
        with torch.inference_mode():
            posterior = vae.encode(signed)
        x0 = posterior.sample(torch.randn((1, 4, 16, 16), generator=generator)) * vae.config.scaling_factor
        held = ~torch.from_numpy(mask)[::4, ::4]
        assert table.levels_after[-1].tolist() == [1.0, 0.0]
        assert (got[i] - x0[0])[:, held].abs().max() < 1e-5  # at the end the given part is the picture's own


def test_one_of_many_is_the_one_alone(pipe: Pipeline, picture: np.ndarray, mask: np.ndarray) -> None:
    pictures, masks = [picture, 255 - picture], [mask, ~mask]
    both = pipe.generate(["a cat", "a dog"], image=pictures, mask=masks, steps=2, output_type="np").images
    alone = pipe.generate("a dog", image=pictures[1], mask=masks[1], steps=2, seed=1, output_type="np").images
    assert np.abs(both[1] - alone[0]).max() < 1e-4


def test_paste_blends_inside_the_mask_alone() -> None:
    mask = torch.zeros(1, 1, 9, 30, dtype=torch.bool)
    mask[..., 10:] = True
    drawn, picture = torch.ones(2, 3, 9, 30), torch.zeros(1, 3, 9, 30)
    line = paste(drawn, picture, mask, blend=4)[1, 2, 4]
    assert torch.equal(line[:10], torch.zeros(10)) and torch.equal(line[14:], torch.ones(16))
    assert (line[10:14].diff() > 0).all() and 0 < line[10] < line[13] < 1
    assert torch.equal(paste(drawn, picture, mask)[0, 0, 0], mask[0, 0, 0].float())


def test_padding_draws_on_beyond_the_edges(pipe: Pipeline, picture: np.ndarray) -> None:
    wide, mask = fastldm.padded(picture, left=4, bottom=6)
    assert wide.size == (20, 22) and mask.shape == (22, 20)
    assert np.array_equal(np.asarray(wide)[:16, 4:], picture) and not mask[:16, 4:].any()
    assert mask[16:].all() and mask[:, :4].all()
    assert np.array_equal(np.asarray(wide)[16:, 4:], np.repeat(picture[-1:], 6, 0))
    made = np.asarray(pipe.generate("a cat", image=wide, mask=mask, steps=2).image)
    assert made.shape == (22, 20, 3) and np.array_equal(made[:16, 4:], picture)
    for wrong in ({}, {"left": -1}, {"top": 1.5}, {"right": 9000}):
        with pytest.raises(InvalidArgument):
            fastldm.padded(picture, **wrong)
