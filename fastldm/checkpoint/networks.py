"""A model's networks: configurations read, built on the meta device, held against what the files offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from fastldm.checkpoint.limits import check_structure
from fastldm.checkpoint.source import ABILITIES, Part, Source
from fastldm.checkpoint.tensors import DTYPES
from fastldm.errors import CheckpointError
from fastldm.models.bert import LDM_BERT, BERTConfig, BERTModel
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.conditioners import (
    ClassEmbedder,
    ClassEmbedderConfig,
    RescalerConfig,
    SpatialRescaler,
)
from fastldm.models.hints import MAP_CLASSES, hint_channels
from fastldm.models.pixels import PIXELS, Autoencoder, PixelAutoencoder, PixelConfig
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.models.vq import VQConfig, VQModel

MAX_MISSING = 1000  # tensors that a network may have beyond those in its files, to tell which is missing

NETWORKS: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
    "class_embedder": (ClassEmbedderConfig, ClassEmbedder),
    "rescaler": (RescalerConfig, SpatialRescaler),
}
AUTOENCODERS: dict[str, tuple[Any, Any]] = {
    "VQModel": (VQConfig, VQModel),
    PIXELS: (PixelConfig, PixelAutoencoder),
}


def read_network_config(part: str, fields: Mapping[str, Any], file: Path) -> Any:
    """The configuration dataclass of a network from the fields of its config.json."""
    check_structure(fields, file)
    try:
        return _classes(part, fields)[0].from_dict(fields, str(file))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise CheckpointError(file, None, f"is malformed: {error}") from error


def _classes(part: str, fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """The dataclass and the network of a component; autoencoders and text encoders are of several classes."""
    if part == "vae":
        return AUTOENCODERS.get(str(fields.get("_class_name")), NETWORKS[part])
    if part == "text_encoder" and fields.get("model_type") == LDM_BERT:
        return BERTConfig, BERTModel
    return NETWORKS[part]


class Networks(NamedTuple):
    """The networks of a model: one that makes the UNet's context, or a map for it, or none."""

    unet: UNet
    vae: Autoencoder
    text_encoder: CLIPTextModel | BERTModel | None = None
    class_embedder: ClassEmbedder | None = None
    rescaler: SpatialRescaler | None = None


def build(source: Source) -> Networks:
    """The networks on the meta device, each of whose tensors the source has, under its name and in its shape.

    A tensor that is missing, unexpected, misshapen or no float is a CheckpointError, and so are networks that
    do not fit together.
    """
    networks = Networks(**{name: _build(name, part) for name, part in source.parts.items()})
    unet, unet_file = networks.unet.config, source.parts["unet"].config_file
    given = unet.cross_attention_dim
    made, by = None, "there is no network that makes a context"
    if networks.text_encoder is not None:
        made = networks.text_encoder.config.hidden_size
        by = f"the text encoder's hidden_size is {made}"
    elif networks.class_embedder is not None:
        made = networks.class_embedder.config.embed_dim
        by = f"the class embedder's embed_dim is {made}"
    if given != made:
        raise CheckpointError(unet_file, "cross_attention_dim", f"is {given}, but {by}")
    for width, heads in zip(unet.block_out_channels, unet.heads, strict=True):
        if width % heads:
            raise CheckpointError(
                unet_file, "attention_head_dim", f"{heads} heads do not divide width {width}"
            )
    if unet.num_class_embeds:
        raise CheckpointError(unet_file, "num_class_embeds", f"is {unet.num_class_embeds}: not supported yet")
    _check_channels(networks, source.family, unet_file)
    _check_abilities(networks, source)
    return networks


def _check_channels(networks: Networks, family: str, file: Path) -> None:
    """Whether the UNet reads the latents, and beside them what its family has there; it answers with as many
    channels, or where it learns the variance with twice as many.
    """
    unet, latent = networks.unet.config, networks.vae.config.latent_channels
    if unet.out_channels == 2 * latent:
        networks.unet.config = unet = replace(unet, learned_variance=True)
    beside = {0: "", latent + 1: " for inpainting"}
    if not family.startswith("ldm"):
        beside[hint_channels(latent)] = " with a hint block"
    elif networks.rescaler is not None:
        beside = {networks.rescaler.config.out_channels: " with a map"}
    else:
        beside[3] = " with a small picture"
    if unet.latent_channels != latent or unet.in_channels - latent not in beside:
        known = ", ".join(f"{latent + more} → {latent}{what}" for more, what in sorted(beside.items()))
        given = f"{unet.in_channels} → {unet.out_channels}"
        why = f"is {given}; with {latent} latent channels fastldm supports {known}"
        raise CheckpointError(file, "in_channels", why)


def _check_abilities(networks: Networks, source: Source) -> None:
    """Whether the networks can do all that the model says, and are told at least what they need."""
    told, text, embedder, rescaler = source.abilities, *networks[2:]
    unet, vae = networks.unet.config, networks.vae.config
    beside, paper = unet.in_channels - vae.latent_channels, source.family.startswith("ldm")
    hinted = not paper and beside == hint_channels(vae.latent_channels)
    if told.prompt:
        classes = len(told.labels)  # which are words
    elif embedder is not None:
        classes = embedder.config.classes
    else:
        classes = 0 if text is None else text.config.vocab_size - 1
    maps = MAP_CLASSES if hinted else 0 if rescaler is None else rescaler.config.in_channels
    small = paper and rescaler is None and beside == 3
    for name, fits in (
        ("prompt", text is not None if told.prompt else not isinstance(text, CLIPTextModel)),
        ("layout", told.prompt or told.layout == (text is not None)),
        ("classes", (classes > 0) <= told.classes <= classes),
        ("segmentation", (rescaler is not None) <= len(told.segmentation) <= maps),
        ("upscaling", hinted or told.upscaling in (0, vae.factor if small else 0)),
    ):
        if not fits:
            why = f"is {getattr(told, name)!r:.80}, which does not fit the model's networks"
            raise CheckpointError(source.path, f"{ABILITIES}.{name}", why)


def _build(name: str, part: Part) -> Any:
    config = read_network_config(name, part.config, part.config_file)
    try:
        with _NoInitialValues(len(part.tensors) + MAX_MISSING), torch.device("meta"):
            network = _classes(name, part.config)[1](config)
    except _TooMany:
        why = f"describes a network of far more tensors than the {len(part.tensors)} there are"
        raise CheckpointError(part.config_file, None, why) from None
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            part.config_file, None, f"describes no network that can be built: {error}"
        ) from error
    expected = network.state_dict()
    for key, entry in part.tensors.items():
        file = entry.spans[0].file.path
        if key not in expected:
            raise CheckpointError(file, entry.name, f"is unexpected: the {name} has no such tensor")
        if entry.shape != tuple(expected[key].shape):
            raise CheckpointError(
                file, entry.name, f"has shape {list(entry.shape)}; expected {list(expected[key].shape)}"
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                file, entry.name, f"has dtype {entry.dtype}; weights are {', '.join(DTYPES)}"
            )
    missing = [key for key in expected if key not in part.tensors]
    if missing:
        more = f" ({len(missing)} tensors of the {name} are)" if len(missing) > 1 else ""
        raise CheckpointError(part.weight_file, part.name_in_file(missing[0]), f"is missing{more}")
    return network


class _TooMany(Exception):
    """A network has more tensors than it may."""


class _NoInitialValues(TorchFunctionMode):
    """Modules are made without drawing initial values, which takes most of the time of building a network,
    and of `most` tensors at most: a configuration of a few bytes can ask for millions.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            self.left -= 1
            if self.left < 0:
                raise _TooMany
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
