"""A stand-in for the pipeline, and commands run in this process."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

import fastldm
import fastldm.checkpoint
from fastldm import cli, images
from fastldm.abilities import Abilities
from fastldm.arguments import Limits, check_generate

ABILITIES = Abilities(
    classes=2, labels=("cat", "dog"), layout=True, segmentation=("none", "cat"), inpainting=True, upscaling=4
)
LIMITS = Limits(1000, ("ddim", "euler"), "ddim", 8, 4, 32, 16, 6, 2**22, 16.0, abilities=ABILITIES)


@dataclasses.dataclass
class FakeResult:
    """Pictures whose colour is the seed, saved as a real result is."""

    request: object
    warnings: tuple = ("prompt cut", "pndm is\nmapped to ddim")
    timings: dict = dataclasses.field(default_factory=lambda: {"encode": 0.01, "denoise": 1.25})

    @property
    def seeds(self):
        return self.request.seeds

    def describe(self, index):
        facts = {"version": "0", "model": self.model, "model_hash": "abc"}
        return facts | {"arguments": self.request.arguments(index)}

    def save(self, path, as_grid=False):
        size = (self.request.width, self.request.height)
        pictures = [Image.new("RGB", size, (seed % 256, 0, 0)) for seed in self.seeds]
        made = [self.describe(k) for k in range(len(pictures))]
        return images.save_pictures(path, pictures, made, as_grid=as_grid)


class FakePipeline:
    def __init__(self):
        self.loaded, self.requests, self.model = [], [], "default"

    def load(self, path, **options):
        self.loaded.append((path, options))
        self.model = path
        return self

    def generate(self, **arguments):
        request = check_generate(LIMITS, **arguments)
        self.requests.append(request)
        result = FakeResult(request)
        result.model = self.model
        return result


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    """A pipeline that `fastldm.load` gives, in an empty working folder."""
    fake = FakePipeline()
    monkeypatch.setattr(fastldm, "load", fake.load, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def run(capsys):
    """run(*arguments): exit code, stdout, stderr of one command."""

    def command(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def fails(run):
    """fails(*arguments): the message of a command that has to end with code 2 and one line."""

    def command(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("fastldm: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return command


@pytest.fixture
def recorded():
    """recorded(**changes): what a PNG of ours tells about its making, with some arguments changed."""

    def made(**changes):
        arguments = check_generate(LIMITS, prompt="a").arguments(0) | changes
        return {"version": "0", "model": "default", "model_hash": None, "arguments": arguments}

    return made
