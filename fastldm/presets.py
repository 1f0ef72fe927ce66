"""Well-known models by name: the shapes of their networks, for random weights where only speed matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastldm.models.bert import BERTConfig
from fastldm.models.clip import CLIP_L, OPENCLIP_H, CLIPTextConfig
from fastldm.models.conditioners import ClassEmbedderConfig, RescalerConfig
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


@dataclass(frozen=True)
class PaperModel:
    """A model of the latent diffusion paper: its networks, and the first and the last β of its noise."""

    unet: UNetConfig
    first_stage: VAEConfig | VQConfig
    conditioner: BERTConfig | ClassEmbedderConfig | RescalerConfig | None = None
    betas: tuple[float, float] = (0.0015, 0.0195)


_PLAIN = UNetConfig(in_channels=3, out_channels=3, cross_attention_dim=None)
_CELEBAHQ = PaperModel(
    replace(
        _PLAIN,
        block_out_channels=(224, 448, 672, 896),
        heads=(7, 14, 21, 28),
        transformer_depth=(0, 1, 1, 1),
    ),
    _VQ_F4,
)
_TEXT2IMG256 = PaperModel(
    UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        heads=(6, 12, 18, 30),
        transformer_depth=(0, 1, 1, 1),
        cross_attention_dim=640,
    ),
    _VQ_F4,
    BERTConfig(d_model=640, encoder_ffn_dim=2560),
)
_SEMANTIC = PaperModel(
    replace(
        _PLAIN,
        in_channels=6,
        block_out_channels=(128, 512, 1024),
        heads=(8, 8, 8),
        transformer_depth=(0, 0, 0),
    ),
    _VQ_F4,
    RescalerConfig(in_channels=182, out_channels=3, n_stages=2),
    betas=(0.0015, 0.0205),
)
PAPER_MODELS: dict[str, PaperModel] = {
    **dict.fromkeys(("ldm-celebahq", "ldm-ffhq", "ldm-beds"), _CELEBAHQ),
    "ldm-churches": PaperModel(
        replace(
            _PLAIN,
            in_channels=4,
            out_channels=4,
            block_out_channels=(192, 384, 384, 768, 768),
            heads=(8, 8, 8, 8, 8),
            transformer_depth=(1, 1, 1, 1, 0),
            scale_shift_norm=True,
            resblock_updown=True,
            sample_size=32,
        ),
        FIRST_STAGES["kl-f8"],
        betas=(0.0015, 0.0155),
    ),
    "ldm-cin256-v2": PaperModel(
        replace(_TEXT2IMG256.unet, heads=(1, 1, 1, 1), cross_attention_dim=512),
        _VQ_F4,
        ClassEmbedderConfig(1001, 512),
    ),
    "ldm-cin256": PaperModel(
        UNetConfig(
            block_out_channels=(256, 512, 1024),
            heads=(8, 16, 32),
            transformer_depth=(1, 1, 1),
            cross_attention_dim=512,
            sample_size=32,
        ),
        _VQ_F8,
        ClassEmbedderConfig(1000, 512, null_class=False),
    ),
    "ldm-text2img256": _TEXT2IMG256,
    "ldm-txt2img-1p4b": PaperModel(
        replace(SD15.unet, cross_attention_dim=1280, sample_size=32),
        SD15.vae,
        BERTConfig(),
        betas=(0.00085, 0.012),
    ),
    "ldm-layout2img": PaperModel(
        UNetConfig(
            in_channels=3,
            out_channels=3,
            block_out_channels=(128, 256, 384, 512),
            heads=(4, 8, 12, 16),
            transformer_depth=(0, 3, 3, 3),
            mid_depth=3,
            cross_attention_dim=512,
        ),
        _VQ_F4,
        BERTConfig(8192, 92, encoder_layers=16, encoder_ffn_dim=2048, d_model=512),
        betas=(0.0015, 0.0205),
    ),
    "ldm-bsr": PaperModel(
        replace(
            _PLAIN,
            in_channels=6,
            block_out_channels=(160, 320, 320, 640),
            heads=(5, 10, 10, 20),
            transformer_depth=(0, 0, 0, 1),
        ),
        _VQ_F4,
        betas=(0.0015, 0.0155),
    ),
    "ldm-inpainting": PaperModel(
        replace(
            _PLAIN,
            in_channels=7,
            block_out_channels=(256, 512, 768, 1024),
            heads=(8, 8, 8, 8),
            transformer_depth=(0, 1, 1, 1),
            resblock_updown=True,
        ),
        FIRST_STAGES["vq-f4-noattn"],
        betas=(0.0015, 0.0205),
    ),
    "ldm-semantic256": _SEMANTIC,
    "ldm-semantic512": replace(_SEMANTIC, unet=replace(_SEMANTIC.unet, sample_size=128)),
}
"""The diffusion models of the latent diffusion paper's zoo. (arXiv:2112.10752, appendix E)"""
