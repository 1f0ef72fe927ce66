"""`fastldm generate`: options, files, one-line errors; a stand-in for the pipeline, the real validator."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fastldm import cli, cli_generate, images
from fastldm.errors import CheckpointError, OutOfMemory


def test_generate_writes_the_picture_and_prints_its_path(pipe, run):
    code, out, err = run("generate", "a house", "--steps", 9, "--seed", 7, "-o", "house.png")
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


def test_every_option_reaches_the_pipeline(pipe, run, tmp_path):
    Image.new("RGB", (16, 24)).save("in.png")
    options = (
        "generate a --negative b --steps 5 --guidance -2.5 --seed -3 --num-images 2 --width 16 --height 8 "
        "--sampler euler --eta 0.25 --image in.png --strength 0.5 --model m --device cpu --dtype bf16 "
        "--config c --tokenizer t --backends reference --quiet"
    )
    code, out, err = run(*options.split())
    assert (code, out) == (0, "out-0.png\nout-1.png\n")
    assert err.count("\n") == 2  # the warnings stay, the timings go
    loading = {"device": "cpu", "dtype": "bf16", "config": "c", "tokenizer": "t", "backends": "reference"}
    assert pipe.loaded == [("m", loading)]
    made = pipe.requests[0]
    assert (made.prompts, made.negatives, made.seeds) == (["a", "a"], ["b", "b"], [-3, -2])
    assert (made.steps, made.guidance_scale, made.width, made.height) == (5, -2.5, 16, 8)
    assert (made.sampler, made.eta, made.strength, made.image.shape) == ("euler", 0.25, 0.5, (1, 8, 16, 3))


def test_seed_list_and_random(pipe, run):
    assert run("generate", "a", "--num-images", 2, "--seed", "5,5")[0] == 0
    assert run("generate", "a", "--seed", "random")[0] == 0
    assert pipe.requests[0].seeds == [5, 5]
    assert pipe.requests[1].seeds != [0]


def test_grid_is_one_file(pipe, run):
    code, out, _ = run("generate", "a", "--num-images", 3, "--grid")
    assert (code, out) == (0, "out.png\n")
    assert Image.open("out.png").size == (64, 32)
    assert os.listdir() == ["out.png"]


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
def test_user_errors_are_one_line(pipe, fails, options, message):
    assert message in fails("generate", "a", *options.split())
    assert os.listdir() == []


def test_a_prompt_is_needed(pipe, fails):
    assert "prompt=None" in fails("generate")
    assert "prompt='\\ud800'" in fails("generate", "\ud800")


def test_the_output_is_checked_before_the_model_is_loaded(pipe, fails):
    fails("generate", "a", "-o", "none/out.png")
    os.mkdir("out-1.png")
    assert "path='out-1.png'" in fails("generate", "a", "--num-images", 2)
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
def test_failures_of_the_work_are_one_line(pipe, run, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipe, "generate", fail)
    found, out, err = run("generate", "a")
    assert (found, out) == (code, "")
    assert err.startswith(f"fastldm: {line}") and err.count("\n") == 1
    assert os.listdir() == []


def test_a_bug_is_not_hidden(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "a"])


def test_a_failed_write_keeps_the_old_file(pipe, run, monkeypatch):
    Path("out.png").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, out, err = run("generate", "a")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "fastldm: error: cannot write out.png: no space left on device"
    assert os.listdir() == ["out.png"] and Path("out.png").read_bytes() == b"old"


def test_progress_bar_only_on_a_terminal(pipe, run, monkeypatch):
    monkeypatch.setattr(cli_generate, "is_terminal", lambda stream: True)
    run("generate", "a")
    run("generate", "a", "--quiet")
    assert callable(pipe.requests[0].progress)
    assert pipe.requests[1].progress is None


def test_an_image_bomb_is_one_line(pipe, fails):
    """A PNG header of 144 million pixels; Pillow would add a warning of two lines."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 12000, 12000, 1, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(9)), b"IEND"]
    sized = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    Path("bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(sized))
    assert "at most 67108864 pixels" in fails("generate", "a", "--image", "bomb.png")


def test_a_library_s_long_message_is_cut():
    error = CheckpointError("m.safetensors", "unet.x", "no\n" * 1000)
    assert str(error).startswith("m.safetensors: unet.x: no no no") and len(error.why) == 1000


def test_every_task_has_its_options(pipe, run, fails):
    Image.new("L", (32, 16), 1).save("map.png")
    assert run("generate", "a", "--segmentation", "map.png")[0] == 0
    assert pipe.requests[-1].segmentation.max() == 1
    assert run("generate", "--label", "dog")[0] == run("generate", "--label", "1")[0] == 0
    assert [request.prompts for request in pipe.requests[-2:]] == [["label dog"]] * 2
    assert run("generate", "--layout", "red cat:0,0,0.5,1", "--layout", "dog:0.5,0,1,1")[0] == 0
    assert pipe.requests[-1].prompts == ["layout red cat p0 p0 p15 p31 , dog p16 p0 p31 p31"]
    assert "'cat': allowed is an object and its box" in fails("generate", "--layout", "cat")
    assert "layout[0]" in fails("generate", "--layout", "cat:0,0,0")


def test_pad_makes_the_mask(pipe, run, fails):
    Image.new("RGB", (32, 16), "red").save("in.png")
    assert run("generate", "a", "--image", "in.png", "--pad", 8, 0, 16, 8)[0] == 0
    request = pipe.requests[-1]
    assert (request.width, request.height) == (56, 24) and request.mask.sum() == 56 * 24 - 32 * 16
    assert run("generate", "--replay", "out.png", "--image", "in.png", "--pad", 8, 0, 16, 8)[0] == 0
    assert Path("out-replay.png").read_bytes() == Path("out.png").read_bytes()
    assert "pad='8 0 0 0': allowed is beside --image" in fails("generate", "a", "--pad", 8, 0, 0, 0)
