"""The first stages of latent diffusion against what the original code computed, and against diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastldm.checkpoint.rename import STAGES, vae_names
from fastldm.errors import CheckpointError
from fastldm.models import vq
from fastldm.models.pixels import PixelAutoencoder, PixelConfig
from fastldm.models.vae import AutoencoderConfig, AutoencoderKL, DiagonalGaussian, VAEConfig
from fastldm.models.vae_strips import decode, decode_in_strips
from fastldm.models.vq import VectorQuantizer, VQConfig, VQModel, nearest
from fastldm.presets import FIRST_STAGES

diffusers = pytest.importorskip("diffusers")

# [counted] from the original configurations.
PARAMETERS = {
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    "vq-f4": 55_322_782,
    "vq-f4-noattn": 53_219_486,
    "vq-f8": 67_717_295,
    "vq-f8-n256": 67_652_783,
    "vq-f16": 69_593_371,
}
TINY = {
    "f4-attention": VQConfig(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_levels=(0, 2),
        num_vq_embeddings=20,
    ),
    "f2-other-z": VQConfig(
        block_out_channels=(16, 8),
        norm_num_groups=8,
        mid_block_add_attention=False,
        latent_channels=2,
        z_channels=5,
        num_vq_embeddings=7,
    ),
}


def network_of(case: Any) -> AutoencoderKL | VQModel:
    """The network of a recorded first stage, its weights renamed."""
    given = case.config["args"]
    shape = given["ddconfig"]
    levels = len(shape["ch_mult"])
    fields: dict[str, Any] = dict(
        latent_channels=given["embed_dim"],
        block_out_channels=tuple(shape["ch"] * factor for factor in shape["ch_mult"]),
        layers_per_block=shape["num_res_blocks"],
        mid_block_add_attention=shape.get("attn_type") != "none",
        attention_levels=tuple(
            i for i in range(levels) if shape["resolution"] >> i in shape["attn_resolutions"]
        ),
    )
    network: AutoencoderKL | VQModel
    if case.config["kind"] == "kl":
        network = AutoencoderKL(VAEConfig(**fields))
    else:
        network = VQModel(VQConfig(**fields, num_vq_embeddings=given["n_embed"]))
    names = vae_names(network.config.to_dict())
    state = {}
    for key, tensor in case.weight.items():
        (name,) = names.to_folder(STAGES["vae"] + key)
        state[name] = tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["vq_f4", "vq_f4_noattn"])
def test_vq_equals_the_original(recorded: Callable[[str], Any], name: str) -> None:
    case = recorded(f"ldm/{name}")
    network = network_of(case)
    for size in ("a", "b"):
        latents = network.encode(case.input[f"x_{size}"]).mean
        case.holds(f"prequant_{size}", latents)
        quantised = network.quantize(case.out[f"prequant_{size}"])
        case.holds(f"quant_{size}", quantised.latents)
        case.holds(f"indices_{size}", quantised.indices.flatten())
        case.holds(f"loss_{size}", quantised.loss)
        case.holds(f"codebook_entry_{size}", network.quantize.codes(quantised.indices))
        case.holds(f"image_{size}", network.decode(latents))
        plain = network.decode(latents, force_not_quantize=True)
        case.holds(f"image_force_not_quantize_{size}", plain)
        there_and_back, _ = network(case.input[f"x_{size}"])
        case.holds(f"image_{size}", there_and_back)


def test_an_image_of_odd_size_is_rounded_down_as_in_the_original(recorded: Callable[[str], Any]) -> None:
    case = recorded("ldm/vq_f4")
    network = network_of(case)
    latents = network.encode(case.input["x_odd"]).mean
    case.holds("prequant_odd", latents)
    case.holds("image_odd", network.decode(latents))


@pytest.mark.parametrize("name", ["kl_f4", "kl_f8"])
def test_kl_equals_the_original(recorded: Callable[[str], Any], name: str) -> None:
    case = recorded(f"ldm/{name}")
    network = network_of(case)
    for size in ("a", "b"):
        posterior = network.encode(case.input[f"x_{size}"])
        case.holds(f"mean_{size}", posterior.mean)
        case.holds(f"logvar_{size}", posterior.logvar)
        case.holds(f"std_{size}", posterior.std)
        case.holds(f"kl_{size}", posterior.kl())
        latents = posterior.sample(case.input[f"noise_{size}"])
        case.holds(f"z_{size}", latents)
        case.holds(f"image_{size}", network.decode(latents))
        case.holds(f"mode_image_{size}", network.decode(posterior.mean))


def test_the_posterior_equals_the_original(recorded: Callable[[str], Any]) -> None:
    case = recorded("ldm/kl_distribution")
    posterior = DiagonalGaussian.of(case.input["moments"])
    case.holds("mean", posterior.mean)
    case.holds("mode", posterior.mean)
    case.holds("logvar", posterior.logvar)
    case.holds("std", posterior.std)
    case.holds("kl", posterior.kl())
    extreme = DiagonalGaussian.of(case.input["extreme_moments"])
    case.holds("extreme_logvar", extreme.logvar)
    case.holds("extreme_std", extreme.std)


def test_quantiser_and_its_gradients_equal_the_original(recorded: Callable[[str], Any]) -> None:
    case = recorded("ldm/vector_quantizer")
    quantiser = VectorQuantizer(64, 3)
    quantiser.embedding.weight = torch.nn.Parameter(case.weight["embedding.weight"])
    latents = case.input["z"].requires_grad_()
    found = quantiser(latents)
    case.holds("quant", found.latents)
    case.holds("indices_sane_shape", found.indices)
    case.holds("loss_legacy", found.loss)
    wanted = [latents, quantiser.embedding.weight]
    for name, gradient in zip(("z", "codebook"), torch.autograd.grad(found.loss, wanted), strict=True):
        case.holds(f"grad_{name}_legacy", gradient)
    (passed,) = torch.autograd.grad((quantiser(latents).latents * case.input["probe"]).sum(), latents)
    case.holds("straight_through_grad", passed)


def test_nearest_is_the_least_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    codebook = torch.randn(37, 5, generator=generator)
    vectors = 3 + torch.randn(101, 5, generator=generator)
    want = [
        min(range(37), key=lambda k: float((v - codebook[k].double()).square().sum()))
        for v in vectors.double()
    ]
    assert nearest(vectors, codebook).tolist() == want
    monkeypatch.setattr(vq, "DISTANCES", 100)  # many pieces
    assert nearest(vectors, codebook).tolist() == want
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(vectors, codebook).tolist() == want


def test_a_new_codebook_is_uniform_and_small() -> None:
    torch.manual_seed(0)
    codes = VectorQuantizer(1000, 4).embedding.weight.detach() * 1000
    assert -1 <= float(codes.min()) < -0.99 and 0.99 < float(codes.max()) <= 1
    assert abs(float(codes.mean())) < 0.03 and float(codes.var()) == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("name", TINY)
def test_vq_equals_diffusers(name: str) -> None:
    config = TINY[name]
    torch.manual_seed(1)
    ours = VQModel(config).eval().requires_grad_(False)
    torch.nn.init.normal_(ours.quantize.embedding.weight)
    theirs = diffusers.VQModel(
        **{k: v for k, v in config.to_dict().items() if k not in ("_class_name", "shift_factor")}
    )
    theirs.load_state_dict(ours.state_dict())
    theirs.eval().requires_grad_(False)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = ours.encode(images).mean
    assert latents.shape == (2, config.latent_channels, 16 // config.factor, 24 // config.factor)
    for got, want in (
        (latents, theirs.encode(images).latents),
        (ours.decode(latents), theirs.decode(latents).sample),
        (
            ours.decode(latents, force_not_quantize=True),
            theirs.decode(latents, force_not_quantize=True).sample,
        ),
    ):
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_attention_on_levels_of_a_kl_autoencoder_equals_diffusers() -> None:
    config = VAEConfig(
        block_out_channels=(8, 16, 16), norm_num_groups=4, attention_levels=(1, 2), latent_channels=5
    )
    torch.manual_seed(2)
    ours = AutoencoderKL(config).eval().requires_grad_(False)
    theirs = diffusers.AutoencoderKL(**{k: v for k, v in config.to_dict().items() if k != "_class_name"})
    theirs.load_state_dict(ours.state_dict())
    theirs.eval().requires_grad_(False)
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    posterior, want = ours.encode(images), theirs.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean, want.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(want.mean), theirs.decode(want.mean).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_of_the_zoo(name: str) -> None:
    config = FIRST_STAGES[name]
    with torch.device("meta"):
        network = VQModel(config) if isinstance(config, VQConfig) else AutoencoderKL(config)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    assert f"-f{config.factor}" in name


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_factor_by_configuration(kind: str, factor: int) -> None:
    shape: dict[str, Any] = dict(
        block_out_channels=(8,) * factor.bit_length(), layers_per_block=1, norm_num_groups=2
    )
    torch.manual_seed(3)
    network = AutoencoderKL(VAEConfig(**shape)) if kind == "kl" else VQModel(VQConfig(**shape))
    network.eval().requires_grad_(False)
    latents = network.encode(torch.rand(1, 3, 64, 32)).mean
    assert network.config.factor == factor
    assert latents.shape == (1, network.config.latent_channels, 64 // factor, 32 // factor)
    assert network.decode(latents).shape == (1, 3, 64, 32)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_decoding_in_strips_quantises_and_attends_as_the_whole(rows: int) -> None:
    torch.manual_seed(5)
    network = VQModel(replace(TINY["f4-attention"], attention_levels=(1, 2))).eval().requires_grad_(False)
    torch.nn.init.normal_(network.quantize.embedding.weight)
    latents = torch.randn(2, 3, 5, 7)
    want = network.decode(latents)
    torch.testing.assert_close(decode_in_strips(network, latents, rows), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(decode(network, latents), want, rtol=0, atol=1e-5)


def test_pixels_are_their_own_latents() -> None:
    stage = PixelAutoencoder(PixelConfig())
    images = torch.rand(2, 3, 4, 6)
    posterior = stage.encode(images)
    assert torch.equal(posterior.sample(torch.ones_like(images)), images) and not posterior.std.any()
    assert decode(stage, images) is images and stage.config.factor == 1


@pytest.mark.parametrize("config", [*TINY.values(), *FIRST_STAGES.values()])
def test_config_round_trip(config: AutoencoderConfig) -> None:
    assert type(config).from_dict(config.to_dict()) == config


def test_latents_are_not_scaled_where_the_file_says_nothing() -> None:
    fields = {k: v for k, v in TINY["f4-attention"].to_dict().items() if k != "scaling_factor"}
    assert VQConfig.from_dict(fields).scaling_factor == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_type", "spatial"),
        ("lookup_from_codebook", True),
        ("num_vq_embeddings", 0),
        ("vq_embed_dim", "3"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 2 + ["DownEncoderBlock2D"]),
        ("remap", "x"),
    ],
)
def test_config_refuses_what_would_change_the_numbers(field: str, value: object) -> None:
    with pytest.raises(CheckpointError):
        VQConfig.from_dict({**TINY["f4-attention"].to_dict(), field: value})
