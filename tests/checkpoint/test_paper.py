"""The latent diffusion paper's models from their own files: one recorded, tiny ones, and full-size keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastldm.abilities import Abilities
from fastldm.checkpoint import Components, convert, inspect, load_components, save_folder
from fastldm.checkpoint.load import open_source
from fastldm.checkpoint.networks import build
from fastldm.checkpoint.paper import paper_names
from fastldm.checkpoint.rename import STAGES
from fastldm.diffusion import build_table
from fastldm.diffusion.loop import sample
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.bert import BERTConfig, BERTModel
from fastldm.models.conditioners import ClassEmbedder, ClassEmbedderConfig, RescalerConfig, SpatialRescaler
from fastldm.models.pixels import PixelAutoencoder, PixelConfig
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.models.vq import VQConfig, VQModel
from fastldm.presets import PAPER_MODELS

NETWORKS: dict[type, Callable[[Any], nn.Module]] = {
    UNetConfig: UNet,
    VAEConfig: AutoencoderKL,
    VQConfig: VQModel,
    BERTConfig: BERTModel,
    ClassEmbedderConfig: ClassEmbedder,
    RescalerConfig: SpatialRescaler,
}
PART_OF = {BERTConfig: "text_encoder", ClassEmbedderConfig: "class_embedder", RescalerConfig: "rescaler"}
WORDS = Tokenizer.from_words(["a", "red", "cat"], 8)


# The recorded model: random weights under the keys of a real file, run by the original code.


@pytest.fixture(scope="module")
def whole(recorded: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    case = recorded("ldm/latent_diffusion")
    file = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in case.weight.items()}, file)
    return case, file


def drawn(model: Components, case: Any) -> Tensor:
    """The recorded DDIM sample, by our networks, our table and its plain loop."""
    assert model.class_embedder is not None
    context = model.class_embedder(torch.cat((case.input["uncond"], case.input["cond"])))
    table = build_table(
        model.scheduler, case.config["S"], sampler="ddim", guidance_scale=case.config["guidance"]
    )

    def predict(x: Tensor, t: Tensor) -> Tensor:
        condition = model.unet.condition(context, t[:, None])
        return model.unet(x, condition, torch.zeros(len(x), dtype=torch.long))

    return sample(table, predict, case.input["x_T"])


def test_the_recorded_model(whole: tuple[Any, Path]) -> None:
    case, file = whole
    raw = load_components(file, config={"variant": "non_ema"})
    assert raw.class_embedder is not None
    with torch.inference_mode():
        latents = raw.vae.encode(case.input["image"]).mean * raw.vae.config.scaling_factor
        case.holds("z", latents)
        case.holds("reconstruction", raw.vae.decode(latents / raw.vae.config.scaling_factor))
        context = raw.class_embedder(case.input["cond"])
        case.holds("cond", context)
        condition = raw.unet.condition(context, case.input["t"].float()[:, None])
        case.holds("eps", raw.unet(case.input["x_t"], condition, torch.zeros(2, dtype=torch.long)))
        for ending, model in (("", raw), ("_ema", load_components(file))):
            made = drawn(model, case)
            case.holds(f"sample{ending}", made)
            case.holds(f"sample_image{ending}", model.vae.decode(made))


def test_what_the_recorded_file_tells(whole: tuple[Any, Path]) -> None:
    _, file = whole
    model = load_components(file)
    assert model.family == "ldm-class" and model.text_encoder is model.tokenizer is model.rescaler is None
    assert model.unet.config.scale_shift_norm and model.unet.config.transformer_depth == (0, 1)
    assert model.scheduler.beta_start == 0.0015 and model.scheduler.beta_end == 0.0195
    assert model.abilities.classes == 10 and model.abilities.needs == "label" and model.abilities.guides
    assert [warning.split(";")[0] for warning in model.warnings] == [
        "guessed attention heads",
        "guessed that the last class stands for none",
    ]
    info = inspect(file)
    assert "class to image" in info.tasks
    unet = sum(parameter.numel() for parameter in model.unet.parameters())
    assert info.parameters["unet"] == unet and info.parameters["class_embedder"] == 11 * 20
    averaged = len(model.unet.state_dict())
    assert info.skipped == {"not_averaged": averaged, "schedule": 12, "model_ema": 2}
    stated = {"unet": {"num_attention_heads": [1, 1]}, "class_embedder": {"null_class": False}}
    told = load_components(file, config=stated)
    assert told.warnings == () and told.abilities.classes == 11 and not told.abilities.guides


def test_averages_that_do_not_fit_are_errors(whole: tuple[Any, Path], tmp_path: Path) -> None:
    case, _ = whole
    tensors = {key: tensor.contiguous() for key, tensor in case.weight.items()}
    one = "model_ema.diffusion_modelout2bias"
    for changed, why in (
        ({key: t for key, t in tensors.items() if key != one}, "is missing"),
        ({**tensors, "model_ema.diffusion_modelsurprise": torch.zeros(2)}, "averages no weight"),
        ({**tensors, one: torch.zeros(2)}, "has shape"),
    ):
        save_file(changed, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=why) as caught:
            load_components(tmp_path / "a.safetensors")
        assert str(caught.value.key).startswith("model_ema.")
    kept = {key: t for key, t in tensors.items() if not key.startswith("model_ema.diffusion_model")}
    save_file(kept, tmp_path / "a.safetensors")
    assert "not_averaged" not in inspect(tmp_path / "a.safetensors").skipped


def test_betas_that_are_no_known_line_are_kept(whole: tuple[Any, Path], tmp_path: Path) -> None:
    case, _ = whole
    tensors = {key: tensor.contiguous() for key, tensor in case.weight.items()}
    betas = torch.linspace(1e-4, 0.02, 1000)
    save_file({**tensors, "betas": betas}, tmp_path / "a.safetensors")
    scheduler = load_components(tmp_path / "a.safetensors").scheduler
    assert scheduler.trained_betas is not None
    assert torch.equal(torch.tensor(scheduler.trained_betas), betas)
    for wrong in (betas[:1], betas[None], torch.arange(1000), -betas, 100 * betas):
        save_file({**tensors, "betas": wrong.contiguous()}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="betas"):
            load_components(tmp_path / "a.safetensors")


# Tiny models of every layout, written under the names of the original.

_FIRST = VQConfig(block_out_channels=(32, 32), layers_per_block=1, num_vq_embeddings=16)
_MAP = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64),
    layers_per_block=1,
    heads=(1, 2),
    transformer_depth=(0, 1),
    cross_attention_dim=None,
)
_TEXT = replace(_MAP, cross_attention_dim=16)
TINY: dict[str, tuple[Any, ...]] = {
    "ldm-unconditional": (_MAP, _FIRST),
    "ldm-upscale": (replace(_MAP, in_channels=6, heads=(1, 2), transformer_depth=(1, 0)), _FIRST),
    "ldm-inpaint": (
        replace(_MAP, in_channels=7, resblock_updown=True),
        replace(_FIRST, mid_block_add_attention=False),
    ),
    "ldm-semantic": (
        replace(_MAP, in_channels=6, transformer_depth=(0, 0)),
        _FIRST,
        RescalerConfig(in_channels=5, out_channels=3),
    ),
    "ldm-class": (_TEXT, _FIRST, ClassEmbedderConfig(7, 16)),
    "ldm-text": (_TEXT, _FIRST, BERTConfig(encoder_layers=1, encoder_ffn_dim=64, d_model=16)),
    "ldm-layout": (
        replace(_TEXT, transformer_depth=(0, 3), mid_depth=3),
        _FIRST,
        BERTConfig(64, 92, encoder_layers=2, encoder_ffn_dim=64, d_model=16),
    ),
    # The KL first stage, scale and shift, resampling blocks: churches.
    "ldm-unconditional-kl": (
        replace(_MAP, scale_shift_norm=True, resblock_updown=True, in_channels=4, out_channels=4),
        VAEConfig(block_out_channels=(32, 32), layers_per_block=1),
    ),
}


def in_parts(configs: tuple[Any, ...]) -> dict[str, Any]:
    """Configurations by the names of their parts."""
    unet, vae, *rest = configs
    return {"unet": unet, "vae": vae, **{PART_OF[type(config)]: config for config in rest}}


def original_shape(part: str, key: str, config: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a matrix of ours has in the original: attention over a map is made of convolutions."""
    if len(shape) != 2 or ".attentions." not in key:
        return shape
    if part == "vae":
        return (*shape, 1, 1)
    return (*shape, 1) if config.cross_attention_dim is None else shape


def written(configs: dict[str, Any], state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of ours as the original keeps them, queries, keys and values head by head."""
    names, tensors = paper_names(configs), {}
    for part, weights in state.items():
        for key, tensor in weights.items():
            tensor = tensor.view(original_shape(part, key, configs[part], tuple(tensor.shape)))
            single = names[part].to_single(key)
            assert single is not None
            targets, heads = names[part].to_folder(single), names[part].heads(single)
            if len(targets) == 3:
                level = configs[part].block_out_channels.index(len(tensor))
                assert heads == configs[part].heads[level], single
                parts = [state[part][name].view_as(tensor).unflatten(0, (heads, -1)) for name in targets]
                tensor = torch.stack(parts, dim=1).flatten(0, 2)
            tensors[single] = tensor.contiguous()
    return tensors


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny file: its family, configurations, weights by our names, and where it is."""
    torch.manual_seed(5)
    configs = in_parts(TINY[request.param])
    networks = {part: NETWORKS[type(config)](config) for part, config in configs.items()}
    state = {part: network.state_dict() for part, network in networks.items()}
    tensors = written(configs, state)
    tensors |= {"betas": torch.linspace(0.0015**0.5, 0.0205**0.5, 1000, dtype=torch.float64).square().float()}
    tensors |= {"global_step": torch.tensor(9), "first_stage_model.loss.logvar": torch.tensor(0.0)}
    if request.param == "ldm-inpaint":  # there the condition's encoder is the first stage, written twice
        tensors |= {
            key.replace("first_stage_model", "cond_stage_model", 1): tensor.clone()
            for key, tensor in tensors.items()
            if key.startswith("first_stage_model") and ".loss." not in key
        }
    if request.param.endswith("-kl"):
        tensors["scale_factor"] = torch.tensor(0.25)
        configs["vae"] = replace(configs["vae"], scaling_factor=0.25)
    if "text_encoder" in configs:
        width = configs["text_encoder"].d_model
        tensors["cond_stage_model.transformer.to_logits.weight"] = torch.rand(9, width)
        tensors["cond_stage_model.transformer.to_logits.bias"] = torch.rand(9)
    file = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    save_file(tensors, file)
    return request.param.removesuffix("-kl"), configs, state, file


def options(family: str) -> dict[str, Any]:
    return {"tokenizer": WORDS} if family == "ldm-text" else {}


def test_every_layout(tiny: Any) -> None:
    family, configs, state, file = tiny
    model = load_components(file, **options(family))
    assert model.family == family and model.networks.keys() == configs.keys()
    for part, network in model.networks.items():
        assert network.config == configs[part], part
        ours = network.state_dict()
        assert ours.keys() == state[part].keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in state[part].items()), part
    assert (model.scheduler.beta_start, model.scheduler.beta_end) == (0.0015, 0.0205)
    assert (model.tokenizer is None) == (family != "ldm-text")
    assert model.warnings[0].startswith("guessed attention heads")
    assert len(model.warnings) == 1 + (family == "ldm-class")
    skipped = inspect(file).skipped
    assert skipped.get("to_logits", 0) == 2 * (family in ("ldm-text", "ldm-layout"))
    again = sum(1 for _ in state["vae"]) if family == "ldm-inpaint" else 0
    assert skipped.get("first_stage_again", 0) == again


ABILITIES = {
    "ldm-unconditional": ("unconditional", None, False),
    "ldm-upscale": ("upscaling ×2", "image", False),
    "ldm-inpaint": ("inpainting", "mask", False),
    "ldm-semantic": ("semantic synthesis", "segmentation", False),
    "ldm-class": ("class to image", "label", True),
    "ldm-text": ("text to image", None, True),
    "ldm-layout": ("layout to image", "layout", False),
}


def test_what_each_can_be_asked_for(tiny: Any) -> None:
    family, _, _, file = tiny
    task, needs, guides = ABILITIES[family]
    info = inspect(file)
    assert task in info.tasks and info.family == family
    abilities = load_components(file, **options(family)).abilities
    assert (abilities.needs, abilities.guides) == (needs, guides)
    assert abilities.prompt == (family == "ldm-text")
    if family == "ldm-semantic":
        assert abilities.segmentation == ("0", "1", "2", "3", "4")


def test_there_and_back(tiny: Any, tmp_path: Path) -> None:
    """To a folder, from there to a single file, and again: every bit, and nothing to guess."""
    family, configs, state, file = tiny
    folder = convert(file, tmp_path / "folder", **options(family))
    single = convert(folder, tmp_path / "single.safetensors")
    second = convert(single, tmp_path / "second")
    original, again = load_file(file), load_file(single)
    assert {key: original[key].shape for key in again} == {key: t.shape for key, t in again.items()}
    assert all(torch.equal(original[key], tensor) for key, tensor in again.items())
    for place in (folder, single, second):
        model = load_components(place)
        assert model.family == family and model.warnings == ()
        assert {part: network.config for part, network in model.networks.items()} == configs
        for part, network in model.networks.items():
            ours = network.state_dict()
            assert all(torch.equal(ours[key], tensor) for key, tensor in state[part].items())
        if family == "ldm-text":
            assert model.tokenizer is not None and model.tokenizer.vocab_size == WORDS.vocab_size


def test_pixels_can_be_upscaled(tmp_path: Path) -> None:
    """Without a first stage, as in cascades of diffusion models."""
    torch.manual_seed(1)
    save_folder(
        tmp_path / "model",
        unet=UNet(replace(_MAP, in_channels=6)),
        vae=PixelAutoencoder(PixelConfig()),
        tokenizer=None,
        scheduler={"_class_name": "DDIMScheduler"},
    )
    model = load_components(tmp_path / "model")
    assert model.family == "ldm-upscale" and model.abilities.upscaling == 1


LIES = {  # of what a model can be asked for, that its networks cannot do
    "ldm-unconditional": {"prompt": {}, "upscaling": {"prompt": False, "upscaling": 2}},
    "ldm-upscale": {"segmentation": {"prompt": False, "segmentation": ["0"]}},
    "ldm-class": {"classes": {"prompt": False, "classes": 7}, "layout": {"prompt": False, "layout": True}},
    "ldm-semantic": {"segmentation": {"prompt": False, "segmentation": list("012345")}},
    "ldm-layout": {"layout": {"prompt": False, "classes": 63}},
}


def test_abilities_are_held_against_the_networks(tiny: Any, tmp_path: Path) -> None:
    family, _, _, file = tiny
    folder = convert(file, tmp_path / "folder", **options(family))
    index = folder / "model_index.json"
    for name, lie in LIES.get(family, {}).items():
        index.write_text(json.dumps({**json.loads(index.read_text()), "_fastldm": lie}))
        with pytest.raises(CheckpointError, match="does not fit the model's networks") as caught:
            load_components(folder)
        assert (caught.value.file, caught.value.key) == (str(folder), f"_fastldm.{name}")


def test_missing_and_surplus_tensors_are_named(tiny: Any, tmp_path: Path) -> None:
    family, _, _, file = tiny
    tensors = load_file(file)
    stages = tuple(STAGES.values())
    again = family == "ldm-inpaint"
    for key in list(tensors)[:: len(tensors) // 9]:
        if not key.startswith(stages) or ".loss." in key or "to_logits" in key:
            continue
        if again and key.startswith("cond_stage_model"):
            continue
        save_file({k: t for k, t in tensors.items() if k != key}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError):
            load_components(tmp_path / "a.safetensors", **options(family))
    for surplus in ("model.diffusion_model.surprise.weight", "cond_stage_model.surprise"):
        save_file({**tensors, surplus: torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load_components(tmp_path / "a.safetensors", **options(family))
        assert caught.value.key == surplus


@pytest.mark.parametrize("tiny", ["ldm-text"], indirect=True)
def test_words_of_a_text_model_are_not_in_its_file(tiny: Any) -> None:
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        load_components(tiny[3])
    many = Tokenizer.from_words([f"word{i}" for i in range(31000)], 8)
    with pytest.raises(CheckpointError, match="vocab_size"):
        load_components(tiny[3], tokenizer=many)


@pytest.mark.parametrize("tiny", ["ldm-class", "ldm-layout"], indirect=True)
def test_a_model_that_reads_no_text_takes_no_tokenizer(tiny: Any) -> None:
    with pytest.raises(InvalidArgument, match="tokenizer"):
        load_components(tiny[3], tokenizer=WORDS)


# Full-size files recognised from their headers: sparse, with the original's keys and shapes.


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_published_models_are_recognised(name: str, tmp_path: Path) -> None:
    model = PAPER_MODELS[name]
    configs = in_parts((model.unet, model.first_stage, *((model.conditioner,) if model.conditioner else ())))
    names, shapes, counts = paper_names(configs), {}, {}
    for part, config in configs.items():
        with torch.device("meta"):
            network = NETWORKS[type(config)](config)
        counts[part] = sum(parameter.numel() for parameter in network.parameters())
        for key, tensor in network.state_dict().items():
            single = names[part].to_single(key)
            assert single is not None
            rows, *rest = original_shape(part, key, config, tuple(tensor.shape))
            shapes[single] = (rows * len(names[part].to_folder(single)), *rest)
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)

    source = open_source(file)
    networks = build(source)._asdict()
    found = {part: network.config for part, network in networks.items() if network is not None}
    if name == "ldm-semantic512":  # the same weights as the other, which draws 256²
        found["unet"] = replace(found["unet"], sample_size=128)
    assert found == configs
    assert source.warnings == ()
    assert (source.scheduler["beta_start"], source.scheduler["beta_end"]) == model.betas
    assert {part: sum(e.numel for e in p.tensors.values()) for part, p in source.parts.items()} == counts
    assert isinstance(source.abilities, Abilities) and source.abilities.tasks


def test_pickled_as_they_were_published(tiny: Any, tmp_path: Path) -> None:
    """A .ckpt: read where that is allowed, and written as .safetensors."""
    family, configs, state, file = tiny
    torch.save({"state_dict": load_file(file), "global_step": 9}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load_components(tmp_path / "model.ckpt", **options(family))
    where = convert(
        tmp_path / "model.ckpt", tmp_path / "model.safetensors", allow_pickle=True, **options(family)
    )
    for model in (
        load_components(tmp_path / "model.ckpt", allow_pickle=True, **options(family)),
        load_components(where),
    ):
        assert model.family == family
        assert {part: network.config for part, network in model.networks.items()} == configs
        for part, network in model.networks.items():
            ours = network.state_dict()
            assert all(torch.equal(ours[key], tensor) for key, tensor in state[part].items())
