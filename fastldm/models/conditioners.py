"""What tells a diffusion model of a class, or of a map: the smallest of latent diffusion's conditioners.
(Rombach et al. 2022, arXiv:2112.10752, appendix E)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.models.config import read_config
from fastldm.models.layers import Conv2d

METHODS = ("nearest", "bilinear", "bicubic", "area")


@dataclass(frozen=True)
class ClassEmbedderConfig:
    """So many embeddings, of which the last stands for no class at all if `null_class`."""

    n_classes: int = 1001
    embed_dim: int = 512
    null_class: bool = True

    @property
    def classes(self) -> int:
        """How many classes a label can name: 0 … classes − 1."""
        return self.n_classes - self.null_class

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], file: str = "class_embedder/config.json"
    ) -> ClassEmbedderConfig:
        """Read what `to_dict` gives; CheckpointError for a field that this network does not have."""
        config = cls(**read_config(cls, fields, file, fixed={}))
        if config.classes < 1:
            raise CheckpointError(file, "n_classes", f"is {config.n_classes}: it leaves no class to name")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json."""
        return {"_class_name": "ClassEmbedder", **vars(self)}


class ClassEmbedder(nn.Module):
    """Labels int [R] → context [R, 1, embed_dim], one token a label."""

    def __init__(self, config: ClassEmbedderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_classes, config.embed_dim)

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.embedding.weight)[:, None]


@dataclass(frozen=True)
class RescalerConfig:
    """How often a map is halved, and the channels before and after its 1×1 convolution."""

    in_channels: int = 3
    out_channels: int = 0  # 0: the map's own, for there is no convolution
    n_stages: int = 1
    bias: bool = False
    method: str = "bilinear"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "rescaler/config.json") -> RescalerConfig:
        """Read what `to_dict` gives; CheckpointError for a field that this network does not have."""
        config = cls(**read_config(cls, fields, file, fixed={}))
        if config.method not in METHODS:
            raise CheckpointError(file, "method", f"is {config.method!r}; known are {', '.join(METHODS)}")
        if config.n_stages > 8:
            raise CheckpointError(file, "n_stages", f"is {config.n_stages}; expected at most 8")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json."""
        return {
            "_class_name": "SpatialRescaler",
            **{name: value for name, value in vars(self).items() if value},
        }


class SpatialRescaler(nn.Module):
    """Maps [N, in_channels, H, W], as one-hot classes, → [N, out_channels, H / 2ⁿ, W / 2ⁿ] for n stages,
    rounded down at each.
    """

    def __init__(self, config: RescalerConfig) -> None:
        super().__init__()
        self.config = config
        out = config.out_channels
        self.channel_mapper = Conv2d(config.in_channels, out, 1, bias=config.bias) if out else None

    def classes(self, maps: Tensor) -> Tensor:
        """Maps of classes int [N, H, W] as one-hot ones: of those the convolution is a look-up, and as it
        commutes with averaging it comes first.
        """
        if self.channel_mapper is None:
            return self.halved(F.one_hot(maps, self.config.in_channels).permute(0, 3, 1, 2).float())
        colours = F.embedding(maps, self.channel_mapper.weight[:, :, 0, 0].T)
        if self.channel_mapper.bias is not None:
            colours = colours + self.channel_mapper.bias
        return self.halved(colours.permute(0, 3, 1, 2))

    def halved(self, maps: Tensor) -> Tensor:
        """Maps [N, channels, H, W] in the size of the latents."""
        for _ in range(self.config.n_stages):
            maps = F.interpolate(maps, scale_factor=0.5, mode=self.config.method)
        return maps

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.halved(maps)
        return maps if self.channel_mapper is None else self.channel_mapper(maps)
