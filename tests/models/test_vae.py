"""The autoencoder against diffusers with the same random weights."""

from __future__ import annotations

import pytest
import torch

from fastldm.errors import CheckpointError
from fastldm.models.vae import AutoencoderKL, DiagonalGaussian, VAEConfig

diffusers = pytest.importorskip("diffusers")

TINY = {
    "f4": VAEConfig(
        block_out_channels=(16, 32, 16), layers_per_block=1, norm_num_groups=4, latent_channels=3
    ),
    "f2-plain": VAEConfig(
        block_out_channels=(32, 64),
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ),
}


def oracle(config: VAEConfig, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    made = diffusers.AutoencoderKL(**{k: v for k, v in config.to_dict().items() if k != "_class_name"})
    made.load_state_dict(state)
    return made.eval()


def compare(config: VAEConfig, size: tuple[int, int]) -> float:
    torch.manual_seed(1)
    ours = AutoencoderKL(config).eval()
    theirs = oracle(config, ours.state_dict())
    images = torch.randn(2, 3, *size).clamp(-1, 1)
    latents = torch.randn(2, config.latent_channels, size[0] // config.factor, size[1] // config.factor)
    with torch.inference_mode():
        posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
        pairs = [
            (posterior.mean, expected.mean),
            (posterior.logvar, expected.logvar),
            (ours.decode(latents), theirs.decode(latents).sample),
        ]
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


@pytest.mark.parametrize("name", TINY)
def test_tiny_equals_diffusers(name: str) -> None:
    assert compare(TINY[name], (16, 24)) <= 1e-5


def test_full_size_equals_diffusers() -> None:
    assert compare(VAEConfig(), (32, 32)) <= 1e-5


def test_parameter_count() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL(VAEConfig()).parameters()) == 83_653_863


@pytest.mark.parametrize("name", TINY)
def test_config_round_trip(name: str) -> None:
    assert VAEConfig.from_dict(TINY[name].to_dict()) == TINY[name]


@pytest.mark.parametrize(
    ("field", "value"), [("act_fn", "relu"), ("latents_mean", [1.0]), ("latent_channels", 0), ("new", "x")]
)
def test_config_refuses_what_would_change_the_numbers(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field):
        VAEConfig.from_dict({**TINY["f4"].to_dict(), field: value})


def test_kl_and_sample_against_the_distribution_of_torch() -> None:
    g = torch.Generator().manual_seed(3)
    mean, logvar, noise = (torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    ours = DiagonalGaussian(mean, logvar)
    theirs = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    want = torch.distributions.kl_divergence(theirs, standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(ours.kl(), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.sample(noise), mean + theirs.scale * noise, rtol=1e-14, atol=0)
