"""The quantising autoencoder: images to latents, and back through the nearest entries of a codebook.
(van den Oord et al. 2017, arXiv:1711.00937; Esser et al. 2021, arXiv:2012.09841)

In latent diffusion the quantiser belongs to the decoder: `encode` gives latents as they were before it, the
diffusion model learns those, and `decode` quantises first. (Rombach et al. 2022, arXiv:2112.10752, section
3.1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastldm.models.layers import Conv2d
from fastldm.models.vae import AutoencoderConfig, Decoder, Encoder, PointMass

BETA = 0.25
DISTANCES = 1 << 20  # between vectors and codes, held at a time


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """The shape of a quantising autoencoder.

    Its latents are not scaled unless a file says so: latent diffusion does not, although 0.18215 is the
    default in diffusers.
    """

    latent_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512)
    num_vq_embeddings: int = 8192  # entries of the codebook, each of latent_channels numbers
    z_channels: int = 0  # of what the encoder gives and the decoder takes; 0: latent_channels

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], file: str = "vae/config.json") -> VQConfig:
        """Read the config.json of a diffusers VQModel; CheckpointError for a field that this network does not
        have.
        """
        fields = {"latent_channels": 3, "num_vq_embeddings": 256, "norm_type": "group", **fields}
        z_channels = fields["latent_channels"]
        codes = fields.pop("vq_embed_dim", None)
        if codes is not None and codes != z_channels:
            fields |= {"latent_channels": codes, "z_channels": z_channels}
        return cls(**cls.read(fields, file, {"norm_type": "group", "lookup_from_codebook": False}))

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this autoencoder as a diffusers VQModel."""
        fields = {"_class_name": "VQModel", **self.fields(), "vq_embed_dim": self.latent_channels}
        fields["latent_channels"] = fields.pop("z_channels") or self.latent_channels
        return {name: value for name, value in fields.items() if value is not None}


class Quantised(NamedTuple):
    """Latents [N, C, h, w] quantised, with the gradient of what they were; the indices of their codes, int64
    [N, h, w]; the loss of codebook and commitment, a scalar.
    """

    latents: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """A codebook; every vector of a map is replaced by its nearest entry."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def indices(self, latents: Tensor) -> Tensor:
        """The nearest code's index at each place of [N, C, h, w]: int64 [N, h, w]."""
        places = latents.permute(0, 2, 3, 1)
        return nearest(places.flatten(0, 2), self.embedding.weight).view(places.shape[:3])

    def codes(self, indices: Tensor) -> Tensor:
        """The entries at indices [N, h, w]: [N, C, h, w], channels-last."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> Quantised:
        """Quantise for training, in float32 or wider.

        The gradient passes straight through to the latents. The loss is mean (sg[q] − z)² + β mean (q −
        sg[z])²: β is on the codebook's term, not on the latents', as in the original that all published
        weights were trained with.
        """
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        indices = self.indices(latents)
        codes = self.codes(indices)
        commitment = (codes.detach() - latents).square().mean()
        codebook = (codes - latents.detach()).square().mean()
        passed = latents + (codes - latents).detach()
        return Quantised(passed, indices, commitment + BETA * codebook)


@torch.no_grad()
def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code nearest to each vector: [M, C], [K, C] → int64 [M]; compared in float32 or wider.

    |z − e|² is least where |e|²/2 − z·e is.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    codebook = codebook.to(dtype)
    half_norms = 0.5 * codebook.square().sum(1)
    rows = max(1, DISTANCES // len(codebook))
    kind = "cpu" if vectors.is_meta else vectors.device.type  # footprints are found without numbers
    with torch.autocast(kind, enabled=False):
        parts = [
            torch.addmm(half_norms, part, codebook.T, alpha=-1).argmin(1)
            for part in vectors.to(dtype).split(rows)
        ]
    return torch.cat(parts)


class VQModel(nn.Module):
    """Images in −1…1 to latents, and latents to images through the codebook."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        latent, z_channels = config.latent_channels, config.z_channels or config.latent_channels
        self.encoder = Encoder(config, z_channels)
        self.decoder = Decoder(config, z_channels)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, latent)
        self.quant_conv = Conv2d(z_channels, latent, 1)
        self.post_quant_conv = Conv2d(latent, z_channels, 1)

    def encode(self, images: Tensor) -> PointMass:
        """Images [N, 3, H, W] in −1…1 → latents before quantisation, [N, C, H/f, W/f]."""
        return PointMass(self.quant_conv(self.encoder(images)))

    def before_decoder(self, latents: Tensor) -> Tensor:
        """What the decoder reads: the latents [N, C, h, w] quantised, through the 1×1 convolution."""
        return self.post_quant_conv(self.quantize.codes(self.quantize.indices(latents)))

    def decode(self, latents: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents [N, C, h, w], quantised first unless forced not to → images [N, 3, f·h, f·w], about
        −1…1.
        """
        latents = latents.contiguous(memory_format=torch.channels_last)
        ready = self.post_quant_conv(latents) if force_not_quantize else self.before_decoder(latents)
        return self.decoder(ready)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """One pass there and back, for training: the reconstruction, and what the quantiser did."""
        quantised = self.quantize(self.encode(images).mean)
        return self.decode(quantised.latents, force_not_quantize=True), quantised
