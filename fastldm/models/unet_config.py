"""The shape of a UNet, and its config.json as diffusers writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastldm.errors import CheckpointError
from fastldm.models.config import per_level, read_config

# The classes of diffusers. In the first, with attention over the map alone, `attention_head_dim` is what it
# says; in the second it means the number of heads. `num_attention_heads` means that in both.
UNCONDITIONAL, CONDITIONAL = "UNet2DModel", "UNet2DConditionModel"
# What each class takes for fields that a file does not have.
_DEFAULTS: dict[str, dict[str, Any]] = {
    CONDITIONAL: {
        "sample_size": 64,
        "cross_attention_dim": 1280,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    UNCONDITIONAL: {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "attention_head_dim": 8,
    },
}
_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "attention_type": "default",
    "add_attention": True,
}
# Read by `from_dict` itself.
_READ = (
    *("num_attention_heads", "attention_head_dim", "transformer_layers_per_block"),
    *("resnet_time_scale_shift", "downsample_type", "upsample_type", "attn_norm_num_groups"),
)
_INERT = {
    *_READ,
    "upcast_attention",  # attention scores are always accumulated in float32
    *("dropout", "addition_embed_type_num_heads"),
}
_MIDDLE = {CONDITIONAL: "UNetMidBlock2DCrossAttn", UNCONDITIONAL: "UNetMidBlock2D"}
_WIDEST_HEAD = 65_536


@dataclass(frozen=True)
class UNetConfig:
    """A UNet's shape, level by level from the largest map to the smallest."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)  # 0: no attention on this level
    mid_depth: int = 1
    cross_attention_dim: int | None = 768  # None: attention over the map alone, in place of transformers
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64  # side of the latents it was trained on
    scale_shift_norm: bool = False  # whether a timestep scales the normed features, and shifts them after it
    resblock_updown: bool = False  # whether residual blocks change the resolution
    num_class_embeds: int = 0  # classes embedded beside the timestep
    learned_variance: bool = False  # whether the second half of what comes out places the log variance

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, without concatenated ones (masks, masked latents)."""
        return self.out_channels // (1 + self.learned_variance)

    @property
    def inpaints(self) -> bool:
        """Whether a mask and masked latents stand beside the latents, as in SD's inpainting models."""
        return self.in_channels == 2 * self.latent_channels + 1

    @property
    def block_types(self) -> dict[str, list[str]]:
        """The names of the levels in a diffusers config.json."""
        attention = "Attn" if self.cross_attention_dim is None else "CrossAttn"
        plain = ("ResnetDownsample", "ResnetUpsample") if self.resblock_updown else ("Down", "Up")
        attends = [depth > 0 for depth in self.transformer_depth]
        return {
            "down_block_types": [f"{attention}DownBlock2D" if on else f"{plain[0]}Block2D" for on in attends],
            "up_block_types": [
                f"{attention}UpBlock2D" if on else f"{plain[1]}Block2D" for on in attends[::-1]
            ],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "unet/config.json") -> UNetConfig:
        """Read the fields of a diffusers unet/config.json; CheckpointError for one that this network does
        not have. It does not tell a learned variance: the latents' channels do.
        """
        kind = UNCONDITIONAL if fields.get("_class_name") == UNCONDITIONAL else CONDITIONAL
        fields = {**_DEFAULTS[kind], **fields}
        widths = fields["block_out_channels"]
        if not isinstance(widths, list | tuple) or not widths:
            raise CheckpointError(file, "block_out_channels", f"is {widths!r:.80}; expected a list")
        levels = len(widths)
        style: dict[str, Any] = {
            "scale_shift_norm": _one_of(fields, "resnet_time_scale_shift", ("default", "scale_shift"), file),
            "resblock_updown": _one_of(fields, "downsample_type", ("conv", "resnet"), file),
        }
        if _one_of(fields, "upsample_type", ("conv", "resnet"), file) != style["resblock_updown"]:
            raise CheckpointError(file, "upsample_type", "is not the downsample_type")
        attention = _conditional if kind == CONDITIONAL else _unconditional
        down, up, depth, derived = attention(fields, levels, file)
        if not isinstance(down, list | tuple) or len(down) != levels:
            raise CheckpointError(
                file, "down_block_types", f"is {down!r:.200}; expected {levels}, one a level"
            )
        derived["transformer_depth"] = tuple(
            d if "Attn" in str(level) else 0 for d, level in zip(depth, down, strict=True)
        )
        fixed = {**_FIXED, "down_block_types": down, "up_block_types": up, "mid_block_type": _MIDDLE[kind]}
        read = read_config(
            cls, fields, file, fixed=fixed, inert=_INERT, derived=(*derived, *style, "learned_variance")
        )
        config = cls(**read, **derived, **style)
        if config.block_types != {"down_block_types": list(down), "up_block_types": list(up)}:
            raise CheckpointError(
                file, "down_block_types", f"{down} with {up} is not a UNet that fastldm knows"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The diffusers unet/config.json of this UNet."""
        fields: dict[str, Any] = {
            "_class_name": UNCONDITIONAL if self.cross_attention_dim is None else CONDITIONAL,
            "sample_size": self.sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            **self.block_types,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
        }
        if self.cross_attention_dim is None:
            dims = [width // heads for width, heads in zip(self.block_out_channels, self.heads, strict=True)]
            one_head = set(self.heads) == {1}
            fields["attention_head_dim"] = None if one_head else dims if len(set(dims)) > 1 else dims[0]
        else:
            depths = [depth or self.mid_depth for depth in self.transformer_depth]
            depths[-1] = self.mid_depth
            fields |= {
                "attention_head_dim": list(self.heads),
                "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
                "cross_attention_dim": self.cross_attention_dim,
                "use_linear_projection": self.use_linear_projection,
            }
        if self.scale_shift_norm:
            fields |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": self.norm_num_groups}
        if self.resblock_updown:
            fields |= {"downsample_type": "resnet", "upsample_type": "resnet"}
        if self.num_class_embeds:
            fields["num_class_embeds"] = self.num_class_embeds
        return fields


_Attention = tuple[Any, Any, tuple[int, ...], dict[str, Any]]


def _conditional(fields: Mapping[str, Any], levels: int, file: str) -> _Attention:
    """The names of the levels down and up, transformers a block, and what else tells of attention."""
    down = fields.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
    up = fields.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1))
    depth = per_level(fields, "transformer_layers_per_block", levels, file) or (1,) * levels
    heads = per_level(fields, "num_attention_heads", levels, file) or per_level(
        fields, "attention_head_dim", levels, file
    )
    return down, up, depth, {"heads": heads or (8,) * levels, "mid_depth": depth[-1]}


def _unconditional(fields: Mapping[str, Any], levels: int, file: str) -> _Attention:
    """The same of a UNet without a context."""
    down = fields.get("down_block_types", ["DownBlock2D"] + ["AttnDownBlock2D"] * (levels - 1))
    up = fields.get("up_block_types", ["AttnUpBlock2D"] * (levels - 1) + ["UpBlock2D"])
    groups, of_attention = fields.get("norm_num_groups", 32), fields.get("attn_norm_num_groups")
    # Not told otherwise, diffusers leaves the middle's attention without a norm beside scale_shift.
    if of_attention != groups and (of_attention or fields.get("resnet_time_scale_shift") == "scale_shift"):
        why = f"is {of_attention!r:.80}; fastldm supports {groups!r:.80}"
        raise CheckpointError(file, "attn_norm_num_groups", why)
    heads = per_level(fields, "num_attention_heads", levels, file) or _heads_of_dims(fields, levels, file)
    return down, up, (1,) * levels, {"heads": heads, "mid_depth": 1, "cross_attention_dim": None}


def _one_of(fields: Mapping[str, Any], name: str, values: tuple[str, str], file: str) -> bool:
    """Whether a field has the second of two values; absent, it has the first."""
    value = fields.get(name, values[0])
    if value not in values:
        raise CheckpointError(file, name, f"is {value!r:.80}; fastldm supports {values[0]!r}, {values[1]!r}")
    return bool(value == values[1])


def _heads_of_dims(fields: Mapping[str, Any], levels: int, file: str) -> tuple[int, ...]:
    """The heads of each level, whose channels are given; one head where they are not."""
    dims = per_level(fields, "attention_head_dim", levels, file, most=_WIDEST_HEAD)
    if dims is None:
        return (1,) * levels
    for width, dim in zip(fields["block_out_channels"], dims, strict=True):
        if not isinstance(width, int) or width % dim:
            raise CheckpointError(file, "attention_head_dim", f"{dim} does not divide width {width!r:.40}")
    return tuple(width // dim for width, dim in zip(fields["block_out_channels"], dims, strict=True))
