"""The trainer: whole tiny runs, and their configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastldm
from fastldm.errors import InvalidArgument
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
    file.write_text(plain.replace("seed = 3", f'seed = 4\nstart = "{tmp_path}/model"'))
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
        start = f'seed = 4\nstart = "{tmp_path}/model"'
        file.write_text(text.format(folder=tmp_path / name).replace("seed = 3", start))
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
        (("hinted = 0.5", 'objective = { loss = "hybrids" }'), "loss", "hybrid"),
        (("hinted = 0.5", 'objective = { timesteps = "logit_normal" }'), "timesteps", "loss_second_moment"),
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


def test_the_shipped_recipe_is_readable() -> None:
    recipe = Path(fastldm.__file__).parent / "training" / "scenes.toml"
    config = read_config(recipe)
    assert isinstance(config, TrainConfig) and config.diffusion.fit.steps > 0
    assert replace(config, seed=1).seed == 1
