"""What training is made of, against closed forms: losses, pictures, the facts of a caption."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.scenes import COLOURS, KINDS, LANDSCAPES, STYLES, draw_scene, render
from fastldm.training.autoencoder import AutoencoderLoss, AutoencoderTraining, encode_all
from fastldm.training.config import AutoencoderSection
from fastldm.training.data import SceneData, to_model
from fastldm.training.fit import FitSettings
from fastldm.training.reconstruction import reconstruction_report
from fastldm.training.text import QUESTIONS, UNTOLD, answers, reader_loss


def test_autoencoder_loss_against_an_independent_transcription() -> None:
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=2)
    model = AutoencoderTraining(AutoencoderKL(config), width=5).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    segmentation = torch.randint(17, (2, 8, 8), dtype=torch.uint8)
    section = AutoencoderSection((8, 8), 2, FitSettings(1, 1, 1.0), kl_weight=0.01, noise=0.3, alignment=0.2)
    objective = AutoencoderLoss(section, torch.device("cpu"))
    got = objective(model, 0, images, segmentation, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    posterior = model.vae.encode(images)
    shape = (2, 2, 4, 4)
    latents = posterior.mean + (posterior.logvar / 2).exp() * torch.randn(
        shape, generator=generator, dtype=torch.float64
    )
    level = 0.3 * torch.rand((2, 1, 1, 1), generator=generator)
    latents = latents + level * posterior.mean.std() * torch.randn(shape, generator=generator)
    decoded = model.vae.decode(latents)
    kl = sum(
        0.5 * (float(m) ** 2 + math.exp(float(v)) - 1 - float(v))
        for m, v in zip(posterior.mean.detach().flatten(), posterior.logvar.detach().flatten(), strict=True)
    )
    first, second = model.head
    told = 0.0
    for row in range(2):
        for y in range(4):
            for x in range(4):
                hidden = first.weight[:, :, 0, 0] @ latents[row, :, y, x] + first.bias
                hidden = hidden / (1 + (-hidden).exp())
                logits = (second.weight[:, :, 0, 0] @ hidden + second.bias).detach().float()
                for pixel in segmentation[row, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten():
                    told -= float(logits[int(pixel)] - logits.logsumexp(0)) / 4
    want = (images - decoded).abs().mean() + ((images - decoded) ** 2).mean() + 0.01 * kl / 2
    assert float(got.detach()) == pytest.approx(float(want.detach()) + 0.2 * told / 32, rel=1e-6)


def test_reader_loss_ignores_what_was_not_told() -> None:
    logits = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])]
    labels = torch.tensor([[0, -1], [1, 0]])
    want = (math.log(1 + math.exp(-2)) + math.log(2) + math.log(1 + math.exp(-5))) / 2
    assert float(reader_loss(logits, labels)) == pytest.approx(want, rel=1e-6)


def test_data_is_drawn_from_its_seed_and_crops_go_with_their_maps() -> None:
    data, again = SceneData.draw(6, 9, stage=4), SceneData.draw(6, 9, stage=4)
    assert torch.equal(data.images, again.images) and data.scenes == again.scenes
    for i, scene in enumerate(data.scenes):
        drawn = render(scene)
        assert torch.equal(data.images[i], torch.from_numpy(drawn.image))
        assert torch.equal(data.segmentation[i], torch.from_numpy(drawn.segmentation))
    plain = SceneData.draw(6, 9)
    images, maps = plain.crops(20, 32, torch.Generator().manual_seed(1))
    assert images.shape == (20, 3, 32, 32) and maps.shape == (20, 32, 32)
    assert -1 <= float(images.min()) and float(images.max()) <= 1
    colours = [
        set(map(tuple, image.permute(1, 2, 0)[maps[i] == 0].tolist())) for i, image in enumerate(images)
    ]
    # Under the map's zeros lies the plain background, but for the soft edges of objects.
    assert all(len(found) == 1 for i, found in enumerate(colours) if not maps[i].any())


def test_answers_are_what_the_scene_shows() -> None:
    rng = np.random.default_rng(3)
    names = list(QUESTIONS)
    told = frozenset(
        {"kind", "count", "colour", "background", "size", "position", "relation", "style", "sky"}
    )
    for _ in range(60):
        scene = draw_scene(rng)
        found = dict(zip(names, answers(scene, told), strict=True))
        silent = dict(zip(names, answers(scene, frozenset({"kind", "count"})), strict=True))
        for kind in KINDS:
            things = [thing for thing in scene.objects if thing.kind == kind]
            assert found[f"number of {kind}"] == len(things) == silent[f"number of {kind}"]
            if found[f"colour of {kind}"] != UNTOLD:
                assert {COLOURS[found[f"colour of {kind}"]]} == {thing.colour for thing in things}
        grounds = (*COLOURS, *LANDSCAPES)
        assert grounds[found["background"]] == scene.background and STYLES[found["style"]] == scene.style
        assert {value for name, value in silent.items() if not name.startswith("number")} == {UNTOLD}
        assert all(UNTOLD <= value < QUESTIONS[name] for name, value in found.items())


def test_psnr_and_encoding_of_a_known_autoencoder() -> None:
    data = SceneData.draw(3, 1)
    config = VAEConfig(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=2,
        mid_block_add_attention=False,
    )
    vae = AutoencoderKL(config).eval()
    nn.init.zeros_(vae.decoder.conv_out.weight)
    nn.init.zeros_(vae.decoder.conv_out.bias)
    errors = [float(((128 - image.double()) ** 2).mean()) for image in data.images]
    want = sum(10 * math.log10(255**2 / error) for error in errors) / 3
    assert reconstruction_report(vae, data.images).psnr == pytest.approx(want, rel=1e-5)
    with torch.no_grad():
        means, deviations = encode_all(vae, data.images, batch=2)
        posterior = vae.encode(to_model(data.images[2:]))
    torch.testing.assert_close(means[2:], posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(deviations[2:], (posterior.logvar / 2).exp(), rtol=1e-5, atol=1e-5)
