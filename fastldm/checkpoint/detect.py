"""What a single file is, read from its keys and shapes alone: the family, and each network's config.json.

Shapes fix everything but the number of attention heads: SD1 has 8 on every level, SD2 and CLIP heads of 64
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastldm.checkpoint.limits import MAX_LEVELS
from fastldm.checkpoint.rename import CLIP, OPEN_CLIP, SHORT_CLIP, STAGES
from fastldm.errors import CheckpointError

SD1_HEADS = 8
HEAD_WIDTH = 64
MAX_BLOCKS = 256
SD_SCALING_FACTOR = 0.18215

BERT = "latent diffusion models with a BERT text encoder are not supported yet"
ONE_COMPONENT = "this is one component of a diffusers folder: give the folder that holds its model_index.json"
# How keys begin that only one kind of model file has, and what to say of it.
FOREIGN = (
    (("conditioner.embedders.1.",), "SDXL is not supported yet"),
    (("conditioner.embedders.0.model.",), "the SDXL refiner is not supported yet"),
    (("model.diffusion_model.joint_blocks.", "joint_blocks."), "Stable Diffusion 3 is not supported yet"),
    (("model.diffusion_model.double_blocks.", "double_blocks."), "Flux is not supported"),
    (("low_scale_model.",), "the Stable Diffusion upscaler is not supported yet"),
    (("depth_model.",), "the Stable Diffusion 2 depth model is not supported"),
    (("cond_stage_model.transformer.token_emb.",), BERT),
    (("cond_stage_model.embedding.",), "class-conditional latent diffusion models are not supported yet"),
    (("control_model.", "input_hint_block.", "controlnet_cond_"), "a ControlNet is no model by itself"),
    (("emb_params",), "a textual inversion is no model by itself"),
    (("time_embedding.", "decoder.mid_block.", "text_model.encoder.", "encoder.layers."), ONE_COMPONENT),
    (("decoder.mid.", "encoder.mid."), "this is an autoencoder alone"),
    (("input_blocks.",), "this is a UNet alone"),
    (("x_embedder.proj.", "y_embedder.embedding_table."), "DiT is not supported yet"),
)
FOREIGN_CLASSES = {
    "StableDiffusionXL": "SDXL is not supported yet",
    "StableDiffusion3": "Stable Diffusion 3 is not supported yet",
    "StableDiffusionUpscale": "the Stable Diffusion upscaler is not supported yet",
    "StableDiffusionLatentUpscale": "the latent upscaler is not supported",
    "StableDiffusionDepth2Img": "the Stable Diffusion 2 depth model is not supported",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix is not supported",
    "LDMTextToImage": BERT,
    "LDMSuperResolution": "latent diffusion super-resolution is not supported yet",
    "LatentDiffusion": "unconditional latent diffusion models are not supported yet",
    "DiT": "DiT is not supported yet",
    "Flux": "Flux is not supported",
}


def refuse_foreign(file: Path, keys: Iterable[str]) -> None:
    """CheckpointError saying what a single file is when it is no SD1 or SD2 model."""
    keys = tuple(keys)
    for starts, why in FOREIGN:
        if any(key.startswith(starts) for key in keys):
            raise CheckpointError(file, None, why)
    if any("lora_" in key or ".lora." in key for key in keys):
        raise CheckpointError(file, None, "a LoRA is no model by itself: load a model, then the LoRA")
    for part, prefix in STAGES.items():
        if not any(key.startswith(prefix) for key in keys):
            raise CheckpointError(
                file, f"{prefix}*", f"is missing: the file holds no {part.replace('_', ' ')}"
            )


class Shapes:
    """The shapes of one network in a single file; an absent or odd one is a CheckpointError naming it."""

    def __init__(self, file: Path, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.file, self.prefix, self._shapes = file, prefix, shapes

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self._shapes

    def get(self, key: str, *ranks: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with one of these numbers of dimensions."""
        shape = self._shapes.get(self.prefix + key)
        if shape is None:
            raise self.error(key, "is missing")
        if len(shape) not in ranks or 0 in shape:
            raise self.error(
                key, f"has shape {list(shape)}; expected {' or '.join(map(str, ranks))} dimensions"
            )
        return shape

    def count(self, key: Callable[[int], str]) -> int:
        """How many of key(0), key(1), … there are."""
        return next(i for i in range(MAX_BLOCKS + 1) if i == MAX_BLOCKS or key(i) not in self)

    def error(self, key: str, why: str) -> CheckpointError:
        """A CheckpointError about a key of this network."""
        return CheckpointError(self.file, self.prefix + key, why)


def family_of(unet: Mapping[str, Any]) -> str:
    """sd1, sd1-inpaint, sd2 or sd2-inpaint, from a UNet's config.json: linear projections came with SD2."""
    base = "sd2" if unet.get("use_linear_projection") else "sd1"
    given, latent = unet.get("in_channels", 4), unet.get("out_channels", 4)
    return f"{base}-inpaint" if isinstance(latent, int) and given == 2 * latent + 1 else base


def infer_unet(shapes: Shapes) -> dict[str, Any]:
    """The config.json of a UNet with CompVis keys."""
    downsamplers = [i for i in range(1, MAX_BLOCKS) if f"input_blocks.{i}.0.op.weight" in shapes]
    if len(downsamplers) >= MAX_LEVELS:
        raise shapes.error(
            "input_blocks.*", f"form {len(downsamplers) + 1} levels; the limit is {MAX_LEVELS}"
        )
    first_blocks = [1, *(i + 1 for i in downsamplers)]
    widths = [shapes.get(f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in first_blocks]
    depths = [_depth(shapes, f"input_blocks.{i}.1") for i in first_blocks]
    linear = len(shapes.get("middle_block.1.proj_in.weight", 2, 4)) == 2
    attends = [depth > 0 for depth in depths]
    mid = _depth(shapes, "middle_block.1")
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": shapes.get("input_blocks.0.0.weight", 4)[1],
        "out_channels": shapes.get("out.2.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": shapes.count(lambda i: f"input_blocks.{i + 1}.0.in_layers.2.weight"),
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attends[::-1]],
        "attention_head_dim": [_heads(width, linear) for width in widths],
        "transformer_layers_per_block": [*(depth or mid for depth in depths[:-1]), mid],
        "cross_attention_dim": shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "use_linear_projection": linear,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    }


def _heads(width: int, linear: bool) -> int:
    return max(1, width // HEAD_WIDTH) if linear else SD1_HEADS


def _depth(shapes: Shapes, prefix: str) -> int:
    return shapes.count(lambda i: f"{prefix}.transformer_blocks.{i}.norm1.weight")


def infer_vae(shapes: Shapes, scaling_factor: float | None) -> dict[str, Any]:
    """The config.json of an autoencoder with CompVis keys; not told otherwise, KL latents are scaled as those
    of Stable Diffusion, and latents before quantisation are not.
    """
    levels = shapes.count(lambda i: f"encoder.down.{i}.block.0.conv1.weight")
    if not 0 < levels <= MAX_LEVELS:
        raise shapes.error("encoder.down.*", f"has {levels} levels")
    kinds = ["Attn" if f"encoder.down.{i}.attn.0.q.weight" in shapes else "" for i in range(levels)]
    shared = {
        "in_channels": shapes.get("encoder.conv_in.weight", 4)[1],
        "out_channels": shapes.get("decoder.conv_out.weight", 4)[0],
        "latent_channels": shapes.get("decoder.conv_in.weight", 4)[1],
        "block_out_channels": [
            shapes.get(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)
        ],
        "layers_per_block": shapes.count(lambda i: f"encoder.down.0.block.{i}.conv1.weight"),
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }
    if "quantize.embedding.weight" in shapes:
        codes, width = shapes.get("quantize.embedding.weight", 2)
        return {
            "_class_name": "VQModel",
            **shared,
            "num_vq_embeddings": codes,
            "vq_embed_dim": width,
            "scaling_factor": scaling_factor or 1.0,
        }
    return {
        "_class_name": "AutoencoderKL",
        **shared,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": scaling_factor or SD_SCALING_FACTOR,
    }


def infer_clip(shapes: Shapes) -> dict[str, Any]:
    """The config.json of a CLIP text encoder with transformers' keys, as SD1 files have it."""
    layers = shapes.count(lambda i: f"encoder.layers.{i}.mlp.fc1.weight")
    return {
        **_text_config(
            tokens=shapes.get("embeddings.token_embedding.weight", 2),
            positions=shapes.get("embeddings.position_embedding.weight", 2),
            inner=shapes.get("encoder.layers.0.mlp.fc1.weight", 2)[0],
        ),
        "num_hidden_layers": layers,
        "hidden_act": "quick_gelu",
    }


def infer_open_clip(shapes: Shapes) -> dict[str, Any]:
    """The config.json of an OpenCLIP text encoder, as SD2 files have it.

    SD2 reads the last layer but one. An original file, known by its text projection or by ViT-H's 24 layers,
    holds a last layer that is never used; a file made from a diffusers folder does not.
    """
    layers = shapes.count(lambda i: f"transformer.resblocks.{i}.mlp.c_fc.weight")
    whole = layers == 24 or "text_projection" in shapes or "logit_scale" in shapes
    return {
        **_text_config(
            tokens=shapes.get("token_embedding.weight", 2),
            positions=shapes.get("positional_embedding", 2),
            inner=shapes.get("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        ),
        "num_hidden_layers": layers - 1 if whole and layers > 1 else layers,
        "hidden_act": "gelu",
    }


def _text_config(tokens: tuple[int, ...], positions: tuple[int, ...], inner: int) -> dict[str, Any]:
    vocabulary, width = tokens
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": positions[0],
        "layer_norm_eps": 1e-5,
        "eos_token_id": vocabulary - 1,
        "projection_dim": width,
    }


def text_stage(file: Path, keys: Iterable[str]) -> str:
    """The prefix of the text encoder's keys: CLIP, SHORT_CLIP or OPEN_CLIP."""
    keys = tuple(keys)
    for stage in (CLIP, OPEN_CLIP, SHORT_CLIP):
        if any(key.startswith((f"{stage}embeddings.", f"{stage}transformer.resblocks.")) for key in keys):
            return stage
    raise CheckpointError(file, f"{STAGES['text_encoder']}*", "is a text encoder that fastldm does not know")
