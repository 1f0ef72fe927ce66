"""A diffusion model of pixels, f = 1: trained, written without an autoencoder, loaded and sampled as any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastldm
from fastldm import cli
from fastldm.bench.models import open_model
from fastldm.checkpoint import convert, inspect
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.models.pixels import PixelAutoencoder
from fastldm.training import run
from fastldm.training.config import read_config
from tests.training.test_train import going_on

TINY = """
folder = "{folder}/run"
output = "{folder}/model"
data = "{folder}/pictures"
side = 16
seed = 3
threads = 1

[autoencoder]
kind = "pixels"

[text]
width = 16
heads = 2

[diffusion]
block_out_channels = [8, 16]
transformer_depth = [0, 1]
heads = [1, 2]
norm_num_groups = 4
hinted = 0.5
fit = {{ steps = 4, batch = 2, learning_rate = 1e-3, warmup = 1, ema_decay = 0.9, sample_every = 4 }}
"""


def write(folder: Path) -> Path:
    """Six pictures with captions, and a configuration for them."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(1)
    for i in range(6):
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(
            folder / "pictures" / f"{i}.png"
        )
        (folder / "pictures" / f"{i}.txt").write_text(f"number {i} is blue")
    file = folder / "pixels.toml"
    file.write_text(TINY.format(folder=folder))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("pixels")
    run.main(write(folder), str)
    return folder


def test_the_folder_says_that_there_is_no_autoencoder(trained: Path) -> None:
    model = trained / "model"
    assert [file.name for file in (model / "vae").iterdir()] == ["config.json"]
    said = json.loads((model / "vae" / "config.json").read_text())
    assert said == {"_class_name": "PixelAutoencoder", "scaling_factor": 1.0, "shift_factor": 0.0}
    index = json.loads((model / "model_index.json").read_text())
    assert index["vae"] == ["fastldm", "PixelAutoencoder"]
    assert json.loads((model / "scheduler" / "scheduler_config.json").read_text())["clip_sample"] is True
    assert inspect(model).parameters["vae"] == 0
    assert not (trained / "run" / "latents.pt").exists() and not list((trained / "run").glob("autoencoder*"))
    assert Image.open(trained / "run" / "samples-4.png").size[0] > 4 * 16


def test_latents_are_the_picture(trained: Path) -> None:
    pipe = fastldm.load(trained / "model")
    assert isinstance(pipe.components.vae, PixelAutoencoder)
    asked = {"steps": 3, "seed": [1, 2], "num_images": 1}
    latents, drawn = (
        pipe.generate(["number 3", "number 4"], output_type=kind, **asked).images for kind in ("latent", "np")
    )
    assert latents.shape == (2, 3, 16, 16) and latents.abs().max() <= 1  # x0 is held to the range of pixels
    assert np.array_equal(drawn, latents.mul(0.5).add(0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    assert drawn.std() > 0.05


def test_image_to_image_and_inversion(trained: Path) -> None:
    """Almost unchanged by a strength of one step in twenty; and back from the noise it stands for."""
    pipe = fastldm.load(trained / "model")
    picture = Image.open(trained / "pictures" / "0.png")
    near = pipe.generate("number 0", image=picture, strength=0.05, steps=20, output_type="np").images[0]
    far = pipe.generate("number 0", image=picture, strength=1.0, steps=20, output_type="np").images[0]
    given = np.asarray(picture) / 255
    assert np.abs(near - given).mean() < 0.1 < np.abs(far - given).mean()
    assert fastldm.invert(pipe, picture, "number 0", steps=2).shape == (1, 3, 16, 16)


def test_the_fast_path_is_the_reference(trained: Path) -> None:
    assert fastldm.verify(fastldm.load(trained / "model")).ok


def test_memory_is_estimated(trained: Path) -> None:
    """Steps at full size take far more than the decode, which only copies."""
    pipe = fastldm.load(trained / "model")
    large = pipe.footprint(pipe.check("number 1", width=512, height=512))
    assert large.denoise > 100 * 512 * 512 > large.decode / 100
    assert large.weights == pipe.footprint(pipe.check("number 1")).weights


def test_from_the_command_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "one.png"
    asked = ["generate", "number 1", "--model", str(trained / "model"), "--steps", "2", "-o", str(picture)]
    assert cli.main(asked) == 0 and Image.open(picture).size == (16, 16)
    assert cli.main(["info", str(trained / "model")]) == 0
    assert "vae: 0" in capsys.readouterr().out


def test_what_needs_an_autoencoder_says_so(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pixels, which no single file can hold"):
        convert(trained / "model", tmp_path / "model.safetensors")
    with pytest.raises(InvalidArgument, match="with an autoencoder"):
        open_model(str(trained / "model"), torch.float32, tmp_path)


def test_training_and_a_lora_go_on_from_it(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    text = TINY.format(folder=tmp_path).replace(f"{tmp_path}/pictures", f"{trained}/pictures")
    file.write_text(going_on(text, trained / "model"))
    first, then = (fastldm.load(each).components.unet for each in (trained / "model", run.main(file, str)))
    assert not torch.equal(first.conv_out.weight, then.conv_out.weight)
    settings = '[lora]\ntargets = ["conv1"]\nfit = { steps = 2, batch = 2, learning_rate = 1e-2 }\n'
    start = f'seed = 4\nstart = "{trained}/model"'
    file.write_text(text[: text.index("[auto")].replace("seed = 3", start) + settings)
    pipe = fastldm.load(trained / "model")
    pipe.load_lora(run.main(file, str))
    assert not torch.equal(
        pipe.components.unet.mid_block.resnets[0].conv1.weight, first.mid_block.resnets[0].conv1.weight
    )
    wrong = text.replace('kind = "pixels"', "block_out_channels = [8, 8]\nlatent_channels = 3")
    file.write_text(going_on(wrong, trained / "model"))
    with pytest.raises(InvalidArgument, match="pixels, as in") as caught:
        run.main(file, str)
    assert caught.value.name == "autoencoder.kind"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (('kind = "pixels"', 'kind = "pixels"\nlatent_channels = 3'), "autoencoder.latent_channels"),
        (
            ('kind = "pixels"', 'kind = "pixels"\nfit = { steps = 1, batch = 1, learning_rate = 1 }'),
            "autoencoder.fit",
        ),
        (('kind = "pixels"', 'kind = "kl"'), "autoencoder.block_out_channels"),
        (("hinted = 0.5", "reading = 0.5"), "diffusion.reading"),
        (("side = 16", "side = 17"), "side"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradiction_is_named(tmp_path: Path, change: tuple[str, str], name: str) -> None:
    file = write(tmp_path)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(InvalidArgument) as caught:
        read_config(file)
    assert caught.value.name == name
