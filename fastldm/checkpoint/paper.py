"""Single files of the latent diffusion paper's models: CompVis names, and nothing that says what they are.

The UNet's shape tells the published model, and that its number of attention heads and its schedule, which no
tensor holds. Averaged weights are preferred where a file has them. (Rombach et al. 2022, arXiv:2112.10752)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastldm.checkpoint.container import Entry, WeightFile
from fastldm.checkpoint.defaults import DDIM, read_abilities
from fastldm.checkpoint.detect import Shapes, family_of, infer_unet, infer_vae
from fastldm.checkpoint.networks import read_network_config
from fastldm.checkpoint.overrides import overlay
from fastldm.checkpoint.rename import STAGES, Names, bert_names, conditioner_names, unet_names, vae_names
from fastldm.checkpoint.single import configurations, embedded_in, name_in_file, renamed, scaling_factor
from fastldm.checkpoint.source import ABILITIES, CONDITIONERS, Part, Skipped, Source
from fastldm.checkpoint.tensors import DTYPES, read_tensor
from fastldm.errors import CheckpointError
from fastldm.models.bert import BERTConfig
from fastldm.models.conditioners import ClassEmbedderConfig, RescalerConfig
from fastldm.models.unet_config import UNetConfig
from fastldm.presets import PAPER_MODELS, PaperModel

# Keys of which each model of the paper has one, and no other model any.
SIGNS = (
    "model.diffusion_model.middle_block.1.qkv.weight",
    "cond_stage_model.transformer.token_emb.weight",
    "cond_stage_model.embedding.weight",
)
RAW = "non_ema"  # the variant= that asks for the weights as the last training step left them
HEAD_DIM = 64  # of the text encoder, whatever its width
UNET_HEAD_DIM = 32  # of most UNets
MAX_BETAS = 10_000
_EMA = "model_ema."


def is_paper(keys: Collection[str]) -> bool:
    """Whether a single file with these keys is a model of the latent diffusion paper."""
    return any(sign in keys for sign in SIGNS)


def open_paper(file: WeightFile, overrides: Mapping[str, Any]) -> Source:
    """Work out from a file's header which model it is; of the tensors, two small ones may be read.

    With the variant `RAW` the UNet's weights are those that were not averaged.
    """
    embedded, path = embedded_in(file), file.path
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    inferred = {
        "unet": infer_unet(Shapes(path, STAGES["unet"], shapes)),
        "vae": infer_vae(Shapes(path, STAGES["vae"], shapes), scaling_factor(file)),
    }
    shape = read_network_config("unet", inferred["unet"], path)
    model = recognise(shape)
    told = model.unet if model else replace(shape, heads=tuple(map(_heads, shape.block_out_channels)))
    inferred["unet"] = replace(shape, heads=told.heads, sample_size=told.sample_size).to_dict()
    inferred |= _conditioner(Shapes(path, STAGES["text_encoder"], shapes), inferred["vae"], model)
    configs = configurations(inferred, embedded, overrides)
    names = paper_names({part: read_network_config(part, configs[part], path) for part in configs})
    skipped = Skipped()
    entries = _averaged(file, skipped, raw=overrides.get("variant") == RAW)
    tensors = renamed(path, entries, names, skipped, partial(_unused, file.entries))
    family = family_of(configs)
    scheduler = embedded.get("scheduler") or _scheduler(file, model)
    return Source(
        path=path,
        family=family,
        parts={
            part: Part(configs[part], path, path, tensors[part], partial(name_in_file, names[part]))
            for part in configs
        },
        abilities=read_abilities(family, configs, embedded.get(ABILITIES), path),
        scheduler=overlay(scheduler, overrides.get("scheduler")),
        scheduler_file=path,
        tokenizer=embedded.get("tokenizer"),
        files=(file,),
        skipped=dict(skipped),
        warnings=() if model else _guesses(file, inferred, embedded, overrides),
    )


def recognise(unet: UNetConfig) -> PaperModel | None:
    """The published model with a UNet of this shape, whatever its heads."""
    for model in PAPER_MODELS.values():
        if replace(unet, heads=model.unet.heads, sample_size=model.unet.sample_size) == model.unet:
            return model
    return None


def _heads(width: int) -> int:
    return width // UNET_HEAD_DIM if width % UNET_HEAD_DIM == 0 else 1


def paper_names(configs: Mapping[str, Any]) -> dict[str, Names]:
    """The renaming table of each network, from their configurations."""
    names = {"unet": unet_names(configs["unet"]), "vae": vae_names(configs["vae"].to_dict())}
    for part, config in configs.items():
        if part == "text_encoder":
            names[part] = bert_names(config.encoder_layers)
        elif part in CONDITIONERS:
            names[part] = conditioner_names()
    return names


def _conditioner(shapes: Shapes, vae: Mapping[str, Any], model: PaperModel | None) -> dict[str, Any]:
    """The network beside UNet and autoencoder, if there is one: its name, and its config.json."""
    if "transformer.token_emb.weight" in shapes:
        words, width = shapes.get("transformer.token_emb.weight", 2)
        layers = "transformer.attn_layers.layers."
        config = BERTConfig(
            vocab_size=words,
            max_position_embeddings=shapes.get("transformer.pos_emb.emb.weight", 2)[0],
            encoder_layers=shapes.count(lambda i: f"{layers}{2 * i}.1.to_q.weight"),
            encoder_ffn_dim=shapes.get(f"{layers}1.1.net.0.0.weight", 2)[0],
            encoder_attention_heads=max(1, shapes.get(f"{layers}0.1.to_q.weight", 2)[0] // HEAD_DIM),
            head_dim=HEAD_DIM,
            d_model=width,
        )
        return {"text_encoder": config.to_dict()}
    if "embedding.weight" in shapes:
        classes, width = shapes.get("embedding.weight", 2)
        known = model and model.conditioner
        null = known.null_class if isinstance(known, ClassEmbedderConfig) else True
        return {"class_embedder": ClassEmbedderConfig(classes, width, null).to_dict()}
    if "channel_mapper.weight" in shapes:
        out, channels, *_ = shapes.get("channel_mapper.weight", 4)
        halvings = len(vae["block_out_channels"]) - 1  # to the size of the latents
        bias = "channel_mapper.bias" in shapes
        return {"rescaler": RescalerConfig(channels, out, halvings, bias).to_dict()}
    return {}


def _unused(keys: Collection[str], key: str) -> str | None:
    """The kind of one of these keys that is in files of the paper and no network needs."""
    if key.startswith("cond_stage_model.transformer.to_logits."):
        return "to_logits"
    if key.startswith(STAGES["text_encoder"]) and key.replace("cond", "first", 1) in keys:
        return "first_stage_again"  # an inpainting model's condition is encoded by its first stage
    return None


def _averaged(file: WeightFile, skipped: Skipped, raw: bool) -> dict[str, Entry]:
    """The file's tensors with the UNet's averaged weights in place of the raw ones, unless `raw` ones are
    asked for or there are no others.
    """
    averages = {key for key in file.entries if key.startswith(f"{_EMA}diffusion_model")}
    if raw or not averages:
        return dict(file.entries)
    entries = {key: entry for key, entry in file.entries.items() if key not in averages}
    for key in entries:
        if key.startswith(STAGES["unet"]):
            average = _EMA + key.removeprefix("model.").replace(".", "")
            if average not in averages:
                why = "is missing, although there are other averages"
                raise CheckpointError(file.path, average, why)
            averages.remove(average)
            entries[key] = file.entries[average]
            skipped.count("not_averaged")
    for key in averages:
        raise CheckpointError(file.path, key, "is unexpected: it averages no weight of the UNet")
    return entries


def _scheduler(file: WeightFile, model: PaperModel | None) -> dict[str, Any]:
    """The scheduler's configuration, with the noise of the file's own table if it has one."""
    entry = file.entries.get("betas")
    if entry is None:
        first, last = model.betas if model else PaperModel.betas
        return {**DDIM, "beta_start": first, "beta_end": last}
    if len(entry.shape) != 1 or not 1 < entry.numel <= MAX_BETAS or entry.dtype not in DTYPES:
        why = f"is {entry.dtype} {list(entry.shape)}; expected 2 to {MAX_BETAS} numbers"
        raise CheckpointError(file.path, "betas", why)
    betas = read_tensor(entry, torch.float64)
    if not 0 < betas.min() <= betas.max() < 1:
        raise CheckpointError(file.path, "betas", "holds numbers that are not between 0 and 1")
    return _with_betas(betas)


def _with_betas(betas: torch.Tensor) -> dict[str, Any]:
    """A scheduler of these β: by its two ends if that gives all others, else by all."""
    ends = [float(f"{end:.6g}") for end in (betas[0].item(), betas[-1].item())]
    line = torch.linspace(ends[0] ** 0.5, ends[1] ** 0.5, len(betas), dtype=torch.float64).square()
    fields = {**DDIM, "num_train_timesteps": len(betas)}
    if torch.allclose(betas, line, rtol=1e-6, atol=0):  # the file's are in float32
        return {**fields, "beta_start": ends[0], "beta_end": ends[1]}
    return {**fields, "trained_betas": betas.tolist()}


def _guesses(
    file: WeightFile,
    inferred: Collection[str],
    embedded: Collection[str],
    overrides: Mapping[str, Mapping[str, Any]],
) -> tuple[str, ...]:
    """A warning for each thing that neither the file nor a published model tells, nor the user."""
    guesses = []
    for part, fields, what in (
        ("unet", ("attention_head_dim", "num_attention_heads"), "attention heads"),
        ("class_embedder", ("null_class",), "that the last class stands for none"),
        ("scheduler", ("beta_start", "beta_end", "trained_betas"), "the noise schedule"),
    ):
        untold = part in inferred or part == "scheduler" and "betas" not in file.entries
        if untold and part not in embedded and not set(fields) & set(overrides.get(part, ())):
            guesses.append(f"guessed {what}; config={{'{part}': {{'{fields[0]}': …}}}} states it")
    return tuple(guesses)
