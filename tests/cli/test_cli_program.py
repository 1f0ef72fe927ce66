"""The command line as a program of its own, and over the real pipeline with a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastldm import cli, images

ROOT = Path(cli.__file__).parents[1]


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


def test_a_closed_pipe_is_quiet(tmp_path, recorded):
    """`fastldm info out.png | true`: the reader is gone before the first line."""
    (tmp_path / "out.png").write_bytes(images.encode_png(Image.new("RGB", (8, 8)), recorded()))
    for arguments in (["info", str(tmp_path / "out.png")], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "fastldm", *arguments]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
        os.close(write)
        assert done.stderr == b""


def test_a_terminal_that_cannot_show_a_prompt(tmp_path, recorded):
    made = images.encode_png(Image.new("RGB", (8, 8)), recorded(prompt="größe"))
    (tmp_path / "out.png").write_bytes(made)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = shell("info", str(tmp_path / "out.png"), env=environment)
    assert done.returncode == 0 and done.stdout.startswith("gr\\xf6\\xdfe\n"), done.stderr


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


def test_from_a_model_on_disk_to_a_picture_and_back(tiny_model, run, fails, monkeypatch, tmp_path):
    """The real pipeline: generate, replay, image to image, info, convert, and the converted file."""
    monkeypatch.chdir(tmp_path)
    generate = ("generate", "a house", "--model", tiny_model, "--steps", 2, "--quiet")
    code, out, err = run(*generate, "--seed", 7, "--num-images", 2)
    assert (code, out, err) == (0, "out-0.png\nout-1.png\n", "")
    assert Image.open("out-0.png").size == (32, 32)
    assert run("generate", "--replay", "out-1.png", "--quiet")[0] == 0
    assert np.abs(pixels("out-1-replay.png") - pixels("out-1.png")).max() <= 1  # another batch size
    assert run(*generate, "--image", "out-0.png", "--strength", 0.5, "-o", "i.png")[0] == 0
    assert run("generate", "--replay", "i.png", "--image", "out-0.png", "--quiet")[0] == 0
    assert Path("i-replay.png").read_bytes() == Path("i.png").read_bytes()
    facts = json.loads(run("info", tiny_model, "--json")[1])
    recorded_hash = json.loads(run("info", "out-0.png", "--json")[1])["fastldm"]["model_hash"]
    assert facts["hash"] == recorded_hash and facts["prediction"] == "epsilon"
    converted = run("convert", tiny_model, "one.safetensors")
    assert converted[:2] == (0, f"{tmp_path}/one.safetensors\n")
    code, _, _ = run(*generate, "--seed", 7, "--model", "one.safetensors", "-o", "one.png")
    assert code == 0
    assert np.abs(pixels("one.png") - pixels("out-0.png")).max() <= 1
    assert "allowed is a path that is free" in fails("convert", tiny_model, "one.safetensors")


def pixels(path):
    return np.asarray(Image.open(path), int)


def test_errors_of_the_real_pipeline_are_one_line(tiny_model, fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    generate = ("generate", "a", "--model", tiny_model)
    assert "steps=1001: allowed is an integer 1…1000" in fails(*generate, "--steps", 1001)
    assert "width=33: allowed is a multiple of 2" in fails(*generate, "--width", 33)
    assert "width=2147483646: allowed is width × height" in fails(*generate, "--width", 2**31 - 2)
    assert "device='tpu'" in fails(*generate, "--device", "tpu")
    assert "dtype='int8'" in fails(*generate, "--dtype", "int8")
    assert "backends='warp'" in fails(*generate, "--backends", "warp")
    fails(*generate, "--config", "none.json")
    fails(*generate, "--tokenizer", "none")
    for model in ("./none", "none.safetensors", "."):
        fails("generate", "a", "--model", model)
    whole = next(tiny_model.glob("unet/*.safetensors")).read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut.safetensors" in fails("generate", "a", "--model", "cut.safetensors")
    fails("train", "none.toml")
    assert os.listdir() == ["cut.safetensors"]


def test_generate_as_a_program(tiny_model, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ("--model", str(tiny_model), "--steps", "2", "-o", str(tmp_path / "out.png"))
    done = shell("generate", "a house", *options, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out.png\n"), done.stderr
    assert done.stderr.startswith("fastldm: seed 0; load ") and done.stderr.count("\n") == 1
