"""The UNet against diffusers with the same random weights, tiny and full size."""

from __future__ import annotations

import pytest
import torch

from fastldm import ops
from fastldm.errors import CheckpointError
from fastldm.models.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

SD15 = UNetConfig()
SD21 = UNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True, sample_size=96)
TINY = {
    "sd1": UNetConfig(
        block_out_channels=(32, 64),
        heads=(4, 4),
        transformer_depth=(1, 0),
        cross_attention_dim=24,
        norm_num_groups=8,
    ),
    "sd2": UNetConfig(
        block_out_channels=(32, 64, 64),
        heads=(1, 2, 2),
        transformer_depth=(1, 1, 0),
        cross_attention_dim=32,
        use_linear_projection=True,
        norm_num_groups=16,
        layers_per_block=1,
    ),
    "inpaint": UNetConfig(
        in_channels=9,
        block_out_channels=(32, 32),
        heads=(2, 2),
        transformer_depth=(0, 1),
        cross_attention_dim=16,
        norm_num_groups=4,
        layers_per_block=3,
    ),
    "deep": UNetConfig(
        block_out_channels=(32, 64),
        heads=(2, 4),
        transformer_depth=(1, 2),
        mid_depth=2,
        cross_attention_dim=16,
        norm_num_groups=8,
    ),
}


def oracle(config: UNetConfig, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    with torch.device("meta"):
        made = diffusers.UNet2DConditionModel(
            **{k: v for k, v in config.to_dict().items() if k != "_class_name"}
        )
    made.load_state_dict(state, assign=True)
    return made.eval()


def cheap_weights(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of sane size, drawn once and repeated: a full-size network in seconds."""
    draw = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    weights = {}
    for name, parameter in module.named_parameters():
        count = parameter.numel()
        values = draw.repeat(-(-count // draw.numel()))[:count].view(parameter.shape)
        fan_in = count // parameter.shape[0]
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = values.mul(0.1 if parameter.dim() == 1 else fan_in**-0.5).add_(base)
    return weights


def compare(config: UNetConfig, size: tuple[int, int], rows: int = 2) -> float:
    with torch.device("meta"):
        ours = UNet(config)
    weights = cheap_weights(ours, 1)
    ours.load_state_dict(weights, assign=True)
    theirs = oracle(config, weights)
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(rows, config.in_channels, *size, generator=g)
    context = torch.randn(rows, 7, config.cross_attention_dim, generator=g)
    timesteps = torch.tensor([[999.0, 21.5], [3.0, 400.0]])[:rows]
    step = torch.tensor([0, 1])[:rows]
    with torch.inference_mode():
        extra = latents[:, config.latent_channels :] if config.in_channels > config.latent_channels else None
        condition = ours.condition(context, timesteps, concat=extra)
        got = ours(latents[:, : config.latent_channels], condition, step)
        want = theirs(latents, timesteps[torch.arange(rows), step], context).sample
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", TINY)
def test_tiny_equals_diffusers(name: str) -> None:
    assert compare(TINY[name], (8, 12)) <= 1e-5


@pytest.mark.parametrize("size", [(7, 9), (1, 5), (6, 13)])
def test_sides_that_do_not_halve_equal_diffusers(size: tuple[int, int]) -> None:
    assert compare(TINY["sd2"], size) <= 1e-5


def test_sd15_full_size_equals_diffusers() -> None:
    assert compare(SD15, (8, 8)) <= 1e-5


@pytest.mark.long
def test_sd21_full_size_equals_diffusers() -> None:
    assert compare(SD21, (16, 16)) <= 1e-5


@pytest.mark.parametrize(
    ("config", "count"),
    [(SD15, 859_520_964), (UNetConfig(in_channels=9), 859_535_364), (SD21, 865_910_724)],
    ids=["sd15", "sd15-inpaint", "sd21"],
)
def test_parameter_count(config: UNetConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config).parameters()) == count


@pytest.mark.parametrize("name", TINY)
def test_config_round_trip(name: str) -> None:
    assert UNetConfig.from_dict(TINY[name].to_dict()) == TINY[name]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resnet_time_scale_shift", "ada_group"),
        ("act_fn", "gelu"),
        ("class_embed_type", "timestep"),
        ("layers_per_block", "2"),
        ("block_out_channels", [32, -1]),
        ("attention_head_dim", 0),
        ("surprise", 3),
        ("num_class_embeds", "10"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    ],
)
def test_config_refuses_what_would_change_the_numbers(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field.split("_types")[0]):
        UNetConfig.from_dict({**TINY["sd1"].to_dict(), field: value})


def test_one_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY["sd2"]).eval()
    latents, context = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 32)
    with torch.inference_mode():
        together = unet(latents, unet.condition(context, torch.tensor([900.0, 7.0])), torch.tensor([0, 1, 0]))
        alone = unet(latents[1:2], unet.condition(context[1:2], torch.tensor([7.0])), torch.tensor([0]))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-6 * float(alone.abs().max()))


def test_padding_beyond_the_context_length_is_not_seen() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY["sd1"]).eval()
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    padded = torch.cat((context, torch.full((1, 3, 24), 1e3)), dim=1)
    step, timesteps = torch.tensor([0]), torch.tensor([500.0])
    with torch.inference_mode():
        want = unet(latents, unet.condition(context, timesteps), step)
        got = unet(latents, unet.condition(padded, timesteps, context_length=torch.tensor([5])), step)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("backends", ["reference", None])
@pytest.mark.parametrize("name", TINY)
def test_halves_share_what_comes_before_the_first_cross_attention(name: str, backends: str | None) -> None:
    """Guided latents given once or twice: the same numbers up to the rounding of other batch sizes."""
    torch.manual_seed(0)
    config = TINY[name]
    unet = UNet(config).eval()
    latents, context = torch.randn(2, 4, 8, 12), torch.randn(4, 5, config.cross_attention_dim)
    extra = torch.randn(2, config.in_channels - 4, 8, 12) if config.in_channels > 4 else None
    timesteps, step = torch.tensor([[900.0, 7.0], [400.0, 20.0]]), torch.tensor([1, 0])
    convolved: list[int] = []
    unet.conv_in.register_forward_hook(lambda module, given, made: convolved.append(len(made)))
    with torch.inference_mode(), ops.use_backends(backends):
        once = unet(latents, unet.condition(context, timesteps, extra), step)
        twice = [None if extra is None else extra.repeat(2, 1, 1, 1), timesteps.repeat(2, 1)]
        want = unet(latents.repeat(2, 1, 1, 1), unet.condition(context, twice[1], twice[0]), step.repeat(2))
    assert once.shape == want.shape == (4, 4, 8, 12)
    assert convolved in ([2, 4], [])  # of an inpainting model, the convolution is called without its module
    torch.testing.assert_close(once, want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert not torch.allclose(once[:2], once[2:], atol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_shallow_is_the_outermost_block_on_kept_features(name: str) -> None:
    torch.manual_seed(0)
    config = TINY[name]
    unet = UNet(config).eval()
    before, latents = torch.randn(2, 2, 4, 8, 12)
    context = torch.randn(4, 5, config.cross_attention_dim)
    extra = torch.randn(2, config.in_channels - 4, 8, 12) if config.in_channels > 4 else None
    deep = torch.full((4, config.block_out_channels[0], 8, 12), torch.nan)
    deep = deep.contiguous(memory_format=torch.channels_last)
    last = unet.up_blocks[-1]
    with torch.inference_mode():
        condition = unet.condition(context, torch.tensor([900.0, 7.0]), extra)
        first, second = torch.tensor([0, 0]), torch.tensor([1, 1])
        assert torch.equal(unet(before, condition, first, deep), unet(before, condition, first))
        assert torch.equal(unet.shallow(before, condition, first, deep), unet(before, condition, first))
        kept = deep.clone()
        got = unet.shallow(latents, condition, second, deep)
        assert torch.equal(deep, kept)
        # By hand: the skip of the new latents beside the old features, under the new step's time bias.
        skip = unet.conv_in(latents if extra is None else torch.cat((latents, extra), dim=1)).repeat(
            2, 1, 1, 1
        )
        bias = condition.time_bias[0, 1, -config.block_out_channels[0] :].expand(4, -1)
        x = last.resnets[-1](torch.cat((deep, skip), dim=1), bias)
        if last.attentions:
            depth = config.transformer_depth[0]
            pairs = list(unet._split(condition.context))[-depth:]
            x = last.attentions[-1](x, iter(pairs), None)
        want = unet.conv_out(unet.conv_norm_out(x))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))
