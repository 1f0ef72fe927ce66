"""Weight names of single files (CompVis) and of diffusers folders: pure tables, made from block structures.

Both layouts have the same modules under different names, so a table pairs module prefixes and is used in both
directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from fastldm.models.unet_config import UNetConfig

STAGES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
# Text encoders: transformers' CLIP, the same without a level that some files leave out, OpenCLIP.
CLIP = "cond_stage_model.transformer.text_model."
SHORT_CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."

# A module of the single file, what it is in a folder, and how many heads keep their parts side by side.
Pair: TypeAlias = tuple[str, str] | tuple[str, tuple[str, ...]] | tuple[str, tuple[str, ...], int]

RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPEN_CLIP_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)

HARMLESS = {
    "position_ids": r"(.*\.)?position_ids",
    "attn_mask": r"(.*\.)?attn_mask",
    "schedule": r"betas|alphas_cumprod\w*|(sqrt|posterior|log_one_minus)_\w+|logvar|lvlb_weights|global_step",
    "scale_factor": r"scale_factor",
    "model_ema": r"(.*\.)?model_ema\..*",
    "loss": r"first_stage_model\.loss\..*",
    "logit_scale": r"(.*\.)?logit_scale",
    "text_projection": r"(.*\.)?text_projection(\.weight)?",
}
_HARMLESS = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in HARMLESS.items()))


def harmless(key: str) -> str | None:
    """The kind ("model_ema" …) of a key that real files hold and no network needs; None for any other."""
    found = _HARMLESS.fullmatch(key)
    return found.lastgroup if found else None


class Names:
    """A two-way table between module prefixes of a single file and of a folder.

    One name of the single file may stand for several of the folder: OpenCLIP keeps the query, key and value
    weights as one, and so do the UNets without cross-attention, head by head.
    """

    def __init__(self, stage: str, pairs: Iterable[Pair]) -> None:
        self._folder: dict[str, tuple[str, ...]] = {}
        self._heads: dict[str, int] = {}
        for single, folder, *heads in pairs:
            self._folder[stage + single] = (folder,) if isinstance(folder, str) else folder
            self._heads[stage + single] = heads[0] if heads else 1
        self._single = {folder: single for single, folders in self._folder.items() for folder in folders}

    def to_folder(self, key: str) -> tuple[str, ...]:
        """The folder's names for a single file's key: several if the tensor is to be cut, none if unknown."""
        for prefix, rest in _prefixes(key):
            if prefix in self._folder:
                return tuple(folder + rest for folder in self._folder[prefix])
        return ()

    def heads(self, key: str) -> int:
        """How many groups of rows a single file's tensor is made of, each with a share of every part."""
        return next((self._heads[prefix] for prefix, _ in _prefixes(key) if prefix in self._heads), 1)

    def to_single(self, key: str) -> str | None:
        """The single file's name for a folder's key; None when unknown."""
        for prefix, rest in _prefixes(key):
            if prefix in self._single:
                return self._single[prefix] + rest
        return None


def _prefixes(key: str) -> Iterator[tuple[str, str]]:
    """The key cut at each of its dots, longest prefix first: (prefix, rest)."""
    prefix = key
    while prefix:
        yield prefix, key[len(prefix) :]
        prefix = prefix.rpartition(".")[0]


def _below(single: str, folder: str, leaves: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    for one, other in leaves:
        yield f"{single}.{one}", f"{folder}.{other}"


def unet_names(config: UNetConfig, legacy: bool = True) -> Names:
    """Names of a UNet. `legacy`: attention over the map alone keeps queries, keys and values head by head, as
    every model of the latent diffusion paper does; else all queries come first.
    """
    return Names(STAGES["unet"], _unet_pairs(config, legacy))


def _unet_pairs(config: UNetConfig, legacy: bool) -> Iterator[Pair]:
    layers, levels = config.layers_per_block, range(len(config.block_out_channels))
    attends = [depth > 0 for depth in config.transformer_depth]

    def attention(single: str, folder: str, level: int) -> Iterator[Pair]:
        if config.cross_attention_dim is not None:
            yield single, folder
            return
        yield f"{single}.norm", f"{folder}.group_norm"
        parts = tuple(f"{folder}.to_{part}" for part in "qkv")
        yield f"{single}.qkv", parts, config.heads[level] if legacy else 1
        yield f"{single}.proj_out", f"{folder}.to_out.0"

    def resampler(single: str, folder: str, conv: str) -> Iterator[Pair]:
        if config.resblock_updown:
            yield from _below(single, folder, RESNET)
        else:
            yield f"{single}.{conv}", f"{folder}.conv"

    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    yield "label_emb", "class_embedding"
    yield "input_blocks.0.0", "conv_in"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    yield from _below("middle_block.0", "mid_block.resnets.0", RESNET)
    yield from attention("middle_block.1", "mid_block.attentions.0", -1)
    yield from _below("middle_block.2", "mid_block.resnets.1", RESNET)
    block = 1
    for level in levels:
        folder = f"down_blocks.{level}"
        for layer in range(layers):
            yield from _below(f"input_blocks.{block}.0", f"{folder}.resnets.{layer}", RESNET)
            if attends[level]:
                yield from attention(f"input_blocks.{block}.1", f"{folder}.attentions.{layer}", level)
            block += 1
        if level < levels[-1]:
            yield from resampler(f"input_blocks.{block}.0", f"{folder}.downsamplers.0", "op")
            block += 1
    block = 0
    for level in reversed(levels):
        folder = f"up_blocks.{levels[-1] - level}"
        for layer in range(layers + 1):
            yield from _below(f"output_blocks.{block}.0", f"{folder}.resnets.{layer}", RESNET)
            if attends[level]:
                yield from attention(f"output_blocks.{block}.1", f"{folder}.attentions.{layer}", level)
            block += 1
        if level > 0:
            last = f"output_blocks.{block - 1}.{1 + attends[level]}"
            yield from resampler(last, f"{folder}.upsamplers.0", "conv")


def vae_names(config: Mapping[str, Any]) -> Names:
    """Names of an autoencoder with these fields of config.json: block_out_channels, layers_per_block."""
    return Names(STAGES["vae"], _vae_pairs(len(config["block_out_channels"]), config["layers_per_block"]))


def _vae_pairs(levels: int, layers: int) -> Iterator[Pair]:
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    yield "quantize", "quantize"
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
        yield f"{half}.conv_out", f"{half}.conv_out"
        yield f"{half}.mid.block_1", f"{half}.mid_block.resnets.0"
        yield from _vae_attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
        yield f"{half}.mid.block_2", f"{half}.mid_block.resnets.1"
    for level in range(levels):
        for layer in range(layers):
            yield from _vae_layer(f"encoder.down.{level}", f"encoder.down_blocks.{level}", layer)
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        up = levels - 1 - level  # CompVis counts the decoder's levels from the image, not from the latents
        for layer in range(layers + 1):
            yield from _vae_layer(f"decoder.up.{up}", f"decoder.up_blocks.{level}", layer)
        yield f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv"


def _vae_layer(single: str, folder: str, layer: int) -> Iterator[Pair]:
    yield f"{single}.block.{layer}", f"{folder}.resnets.{layer}"
    yield f"{single}.block.{layer}.nin_shortcut", f"{folder}.resnets.{layer}.conv_shortcut"
    yield from _vae_attention(f"{single}.attn.{layer}", f"{folder}.attentions.{layer}")


def _vae_attention(single: str, folder: str) -> Iterator[Pair]:
    """Also under diffusers' names, which some converters left in single files; the last ones are written."""
    yield from _below(single, folder, [(name, name) for _, name in VAE_ATTENTION])
    yield from _below(single, folder, VAE_ATTENTION)


def modern_vae_key(key: str) -> str:
    """A folder's key with the attention names that diffusers uses since 2023."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}{OLD_VAE_ATTENTION[found[2]]}.",
        key,
    )


def modern_text_key(key: str) -> str:
    """A CLIP text encoder's key with the level `text_model.`, which some files leave out."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def text_names(config: Mapping[str, Any], stage: str) -> Names:
    """Names of a text encoder with the field num_hidden_layers, in a file that keeps it under `stage`."""
    if stage == OPEN_CLIP:
        return Names(stage, _open_clip_pairs(config["num_hidden_layers"]))
    modules = ("embeddings", "encoder", "final_layer_norm")
    return Names(stage, [(module, f"text_model.{module}") for module in modules])


def _open_clip_pairs(layers: int) -> Iterator[Pair]:
    yield "token_embedding", "text_model.embeddings.token_embedding"
    yield "positional_embedding", "text_model.embeddings.position_embedding.weight"
    yield "ln_final", "text_model.final_layer_norm"
    for layer in range(layers):
        single, folder = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        yield from _below(single, folder, OPEN_CLIP_LAYER)
        for kind in ("weight", "bias"):
            parts = tuple(f"{folder}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield f"{single}.attn.in_proj_{kind}", parts


def bert_names(layers: int) -> Names:
    """Names of the text encoder of latent diffusion's first text model."""
    return Names(STAGES["text_encoder"], _bert_pairs(layers))


def _bert_pairs(layers: int) -> Iterator[Pair]:
    yield "transformer.token_emb", "model.embed_tokens"
    yield "transformer.pos_emb.emb", "model.embed_positions"
    yield "transformer.norm", "model.layer_norm"
    for layer in range(layers):
        folder = f"model.layers.{layer}"
        attention = f"transformer.attn_layers.layers.{2 * layer}"
        yield f"{attention}.0", f"{folder}.self_attn_layer_norm"
        for part in ("q", "k", "v", "out"):
            yield f"{attention}.1.to_{part}", f"{folder}.self_attn.{part}_proj"
        forward = f"transformer.attn_layers.layers.{2 * layer + 1}"
        yield f"{forward}.0", f"{folder}.final_layer_norm"
        yield f"{forward}.1.net.0.0", f"{folder}.fc1"
        yield f"{forward}.1.net.2", f"{folder}.fc2"


def conditioner_names() -> Names:
    """Names of a class embedder or a map rescaler, the same in both layouts."""
    return Names(STAGES["text_encoder"], [("embedding", "embedding"), ("channel_mapper", "channel_mapper")])
