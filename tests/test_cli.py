"""The command line: one-line errors, replay, files; a small stand-in for the pipeline, the real validator."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastldm
import fastldm.checkpoint
from fastldm import cli, images
from fastldm.arguments import Limits, check_generate
from fastldm.errors import CheckpointError, OutOfMemory

LIMITS = Limits(1000, ("ddim", "euler"), "ddim", 8, 4, 32, 16, 6, 2**22, 16.0)


@dataclasses.dataclass
class FakeResult:
    """Pictures whose colour is the seed, saved as a real result is."""

    request: object
    warnings: tuple = ("prompt cut", "pndm is\nmapped to ddim")
    timings: dict = dataclasses.field(default_factory=lambda: {"encode": 0.01, "denoise": 1.25})

    @property
    def seeds(self):
        return self.request.seeds

    def save(self, path, as_grid=False):
        size = (self.request.width, self.request.height)
        pictures = [Image.new("RGB", size, (seed % 256, 0, 0)) for seed in self.seeds]
        facts = {"version": "0", "model": self.model, "model_hash": "abc"}
        made = [facts | {"arguments": self.request.arguments(k)} for k in range(len(pictures))]
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


def run(capsys, *arguments):
    """Exit code, stdout, stderr of one command."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """The message of a command that has to end with code 2 and one line."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fastldm: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def test_generate_writes_the_picture_and_prints_its_path(pipe, capsys):
    code, out, err = run(capsys, "generate", "a house", "--steps", 9, "--seed", 7, "-o", "house.png")
    assert (code, out) == (0, "house.png\n")
    assert err.splitlines()[:2] == [
        "fastldm: warning: prompt cut",
        "fastldm: warning: pndm is mapped to ddim",
    ]
    assert "seed 7; load 0.0" in err and "encode 0.01 s, denoise 1.25 s" in err
    made = images.read_metadata("house.png")["fastldm"]["arguments"]
    assert (made["prompt"], made["steps"], made["seed"], made["guidance_scale"]) == ("a house", 9, 7, 7.5)
    assert pipe.loaded == [("default", {})]
    assert pipe.requests[0].progress is None  # stderr is no terminal here


def test_every_option_reaches_the_pipeline(pipe, capsys, tmp_path):
    Image.new("RGB", (16, 24)).save("in.png")
    options = (
        "generate a --negative b --steps 5 --guidance -2.5 --seed -3 --num-images 2 --width 16 --height 8 "
        "--sampler euler --eta 0.25 --image in.png --strength 0.5 --model m --device cpu --dtype bf16 "
        "--config c --tokenizer t --backends reference --quiet"
    )
    code, out, err = run(capsys, *options.split())
    assert (code, out) == (0, "out-0.png\nout-1.png\n")
    assert err.count("\n") == 2  # the warnings stay, the timings go
    loading = {"device": "cpu", "dtype": "bf16", "config": "c", "tokenizer": "t", "backends": "reference"}
    assert pipe.loaded == [("m", loading)]
    made = pipe.requests[0]
    assert (made.prompts, made.negatives, made.seeds) == (["a", "a"], ["b", "b"], [-3, -2])
    assert (made.steps, made.guidance_scale, made.width, made.height) == (5, -2.5, 16, 8)
    assert (made.sampler, made.eta, made.strength, made.image.shape) == ("euler", 0.25, 0.5, (1, 8, 16, 3))


def test_seed_list_and_random(pipe, capsys):
    assert run(capsys, "generate", "a", "--num-images", 2, "--seed", "5,5")[0] == 0
    assert run(capsys, "generate", "a", "--seed", "random")[0] == 0
    assert pipe.requests[0].seeds == [5, 5]
    assert pipe.requests[1].seeds != [0]


def test_grid_is_one_file(pipe, capsys):
    code, out, _ = run(capsys, "generate", "a", "--num-images", 3, "--grid")
    assert (code, out) == (0, "out.png\n")
    assert Image.open("out.png").size == (64, 32)
    assert os.listdir() == ["out.png"]


def test_replay_makes_the_picture_again(pipe, capsys):
    options = ("--steps", 9, "--seed", 2**64 - 3, "--negative", "n", "--width", 16, "--num-images", 2)
    run(capsys, "generate", "größe 🐟", *options)
    code, out, _ = run(capsys, "generate", "--replay", "out-1.png")
    assert (code, out) == (0, "out-1-replay.png\n")
    assert Path("out-1-replay.png").read_bytes() == Path("out-1.png").read_bytes()
    code, _, _ = run(capsys, "generate", "other", "--replay", "out-1.png", "--steps", 3, "-o", "new.png")
    changed = images.read_metadata("new.png")["fastldm"]["arguments"]
    assert (code, changed["prompt"], changed["steps"], changed["seed"]) == (0, "other", 3, 2**64 - 2)


def test_replay_from_an_image_wants_the_image(pipe, capsys):
    Image.new("RGB", (32, 16), "red").save("in.png")
    Image.new("RGB", (32, 16), "blue").save("other.png")
    assert run(capsys, "generate", "a", "--image", "in.png", "--strength", 0.5)[0] == 0
    assert "image=None: allowed is --image FILE" in fails(capsys, "generate", "--replay", "out.png")
    code, _, err = run(capsys, "generate", "--replay", "out.png", "--image", "in.png")
    assert code == 0 and "not the picture used before" not in err
    assert Path("out-replay.png").read_bytes() == Path("out.png").read_bytes()
    code, _, err = run(capsys, "generate", "--replay", "out.png", "--image", "other.png")
    assert code == 0 and "--image is not the picture used before" in err


def write_png(name, made):
    Path(name).write_bytes(images.encode_png(Image.new("RGB", (8, 8)), made))


def recorded(**changes):
    arguments = check_generate(LIMITS, prompt="a").arguments(0) | changes
    return {"version": "0", "model": "default", "model_hash": None, "arguments": arguments}


def test_a_replayed_file_is_not_trusted(pipe, capsys):
    """A foreign PNG names no path to read, no Hub id to fetch and no argument beyond those we record."""
    Image.new("RGB", (8, 8)).save("secret.png")
    write_png("evil.png", recorded(image="secret.png", callback="x", output_type="latent"))
    assert run(capsys, "generate", "--replay", "evil.png")[0] == 0
    assert pipe.requests[0].image is None and pipe.requests[0].output_type == "pil"
    write_png("hub.png", recorded() | {"model": "some/repository"})
    assert "model='some/repository': allowed is --model PATH" in fails(
        capsys, "generate", "--replay", "hub.png"
    )
    write_png("junk.png", recorded(steps="many"))
    assert "steps='many'" in fails(capsys, "generate", "--replay", "junk.png")
    write_png("latents.png", recorded(not_recorded={"latents": True}))
    assert "made without latents=" in fails(capsys, "generate", "--replay", "latents.png")
    for model in (None, 7, ["default"]):
        write_png("model.png", recorded() | {"model": model})
        assert "allowed is --model PATH" in fails(capsys, "generate", "--replay", "model.png")


@pytest.mark.parametrize("width", [16.0, "16", True, None, 10**9, -8, [8]])
def test_a_replayed_size_is_checked(pipe, capsys, width):
    Image.new("RGB", (8, 8)).save("in.png")
    write_png("odd.png", recorded(width=width, strength=0.5, not_recorded={"image": "0"}))
    code, _, err = run(capsys, "generate", "--replay", "odd.png", "--image", "in.png")
    assert code == 0 if width is None else (code == 2 and "error: width=" in err)


def test_replay_of_what_fastldm_did_not_make(pipe, capsys):
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "a PNG made by fastldm" in fails(capsys, "generate", "--replay", "plain.png")
    assert "a file that exists" in fails(capsys, "generate", "--replay", "none.png")
    assert pipe.loaded == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps=0: allowed is an integer 1…1000"),
        ("--steps 2.5", "argument --steps: invalid int value: '2.5'"),
        ("--steps 1001", "steps=1001"),
        ("--seed x", "argument --seed: 'x': allowed is an integer"),
        ("--seed 18446744073709551616", "seed=18446744073709551616"),
        ("--seed 1,2", "seed=[1, 2]: allowed is an integer, or a list of one an image (1)"),
        ("--guidance nan", "guidance_scale=nan"),
        ("--guidance 1e30", "guidance_scale=1e+30"),
        ("--width 100", "width=100: allowed is a multiple of 8"),
        ("--num-images 0", "num_images=0"),
        ("--num-images 99999999", "num_images=99999999"),
        ("--sampler plms", "sampler='plms': allowed is one of ddim, euler"),
        ("--strength 0.5", "strength=0.5: allowed is None without image="),
        ("--image none.png", "image='none.png': allowed is a file that exists"),
        ("--ste 5", "unrecognized arguments: --ste"),
        ("--no-such", "unrecognized arguments: --no-such"),
        ("-o out.jpg", "path='out.jpg': allowed is a file name that ends in .png"),
        ("-o none/out.png", "path='none/out.png': allowed is a file in a folder that can be written"),
    ],
)
def test_user_errors_are_one_line(pipe, capsys, options, message):
    assert message in fails(capsys, "generate", "a", *options.split())
    assert os.listdir() == []


def test_a_prompt_is_needed(pipe, capsys):
    assert "prompt=None" in fails(capsys, "generate")
    assert "prompt='\\ud800'" in fails(capsys, "generate", "\ud800")


def test_the_output_is_checked_before_the_model_is_loaded(pipe, capsys):
    fails(capsys, "generate", "a", "-o", "none/out.png")
    os.mkdir("out-1.png")
    assert "path='out-1.png'" in fails(capsys, "generate", "a", "--num-images", 2)
    assert pipe.loaded == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            CheckpointError("m.safetensors", "unet.x", "is\nmissing"),
            2,
            "error: m.safetensors: unet.x: is missing",
        ),
        (FileNotFoundError(2, "No such file or directory", "m"), 2, "error: [Errno 2] No such file"),
        (OutOfMemory("needs 3 GiB"), 2, "error: needs 3 GiB"),
        (ModuleNotFoundError("No module named 'torch'"), 2, "error: No module named 'torch'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_of_the_work_are_one_line(pipe, capsys, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipe, "generate", fail)
    found, out, err = run(capsys, "generate", "a")
    assert (found, out) == (code, "")
    assert err.startswith(f"fastldm: {line}") and err.count("\n") == 1
    assert os.listdir() == []


def test_a_bug_is_not_hidden(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "a"])


def test_a_failed_write_keeps_the_old_file(pipe, capsys, monkeypatch):
    Path("out.png").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, out, err = run(capsys, "generate", "a")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "fastldm: error: cannot write out.png: no space left on device"
    assert os.listdir() == ["out.png"] and Path("out.png").read_bytes() == b"old"


def test_info_of_a_picture(pipe, capsys):
    run(capsys, "generate", "a house", "--seed", 7)
    code, out, _ = run(capsys, "info", "out.png")
    assert code == 0
    assert out.startswith("a house\nSteps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 32x16")
    assert "\n  prompt: a house\n" in out
    code, out, _ = run(capsys, "info", "--json", "out.png")
    assert json.loads(out) == images.read_metadata("out.png")
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "a PNG that says how it was made" in fails(capsys, "info", "plain.png")


def test_info_of_a_model(pipe, capsys, monkeypatch):
    @dataclasses.dataclass
    class Info:
        family: str = "sd1"
        parameters: dict = dataclasses.field(default_factory=lambda: {"unet": 859520964})
        files: tuple = ("a", "b")
        warnings: tuple = ()
        hash: str | None = None

    asked = []
    monkeypatch.setattr(fastldm.checkpoint, "inspect", lambda *a, **k: asked.append((a, k)) or Info())
    code, out, _ = run(capsys, "info", "model", "--config", "c.json")
    assert code == 0 and asked == [(("model",), {"config": "c.json"})]
    assert out == "family: sd1\nparameters:\n  unet: 859,520,964\nfiles: a, b\nwarnings: none\n"
    assert json.loads(run(capsys, "info", "model", "--json")[1])["parameters"] == {"unet": 859520964}


def test_info_and_convert_of_missing_models(pipe, capsys):
    Path("foreign.safetensors").write_bytes(b"not a model")
    for path in ("./none", "./none.safetensors", "foreign.safetensors"):
        fails(capsys, "info", path)
        fails(capsys, "convert", path, "new")
    assert os.listdir() == ["foreign.safetensors"]


def test_convert_prints_what_it_wrote(pipe, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(fastldm.checkpoint, "convert", lambda *a, **k: asked.append((a, k)) or Path(a[1]))
    assert run(capsys, "convert", "a", "b.safetensors", "--overwrite")[:2] == (0, "b.safetensors\n")
    assert asked == [(("a", "b.safetensors"), {"overwrite": True})]


def test_progress_bar_only_on_a_terminal(pipe, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_is_terminal", lambda stream: True)
    run(capsys, "generate", "a")
    run(capsys, "generate", "a", "--quiet")
    assert callable(pipe.requests[0].progress)
    assert pipe.requests[1].progress is None


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["generate", "a", "b"], ["info"], ["convert", "a"], ["train"]]
)
def test_wrong_commands(capsys, arguments):
    fails(capsys, *arguments)


def shell(*arguments, **options):
    command = [sys.executable, "-m", "fastldm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_and_version_import_little(arguments):
    code = (
        "import sys; from fastldm.cli import main\n"
        f"try: main({arguments})\n"
        "finally: assert not {'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "fastldm" in done.stdout, done.stderr


def test_module_runs_as_a_program(tmp_path):
    done = shell("generate", "--replay", "none.png", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastldm: error: path='none.png': allowed is a file that exists\n"


ROOT = Path(cli.__file__).parents[1]


def test_a_closed_pipe_is_quiet(tmp_path):
    """`fastldm info out.png | true`: the reader is gone before the first line."""
    write_png(tmp_path / "out.png", recorded())
    for arguments in (["info", str(tmp_path / "out.png")], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "fastldm", *arguments]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
        os.close(write)
        assert done.stderr == b""


def test_a_terminal_that_cannot_show_a_prompt(tmp_path):
    made = recorded(prompt="größe")
    write_png(tmp_path / "out.png", made)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = shell("info", str(tmp_path / "out.png"), env=environment)
    assert done.returncode == 0 and done.stdout.startswith("gr\\xf6\\xdfe\n"), done.stderr


def test_an_image_bomb_is_one_line(pipe, capsys):
    """A PNG header of 144 million pixels; Pillow would add a warning of two lines."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 12000, 12000, 1, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(9)), b"IEND"]
    sized = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    Path("bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(sized))
    assert "at most 67108864 pixels" in fails(capsys, "generate", "a", "--image", "bomb.png")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a model of a few thousand random weights."""
    torch = pytest.importorskip("torch")
    from fastldm.checkpoint import save_folder
    from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
    from fastldm.models.tokenizer import Tokenizer
    from fastldm.models.unet import UNet, UNetConfig
    from fastldm.models.vae import AutoencoderKL, VAEConfig

    tokenizer = Tokenizer.from_words(["a", "house"], 6)
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=6,
        eos_token_id=tokenizer.eos_id,
    )
    unet = UNetConfig(
        block_out_channels=(8, 8),
        heads=(1, 1),
        transformer_depth=(1, 0),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        sample_size=16,
    )
    vae = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("tiny") / "model"
        save_folder(
            folder,
            unet=UNet(unet),
            vae=AutoencoderKL(vae),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            scheduler={
                "_class_name": "DDIMScheduler",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "clip_sample": False,
                "set_alpha_to_one": False,
                "steps_offset": 1,
            },
        )
    return folder


def test_from_a_model_on_disk_to_a_picture_and_back(tiny_model, capsys, monkeypatch, tmp_path):
    """The real pipeline: generate, replay, image to image, info, convert, and the converted file."""
    monkeypatch.chdir(tmp_path)
    generate = ("generate", "a house", "--model", tiny_model, "--steps", 2, "--quiet")
    code, out, err = run(capsys, *generate, "--seed", 7, "--num-images", 2)
    assert (code, out, err) == (0, "out-0.png\nout-1.png\n", "")
    assert Image.open("out-0.png").size == (32, 32)
    assert run(capsys, "generate", "--replay", "out-1.png", "--quiet")[0] == 0
    assert np.abs(pixels("out-1-replay.png") - pixels("out-1.png")).max() <= 1  # another batch size
    assert run(capsys, *generate, "--image", "out-0.png", "--strength", 0.5, "-o", "i.png")[0] == 0
    assert run(capsys, "generate", "--replay", "i.png", "--image", "out-0.png", "--quiet")[0] == 0
    assert Path("i-replay.png").read_bytes() == Path("i.png").read_bytes()
    facts = json.loads(run(capsys, "info", tiny_model, "--json")[1])
    recorded_hash = json.loads(run(capsys, "info", "out-0.png", "--json")[1])["fastldm"]["model_hash"]
    assert facts["hash"] == recorded_hash and facts["prediction"] == "epsilon"
    converted = run(capsys, "convert", tiny_model, "one.safetensors")
    assert converted[:2] == (0, f"{tmp_path}/one.safetensors\n")
    code, _, _ = run(capsys, *generate, "--seed", 7, "--model", "one.safetensors", "-o", "one.png")
    assert code == 0
    assert np.abs(pixels("one.png") - pixels("out-0.png")).max() <= 1
    assert "allowed is a path that is free" in fails(capsys, "convert", tiny_model, "one.safetensors")


def pixels(path):
    return np.asarray(Image.open(path), int)


def test_errors_of_the_real_pipeline_are_one_line(tiny_model, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    generate = ("generate", "a", "--model", tiny_model)
    assert "steps=1001: allowed is an integer 1…1000" in fails(capsys, *generate, "--steps", 1001)
    assert "width=33: allowed is a multiple of 2" in fails(capsys, *generate, "--width", 33)
    assert "width=2147483646: allowed is width × height" in fails(capsys, *generate, "--width", 2**31 - 2)
    assert "device='tpu'" in fails(capsys, *generate, "--device", "tpu")
    assert "dtype='int8'" in fails(capsys, *generate, "--dtype", "int8")
    assert "backends='warp'" in fails(capsys, *generate, "--backends", "warp")
    fails(capsys, *generate, "--config", "none.json")
    fails(capsys, *generate, "--tokenizer", "none")
    for model in ("./none", "none.safetensors", "."):
        fails(capsys, "generate", "a", "--model", model)
    whole = next(tiny_model.glob("unet/*.safetensors")).read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut.safetensors" in fails(capsys, "generate", "a", "--model", "cut.safetensors")
    fails(capsys, "train", "none.toml")
    assert os.listdir() == ["cut.safetensors"]


def test_generate_as_a_program(tiny_model, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ("--model", str(tiny_model), "--steps", "2", "-o", str(tmp_path / "out.png"))
    done = shell("generate", "a house", *options, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out.png\n"), done.stderr
    assert done.stderr.startswith("fastldm: seed 0; load ") and done.stderr.count("\n") == 1
