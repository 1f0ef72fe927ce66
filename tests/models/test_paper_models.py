"""The networks of the latent diffusion paper's models against what the original code computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from fastldm import ops
from fastldm.checkpoint.rename import STAGES, Names, bert_names, unet_names
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.bert import BERTConfig, BERTModel
from fastldm.models.conditioners import (
    ClassEmbedder,
    ClassEmbedderConfig,
    RescalerConfig,
    SpatialRescaler,
)
from fastldm.models.layers import GroupNorm, ResampleBlock, timestep_embedding
from fastldm.models.layouts import layout_tokens
from fastldm.models.unet import UNet, UNetCondition, UNetConfig
from fastldm.presets import PAPER_MODELS

# models.md 2.2 [counted from the original configurations]; the text encoder's without its unused logits.
PARAMETERS = {
    "ldm-celebahq": 274_056_163,
    "ldm-ffhq": 274_056_163,
    "ldm-beds": 274_056_163,
    "ldm-churches": 294_966_916,
    "ldm-cin256-v2": 400_920_579,
    "ldm-cin256": 394_984_196,
    "ldm-text2img256": 403_623_939,
    "ldm-txt2img-1p4b": 872_300_484,
    "ldm-layout2img": 246_277_379,
    "ldm-bsr": 113_622_563,
    "ldm-inpainting": 387_245_827,
    "ldm-semantic256": 215_229_315,
    "ldm-semantic512": 215_229_315,
}
UNETS = [
    "unet_uncond",
    "unet_new_attention_order",
    "unet_scale_shift_updown",
    "unet_classcond",
    "unet_crossattn",
    "unet_crossattn_depth3",
    "unet_inpaint",
    "unet_semantic",
]


def config_of(args: dict[str, Any]) -> UNetConfig:
    """The shape that the original UNet's arguments describe."""
    width, factors = args["model_channels"], args["channel_mult"]
    widths = tuple(width * factor for factor in factors)
    per_head = args.get("num_head_channels", -1)
    depth = args.get("transformer_depth", 1)
    return UNetConfig(
        in_channels=args["in_channels"],
        out_channels=args["out_channels"],
        block_out_channels=widths,
        layers_per_block=args["num_res_blocks"],
        heads=tuple(w // per_head if per_head > 0 else args["num_heads"] for w in widths),
        transformer_depth=tuple(
            depth if 2**i in args["attention_resolutions"] else 0 for i in range(len(widths))
        ),
        mid_depth=depth,
        cross_attention_dim=args.get("context_dim"),
        scale_shift_norm=args.get("use_scale_shift_norm", False),
        resblock_updown=args.get("resblock_updown", False),
        num_class_embeds=args.get("num_classes") or 0,
    )


def renamed(names: Names, weights: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
    """Weights of the original under our names, attention's cut into its parts."""
    found = {}
    for key, tensor in weights.items():
        targets = names.to_folder(stage + key)
        assert targets, key
        assert [names.to_single(target) for target in targets] == [stage + key] * len(targets)
        if tensor.dim() == 3:
            tensor = tensor.squeeze(2)
        by_head = tensor.unflatten(0, (names.heads(stage + key), len(targets), -1))
        found |= {name: by_head[:, i].flatten(0, 1) for i, name in enumerate(targets)}
    return found


def unet_of(case: Any) -> UNet:
    config = config_of(case.config["args"])
    names = unet_names(config, legacy=not case.config["args"].get("use_new_attention_order", False))
    unet = UNet(config)
    unet.load_state_dict(renamed(names, case.weight, STAGES["unet"]))
    return unet.eval().requires_grad_(False)


@pytest.mark.parametrize("backends", ["reference", None])
@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_the_original(recorded: Callable[[str], Any], name: str, backends: str | None) -> None:
    case = recorded(f"ldm/{name}")
    unet = unet_of(case)
    latent, rows = unet.config.latent_channels, torch.arange(2)
    seen: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, given, made: seen.append(made))
    for size in ("a", "b"):
        x, t = case.input[f"x_{size}"], case.input[f"t_{size}"].float()
        context = case.input.get(f"context_{size}", torch.empty(2, 0, 0))
        labels, concat = case.input.get(f"class_{size}"), x[:, latent:]
        with torch.inference_mode(), ops.use_backends(backends):
            embedding = unet.time_embedding(timestep_embedding(t, unet.config.block_out_channels[0]))
            if labels is None:
                case.holds(f"temb_{size}", embedding)
            # Each picture at its own timestep, then both timesteps as two steps of one condition.
            condition = unet.condition(context, t[:, None], concat if len(concat[0]) else None, labels=labels)
            case.holds(f"y_{size}", unet(x[:, :latent], condition, torch.zeros(2, dtype=torch.long)))
            case.holds(f"middle_{size}", seen.pop())
            table = unet.condition(context, t, concat if len(concat[0]) else None, labels=labels)
            case.holds(f"y_{size}", unet(x[:, :latent], table, rows))
        seen.clear()


@pytest.mark.parametrize("name", UNETS)
def test_float64_shows_every_epsilon(recorded: Callable[[str], Any], name: str) -> None:
    case = recorded(f"ldm/{name}")
    unet = unet_of(case).double()
    truth = case.groups["truth64"]
    for size in ("a", "b"):
        x, t = case.input[f"x_{size}"].double(), case.input[f"t_{size}"].float()
        context = case.input.get(f"context_{size}", torch.empty(2, 0, 0)).double()
        latent = unet.config.latent_channels
        concat = x[:, latent:] if x.shape[1] > latent else None
        labels = case.input.get(f"class_{size}")
        condition = unet.condition(context, t[:, None], concat, labels=labels)
        got = unet(x[:, :latent], condition, torch.zeros(2, dtype=torch.long))
        # Only the sinusoid is float32 in both.
        torch.testing.assert_close(got, truth[f"y_{size}"], rtol=0, atol=1e-6)


def test_the_unet_of_guided_diffusion_is_the_same_net() -> None:
    """A class beside the timestep, the new order of q, k and v, more channels out than in."""
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "in": {}, "out": {}}
    path = Path(__file__).parents[1] / "fixtures" / "adm" / "unet_adm.safetensors"
    with safe_open(path, "pt") as file:
        args, tolerances = (json.loads(file.metadata()[name]) for name in ("config", "tol"))
        for key in file.keys():
            group, _, name = key.partition(".")
            groups[group][name] = file.get_tensor(key).clone()
    config = config_of(args)
    names = unet_names(config, legacy=False)
    weights = {key: tensor.float() for key, tensor in groups["weight"].items()}
    unet = UNet(config).eval()
    unet.load_state_dict(renamed(names, weights, STAGES["unet"]))
    for latents, made, times in (
        ("x", "sample", "t"),
        ("x2", "sample2", "t"),
        ("x_low", "sample_low", "t_low"),
    ):
        given, want = groups["in"], groups["out"][made]
        with torch.inference_mode():
            condition = unet.condition(torch.empty(2, 0, 0), given[times].float()[:, None], labels=given["y"])
            got = unet(given[latents], condition, torch.zeros(2, dtype=torch.long))
        allowed = tolerances["per_tensor"].get(made, tolerances["default"])
        torch.testing.assert_close(got, want, rtol=0, atol=allowed * float(want.abs().max()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert PAPER_MODELS.keys() == PARAMETERS.keys()
    model = PAPER_MODELS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(model.unet).parameters()) == PARAMETERS[name]
    if isinstance(model.conditioner, BERTConfig | ClassEmbedderConfig):
        width = getattr(model.conditioner, "hidden_size", None) or model.conditioner.embed_dim  # type: ignore[union-attr]
        assert width == model.unet.cross_attention_dim
    assert model.unet.latent_channels == model.first_stage.latent_channels


@pytest.mark.parametrize("name", [*PARAMETERS, *UNETS])
def test_config_round_trip(recorded: Callable[[str], Any], name: str) -> None:
    config = (
        PAPER_MODELS[name].unet if name in PARAMETERS else config_of(recorded(f"ldm/{name}").config["args"])
    )
    assert UNetConfig.from_dict(config.to_dict()) == config


SMALL = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    heads=(2, 4, 4),
    transformer_depth=(0, 1, 1),
    cross_attention_dim=None,
    norm_num_groups=8,
    sample_size=8,
)
VARIANTS = {
    "plain": SMALL,
    "one head": replace(SMALL, heads=(1, 1, 1)),
    "scale and shift": replace(SMALL, scale_shift_norm=True),
    "resampling blocks": replace(SMALL, resblock_updown=True, transformer_depth=(1, 0, 1)),
    "both": replace(SMALL, scale_shift_norm=True, resblock_updown=True, layers_per_block=2),
    "middle alone": replace(SMALL, transformer_depth=(0, 0, 0)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_unconditional_nets_equal_diffusers(variant: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = VARIANTS[variant]
    torch.manual_seed(3)
    fields = {name: value for name, value in config.to_dict().items() if name != "_class_name"}
    theirs = diffusers.UNet2DModel(**fields).eval()
    assert UNetConfig.from_dict(dict(theirs.config) | {"_class_name": "UNet2DModel"}) == config
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    latents, timesteps = torch.randn(2, 3, 8, 12), torch.tensor([999.0, 3.0])
    with torch.inference_mode():
        want = theirs(latents, timesteps).sample
        condition = ours.condition(torch.empty(2, 0, 0), timesteps)
        got = ours(latents, condition, torch.arange(2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_head_dim", 5),
        ("attention_head_dim", [8, 8]),
        ("downsample_type", "conv2"),
        ("upsample_type", "resnet"),
        ("resnet_time_scale_shift", "spatial"),
        ("add_attention", False),
        ("attn_norm_num_groups", 16),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("class_embed_type", "timestep"),
        ("down_block_types", ["AttnDownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ("down_block_types", "AttnDownBlock2D"),
        ("block_out_channels", 32),
    ],
)
def test_config_refuses_what_would_change_the_numbers(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field):
        UNetConfig.from_dict({**SMALL.to_dict(), field: value})


@pytest.mark.parametrize("variant", ["plain", "both"])
def test_an_empty_context_may_have_two_rows_a_picture(variant: str) -> None:
    """As in guided slots that a group without guidance was given."""
    torch.manual_seed(0)
    unet = UNet(VARIANTS[variant]).eval()
    latents, step = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    with torch.inference_mode():
        bias = unet.time_bias(torch.tensor([900.0, 7.0]), torch.float32)[None]
        once = unet(latents, UNetCondition(torch.empty(2, 0), bias), step)
        twice = unet(latents, UNetCondition(torch.empty(4, 0), bias), step)
    assert torch.equal(twice, torch.cat((once, once)))


@pytest.mark.parametrize("variant", ["plain", "both", "middle alone"])
def test_shallow_is_the_outermost_block_on_kept_features(variant: str) -> None:
    torch.manual_seed(0)
    config = VARIANTS[variant]
    unet = UNet(config).eval()
    latents, step = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    deep = torch.full((2, 32, 8, 8), torch.nan).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        condition = unet.condition(torch.empty(2, 0, 0), torch.tensor([900.0, 7.0]))
        whole = unet(latents, condition, step, deep)
        assert torch.equal(unet.shallow(latents, condition, step, deep), whole)
        deep.zero_()
        assert not torch.allclose(unet.shallow(latents, condition, step, deep), whole, atol=1e-3)


def test_sides_that_two_does_not_divide() -> None:
    """The original refuses them. A map is halved upwards, and enlarged to the skip that it meets."""
    torch.manual_seed(0)
    unet = UNet(VARIANTS["both"]).eval()
    latents, step = torch.randn(1, 3, 7, 5), torch.tensor([0])
    halved: list[Tensor] = []
    unet.down_blocks[0].register_forward_hook(lambda module, given, made: halved.append(made))
    with torch.inference_mode():
        made = unet(latents, unet.condition(torch.empty(1, 0, 0), torch.tensor([500.0])), step)
    assert made.shape == latents.shape and halved[0].shape[2:] == (4, 3)

    down, up = (ResampleBlock(8, 2, 1e-5, 4, scale_shift=False, enlarges=up) for up in (False, True))
    x = torch.randn(1, 8, 3, 1)
    mean = torch.stack((x[:, :, :2].mean(2), x[:, :, 2]), dim=2)
    for block in (down, up):
        torch.nn.init.zeros_(block.conv2.weight)
    with torch.inference_mode():
        torch.testing.assert_close(down(x), mean + down.conv2.bias[:, None, None])
        large = up(mean, None, torch.Size((3, 2)))
    rows = torch.stack((mean[:, :, 0], mean[:, :, 0], mean[:, :, 1]), dim=2).expand(-1, -1, -1, 2)
    torch.testing.assert_close(large, rows + up.conv2.bias[:, None, None])


def test_each_row_has_a_modulation_of_its_own() -> None:
    torch.manual_seed(0)
    norm = GroupNorm(4, 16)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 3, 16)
    want = (
        F.group_norm(x, 4, norm.weight, norm.bias) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    )
    with torch.inference_mode():
        got = norm.modulated(x, scale, shift)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, F.silu(want), rtol=0, atol=2e-6)


def test_timestep_embedding_equals_the_original(recorded: Callable[[str], Any]) -> None:
    case = recorded("ldm/timestep_embedding")
    for width in (32, 320):
        case.holds(f"unet_dim{width}", timestep_embedding(case.input["t"].float(), width))


def test_bert_equals_the_original(recorded: Callable[[str], Any]) -> None:
    case = recorded("ldm/bert_embedder")
    args = case.config["args"]
    config = BERTConfig(
        vocab_size=args["vocab_size"],
        max_position_embeddings=args["max_seq_len"],
        encoder_layers=args["n_layer"],
        encoder_ffn_dim=4 * args["n_embed"],
        d_model=args["n_embed"],
    )
    assert BERTConfig.from_dict(config.to_dict()) == config
    weights = dict(case.weight)
    head = [weights.pop(f"transformer.to_logits.{kind}") for kind in ("weight", "bias")]
    model = BERTModel(config).eval()
    model.load_state_dict(renamed(bert_names(config.encoder_layers), weights, STAGES["text_encoder"]))
    for size in ("a", "b"):
        with torch.inference_mode():
            hidden = model(case.input[f"tokens_{size}"])
            case.holds(f"z_{size}", hidden)
            case.holds(f"logits_{size}", F.linear(hidden[:, :4], *head))
        if size == "b":
            exact = model.double()(case.input["tokens_b"])
            torch.testing.assert_close(exact, case.groups["truth64"]["z_b"], rtol=0, atol=1e-9)


def test_parameters_of_the_text_encoders() -> None:
    """0.58 of the 1.45 billion are the encoder's, with the logits that the original keeps and never uses."""
    counts = []
    for name in ("ldm-txt2img-1p4b", "ldm-layout2img"):
        config = PAPER_MODELS[name].conditioner
        assert isinstance(config, BERTConfig)
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in BERTModel(config).parameters()))
    assert counts[0] == 32 * (4 * 1280 * 512 + 2 * 1280 * 5120 + 5120 + 6 * 1280) + (30522 + 77 + 2) * 1280
    assert round((counts[0] + 30522 * 1281) / 1e9, 2) == 0.58
    assert counts[1] == 16 * (4 * 512 * 512 + 2 * 512 * 2048 + 2048 + 6 * 512) + (8192 + 92 + 2) * 512


def test_class_embedder_equals_the_original(recorded: Callable[[str], Any]) -> None:
    case = recorded("ldm/class_embedder")
    config = ClassEmbedderConfig(case.config["args"]["n_classes"], case.config["args"]["embed_dim"])
    assert config.classes == 10 and ClassEmbedderConfig.from_dict(config.to_dict()) == config
    embedder = ClassEmbedder(config)
    embedder.load_state_dict(case.weight)
    case.holds("c", embedder(case.input["ids"]))
    with pytest.raises(CheckpointError, match="n_classes"):
        ClassEmbedderConfig.from_dict({"n_classes": 1})


def test_spatial_rescaler_equals_the_original(recorded: Callable[[str], Any]) -> None:
    case = recorded("ldm/spatial_rescaler")
    for name, args in case.config["variants"].items():
        config = RescalerConfig(**args)
        assert RescalerConfig.from_dict(config.to_dict()) == config
        rescaler = SpatialRescaler(config)
        own = {
            key.removeprefix(f"{name}."): w for key, w in case.weight.items() if key.startswith(f"{name}.")
        }
        rescaler.load_state_dict(own)
        for size in ("a", "b"):
            case.holds(f"{name}_{size}", rescaler(case.input[f"x_{size}"]))
    with pytest.raises(CheckpointError, match="trilinear"):
        RescalerConfig.from_dict({"method": "trilinear"})


def test_a_layout_as_tokens() -> None:
    config = PAPER_MODELS["ldm-layout2img"].conditioner
    assert isinstance(config, BERTConfig)
    boxes = [(7, (0.0, 0.0, 1.0, 0.5)), (0, (0.25, 0.5, 0.75, 1.0))]
    ids = layout_tokens(boxes, config)
    # 90 × 90 cells: round(89 · 0.5) = 44, round(89 · 0.25) = 22, round(89 · 0.75) = 67; y · 90 + x.
    assert ids[:6] == [7, 0, 44 * 90 + 89, 0, 44 * 90 + 22, 89 * 90 + 67]
    assert ids[6:90] == [8191] * 84 and ids[90:] == [0, 8099]
    for wrong in ([(8191, boxes[0][1])], [(-1, boxes[0][1])], boxes * 16):
        with pytest.raises(InvalidArgument, match="layout"):
            layout_tokens(wrong, config)
    assert len(layout_tokens(boxes * 15, config)) == len(layout_tokens([], config)) == 92
