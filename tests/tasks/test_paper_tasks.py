"""The latent diffusion paper's models through generate(), beside the loop that the table stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastldm.checkpoint import load_components, save_folder
from fastldm.diffusion import build_table
from fastldm.diffusion.loop import sample
from fastldm.errors import InvalidArgument
from fastldm.models.bert import BERTConfig, BERTModel
from fastldm.models.conditioners import ClassEmbedder, ClassEmbedderConfig, RescalerConfig, SpatialRescaler
from fastldm.models.layouts import layout_tokens
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vq import VQConfig, VQModel
from fastldm.pipeline import Pipeline
from fastldm.runtime import Batcher
from fastldm.verification import verify
from tests.conftest import sane_weights

FIRST = VQConfig(block_out_channels=(16, 16, 16), layers_per_block=1, norm_num_groups=4, num_vq_embeddings=16)
UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32),
    layers_per_block=1,
    heads=(2, 4),
    transformer_depth=(0, 1),
    cross_attention_dim=None,
    norm_num_groups=4,
    sample_size=8,
)
WITH_CONTEXT = replace(UNET, cross_attention_dim=16)
WORDS = Tokenizer.from_words(["a", "red", "cat"], 8)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "unconditional": lambda: {"unet": UNet(replace(UNET, scale_shift_norm=True, resblock_updown=True))},
    "class": lambda: {
        "unet": UNet(WITH_CONTEXT),
        "class_embedder": ClassEmbedder(ClassEmbedderConfig(7, 16)),
    },
    "text": lambda: {
        "unet": UNet(WITH_CONTEXT),
        "text_encoder": BERTModel(
            BERTConfig(30522, 8, encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2, d_model=16)
        ),
        "tokenizer": WORDS,
    },
    "layout": lambda: {
        "unet": UNet(WITH_CONTEXT),
        "text_encoder": BERTModel(
            BERTConfig(64, 11, encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2, d_model=16)
        ),
    },
    "semantic": lambda: {
        "unet": UNet(replace(UNET, in_channels=6)),
        "rescaler": SpatialRescaler(RescalerConfig(in_channels=5, out_channels=3, n_stages=2)),
    },
    "upscale": lambda: {"unet": UNet(replace(UNET, in_channels=6))},
    "inpaint": lambda: {"unet": UNet(replace(UNET, in_channels=7, resblock_updown=True))},
}
CHANCE = np.random.default_rng(0)
PICTURE = CHANCE.integers(0, 256, (32, 32, 3), dtype=np.uint8)
SMALL = CHANCE.integers(0, 256, (8, 8, 3), dtype=np.uint8)
CLASSES = CHANCE.integers(0, 5, (32, 32))
MASK = np.zeros((32, 32), bool)
MASK[5:20, 9:30] = True
BOXES = [(3, (0.0, 0.25, 0.5, 1.0)), (0, (0.5, 0.0, 1.0, 0.75))]
ASKED: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "class": {"label": 4},
    "text": {"prompt": "a red cat", "guidance_scale": 2.0},
    "layout": {"layout": BOXES},
    "semantic": {"segmentation": CLASSES},
    "upscale": {"image": SMALL},
    "inpaint": {"image": PICTURE, "mask": MASK},
}


@pytest.fixture(scope="module", params=MODELS)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pipeline]:
    """A tiny model of each task, loaded from a folder."""
    torch.manual_seed(4)
    parts = {"vae": VQModel(FIRST), "tokenizer": None, **MODELS[request.param]()}
    sane_weights(*(network for network in parts.values() if isinstance(network, torch.nn.Module)))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    save_folder(folder, **parts, scheduler=SCHEDULER)
    return request.param, Pipeline(load_components(folder), torch.device("cpu"), torch.float32, None)


def signed(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def by_hand(name: str, pipe: Pipeline) -> tuple[Tensor, Tensor | None]:
    """Context and further channels of what is asked, as the paper's code makes them."""
    model, nothing = pipe.components, torch.empty(1, 0, 0)
    if name == "class":
        assert model.class_embedder is not None
        return model.class_embedder.embedding.weight[[6, 4]][:, None], None
    if name == "text":
        assert model.text_encoder is not None
        ids = [WORDS.encode(text).chunks[0] for text in ("", "a red cat")]
        return torch.cat([model.text_encoder(torch.tensor([row])) for row in ids]), None
    if name == "layout":
        assert isinstance(model.text_encoder, BERTModel)
        return model.text_encoder(torch.tensor([layout_tokens(BOXES, model.text_encoder.config)])), None
    if name == "semantic":
        assert model.rescaler is not None
        one_hot = F.one_hot(torch.from_numpy(CLASSES), 5).permute(2, 0, 1)[None].float()
        return nothing, model.rescaler(one_hot)
    if name == "upscale":
        return nothing, signed(SMALL)
    if name == "inpaint":
        mask = torch.from_numpy(MASK)[None, None].float()
        masked = (1 - mask) * (signed(PICTURE) + 1) / 2 * 2 - 1
        known = model.vae.encode(masked).mean
        return nothing, torch.cat((known, 2 * F.interpolate(mask, (8, 8), mode="nearest") - 1), dim=1)
    return nothing, None


def test_every_task_is_the_plain_loop(drawn: tuple[str, Pipeline]) -> None:
    name, pipe = drawn
    assert pipe.components.family == f"ldm-{name}"
    asked = {"steps": 4, "seed": 5, **ASKED[name]}
    with torch.no_grad():
        context, concat = by_hand(name, pipe)
        scale = {"class": 3.0, "text": 2.0}.get(name, 1.0)
        table = build_table(pipe.components.scheduler, 4, sampler="ddim", guidance_scale=scale)
        start = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(5))
        unet = pipe.components.unet

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return unet(x, unet.condition(context, t[:, None], concat), torch.zeros(1, dtype=torch.long))

        want = sample(table, predict, start)
    got = pipe.generate(**asked, output_type="latent").images
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    image = np.asarray(pipe.generate(**asked).image)
    assert image.shape == (32, 32, 3)
    if name == "inpaint":
        assert np.array_equal(image[~MASK], PICTURE[~MASK])


def test_images_do_not_depend_on_their_neighbours(drawn: tuple[str, Pipeline]) -> None:
    name, pipe = drawn
    asked = {"steps": 3, "output_type": "latent", **ASKED[name]}
    two = pipe.generate(**asked, seed=1, num_images=2).images
    assert torch.equal(two[1:], pipe.generate(**asked, seed=[2, 9], num_images=2).images[:1])
    with Batcher(pipe, slots=2) as batcher:
        made = [batcher.submit(**asked, seed=seed).result().images for seed in (1, 2)]
    torch.testing.assert_close(torch.cat(made), two, rtol=0, atol=1e-5 * float(two.abs().max()))


def test_footprints_and_other_sizes(drawn: tuple[str, Pipeline]) -> None:
    name, pipe = drawn
    if name in ("semantic", "inpaint", "upscale"):
        shape = (48, 24)
        larger = {
            "semantic": {"segmentation": np.zeros(shape, int)},
            "inpaint": {"image": np.zeros((*shape, 3), np.uint8), "mask": np.ones(shape, bool)},
            "upscale": {"image": np.zeros((12, 6, 3), np.uint8)},
        }[name]
    else:
        larger = {**ASKED[name], "height": 48, "width": 24}
    request = pipe.check(steps=2, **larger)
    footprint = pipe.footprint(request)
    weights = sum(w.nbytes for network in pipe.components.networks.values() for w in network.parameters())
    assert footprint.weights == weights and footprint.needed > 0
    assert (footprint.text > 0) == (name in ("text", "layout"))
    assert pipe.generate(steps=2, **larger).image.size == (24, 48)


def test_every_op_call_of_a_task_can_be_verified(drawn: tuple[str, Pipeline]) -> None:
    found = verify(drawn[1], width=16, height=24)
    assert found.ok, str(found)
    layers = {row.layer.partition(".")[0] for row in found.rows}
    assert {"unet", "vae"} <= layers and "latents after 3 steps" in {row.layer for row in found.rows}


WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "unconditional": [({"prompt": "a cat"}, "prompt"), ({"guidance_scale": 2.0}, "guidance_scale")],
    "class": [({}, "label"), ({"label": 6}, "label"), ({"label": 1, "prompt": "a"}, "prompt")],
    "text": [({}, "prompt"), ({"label": 1}, "label")],
    "layout": [({}, "layout"), ({"label": 1}, "label"), ({"layout": [(63, BOXES[0][1])]}, "layout")],
    "semantic": [({}, "segmentation"), ({"segmentation": CLASSES + 1}, "segmentation")],
    "upscale": [({}, "image")],
    "inpaint": [({}, "mask"), ({"mask": MASK}, "image")],
}


def test_what_a_model_cannot_do_is_refused(drawn: tuple[str, Pipeline]) -> None:
    name, pipe = drawn
    for arguments, blamed in WRONG[name]:
        with pytest.raises(InvalidArgument) as caught:
            pipe.generate(steps=1, **arguments)
        assert caught.value.name.startswith(blamed)
    if name == "layout":
        with pytest.raises(InvalidArgument, match="at most 3"):
            pipe.generate(steps=1, layout=BOXES * 2)


def test_the_recorded_model_through_generate(recorded: Callable[[str], Any], tmp_path: Path) -> None:
    """The original code's DDIM sample with guidance, its averaged weights and its raw ones."""
    case = recorded("ldm/latent_diffusion")
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in case.weight.items()}, file)
    assert case.input["uncond"].tolist() == [10, 10]
    asked = {"label": case.input["cond"].tolist(), "latents": case.input["x_T"], "width": 12, "height": 12}
    for ending, config in (("_ema", None), ("", {"variant": "non_ema"})):
        model = load_components(file, config=config)
        pipe = Pipeline(model, torch.device("cpu"), torch.float32, None)
        asked |= {"steps": case.config["S"], "guidance_scale": case.config["guidance"]}
        case.holds(f"sample{ending}", pipe.generate(**asked, output_type="latent").images)
        images = pipe.generate(**asked, output_type="pt").images * 2 - 1
        want = case.out[f"sample_image{ending}"].clamp(-1, 1)
        torch.testing.assert_close(images, want, rtol=0, atol=1e-4)
