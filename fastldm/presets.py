"""Well-known models by name: the shapes of their networks, for random weights where only speed matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastldm.models.clip import CLIP_L, OPENCLIP_H, CLIPTextConfig
from fastldm.models.unet import UNetConfig
from fastldm.models.vae import VAEConfig
from fastldm.models.vq import VQConfig


@dataclass(frozen=True)
class Preset:
    """Configurations of a model; text None: its text encoders are not in fastldm."""

    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig | None
    scheduler: Mapping[str, Any]


_DDIM = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
SD15 = Preset(UNetConfig(), VAEConfig(), CLIP_L, _DDIM)
SD21 = Preset(
    replace(
        SD15.unet,
        heads=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
        sample_size=96,
    ),
    SD15.vae,
    OPENCLIP_H,
    {**_DDIM, "prediction_type": "v_prediction"},
)
# SDXL without its added embedding of sizes and pooled text, which is no work of a step.
SDXL_SHAPE = Preset(
    UNetConfig(
        block_out_channels=(320, 640, 1280),
        heads=(5, 10, 20),
        transformer_depth=(0, 2, 10),
        mid_depth=10,
        cross_attention_dim=2048,
        use_linear_projection=True,
        sample_size=128,
    ),
    VAEConfig(scaling_factor=0.13025),
    None,
    _DDIM,
)
PRESETS = {"sd15": SD15, "sd21": SD21, "sdxl-shape": SDXL_SHAPE}

_VQ_F4 = VQConfig()
_VQ_F8 = VQConfig(
    latent_channels=4,
    block_out_channels=(128, 256, 256, 512),
    attention_levels=(3,),
    num_vq_embeddings=16384,
)
_KL_F4 = VAEConfig(latent_channels=3, block_out_channels=(128, 256, 512))
_F16 = (128, 128, 256, 256, 512)
FIRST_STAGES: dict[str, VAEConfig | VQConfig] = {
    "kl-f4": _KL_F4,
    "kl-f8": VAEConfig(),
    "kl-f16": replace(_KL_F4, latent_channels=16, block_out_channels=_F16, attention_levels=(4,)),
    "kl-f32": replace(_KL_F4, latent_channels=64, block_out_channels=(*_F16, 512), attention_levels=(4, 5)),
    "vq-f4": _VQ_F4,
    "vq-f4-noattn": replace(_VQ_F4, mid_block_add_attention=False),
    "vq-f8": _VQ_F8,
    "vq-f8-n256": replace(_VQ_F8, num_vq_embeddings=256),
    "vq-f16": replace(_VQ_F8, latent_channels=8, block_out_channels=_F16, attention_levels=(4,)),
}
"""The first stages of the latent diffusion paper. (arXiv:2112.10752, table 8)"""
