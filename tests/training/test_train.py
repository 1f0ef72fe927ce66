"""The trainer: whole tiny runs, and their configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import fastldm
from fastldm.checkpoint import save_folder
from fastldm.errors import InvalidArgument
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.training import run
from fastldm.training.config import TrainConfig, read_config

TINY = """
folder = "{folder}/run"
output = "{folder}/model"
seed = 3
pictures = 12
threads = 1

[autoencoder]
block_out_channels = [8, 8]
latent_channels = 4
norm_num_groups = 4
crop = 32
noise = 0.2
alignment = 0.1
fit = {{ steps = 3, batch = 4, learning_rate = 1e-3, warmup = 1, ema_decay = 0.9 }}
decoder = {{ steps = 2, batch = 4, learning_rate = 1e-3, warmup = 1 }}

[text]
width = 16
heads = 2
fit = {{ steps = 3, batch = 8, learning_rate = 1e-3, warmup = 1 }}

[diffusion]
block_out_channels = [8, 16]
transformer_depth = [0, 1]
heads = [1, 2]
norm_num_groups = 4
pictures = 8
reading = 0.2
hinted = 0.5
hints = 5
fit = {{ steps = 4, batch = 2, learning_rate = 1e-3, warmup = 1, ema_decay = 0.9, save_every = 2 }}
"""


def of_folder(folder: Path) -> str:
    """The same on pictures of 32 × 32 in `folder/data`, without what only scenes can tell."""
    told = ("pictures = 12\n", "alignment = 0.1\n", "pictures = 8\n", "reading = 0.2\n")
    text = TINY.format(folder=folder)
    for line in (*told, "fit = { steps = 3, batch = 8, learning_rate = 1e-3, warmup = 1 }\n"):
        text = text.replace(line, "")
    return f'data = "{folder}/data"\nside = 32\n{text}'


def going_on(text: str, start: Path) -> str:
    """The same from a model on, whose text encoder it keeps."""
    text = text[: text.index("[text]")] + text[text.index("[diffusion]") :]
    return text.replace("seed = 3", f'seed = 4\nstart = "{start}"')


def tiny_config(folder: Path) -> Path:
    file = folder / "tiny.toml"
    file.write_text(TINY.format(folder=folder))
    return file


def test_a_whole_run_ends_with_a_model_that_generates(tmp_path: Path) -> None:
    said: list[str] = []
    output = run.main(tiny_config(tmp_path), said.append)
    assert output == tmp_path / "model" and "dB" in "".join(said)
    result = fastldm.load(output).generate("a large red fish", steps=2)
    assert result.image.size == (128, 128) and not result.warnings
    assert fastldm.load(output).generate("a zebra", steps=1).warnings == ("unknown words: zebra",)


@pytest.mark.parametrize(
    ("prediction", "objective", "sampler"),
    [
        ("flow", '{ timesteps = "logit_normal" }', "flow_euler"),
        ("epsilon", '{ weighting = "min_snr" }', "ddim"),
        ("v_prediction", '{ loss = "hybrid" }', "ddpm"),
        ("epsilon", '{ loss = "vlb", timesteps = "loss_second_moment" }', "ddpm"),
    ],
)
def test_other_objectives_end_with_models_that_generate(
    tmp_path: Path, prediction: str, objective: str, sampler: str
) -> None:
    file = tiny_config(tmp_path)
    more = f'hinted = 0.5\nprediction = "{prediction}"\nobjective = {objective}'
    text = file.read_text().replace("hinted = 0.5", more).replace("heads = 2\nfit", "heads = 2\n# fit")
    file.write_text(text.replace("save_every = 2", "save_every = 2, sample_every = 4"))
    pipe = fastldm.load(run.main(file, str))
    assert (tmp_path / "run" / "samples-4.png").exists()
    assert pipe.components.scheduler.sampler == sampler
    assert pipe.components.scheduler.prediction == prediction
    assert pipe.components.unet.config.learned_variance == (sampler == "ddpm")
    for name in (None, "flow_euler" if prediction == "flow" else "ddim"):
        assert pipe.generate("a fish", steps=2, sampler=name).image.size == (128, 128)
    other = "hybrid" if sampler != "ddpm" else "simple"
    plain = file.read_text().replace(f"objective = {objective}", f'objective = {{ loss = "{other}" }}')
    file.write_text(going_on(plain, tmp_path / "model"))
    if prediction != "flow":
        with pytest.raises(InvalidArgument, match=f"loss='{other}': allowed is "):
            run.main(file, str)


def test_training_goes_on_from_a_model_folder(tmp_path: Path) -> None:
    """The encoder, and so every latent, stays unless the autoencoder has a fit of its own."""
    run.main(tiny_config(tmp_path), str)
    first = fastldm.load(tmp_path / "model").components
    own = "fit = {{ steps = 3, batch = 4, learning_rate = 1e-3, warmup = 1, ema_decay = 0.9 }}\n"
    for name, text in (("decoder", TINY.replace(own, "")), ("all", TINY)):
        file = tmp_path / "more.toml"
        file.write_text(going_on(text.format(folder=tmp_path / name), tmp_path / "model"))
        run.main(file, str)
        then = fastldm.load(tmp_path / name / "model").components
        pairs = zip(first.vae.encoder.parameters(), then.vae.encoder.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (name == "decoder")
        assert (first.vae.config == then.vae.config) == (name == "decoder")
        assert not torch.equal(first.vae.decoder.conv_out.weight, then.vae.decoder.conv_out.weight)
        assert not torch.equal(first.unet.conv_out.weight, then.unet.conv_out.weight)
        assert not torch.equal(
            first.text_encoder.text_model.embeddings.token_embedding.weight,
            then.text_encoder.text_model.embeddings.token_embedding.weight,
        )


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (("pictures = 12", "pictured = 12"), "pictured", "pictures"),
        (("steps = 4, batch = 2", "stepps = 4, batch = 2"), "diffusion.fit.stepps", "steps"),
        (("pictures = 12", 'pictures = "12"'), "pictures", "int"),
        (("heads = [1, 2]", "heads = [1, 2.5]"), "diffusion.heads", "int"),
        (("latent_channels = 4", "crops = 4"), "autoencoder.crops", "crop"),
        (("block_out_channels = [8, 16]", ""), "diffusion.block_out_channels", "required"),
        (("seed = 3", "seed = ["), "config", "TOML"),
        (("hinted = 0.5", 'prediction = "noise"'), "diffusion.prediction", "epsilon"),
        (("hinted = 0.5", "hinted = 3"), "diffusion.hinted", "0…1"),
        (("hinted = 0.5", ""), "diffusion.hints", "absent without hinted"),
        (("hints = 5", "hints = 0"), "diffusion.hints", "1…"),
        (("hints = 5", "caption_dropout = 7"), "diffusion.caption_dropout", "0…1"),
        (("hints = 5", "stage = 9"), "diffusion.stage", "1…4"),
        (("hints = 5", "shift = 3"), "diffusion.shift", "absent without prediction = flow"),
        (("hints = 5", "objective = { gamma = 1 }"), "diffusion.objective.gamma", "weighting = min_snr"),
        (
            ("heads = [1, 2]\nnorm_num_groups = 4", "heads = [1, 2]\nnorm_num_groups = 3"),
            "diffusion.norm_num_groups",
            "a divisor",
        ),
        (("heads = [1, 2]", "heads = [1, 3]"), "diffusion.heads", "divisors"),
        (("heads = [1, 2]", "heads = [1]"), "diffusion.heads", "2 numbers"),
        (("width = 16", "width = 15"), "text.heads", "a divisor"),
        (("threads = 1", "threads = 0"), "threads", "1…"),
        (("save_every = 2", "accumulate = 0"), "diffusion.fit.accumulate", "1…"),
        (("save_every = 2", "save_every = 0"), "diffusion.fit.save_every", "1…"),
        (("crop = 32", "crop = 33"), "autoencoder.crop", "a multiple of 2, at most the side, 128"),
        (("crop = 32", "crop = 130"), "autoencoder.crop", "at most"),
        (("crop = 32", "codes = 7"), "autoencoder.codes", "absent with kl"),
        (("crop = 32", "whole = 1.5"), "autoencoder.whole", "0…1"),
        (
            ("latent_channels = 4\nnorm_num_groups = 4", "latent_channels = 4\nnorm_num_groups = 5"),
            "autoencoder.norm_num_groups",
            "a divisor",
        ),
        (("seed = 3", 'start = "model"'), "text.fit", "absent with start"),
        (("hinted = 0.5", 'objective = { loss = "hybrids" }'), "diffusion.objective.loss", "hybrid"),
        (
            ("hinted = 0.5", 'hinted = 0.5\nobjective = { timesteps = "logit_normal" }'),
            "diffusion.objective.timesteps",
            "loss_second_moment",
        ),
        (("threads = 1", "side = 64"), "side", "128"),
        (("threads = 1", 'data = "pictures"'), "text.fit", "absent with data"),
        (("crop = 32", 'kind = "vae"'), "autoencoder.kind", "kl, vq"),
        (("crop = 32", "attention_levels = [2]"), "autoencoder.attention_levels", "levels 0 to 1"),
        (("crop = 32", 'lpips = "lpips.safetensors"'), "autoencoder.lpips", "perceptual"),
        (("crop = 32", "adversary = { start = 0 }"), "autoencoder.decoder", "adversary"),
        (("crop = 32", 'adversary = { start = 0, loss = "hing" }'), "autoencoder.adversary.loss", "hinge"),
    ],
)
def test_a_bad_configuration_names_the_key(
    tmp_path: Path, change: tuple[str, str], name: str, says: str
) -> None:
    file = tiny_config(tmp_path)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(InvalidArgument, match=says) as caught:
        read_config(file)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("reading = 0.2", "diffusion.reading"),
        ("pictures = 8", "diffusion.pictures"),
        ("stage = 2", "diffusion.stage"),
        ("hints = 6", ""),
    ],
)
def test_what_only_scenes_have_is_refused_with_data(tmp_path: Path, line: str, name: str) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(of_folder(tmp_path).replace("hints = 5", line))
    if not name:
        read_config(file)
        return
    with pytest.raises(InvalidArgument, match="absent with data") as caught:
        read_config(file)
    assert caught.value.name == name


STABLE = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""The process of Stable Diffusion 1."""


def test_training_goes_on_in_the_process_of_the_model_it_starts_from(tmp_path: Path) -> None:
    """A small Stable Diffusion, which has no channels for hints."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_words(["red", "blue"], 8)
    unet = UNetConfig(
        4, 4, (8, 16), 1, (1, 2), (0, 1), cross_attention_dim=16, norm_num_groups=4, sample_size=8
    )
    text = CLIPTextConfig(
        tokenizer.vocab_size, 16, 64, 2, 2, 8, eos_token_id=tokenizer.eos_id, projection_dim=16
    )
    vae = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    save_folder(
        tmp_path / "start",
        unet=UNet(unet),
        vae=AutoencoderKL(vae),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=STABLE,
    )
    (tmp_path / "data").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    config = f"""
folder = "{tmp_path}/run"
output = "{tmp_path}/model"
start = "{tmp_path}/start"
data = "{tmp_path}/data"
side = 16
threads = 1
[autoencoder]
block_out_channels = [8, 8]
latent_channels = 4
norm_num_groups = 4
[diffusion]
block_out_channels = [8, 16]
transformer_depth = [0, 1]
heads = [1, 2]
norm_num_groups = 4
fit = {{ steps = 2, batch = 2, learning_rate = 1e-3, sample_every = 2 }}
"""
    file = tmp_path / "on.toml"
    for line, name in (
        ('prediction = "v_prediction"', "diffusion.prediction"),
        ("hinted = 0.5", "diffusion.hinted"),
        ('objective = { loss = "hybrid" }', "diffusion.objective.loss"),
        ('prediction = "flow"\nobjective = { timesteps = "logit_normal" }', "diffusion.prediction"),
    ):
        file.write_text(f"{config}{line}\n")
        with pytest.raises(InvalidArgument, match=f"as in {tmp_path}/start") as caught:
            run.main(file, str)
        assert caught.value.name == name and not (tmp_path / "run").exists()
    for line, other, name in (
        ("latent_channels = 4", "latent_channels = 8", "autoencoder.latent_channels"),
        ("latent_channels = 4", "latent_channels = 4\nlayers_per_block = 3", "autoencoder.layers_per_block"),
        ("latent_channels = 4", "latent_channels = 4\nmid_attention = false", "autoencoder.mid_attention"),
        ("latent_channels = 4", 'latent_channels = 4\nkind = "vq"', "autoencoder.kind"),
        ("transformer_depth = [0, 1]", "transformer_depth = [1, 1]", "diffusion.transformer_depth"),
        ("heads = [1, 2]", "heads = [1, 4]", "diffusion.heads"),
        ("heads = [1, 2]", "heads = [1, 2]\nlayers_per_block = 2", "diffusion.layers_per_block"),
    ):
        assert line in config
        file.write_text(config.replace(line, other))
        with pytest.raises(InvalidArgument, match=f"as in {tmp_path}/start") as caught:
            run.main(file, str)
        assert caught.value.name == name and not (tmp_path / "run").exists()
    file.write_text(config)
    run.main(file, str)
    first, then = (fastldm.load(tmp_path / name).components for name in ("start", "model"))
    assert then.scheduler == first.scheduler and then.scheduler.class_name == "PNDMScheduler"
    assert not torch.equal(first.unet.conv_out.weight, then.unet.conv_out.weight)


def test_the_parts_of_the_shipped_recipe_go_on_from_each_other() -> None:
    parts = [
        read_config(Path(fastldm.__file__).parent / "training" / f"{name}.toml")
        for name in ("scenes", "scenes_on", "scenes_arranged")
    ]
    assert all(isinstance(part, TrainConfig) and part.diffusion.fit.steps > 0 for part in parts)
    assert [part.start for part in parts] == [None, *(part.output for part in parts[:-1])]
    for part in parts[1:]:
        assert part.diffusion.block_out_channels == parts[0].diffusion.block_out_channels
        assert part.autoencoder.latent_channels == parts[0].autoencoder.latent_channels
