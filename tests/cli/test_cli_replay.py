"""`fastldm generate --replay`: a picture made again from what its file tells, which is not trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import fastldm
from fastldm import images


def test_replay_makes_the_picture_again(pipe, run):
    options = ("--steps", 9, "--seed", 2**64 - 3, "--negative", "n", "--width", 16, "--num-images", 2)
    run("generate", "größe 🐟", *options)
    code, out, _ = run("generate", "--replay", "out-1.png")
    assert (code, out) == (0, "out-1-replay.png\n")
    assert Path("out-1-replay.png").read_bytes() == Path("out-1.png").read_bytes()
    code, _, _ = run("generate", "other", "--replay", "out-1.png", "--steps", 3, "-o", "new.png")
    changed = images.read_metadata("new.png")["fastldm"]["arguments"]
    assert (code, changed["prompt"], changed["steps"], changed["seed"]) == (0, "other", 3, 2**64 - 2)


def test_replay_from_an_image_wants_the_image(pipe, run, fails):
    Image.new("RGB", (32, 16), "red").save("in.png")
    Image.new("RGB", (32, 16), "blue").save("other.png")
    assert run("generate", "a", "--image", "in.png", "--strength", 0.5)[0] == 0
    assert "image=None: allowed is --image FILE" in fails("generate", "--replay", "out.png")
    code, _, err = run("generate", "--replay", "out.png", "--image", "in.png")
    assert code == 0 and "not the one used before" not in err
    assert Path("out-replay.png").read_bytes() == Path("out.png").read_bytes()
    code, _, err = run("generate", "--replay", "out.png", "--image", "other.png")
    assert code == 0 and "--image is not the one used before" in err


def test_replay_of_a_mask_and_of_an_enlargement(pipe, run, fails):
    Image.new("RGB", (32, 16), "red").save("in.png")
    Image.new("L", (32, 16), 255).save("mask.png")
    assert run("generate", "a", "--image", "in.png", "--mask", "mask.png", "--blend", 3)[0] == 0
    again = "generate", "--replay", "out.png", "--image", "in.png"
    assert "mask=None: allowed is --mask FILE" in fails(*again)
    code, _, err = run(*again, "--mask", "mask.png")
    assert code == 0 and "not the one used" not in err and pipe.requests[-1].blend == 3
    assert Path("out-replay.png").read_bytes() == Path("out.png").read_bytes()
    Image.linear_gradient("L").resize((32, 16)).save("other.png")
    code, _, err = run(*again, "--mask", "other.png")
    assert code == 0 and "--mask is not the one used before" in err
    assert run("generate", "a", "--image", "in.png", "--upscale", "-o", "large.png")[0] == 0
    code, _, err = run("generate", "--replay", "large.png", "--image", "in.png")
    assert code == 0 and "not the one used" not in err and pipe.requests[-1].upscale


def test_another_model_is_told(pipe, run, recorded):
    for known, told in (("abd", True), ("abc", False), (None, False)):
        write_png("made.png", recorded() | {"model_hash": known})
        code, _, err = run("generate", "--replay", "made.png")
        assert code == 0 and ("the model is not the one used before" in err) == told


def test_what_is_shown_can_be_replaced(pipe, run):
    assert run("generate", "a", "--negative", "n")[0] == 0
    for options, prompt in (
        (("--label", "dog"), "dog"),
        (("--layout", "cat:0,0,0.5,0.5"), "cat"),
        (("b",), "b"),
    ):
        assert run("generate", *options, "--replay", "out.png", "-o", "new.png")[0] == 0
        assert prompt in pipe.requests[-1].prompts[0] and pipe.requests[-1].negatives == ["n"]


def test_shortcuts_are_replayed(pipe, run, fails, recorded):
    assert run("generate", "a", "--guidance-interval", 0.2, 0.8, "--whole-every", 2)[0] == 0
    assert pipe.requests[-1].shortcuts == fastldm.Shortcuts((0.2, 0.8), 2)
    assert run("generate", "--replay", "out.png")[0] == 0
    assert Path("out-replay.png").read_bytes() == Path("out.png").read_bytes()
    assert run("generate", "--replay", "out.png", "--whole-every", 3)[0] == 0
    assert pipe.requests[-1].shortcuts == fastldm.Shortcuts(whole_every=3)
    assert "shortcuts[whole_every]=0" in fails("generate", "a", "--whole-every", 0)
    write_png("evil.png", recorded(shortcuts=["whole_every"]))
    assert "shortcuts=['whole_every']" in fails("generate", "--replay", "evil.png")


def write_png(name, made):
    Path(name).write_bytes(images.encode_png(Image.new("RGB", (8, 8)), made))


def test_a_replayed_file_is_not_trusted(pipe, run, fails, recorded):
    """A foreign PNG names no path to read, no Hub id to fetch and no argument beyond those we record."""
    Image.new("RGB", (8, 8)).save("secret.png")
    write_png("evil.png", recorded(image="secret.png", callback="x", output_type="latent"))
    assert run("generate", "--replay", "evil.png")[0] == 0
    assert pipe.requests[0].image is None and pipe.requests[0].output_type == "pil"
    write_png("hub.png", recorded() | {"model": "some/repository"})
    assert "model='some/repository': allowed is --model PATH" in fails("generate", "--replay", "hub.png")
    write_png("junk.png", recorded(steps="many"))
    assert "steps='many'" in fails("generate", "--replay", "junk.png")
    write_png("latents.png", recorded(not_recorded={"latents": True}))
    assert "made without latents=" in fails("generate", "--replay", "latents.png")
    for model in (None, 7, ["default"]):
        write_png("model.png", recorded() | {"model": model})
        assert "allowed is --model PATH" in fails("generate", "--replay", "model.png")


@pytest.mark.parametrize("width", [16.0, "16", True, None, 10**9, -8, [8]])
def test_a_replayed_size_is_checked(pipe, run, recorded, width):
    Image.new("RGB", (8, 8)).save("in.png")
    write_png("odd.png", recorded(width=width, strength=0.5, not_recorded={"image": "0"}))
    code, _, err = run("generate", "--replay", "odd.png", "--image", "in.png")
    assert code == 0 if width is None else (code == 2 and "error: width=" in err)


def test_replay_of_what_fastldm_did_not_make(pipe, fails):
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "a PNG made by fastldm" in fails("generate", "--replay", "plain.png")
    assert "a file that exists" in fails("generate", "--replay", "none.png")
    assert pipe.loaded == []
