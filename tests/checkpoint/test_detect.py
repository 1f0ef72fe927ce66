"""Full-size files recognised from headers alone: sparse files with the published models' keys and shapes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastldm.checkpoint.detect import Shapes as KeyShapes
from fastldm.checkpoint.detect import infer_vae
from fastldm.checkpoint.load import open_source
from fastldm.checkpoint.networks import build
from fastldm.checkpoint.rename import CLIP, OPEN_CLIP, STAGES, text_names, unet_names, vae_names
from fastldm.models.clip import CLIP_L, OPENCLIP_H, CLIPTextConfig, CLIPTextModel
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.models.vq import VQConfig, VQModel
from fastldm.presets import FIRST_STAGES

SD1 = UNetConfig()
SD2 = UNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
# in models.md 2.2; the text encoders' counts are those of the published checkpoints
PARAMETERS = {"sd1": 859_520_964, "sd1-inpaint": 859_535_364, "sd2": 865_910_724, "sd2-inpaint": 865_925_124}
VAE_PARAMETERS = 83_653_863
TEXT_PARAMETERS = {"sd1": 123_060_480, "sd2": 340_387_840}

Shapes = dict[str, tuple[int, ...]]


def single_shapes(unet: UNetConfig, text: CLIPTextConfig) -> Shapes:
    """Names and shapes of a CompVis file, the text encoder's unused parts included."""
    found: Shapes = {}
    stage = CLIP if text == CLIP_L else OPEN_CLIP
    for names, network, config in (
        (unet_names(unet), UNet, unet),
        (vae_names(VAEConfig().to_dict()), AutoencoderKL, VAEConfig()),
        (text_names(text.to_dict(), stage), CLIPTextModel, text),
    ):
        with torch.device("meta"):
            tensors = network(config).state_dict()
        for key, tensor in tensors.items():
            single = names.to_single(key)
            assert single is not None
            shape = tuple(tensor.shape)
            if ".mid.attn_1." in single and len(shape) == 2:
                shape += (1, 1)
            parts = len(names.to_folder(single))
            found[single] = (parts * shape[0], *shape[1:])
    if stage == OPEN_CLIP:
        last = f"{stage}transformer.resblocks."
        found |= {
            key.replace("resblocks.22.", "resblocks.23."): s
            for key, s in found.items()
            if key.startswith(f"{last}22.")
        }
        found |= {f"{stage}text_projection": (1024, 1024), f"{stage}logit_scale": ()}
    return found


def sparse(file: Path, shapes: Shapes) -> Path:
    """A file of float16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)
    return file


@pytest.mark.parametrize(
    ("family", "unet", "text", "keys"),
    [
        ("sd1", SD1, CLIP_L, 686 + 248 + 196),
        ("sd1-inpaint", replace(SD1, in_channels=9), CLIP_L, 686 + 248 + 196),
        ("sd2", SD2, OPENCLIP_H, 686 + 248 + 24 * 12 + 4 + 2),
        ("sd2-inpaint", replace(SD2, in_channels=9), OPENCLIP_H, 686 + 248 + 24 * 12 + 4 + 2),
    ],
)
def test_published_models(
    tmp_path: Path, family: str, unet: UNetConfig, text: CLIPTextConfig, keys: int
) -> None:
    shapes = single_shapes(unet, text)
    assert len(shapes) == keys
    source = open_source(sparse(tmp_path / "model.ckpt", shapes))
    networks = build(source)
    assert source.family == family
    assert networks.unet.config == unet and networks.vae.config == VAEConfig()
    assert replace(networks.text_encoder.config, projection_dim=text.projection_dim) == text
    counted = [sum(entry.numel for entry in source.parts[part].tensors.values()) for part in source.parts]
    assert counted == [PARAMETERS[family], VAE_PARAMETERS, TEXT_PARAMETERS[family[:3]]]
    assert [sum(p.numel() for p in network.parameters()) for network in networks[:3]] == counted
    assert source.warnings == (() if family.startswith("sd1") else source.warnings[:1])
    assert all("guessed prediction_type epsilon" in warning for warning in source.warnings)
    assert source.skipped == (
        {} if text == CLIP_L else {"text_projection": 1, "logit_scale": 1, "unused_layer": 12}
    )


def test_every_missing_tensor_of_a_full_size_model_is_named(tmp_path: Path) -> None:
    shapes = single_shapes(SD1, CLIP_L)
    for key in list(shapes)[:: len(shapes) // 4]:
        file = sparse(tmp_path / "model.safetensors", {k: shape for k, shape in shapes.items() if k != key})
        with pytest.raises(Exception, match="is missing") as caught:
            build(open_source(file))
        assert type(caught.value).__name__ == "CheckpointError"
        assert getattr(caught.value, "key", None) is not None


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages_of_the_zoo_are_read_from_their_keys(name: str) -> None:
    config = FIRST_STAGES[name]
    with torch.device("meta"):
        network = VQModel(config) if isinstance(config, VQConfig) else AutoencoderKL(config)
    names = vae_names(config.to_dict())
    shapes = {str(names.to_single(key)): tuple(t.shape) for key, t in network.state_dict().items()}
    for scale in (None, 0.5):
        fields = infer_vae(KeyShapes(Path("model"), STAGES["vae"], shapes), scale)
        found = type(config).from_dict(fields)
        assert found == replace(config, scaling_factor=scale or config.scaling_factor)
