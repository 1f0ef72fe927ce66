"""What a saved state comes from: it is gone on from by nothing else, and how it learns may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import fastldm
from fastldm.errors import CheckpointError
from fastldm.training import run
from fastldm.training.origin import digest
from tests.training.test_folder import captioned
from tests.training.test_train import of_folder


@dataclass(frozen=True)
class Old:
    size: int = 3


@dataclass(frozen=True)
class New:
    size: int = 3
    more: float = 0.5


def test_a_digest_tells_things_apart() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    image = torch.arange(24, dtype=torch.uint8).view(1, 2, 3, 4)
    assert digest(layer) == digest(weights)
    assert digest(image) == digest(image.contiguous(memory_format=torch.channels_last))
    assert digest(Old(4)) == digest(New(4)) and digest(Old()) != digest(Old(4)) != digest(New(4, 0.6))
    nearly = layer.bias.detach().clone()
    nearly[0] = torch.nextafter(nearly[0], torch.tensor(9.0))
    things = [
        layer,
        weights | {"bias": nearly},
        image,
        image.int(),
        image.view(2, 12),
        ("a", "b"),
        ("ab",),
        None,
    ]
    things += [torch.tensor(1.0), torch.tensor(1.0).bfloat16(), torch.zeros(0)]
    assert len({digest(thing) for thing in things}) == len(things)
    assert digest("a", "b") != digest("ab") and len(digest()) == 16


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of pictures, with all its states."""
    folder = tmp_path_factory.mktemp("finished")
    for i, words in enumerate(("red sky", "red sea", "red sea", "a blue sea")):
        captioned(folder / "data", f"{i}.png", words, colour=(250 - 40 * i, 0, 50 * i))
    (folder / "mine.toml").write_text(of_folder(folder))
    run.main(folder / "mine.toml", str)
    return folder


def copied(finished: Path, to: Path) -> Path:
    """The run in a folder of its own."""
    shutil.copytree(finished, to, dirs_exist_ok=True)
    (to / "mine.toml").write_text((finished / "mine.toml").read_text().replace(str(finished), str(to)))
    return to / "mine.toml"


def weights(folder: Path) -> torch.Tensor:
    return fastldm.load(folder / "model").components.unet.conv_out.weight


def picture(folder: Path) -> None:
    captioned(folder / "data", "0.png", "red sky", colour=(1, 2, 3))


def caption(folder: Path) -> None:
    (folder / "data" / "0.txt").write_text("blue sky")


def text(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "mine.toml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def longer_autoencoder(folder: Path) -> None:
    text("steps = 3", "steps = 4")(folder)


def without_decoder(folder: Path) -> None:
    longer_autoencoder(folder)
    (folder / "run" / "decoder.pt").unlink()


@pytest.mark.parametrize(
    ("change", "file", "what"),
    [
        (picture, "autoencoder.pt", "another set of pictures"),
        (caption, "diffusion.pt", "another set of captions, another vocabulary"),
        (longer_autoencoder, "decoder.pt", "another autoencoder"),
        (without_decoder, "diffusion.pt", "another encoder"),
        (text("seed = 3", "seed = 4"), "autoencoder.pt", "another seed"),
        (
            text("hinted = 0.5", 'hinted = 0.5\nprediction = "epsilon"'),
            "diffusion.pt",
            "another prediction, another noise schedule",
        ),
        (
            text("heads = [1, 2]\nnorm_num_groups = 4", "heads = [1, 2]\nnorm_num_groups = 2"),
            "diffusion.pt",
            "another network",
        ),
    ],
    ids=["picture", "caption", "autoencoder", "encoder", "seed", "prediction", "groups"],
)
def test_what_a_finished_stage_came_from_may_not_change(
    finished: Path, tmp_path: Path, change: Callable[[Path], None], file: str, what: str
) -> None:
    config = copied(finished, tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=f"trained with {what}; remove it") as caught:
        run.main(config, str)
    assert caught.value.file == str(tmp_path / "run" / file)
    assert torch.equal(weights(finished), weights(tmp_path))


def test_how_it_learns_may_change(finished: Path, tmp_path: Path) -> None:
    """More steps, another rate, batch, share of hints: the diffusion goes on, and what is before it stays."""
    config = copied(finished, tmp_path)
    run.main(config, str)
    assert torch.equal(weights(finished), weights(tmp_path))
    kept = (tmp_path / "run" / "latents.pt").read_bytes()
    fit = "fit = { steps = 4, batch = 2, learning_rate = 1e-3, warmup = 1, ema_decay = 0.9, save_every = 2 }"
    text(fit, "fit = { steps = 6, batch = 3, learning_rate = 1e-2, accumulate = 2, save_every = 1 }")(
        tmp_path
    )
    text("hinted = 0.5", "hinted = 0.4\ncaption_dropout = 0.3")(tmp_path)
    run.main(config, str)
    assert not torch.equal(weights(finished), weights(tmp_path))
    assert (tmp_path / "run" / "latents.pt").read_bytes() == kept
    text("decoder = { steps = 2", "decoder = { steps = 3")(tmp_path)  # on which no latent depends
    text("hints = 5", "hints = 3")(tmp_path)
    run.main(config, str)
    assert len(torch.load(tmp_path / "run" / "latents.pt", weights_only=True)["hints"]) == 3


def test_states_of_before_origins_were_kept_are_gone_on_from(finished: Path, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    for file in (tmp_path / "run").glob("*.pt"):
        state = torch.load(file, weights_only=True)
        del state["origin"]
        torch.save(state, file)
    kept = (tmp_path / "run" / "latents.pt").read_bytes()
    run.main(config, str)
    assert torch.equal(weights(finished), weights(tmp_path))
    text("steps = 4", "steps = 5")(tmp_path)
    run.main(config, str)
    assert not torch.equal(weights(finished), weights(tmp_path))
    assert "start" in torch.load(tmp_path / "run" / "diffusion.pt", weights_only=True)["origin"]
    assert (tmp_path / "run" / "latents.pt").read_bytes() == kept
