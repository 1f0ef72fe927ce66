"""What autoencoders are trained with and judged by, against the original code and float64 transcriptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import fastldm
from fastldm.checkpoint import convert
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.discriminator import PatchDiscriminator
from fastldm.models.pixels import PixelAutoencoder, PixelConfig
from fastldm.models.vq import VQConfig, VQModel
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
from fastldm.training.data import SceneData, to_model
from fastldm.training.fit import FitSettings
from fastldm.training.perceptual import LPIPS, laplacian_distance
from fastldm.training.reconstruction import (
    codebook_use,
    frechet_distance,
    psnr,
    reconstruction_report,
    ssim,
    to_pixels,
)
from fastldm.training.session import Session

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
    FitSettings(1, 1, 1.0),
    (8, 8),
    2,
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
            folder, folder, section, DiffusionSection(section.fit, (8, 8), (0, 1), (1, 1)), seed=1
        )
        spied = SimpleNamespace(images=data.images, crops=data_until)
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


def pyramid_by_hand(x: np.ndarray, levels: int) -> float:
    """One channel [H, W], pixel by pixel."""
    taps = np.array([1, 4, 6, 4, 1]) / 16
    total = 0.0
    for _ in range(levels - 1):
        height, width = x.shape
        if min(height, width) < 2:
            break
        blurred = np.zeros_like(x)
        for i in range(height):
            for j in range(width):
                for a in range(5):
                    for b in range(5):
                        ii, jj = min(max(i + a - 2, 0), height - 1), min(max(j + b - 2, 0), width - 1)
                        blurred[i, j] += taps[a] * taps[b] * x[ii, jj]
        small = blurred[::2, ::2]
        large = np.zeros_like(x)
        for i in range(height):
            for j in range(width):
                y = max((i + 0.5) * small.shape[0] / height - 0.5, 0)
                z = max((j + 0.5) * small.shape[1] / width - 0.5, 0)
                y0, z0 = int(y), int(z)
                y1, z1 = min(y0 + 1, small.shape[0] - 1), min(z0 + 1, small.shape[1] - 1)
                up = small[y0, z0] * (1 - z + z0) + small[y0, z1] * (z - z0)
                down = small[y1, z0] * (1 - z + z0) + small[y1, z1] * (z - z0)
                large[i, j] = up * (1 - y + y0) + down * (y - y0)
        total += np.abs(x - large).mean()
        x = small
    return total + np.abs(x).mean()


def test_laplacian_distance_against_a_transcription() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.standard_normal((2, 2, 2, 12, 9))
    got = laplacian_distance(torch.from_numpy(one), torch.from_numpy(other), levels=5)
    for row in range(2):
        want = np.mean([pyramid_by_hand(one[row, c] - other[row, c], 5) for c in range(2)])
        assert float(got[row]) == pytest.approx(want, rel=1e-12)


def test_laplacian_distance_sees_detail_beneath_a_larger_error() -> None:
    board = torch.tensor([0.5, -0.5]).repeat(32)
    fine = (board[:, None] * board)[None, None] * 2
    flat = torch.full((1, 1, 64, 64), 1.0)
    none = torch.zeros_like(flat)
    assert float(laplacian_distance(flat, none)) == pytest.approx(1.0)  # all of it in the last band
    assert float(laplacian_distance(fine, none)) == pytest.approx(0.5, rel=0.05)  # nearly all in the first
    both = flat + fine
    assert float(both.abs().mean()) == pytest.approx(1.0)
    assert float(laplacian_distance(both, none)) == pytest.approx(1.5, rel=0.05)
    assert float(laplacian_distance(both, both)) == 0.0


VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)


def lpips_state(prefix: str = "") -> dict[str, Tensor]:
    """Random weights under the keys of lpips.LPIPS(net='vgg')."""
    generator = torch.Generator().manual_seed(7)
    state, number, part, before = {}, 0, 1, 3
    for width in VGG:
        if isinstance(width, str):
            number, part = number + 1, part + 1
            continue
        weight = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        state[f"net.slice{part}.{number}.weight"] = weight
        state[f"net.slice{part}.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        number, before = number + 2, width
    for i, width in enumerate((64, 128, 256, 512, 512)):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return {prefix + key: value for key, value in state.items()}


def lpips_by_hand(state: dict[str, Tensor], images: Tensor, decoded: Tensor) -> Tensor:
    """In float64, straight from the paper's formula."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)
    maps = []
    for x in (images, decoded):
        x = ((x.double().movedim(1, -1) - shift) / scale).movedim(-1, 1)
        number, part, found = 0, 1, []
        for width in VGG:
            if isinstance(width, str):
                found.append(x)
                x, number, part = F.max_pool2d(x, 2), number + 1, part + 1
                continue
            key = f"net.slice{part}.{number}."
            x = F.conv2d(x, state[key + "weight"].double(), state[key + "bias"].double(), padding=1).clamp(0)
            number += 2
        maps.append([*found, x])
    total = torch.zeros(len(images), dtype=torch.float64)
    for i, (one, other) in enumerate(zip(*maps, strict=True)):
        one = one / (one.square().sum(1, keepdim=True).sqrt() + 1e-10)
        other = other / (other.square().sum(1, keepdim=True).sqrt() + 1e-10)
        weight = state[f"lin{i}.model.1.weight"].double()[0]
        total += ((one - other).square() * weight).sum(1).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("prefix", ["", "first_stage_model.loss.perceptual_loss."])
def test_lpips_against_a_transcription(tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "lpips.safetensors"
    save_file({**lpips_state(prefix), "other": torch.zeros(1)}, file)
    lpips = LPIPS.load(file)
    images = torch.rand(2, 3, 32, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    decoded = (images * 0.7).requires_grad_()
    got = lpips(images, decoded)
    torch.testing.assert_close(
        got.double(), lpips_by_hand(lpips_state(), images, decoded), rtol=1e-4, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(lpips(images, decoded * 0 - 1).sum(), decoded)
    assert gradient.isfinite().all()
    assert float(lpips(images, images).abs().max()) == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lin2.model.1.weight": None}, "missing"),
        ({"net.slice3.12.bias": torch.zeros(255)}, "255"),
        ({"net.slice1.0.weight": torch.full((64, 3, 3, 3), float("nan"))}, "NaN"),
    ],
)
def test_lpips_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    state = {k: v for k, v in {**lpips_state(), **change}.items() if v is not None}
    save_file(state, tmp_path / "lpips.safetensors")
    with pytest.raises(CheckpointError, match=says) as caught:
        LPIPS.load(tmp_path / "lpips.safetensors")
    assert caught.value.key == next(iter(change))


def pictures(count: int, height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """One channel [H, W], window by window."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_against_a_transcription() -> None:
    one = pictures(2, 14, 17, 1)
    other = (one.float() * 0.6 + 0.4 * pictures(2, 14, 17, 2).float()).to(torch.uint8)
    got = ssim(one, other)
    for row in range(2):
        x, y = one[row].double().numpy(), other[row].double().numpy()
        want = np.mean([ssim_by_hand(x[:, :, c], y[:, :, c]) for c in range(3)])
        assert float(got[row]) == pytest.approx(want, rel=1e-10)
    assert ssim(one, one).tolist() == [pytest.approx(1.0, rel=1e-12)] * 2
    with pytest.raises(InvalidArgument, match="11 pixels"):
        ssim(one[:, :10], other[:, :10])


def test_psnr_against_its_formula() -> None:
    one = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    other = one.clone()
    other[0, :2] += 10  # half of the pixels: a mean squared error of 50
    assert psnr(one, other).tolist() == [
        pytest.approx(10 * math.log10(255**2 / 50)),
        pytest.approx(78.13, abs=0.01),
    ]


def test_frechet_distance_against_closed_forms() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    assert frechet_distance(base, base) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(base, base + 2.0) == pytest.approx(6 * 4.0, rel=1e-9)
    # The same features scaled: covariances commute, so it is |(s − 1) μ|² + (s − 1)² tr Σ.
    trace, mean = float(base.T.cov().trace()), float(base.mean(0).square().sum())
    assert frechet_distance(base, 3 * base) == pytest.approx(4 * (mean + trace), rel=1e-9)
    # Covariances that do not commute, against the eigenvalues of their plain product.
    other = base.flip(1) @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 0.3
    one_cov, other_cov = np.cov(base.numpy().T), np.cov(other.numpy().T)
    shared = np.sqrt(np.linalg.eigvals(one_cov @ other_cov).real.clip(0)).sum()
    apart = float((base.mean(0) - other.mean(0)).square().sum())
    want = apart + np.trace(one_cov) + np.trace(other_cov) - 2 * shared
    assert frechet_distance(base, other) == pytest.approx(want, rel=1e-9)
    # Fewer pictures than dimensions: the covariance is singular.
    few = base[:4]
    assert frechet_distance(few, few + 1.0) == pytest.approx(6.0, rel=1e-6)
    with pytest.raises(InvalidArgument, match="2 pictures"):
        frechet_distance(base[:1], base)


def test_codebook_use_counts_codes_and_how_evenly_they_are_chosen() -> None:
    assert codebook_use(torch.arange(8).repeat(5), 32) == (8, pytest.approx(8.0))
    assert codebook_use(torch.zeros(9, dtype=torch.int64), 32) == (1, pytest.approx(1.0))


def test_the_report_of_pixels_is_perfect() -> None:
    images = pictures(5, 16, 12, 4)
    stage = PixelAutoencoder(PixelConfig())
    report = reconstruction_report(stage, images, lambda part: part.flatten(1)[:, :7].double(), batch=2)
    assert report.psnr == pytest.approx(78.13, abs=0.01) and report.ssim == pytest.approx(1.0)
    assert report.frechet == pytest.approx(0.0, abs=1e-6)
    assert report.codes is None and report.perplexity is None
    assert str(report) == "PSNR 78.13 dB, SSIM 1.0000, Fréchet distance 0.000"


def test_the_report_of_a_quantising_autoencoder_is_that_of_its_parts() -> None:
    torch.manual_seed(6)
    vae = VQModel(
        VQConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, num_vq_embeddings=16)
    ).eval()
    images = pictures(5, 16, 12, 4)
    report = reconstruction_report(vae, images, batch=2)
    with torch.no_grad():
        latents = vae.encode(to_model(images)).mean
        shown = to_pixels(vae.decode(latents))
    assert report.psnr == pytest.approx(float(psnr(images, shown).mean()), rel=1e-3)
    assert report.ssim == pytest.approx(float(ssim(images, shown).mean()), rel=1e-2)
    assert report.frechet is None
    codes, perplexity = codebook_use(vae.quantize.indices(latents), 16)
    assert (report.codes, report.perplexity) == (codes, pytest.approx(perplexity))
    assert 1 < codes <= 16
