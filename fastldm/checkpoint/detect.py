"""What a single file is, read from its keys and shapes alone: the family, and each network's config.json.

Shapes fix everything but the number of attention heads: SD1 has 8 on every level, SD2 and CLIP heads of 64
channels, the models of the latent diffusion paper those of the one that has the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastldm.checkpoint.limits import MAX_LEVELS
from fastldm.checkpoint.rename import CLIP, OPEN_CLIP, SHORT_CLIP, STAGES
from fastldm.checkpoint.source import PARTS
from fastldm.errors import CheckpointError
from fastldm.models.bert import LDM_BERT, BERTConfig
from fastldm.models.pixels import PIXELS, PixelConfig
from fastldm.models.unet_config import UNetConfig

SD1_HEADS = 8
HEAD_WIDTH = 64
MAX_BLOCKS = 256
SD_SCALING_FACTOR = 0.18215
BERT_WORDS = BERTConfig().vocab_size  # of an encoder that reads text; others read layouts

ONE_COMPONENT = "this is one component of a diffusers folder: give the folder that holds its model_index.json"
# How keys begin that only one kind of model file has, and what to say of it.
FOREIGN = (
    (("conditioner.embedders.1.",), "SDXL is not supported yet"),
    (("conditioner.embedders.0.model.",), "the SDXL refiner is not supported yet"),
    (("model.diffusion_model.joint_blocks.", "joint_blocks."), "Stable Diffusion 3 is not supported yet"),
    (("model.diffusion_model.double_blocks.", "double_blocks."), "Flux is not supported"),
    (("low_scale_model.",), "the Stable Diffusion upscaler is not supported yet"),
    (("depth_model.",), "the Stable Diffusion 2 depth model is not supported"),
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
    "LDMTextToImage": "of this model, the original single file is supported, the folder is not yet",
    "LDMSuperResolution": "of this model, the original single file is supported, the folder is not yet",
    "LDMPipeline": "of this model, the original single file is supported, the folder is not yet",
    "DiT": "DiT is not supported yet",
    "Flux": "Flux is not supported",
}


def refuse_foreign(file: Path, keys: Iterable[str], parts: Iterable[str] = PARTS) -> None:
    """CheckpointError saying what a single file is when it is no model that fastldm knows, with these parts
    at least.
    """
    keys = tuple(keys)
    for starts, why in FOREIGN:
        if any(key.startswith(starts) for key in keys):
            raise CheckpointError(file, None, why)
    if any("lora_" in key or ".lora." in key for key in keys):
        raise CheckpointError(file, None, "a LoRA is no model by itself: load a model, then the LoRA")
    for part in parts:
        prefix = STAGES[part]
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


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """A model's family, from its networks' config.json by name.

    sd1, sd1-inpaint, sd2 or sd2-inpaint with a CLIP text encoder: linear projections came with SD2. ldm and
    what it draws from for the models of the latent diffusion paper.
    """
    unet, text = configs["unet"], configs.get("text_encoder")
    given, latent = unet.get("in_channels", 4), _latent_channels(configs["vae"])
    inpaints = isinstance(latent, int) and given == 2 * latent + 1
    if text is not None and text.get("model_type") != LDM_BERT:
        base = "sd2" if unet.get("use_linear_projection") else "sd1"
        return f"{base}-inpaint" if inpaints else base
    if text is not None:
        return "ldm-text" if text.get("vocab_size") == BERT_WORDS else "ldm-layout"
    if "class_embedder" in configs:
        return "ldm-class"
    if "rescaler" in configs:
        return "ldm-semantic"
    if inpaints:
        return "ldm-inpaint"
    return "ldm-unconditional" if given == latent else "ldm-upscale"


def _latent_channels(vae: Mapping[str, Any]) -> Any:
    """What a vae/config.json says of its latents' channels."""
    pixels = vae.get("_class_name") == PIXELS
    return PixelConfig.latent_channels if pixels else vae.get("latent_channels", 4)


def infer_unet(shapes: Shapes) -> dict[str, Any]:
    """The config.json of a UNet with CompVis keys."""
    downsamplers = [i for i in range(1, MAX_BLOCKS) if f"input_blocks.{i}.0.op.weight" in shapes]
    layers = shapes.count(lambda i: f"input_blocks.{i + 1}.0.in_layers.2.weight")
    upsamplers = [
        i
        for i in range(MAX_BLOCKS)
        if any(f"output_blocks.{i}.{j}.in_layers.2.weight" in shapes for j in (1, 2))
    ]
    resamples = bool(upsamplers) and not downsamplers  # by residual blocks, which look as all others do
    if resamples:
        layers = upsamplers[0]
        downsamplers = [(i + 1) * (layers + 1) for i in range(len(upsamplers))]
    if len(downsamplers) >= MAX_LEVELS:
        raise shapes.error(
            "input_blocks.*", f"form {len(downsamplers) + 1} levels; the limit is {MAX_LEVELS}"
        )
    first_blocks = [1, *(i + 1 for i in downsamplers)]
    widths = tuple(shapes.get(f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in first_blocks)
    depths = tuple(_depth(shapes, f"input_blocks.{i}.1") for i in first_blocks)
    context, linear = None, False
    if "middle_block.1.qkv.weight" not in shapes:
        context = shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
        linear = len(shapes.get("middle_block.1.proj_in.weight", 2, 4)) == 2
    return UNetConfig(
        in_channels=shapes.get("input_blocks.0.0.weight", 4)[1],
        out_channels=shapes.get("out.2.weight", 4)[0],
        block_out_channels=widths,
        layers_per_block=layers,
        heads=tuple(_heads(width, linear) if context else 1 for width in widths),
        transformer_depth=depths,
        mid_depth=_depth(shapes, "middle_block.1"),
        cross_attention_dim=context,
        use_linear_projection=linear,
        scale_shift_norm=shapes.get("input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        resblock_updown=resamples,
    ).to_dict()


def _heads(width: int, linear: bool) -> int:
    return max(1, width // HEAD_WIDTH) if linear else SD1_HEADS


def _depth(shapes: Shapes, prefix: str) -> int:
    if f"{prefix}.qkv.weight" in shapes:
        return 1
    return shapes.count(lambda i: f"{prefix}.transformer_blocks.{i}.norm1.weight")


def infer_vae(shapes: Shapes, scaling_factor: float | None) -> dict[str, Any]:
    """The config.json of an autoencoder with CompVis keys; not told otherwise, KL latents are scaled as those
    of Stable Diffusion, and latents before quantisation are not.
    """
    levels = shapes.count(lambda i: f"encoder.down.{i}.block.0.conv1.weight")
    if not 0 < levels <= MAX_LEVELS:
        raise shapes.error("encoder.down.*", f"has {levels} levels")
    kinds = ["Attn" if f"encoder.down.{i}.attn.0.norm.weight" in shapes else "" for i in range(levels)]
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
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in shapes,
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
