"""`fastldm train` with a [lora] section: from pictures or scenes to a folder that --lora takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastldm
from fastldm import cli
from fastldm.checkpoint import save_folder
from fastldm.errors import CheckpointError, InvalidArgument
from fastldm.training import lora, run
from fastldm.training.config import LoraConfig, read_config

TINY = """
folder = "{folder}/run"
output = "{folder}/lora"
start = "{model}"
data = "{folder}/pictures"
seed = 3
threads = 1

[lora]
rank = 2
targets = ["to_q", "to_v", "conv1"]
text_targets = ["q_proj"]
fit = {{ steps = 4, batch = 2, learning_rate = 2e-2, warmup = 1, save_every = 2, sample_every = 2 }}
"""


@pytest.fixture
def config(tmp_path: Path, base_folder: Path) -> Path:
    """A folder of five pictures, and what is to be learned from them."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(1)
    for i in range(5):
        Image.fromarray(rng.integers(256, size=(20, 18, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a red cat" if i else "the blue square")
    file = tmp_path / "lora.toml"
    file.write_text(TINY.format(folder=tmp_path, model=base_folder))
    return file


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("more", ["", "bfloat16 = true"])
def test_from_a_folder_of_pictures_to_the_command_line(
    config: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    config.write_text(more + config.read_text())
    assert cli.main(["train", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path}/lora"
    kept = {file.name for file in (tmp_path / "run").iterdir()}
    assert kept == {"latents.pt", "lora.csv", "lora.png", "lora.pt", "samples-2.png", "samples-4.png"}
    drawn = [np.asarray(Image.open(tmp_path / "run" / f"samples-{step}.png")) for step in (2, 4)]
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)

    learned = factors(tmp_path / "lora")
    assert {key.split(".")[0] for key in learned} == {"unet", "text_encoder"}
    assert all(each.any() for key, each in learned.items() if key.endswith("conv1.lora_B.weight"))
    command = ["generate", "a red cat", "--model", str(base_folder), "--steps", "2", "--quiet", "-o"]
    plain, changed = tmp_path / "plain.png", tmp_path / "changed.png"
    assert cli.main([*command, str(plain)]) == 0
    assert cli.main([*command, str(changed), "--lora", f"{tmp_path}/lora:0.8"]) == 0
    assert not np.array_equal(np.asarray(Image.open(plain)), np.asarray(Image.open(changed)))


def test_a_stopped_run_goes_on_to_the_same_bits(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.main(config, str)
    whole = factors(tmp_path / "lora")
    config.write_text(config.read_text().replace(f'"{tmp_path}/run"', f'"{tmp_path}/cut"'))
    true, calls = lora.without_some, []

    def dies(*arguments: object) -> list[str]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(lora, "without_some", dies)
        with pytest.raises(KeyboardInterrupt):
            run.main(config, str)
    assert torch.load(tmp_path / "cut" / "lora.pt", weights_only=True)["step"] == 2
    run.main(config, str)
    again = factors(tmp_path / "lora")
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_state_of_other_pictures_or_of_another_model_is_refused(config: Path, tmp_path: Path) -> None:
    def flat() -> bool:
        means = torch.load(tmp_path / "run" / "latents.pt", weights_only=True)["latents"][0]
        return bool((means == means[:1, :, :1, :1]).all())

    run.main(config, str)
    text = config.read_text()
    config.write_text(text.replace("rank = 2", "rank = 2\nalpha = 4"))
    with pytest.raises(CheckpointError, match=r"lora\.pt: was trained with another alpha; remove it"):
        run.main(config, str)
    other = tmp_path / "other"
    shutil.copytree(text.split('start = "')[1].split('"')[0], other)
    pipe = fastldm.load(other).components
    torch.nn.init.zeros_(pipe.vae.encoder.conv_out.weight)
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    parts = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    save_folder(other, **parts)
    assert not flat()
    config.write_text(re.sub('start = ".*"', f'start = "{other}"', text))
    with pytest.raises(CheckpointError, match="another start, another encoder; remove it"):
        run.main(config, str)
    assert flat()  # the latents are made anew, by an encoder that sees nothing
    config.write_text(text)
    (tmp_path / "pictures" / "0.txt").unlink()
    with pytest.raises(CheckpointError, match="another set of pictures, another set of captions; remove it"):
        run.main(config, str)


def test_without_data_it_learns_from_scenes(config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace(f'data = "{tmp_path}/pictures"', "pictures = 3\nstage = 2")
    config.write_text(
        text.replace(", sample_every = 2", "").replace("steps = 4, batch = 2", "steps = 1, batch = 1")
    )
    said: list[str] = []
    assert run.main(config, said.append) == tmp_path / "lora"
    assert said[0] == "drawing 3 pictures"
    means, deviations = torch.load(tmp_path / "run" / "latents.pt", weights_only=True)["latents"]
    assert means.shape == deviations.shape == (3, 4, 64, 64)


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (("[lora]", "[diffusion]\n[lora]"), "diffusion", "absent beside lora"),
        (("[lora]", "[autoencoder]\n[lora]"), "autoencoder", "absent beside lora"),
        (("[lora]", "[judge]\n[lora]"), "lora", "absent beside judge"),
        (("start =", "# start ="), "start", "required"),
        (("rank = 2", "rank = 0"), "lora.rank", "1…4096"),
        (("rank = 2", "ranks = 2"), "lora.ranks", "did you mean rank"),
        (("rank = 2", "alpha = 0"), "lora.alpha", "number"),
        (("rank = 2", "pictures = 3"), "lora.pictures", "one of"),
        (("seed = 3", "pictures = 3"), "pictures", "absent with data"),
        (('targets = ["to_q", "to_v", "conv1"]', "targets = [1]"), "lora.targets", "str"),
        (("seed = 3", 'device = "gpu"'), "device", "auto, cpu, cuda"),
        (('data = "', '# data = "'), "side", "128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_configuration_names_the_key(
    config: Path, change: tuple[str, str], name: str, says: str
) -> None:
    config.write_text("side = 16\n" + config.read_text().replace(*change))
    with pytest.raises(InvalidArgument, match=says) as caught:
        read_config(config)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (("to_v", "to_value"), "targets", "the nearest is to_v"),
        (("seed = 3", "side = 17"), "side", "a multiple of"),
    ],
    ids=["targets", "side"],
)
def test_what_does_not_fit_the_model_is_named_before_any_work(
    config: Path, tmp_path: Path, change: tuple[str, str], name: str, says: str
) -> None:
    config.write_text(config.read_text().replace(*change))
    with pytest.raises(InvalidArgument, match=says) as caught:
        run.main(config, str)
    assert caught.value.name == name and not (tmp_path / "run").exists()


def test_the_example_is_readable() -> None:
    config = read_config(Path(fastldm.__file__).parents[1] / "examples" / "lora.toml")
    assert isinstance(config, LoraConfig) and config.lora.fit.ema_decay == 0
