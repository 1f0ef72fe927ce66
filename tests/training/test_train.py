"""The trainer: a whole tiny run, exact resume, its configuration, its pieces against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastldm
from fastldm.errors import CheckpointError, InvalidArgument, NonFiniteOutput
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.scenes import COLOURS, KINDS, LANDSCAPES, STYLES, draw_scene, render
from fastldm.training import run
from fastldm.training.autoencoder import AutoencoderLoss, AutoencoderTraining, encode_all
from fastldm.training.config import AutoencoderSection, TrainConfig, read_config
from fastldm.training.data import SceneData, to_model
from fastldm.training.fit import Average, FitSettings, fit
from fastldm.training.reconstruction import reconstruction_report
from fastldm.training.text import QUESTIONS, UNTOLD, answers, reader_loss

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


@pytest.mark.parametrize(("name", "decay"), [("default", 0.9999), ("decay0.3", 0.3)])
def test_the_average_is_the_originals(recorded: Callable[[str], Any], name: str, decay: float) -> None:
    """LitEma counts an update before it weighs it, we after: its update n is our n + 1."""
    case = recorded("ldm/ema")
    weights = {key: nn.Parameter(value) for key, value in case.weight.items() if "frozen" not in key}
    module = nn.ParameterDict({key.replace(".", "/"): value for key, value in weights.items()})
    average = Average(module, decay)
    for step in range(6):
        for key, value in weights.items():
            value.data = case.input[f"step{step}.{key}"]
        average.update(module, step + 1)
        for key in weights:
            flat = key.replace(".", "")
            case.holds(f"{name}.step{step}.{flat}", average.values[key.replace(".", "/")])


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = FitSettings(steps=110, batch=1, learning_rate=2.0, warmup=10)
    assert [settings.rate(0), settings.rate(9)] == [pytest.approx(0.2), pytest.approx(2.0)]
    assert settings.rate(60) == pytest.approx(1.0)
    assert settings.rate(110) == pytest.approx(0.0, abs=1e-12)
    late = replace(settings, decay=0.2)
    assert late.rate(10) == late.rate(87) == 2.0
    assert late.rate(99) == pytest.approx(1.0) and late.rate(110) == pytest.approx(0.0, abs=1e-12)


def test_a_full_disk_is_named_and_the_last_good_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, settings = problem(20)
    save = torch.save

    def full(state: dict[str, object], file: Path) -> None:
        if state["step"] == 10:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        fit("it", module, loss_of(module), settings, tmp_path, 1, str)
    assert torch.load(tmp_path / "it.pt", weights_only=True)["step"] == 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.csv", "it.pt"]  # nothing half written


def test_the_curve_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    rows = []
    for steps in (120, 60, 120):  # as if the state of step 60 were all that a killed run left
        module, settings = problem(steps)
        fit("it", module, loss_of(module), settings, tmp_path, 1, str)
        rows.append([int(line.split(",")[0]) for line in (tmp_path / "it.csv").read_text().splitlines()])
        if steps == 120:
            (tmp_path / "it.pt").unlink()
    assert rows == [[50, 100, 120], [50, 60], [50, 60, 100, 120]]


@pytest.mark.parametrize(
    ("prediction", "objective", "sampler"),
    [
        ("flow", '{ timesteps = "logit_normal" }', "flow_euler"),
        ("epsilon", '{ weighting = "min_snr" }', "ddim"),
    ],
)
def test_other_objectives_end_with_models_that_generate(
    tmp_path: Path, prediction: str, objective: str, sampler: str
) -> None:
    file = tiny_config(tmp_path)
    more = f'hinted = 0.5\nprediction = "{prediction}"\nobjective = {objective}'
    file.write_text(
        file.read_text().replace("hinted = 0.5", more).replace("heads = 2\nfit", "heads = 2\n# fit")
    )
    pipe = fastldm.load(run.main(file, str))
    assert pipe.components.scheduler.sampler == sampler
    assert pipe.components.scheduler.prediction == {"epsilon": "epsilon", "flow": "flow"}[prediction]
    assert pipe.generate("a fish", steps=2).image.size == (128, 128)


def test_averages_are_kept_on_the_way(tmp_path: Path) -> None:
    module, settings = problem(6, keep_every=3)
    fit("it", module, loss_of(module), settings, tmp_path, 1, str)
    kept = torch.load(tmp_path / "it-6.pt", weights_only=True)
    assert torch.equal(kept["weight"], module.weight)
    assert not torch.equal(torch.load(tmp_path / "it-3.pt", weights_only=True)["weight"], module.weight)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_what_is_sampled_on_the_way(tmp_path: Path, ema_decay: float) -> None:
    """The averages, or without any the weights themselves; neither disturbs the training."""
    seen = {}
    for sampled in (3, 0):
        module, settings = problem(6, sample_every=sampled)
        settings = replace(settings, ema_decay=ema_decay)

        def sample(step: int, module: nn.Module = module) -> None:
            assert not module.training
            seen[step] = module.weight.detach().clone()

        fit("it", module, loss_of(module), settings, tmp_path / str(sampled), 1, str, sample=sample)
        seen[-sampled] = module.weight.detach().clone()
    assert torch.equal(seen[6], seen[-3]) and torch.equal(seen[6], seen[0])
    state = torch.load(tmp_path / "3" / "it.pt", weights_only=True)
    assert torch.equal(seen[6], state["module"]["weight"]) == (ema_decay == 0)
    assert not torch.equal(seen[3], seen[6])


def test_an_average_may_be_asked_for_later(tmp_path: Path) -> None:
    module, settings = problem(5)
    fit("it", module, loss_of(module), replace(settings, ema_decay=0.0), tmp_path, 1, str)
    more, settings = problem(10)
    fit("it", more, loss_of(more), settings, tmp_path, 1, str)
    assert torch.load(tmp_path / "it.pt", weights_only=True)["average"].keys() == {"weight", "bias"}


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


def test_autoencoder_loss_against_an_independent_transcription() -> None:
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=2)
    model = AutoencoderTraining(AutoencoderKL(config), width=5).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    segmentation = torch.randint(17, (2, 8, 8), dtype=torch.uint8)
    section = AutoencoderSection((8, 8), 2, FitSettings(1, 1, 1.0), kl_weight=0.01, noise=0.3, alignment=0.2)
    objective = AutoencoderLoss(section, torch.device("cpu"))
    got = objective(model, 0, images, segmentation, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    posterior = model.vae.encode(images)
    shape = (2, 2, 4, 4)
    latents = posterior.mean + (posterior.logvar / 2).exp() * torch.randn(
        shape, generator=generator, dtype=torch.float64
    )
    level = 0.3 * torch.rand((2, 1, 1, 1), generator=generator)
    latents = latents + level * posterior.mean.std() * torch.randn(shape, generator=generator)
    decoded = model.vae.decode(latents)
    kl = sum(
        0.5 * (float(m) ** 2 + math.exp(float(v)) - 1 - float(v))
        for m, v in zip(posterior.mean.detach().flatten(), posterior.logvar.detach().flatten(), strict=True)
    )
    first, second = model.head
    told = 0.0
    for row in range(2):
        for y in range(4):
            for x in range(4):
                hidden = first.weight[:, :, 0, 0] @ latents[row, :, y, x] + first.bias
                hidden = hidden / (1 + (-hidden).exp())
                logits = (second.weight[:, :, 0, 0] @ hidden + second.bias).detach().float()
                for pixel in segmentation[row, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten():
                    told -= float(logits[int(pixel)] - logits.logsumexp(0)) / 4
    want = (images - decoded).abs().mean() + ((images - decoded) ** 2).mean() + 0.01 * kl / 2
    assert float(got.detach()) == pytest.approx(float(want.detach()) + 0.2 * told / 32, rel=1e-6)


def test_reader_loss_ignores_what_was_not_told() -> None:
    logits = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])]
    labels = torch.tensor([[0, -1], [1, 0]])
    want = (math.log(1 + math.exp(-2)) + math.log(2) + math.log(1 + math.exp(-5))) / 2
    assert float(reader_loss(logits, labels)) == pytest.approx(want, rel=1e-6)


def test_data_is_drawn_from_its_seed_and_crops_go_with_their_maps() -> None:
    data, again = SceneData.draw(6, 9, stage=4), SceneData.draw(6, 9, stage=4)
    assert torch.equal(data.images, again.images) and data.scenes == again.scenes
    for i, scene in enumerate(data.scenes):
        drawn = render(scene)
        assert torch.equal(data.images[i], torch.from_numpy(drawn.image))
        assert torch.equal(data.segmentation[i], torch.from_numpy(drawn.segmentation))
    plain = SceneData.draw(6, 9)
    images, maps = plain.crops(20, 32, torch.Generator().manual_seed(1))
    assert images.shape == (20, 3, 32, 32) and maps.shape == (20, 32, 32)
    assert -1 <= float(images.min()) and float(images.max()) <= 1
    colours = [
        set(map(tuple, image.permute(1, 2, 0)[maps[i] == 0].tolist())) for i, image in enumerate(images)
    ]
    # Under the map's zeros lies the plain background, but for the soft edges of objects.
    assert all(len(found) == 1 for i, found in enumerate(colours) if not maps[i].any())


def test_answers_are_what_the_scene_shows() -> None:
    rng = np.random.default_rng(3)
    names = list(QUESTIONS)
    told = frozenset(
        {"kind", "count", "colour", "background", "size", "position", "relation", "style", "sky"}
    )
    for _ in range(60):
        scene = draw_scene(rng)
        found = dict(zip(names, answers(scene, told), strict=True))
        silent = dict(zip(names, answers(scene, frozenset({"kind", "count"})), strict=True))
        for kind in KINDS:
            things = [thing for thing in scene.objects if thing.kind == kind]
            assert found[f"number of {kind}"] == len(things) == silent[f"number of {kind}"]
            if found[f"colour of {kind}"] != UNTOLD:
                assert {COLOURS[found[f"colour of {kind}"]]} == {thing.colour for thing in things}
        grounds = (*COLOURS, *LANDSCAPES)
        assert grounds[found["background"]] == scene.background and STYLES[found["style"]] == scene.style
        assert {value for name, value in silent.items() if not name.startswith("number")} == {UNTOLD}
        assert all(UNTOLD <= value < QUESTIONS[name] for name, value in found.items())


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
    assert reconstruction_report(vae, data.images).psnr == pytest.approx(want, rel=1e-5)
    with torch.no_grad():
        means, deviations = encode_all(vae, data.images, batch=2)
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
        (("hinted = 0.5", 'prediction = "noise"'), "diffusion.prediction", "epsilon"),
        (("hinted = 0.5", 'objective = { loss = "hybrid" }'), "variance_type", "learned"),
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
