"""What autoencoders are trained with, against the original code and float64 transcriptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastldm
from fastldm.checkpoint import convert
from fastldm.models.discriminator import PatchDiscriminator
from fastldm.models.vq import VQModel
from fastldm.training import run
from fastldm.training.adversarial import (
    AdversarySettings,
    adaptive_weight,
    adversarial_losses,
    hinge_loss,
    vanilla_loss,
)
from fastldm.training.autoencoder import (
    AutoencoderLoss,
    AutoencoderTraining,
    new_autoencoder,
    train_autoencoder,
)
from fastldm.training.config import AutoencoderSection, DiffusionSection, TrainConfig
from fastldm.training.data import SceneData
from fastldm.training.fit import FitSettings
from fastldm.training.perceptual import laplacian_distance
from fastldm.training.reconstruction import (
    codebook_use,
    to_pixels,
)
from fastldm.training.session import Session
from tests.training.test_perceptual import pyramid_by_hand

Recorded = Callable[[str], Any]


def test_discriminator_equals_the_original(recorded: Recorded) -> None:
    case = recorded("ldm/discriminator")
    for size in ("a", "b"):
        critic = PatchDiscriminator(3, 8, 3)
        critic.load_state_dict(case.weight)
        critic.eval()
        case.holds(f"eval_{size}", critic(case.input[f"x_{size}"]))
        critic.train()
        case.holds(f"train_{size}", critic(case.input[f"x_{size}"]))
        for key, tensor in critic.named_buffers():
            case.holds(f"after_train_{size}.{key}", tensor)


def test_a_new_discriminator_has_the_originals_initial_values() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(3, 64, 3)
    widest = critic.main[8].weight.detach()
    assert widest.shape == (512, 256, 4, 4)
    assert float(widest.std()) == pytest.approx(0.02, rel=0.01) and abs(float(widest.mean())) < 1e-4
    scale = critic.main[9].weight.detach()
    assert float(scale.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(scale.std()) == pytest.approx(0.02, rel=0.15)
    assert sum(p.numel() for p in critic.parameters()) == 2_765_633


def test_losses_of_the_game_equal_the_original(recorded: Recorded) -> None:
    case = recorded("ldm/gan_losses")
    real, fake = case.input["logits_real"], case.input["logits_fake"]
    case.holds("hinge_d_loss", hinge_loss(real, fake))
    case.holds("vanilla_d_loss", vanilla_loss(real, fake))
    used, perplexity = codebook_use(case.input["indices"], case.config["n_embed"])
    assert used == case.out["cluster_use"]
    case.holds("perplexity", torch.tensor(perplexity))


class Toy:
    """The recorded losses' decoder: one convolution and tanh."""

    def __init__(self, case: Any) -> None:
        self.last_layer = case.weight["last_layer"].requires_grad_()
        self.images = case.input["x"]
        self.decoded = torch.tanh(F.conv2d(case.input["feat"], self.last_layer, padding=1))


def test_adaptive_weight_equals_the_original(recorded: Recorded) -> None:
    case = recorded("ldm/autoencoder_losses")
    toy = Toy(case)
    nll = (toy.decoded - toy.images).abs().sum() / 2
    adversarial = -(toy.decoded * case.input["probe"]).mean()
    case.holds("toy.nll", nll)
    case.holds("toy.d_weight", adaptive_weight(nll, adversarial, toy.last_layer))
    clamped = adaptive_weight(nll, adversarial * 1e-9, toy.last_layer)
    case.holds("toy.d_weight_clamped", clamped)
    assert not clamped.requires_grad


def settings_of(given: dict[str, Any]) -> AdversarySettings:
    return AdversarySettings(
        start=given["disc_start"],
        weight=given["disc_weight"],
        loss=given.get("disc_loss", "hinge"),
        width=given.get("disc_ndf", 64),
        layers=given["disc_num_layers"],
    )


@pytest.mark.parametrize("name", ["kl_hinge", "vq_l1", "vq_l2"])
def test_the_game_equals_the_original(recorded: Recorded, name: str) -> None:
    case = recorded("ldm/autoencoder_losses")
    variant = case.config["variants"][name]
    settings, weights = settings_of(variant["args"]), f"{variant['discriminator']}."
    toy, want = Toy(case), f"{name}.step{max(variant['steps'])}"
    critic = settings.critic()
    critic.load_state_dict(
        {k.removeprefix(weights): v for k, v in case.weight.items() if k.startswith(weights)}
    )
    critic.train(variant.get("disc_train", False))
    error = toy.decoded - toy.images
    if name == "kl_hinge":
        reconstruction, rest = error.abs().sum() / 2, 0.01 * case.out[f"{want}.opt0.kl_loss"]
    else:
        reconstruction = (error.square() if name == "vq_l2" else error.abs()).mean()
        rest = 0.8 * case.input["codebook_loss"]
    case.holds(f"{want}.opt0.nll_loss", reconstruction)
    term, own = adversarial_losses(settings, critic, toy.images, toy.decoded, reconstruction, toy.last_layer)
    case.holds(f"{want}.opt1.disc_loss", own)
    total = reconstruction + rest + term
    case.holds(f"{want}.opt0.total_loss", total)
    # One backward pass of everything moves the last layer as the original's without the critic's loss.
    (total + own).backward()
    case.holds(f"{want}.opt0.grad_last_layer", toy.last_layer.grad)
    # And the critic as its own loss alone.
    moved = [parameter.grad.clone() for parameter in critic.parameters()]
    critic.zero_grad()
    decoded = toy.decoded.detach()
    loss = vanilla_loss if settings.loss == "vanilla" else hinge_loss
    loss(critic(toy.images), critic(decoded)).backward()
    for got, parameter in zip(moved, critic.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


SECTION = AutoencoderSection(
    (8, 8),
    2,
    FitSettings(1, 1, 1.0),
    kind="vq",
    codes=10,
    codebook_weight=0.7,
    norm_num_groups=4,
    perceptual=0.3,
    adversary=AdversarySettings(start=5, weight=0.6, width=4, layers=1),
)


def test_the_loss_of_a_quantising_autoencoder_against_a_transcription() -> None:
    torch.manual_seed(8)
    model = AutoencoderTraining(new_autoencoder(SECTION))
    model.critic = SECTION.adversary.critic()
    model.double()
    vae, critic = model.vae, model.critic
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    maps = torch.zeros(2, 16, 16, dtype=torch.uint8)
    objective = AutoencoderLoss(SECTION, torch.device("cpu"))
    before, after = (objective(model, step, images, maps, torch.Generator()) for step in (4, 5))

    latents = vae.quant_conv(vae.encoder(images))
    codes = vae.quantize.embedding.weight
    places = latents.movedim(1, -1)
    chosen = codes[(places[..., None, :] - codes).square().sum(-1).argmin(-1)]
    quantiser = 1.25 * (places - chosen).square().mean()
    decoded = vae.decoder(vae.post_quant_conv(chosen.movedim(-1, 1)))
    distance = np.mean(
        [
            pyramid_by_hand((images - decoded)[row, channel].detach().numpy(), 4)
            for row in range(2)
            for channel in range(3)
        ]
    )
    reconstruction = (images - decoded).abs().mean() + ((images - decoded) ** 2).mean()
    want = reconstruction.item() + 0.3 * distance + 0.7 * quantiser.item()
    assert before.item() == pytest.approx(want, rel=1e-9)

    adversarial = -critic(decoded).mean()
    last = vae.decoder.conv_out.weight
    full = reconstruction + 0.3 * laplacian_distance(images, decoded).mean()
    pulls = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (full, adversarial)]
    term = 0.6 * pulls[0] / (pulls[1] + 1e-4) * adversarial
    own = ((1 - critic(images)).clamp(0).mean() + (1 + critic(decoded)).clamp(0).mean()) / 2
    assert after.item() == pytest.approx(want + (term + own).item(), rel=1e-6)


def test_training_against_a_critic_resumes_to_the_bit_and_moves_both_players(tmp_path: Path) -> None:
    data = SceneData.draw(4, 2)
    adversary = AdversarySettings(start=2, width=4, layers=1)
    section = replace(
        SECTION,
        fit=FitSettings(steps=6, batch=2, learning_rate=1e-3, warmup=1, save_every=4),
        crop=16,
        adversary=adversary,
        whole=0.0,
    )

    def train(folder: Path, dies_at: int | None = None) -> dict[str, Tensor]:
        def data_until(rows: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            nonlocal passes
            passes += 1
            if passes == dies_at:
                raise KeyboardInterrupt
            return data.crops(rows, side, generator)

        passes = 0
        config = TrainConfig(
            folder, folder, section, DiffusionSection(FitSettings(1, 1, 1.0), (8, 8), (0, 1), (1, 1)), seed=1
        )
        spied = SimpleNamespace(images=data.images, crops=data_until, pictures_digest=data.pictures_digest)
        train_autoencoder(Session(config, report=str), spied)
        return torch.load(folder / "autoencoder.pt", weights_only=True)

    unbroken = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", dies_at=6)
    assert torch.load(tmp_path / "b" / "autoencoder.pt", weights_only=True)["step"] == 4
    resumed = train(tmp_path / "b")
    for key, tensor in unbroken["module"].items():
        assert torch.equal(tensor, resumed["module"][key]), key
    torch.manual_seed(1)
    fresh = AutoencoderTraining(new_autoencoder(section))
    fresh.critic = adversary.critic()
    for key, tensor in fresh.state_dict().items():
        if key.endswith(("main.0.weight", "conv_out.weight", "embedding.weight")):
            assert not torch.equal(tensor, unbroken["module"][key]), key
    groups = unbroken["optimizer"]["param_groups"]
    assert [group["betas"] for group in groups] == [(0.9, 0.99), (0.5, 0.9)]
    assert len(groups[1]["params"]) == len(list(fresh.critic.parameters()))


RUN = """
folder = "{folder}/run"
output = "{folder}/model"
pictures = 6
threads = 1
[autoencoder]
kind = "vq"
codes = 24
block_out_channels = [8, 8, 8]
attention_levels = [2]
latent_channels = 3
norm_num_groups = 4
crop = 32
perceptual = 0.5
adversary = {{ start = 1, width = 4, layers = 1 }}
fit = {{ steps = 3, batch = 2, learning_rate = 1e-3, warmup = 1, ema_decay = 0.9 }}
[text]
width = 16
heads = 2
[diffusion]
block_out_channels = [8, 16]
transformer_depth = [0, 1]
heads = [1, 2]
norm_num_groups = 4
pictures = 4
fit = {{ steps = 2, batch = 2, learning_rate = 1e-3, warmup = 1 }}
"""


def test_a_run_with_a_codebook_ends_with_a_model_that_generates(tmp_path: Path) -> None:
    file = tmp_path / "vq.toml"
    file.write_text(RUN.format(folder=tmp_path))
    said: list[str] = []
    output = run.main(file, said.append)
    assert any("codes used, perplexity" in line for line in said)
    pipe = fastldm.load(output)
    vae = pipe.components.vae
    assert isinstance(vae, VQModel) and vae.config.num_vq_embeddings == 24
    assert vae.config.attention_levels == (2,) and vae.config.scaling_factor != 1.0
    result = pipe.generate("a red circle", steps=2, seed=1)
    latents = pipe.generate("a red circle", steps=2, seed=1, output_type="latent").images
    given = latents / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        codes = vae.quantize.codes(vae.quantize.indices(given))
        decoded = vae.decode(codes, force_not_quantize=True)
    assert np.abs(np.asarray(result.image).astype(int) - to_pixels(decoded)[0].numpy()).max() <= 1
    single = fastldm.load(convert(output, tmp_path / "vq.safetensors")).components.vae
    assert single.config == vae.config
    for key, tensor in vae.state_dict().items():
        assert torch.equal(tensor, single.state_dict()[key]), key
