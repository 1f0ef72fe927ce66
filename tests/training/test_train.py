"""The trainer: a whole tiny run, exact resume, its configuration, its pieces against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fastldm
from fastldm.errors import CheckpointError, InvalidArgument, NonFiniteOutput
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.training import run
from fastldm.training.autoencoder import autoencoder_loss, encode_all, psnr
from fastldm.training.config import TrainConfig, read_config
from fastldm.training.data import SceneData, to_model
from fastldm.training.fit import Average, FitSettings, fit
from fastldm.training.text import reader_loss

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


def problem(steps: int, **changes: object) -> tuple[nn.Module, FitSettings]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), FitSettings(
        steps=steps, batch=4, learning_rate=0.05, warmup=2, ema_decay=0.9, save_every=5, **changes
    )


def loss_of(module: nn.Module, batch: int = 4) -> object:
    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(batch, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


def test_resume_equals_an_unbroken_run_to_the_bit(tmp_path: Path) -> None:
    unbroken, settings = problem(20)
    fit("it", unbroken, loss_of(unbroken), settings, tmp_path / "a", 1, str)

    broken, _ = problem(20)
    plain = loss_of(broken)

    def dies(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == 13:
            raise KeyboardInterrupt
        return plain(step, generator)

    with pytest.raises(KeyboardInterrupt):
        fit("it", broken, dies, settings, tmp_path / "b", 1, str)
    fresh, _ = problem(20)
    nn.init.zeros_(fresh.weight)
    fit("it", fresh, loss_of(fresh), settings, tmp_path / "b", 1, str)
    assert torch.equal(fresh.weight, unbroken.weight) and torch.equal(fresh.bias, unbroken.bias)


def test_a_finished_run_changes_nothing_when_run_again(tmp_path: Path) -> None:
    first, settings = problem(5)
    fit("it", first, loss_of(first), settings, tmp_path, 1, str)
    again, _ = problem(5)
    fit("it", again, loss_of(again), settings, tmp_path, 1, lambda said: pytest.fail(said))
    assert torch.equal(first.weight, again.weight)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    first, settings = problem(5)
    fit("it", first, loss_of(first), settings, tmp_path, 1, str)
    other = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="another configuration"):
        fit("it", other, loss_of(other), settings, tmp_path, 1, str)


def test_nan_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    module, settings = problem(20)
    plain = loss_of(module)
    with pytest.raises(NonFiniteOutput, match="step 7"):
        fit(
            "it",
            module,
            lambda step, g: plain(step, g) * (float("nan") if step == 7 else 1),
            settings,
            tmp_path,
            1,
            str,
        )
    assert torch.load(tmp_path / "it.pt", weights_only=True)["step"] == 5


def test_average_against_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 0.0)
    average, expected = Average(module, 0.5), 0.0
    for n in range(30):
        nn.init.constant_(module.weight, float(n))
        average.update(module, n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert float(average.values["weight"]) == pytest.approx(expected, rel=1e-12)
    with average.swapped_in(module):
        assert module.weight.item() == pytest.approx(expected, rel=1e-12)
    assert module.weight.item() == 29


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = FitSettings(steps=110, batch=1, learning_rate=2.0, warmup=10)
    assert [settings.rate(0), settings.rate(9)] == [pytest.approx(0.2), pytest.approx(2.0)]
    assert settings.rate(60) == pytest.approx(1.0)
    assert settings.rate(110) == pytest.approx(0.0, abs=1e-12)


def test_autoencoder_loss_against_an_independent_transcription() -> None:
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=2)
    vae = AutoencoderKL(config).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    got = autoencoder_loss(vae, images, torch.Generator().manual_seed(5), kl_weight=0.01)
    posterior = vae.encode(images)
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    decoded = vae.decode(posterior.mean + (posterior.logvar / 2).exp() * noise)
    kl = sum(
        0.5 * (float(m) ** 2 + math.exp(float(v)) - 1 - float(v))
        for m, v in zip(posterior.mean.flatten(), posterior.logvar.flatten(), strict=True)
    )
    want = (images - decoded).abs().mean() + ((images - decoded) ** 2).mean() + 0.01 * kl / 2
    assert float(got) == pytest.approx(float(want), rel=1e-10)


def test_reader_loss_ignores_what_was_not_told() -> None:
    logits = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])]
    labels = torch.tensor([[0, -1], [1, 0]])
    want = ((math.log(1 + math.exp(-2)) + math.log(2)) / 2 + math.log(1 + math.exp(-5))) / 2
    assert float(reader_loss(logits, labels)) == pytest.approx(want, rel=1e-6)


def test_data_is_drawn_from_its_seed_and_captions_are_true() -> None:
    data, again = SceneData.draw(6, 9), SceneData.draw(6, 9)
    assert torch.equal(data.images, again.images) and data.scenes == again.scenes
    generator = torch.Generator().manual_seed(1)
    crops = data.crops(5, 32, generator)
    assert crops.shape == (5, 3, 32, 32) and -1 <= float(crops.min()) and float(crops.max()) <= 1
    texts, labels = data.captions([0, 1, 2, 3, 4, 5], generator)
    assert labels.shape == (6, 5)
    from fastldm.scenes.captions import FACTS

    kinds = list(FACTS).index("kind")
    for row, scene in enumerate(data.scenes):
        assert FACTS["kind"][labels[row, kinds]] == scene.objects[0].kind and texts[row]


def test_psnr_and_encoding_of_a_known_autoencoder() -> None:
    data = SceneData.draw(3, 1)
    config = VAEConfig(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=2,
        mid_block_add_attention=False,
    )
    vae = AutoencoderKL(config).eval()
    nn.init.zeros_(vae.decoder.conv_out.weight)
    nn.init.zeros_(vae.decoder.conv_out.bias)
    errors = [float(((128 - image.double()) ** 2).mean()) for image in data.images]
    want = sum(10 * math.log10(255**2 / error) for error in errors) / 3
    assert psnr(vae, data) == pytest.approx(want, rel=1e-5)
    with torch.no_grad():
        means, deviations = encode_all(vae, data, batch=2)
        posterior = vae.encode(to_model(data.images[2:]))
    torch.testing.assert_close(means[2:], posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(deviations[2:], (posterior.logvar / 2).exp(), rtol=1e-5, atol=1e-5)


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
