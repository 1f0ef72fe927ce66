"""Walks between prompts and seeds: the keys are their own pictures, what is between lies between."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastldm
from fastldm import cli

FAST = {"steps": 2, "guidance_scale": 3.0, "output_type": "np"}


def own(pipe: fastldm.Pipeline, prompt: str, seed: int, **arguments: object) -> np.ndarray:
    """The picture of one prompt and seed."""
    return pipe.generate(prompt, seed=seed, **{**FAST, **arguments}).images[0]


def test_keys_are_their_own_pictures(pipe: fastldm.Pipeline) -> None:
    """Where both prompts and seeds change; to rounding, for alone they run in fewer slots."""
    walk = fastldm.interpolate(
        pipe, ["a cat", "a dog", "two dogs"], [4, 9, 4], 5, negative_prompt="blue", **FAST
    )
    assert walk.images.shape == (5, 64, 64, 3) and walk.seeds == [4] * 5
    for frame, prompt, seed in ((0, "a cat", 4), (2, "a dog", 9), (4, "two dogs", 4)):
        assert np.abs(walk.images[frame] - own(pipe, prompt, seed, negative_prompt="blue")).max() <= 1e-5
    apart = [np.abs(a - b).max() for a, b in zip(walk.images, walk.images[1:], strict=False)]
    assert min(apart) > 1e-2


def test_seeds_alone_and_prompts_alone(pipe: fastldm.Pipeline) -> None:
    seeds = fastldm.interpolate(pipe, "a cat", [1, 2], 3, **FAST)
    prompts = fastldm.interpolate(pipe, ["a cat", "a dog"], 1, 3, **{**FAST, "guidance_scale": 1})
    assert np.abs(seeds.images[2] - own(pipe, "a cat", 2)).max() <= 1e-5
    assert np.abs(prompts.images[2] - own(pipe, "a dog", 1, guidance_scale=1)).max() <= 1e-5
    for walk in (seeds, prompts):
        ends = np.abs(walk.images[0] - walk.images[2]).mean()
        assert max(np.abs(walk.images[1] - walk.images[end]).mean() for end in (0, 2)) < ends
    told = seeds.describe(1)["arguments"]
    assert told["prompt"] == "a cat" and told["not_recorded"] == {"latents": True}
    listed = fastldm.interpolate(pipe, ["a cat"] * 2, [1, 2], 3, negative_prompt=["dog"] * 2, **FAST)
    want = fastldm.interpolate(pipe, "a cat", [1, 2], 3, negative_prompt="dog", **FAST)
    assert np.array_equal(listed.images, want.images)


def test_what_is_between_is_slerp_and_lerp(pipe: fastldm.Pipeline) -> None:
    """The second of four frames, made by hand from the noise and the embeddings of two keys."""
    a, b = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    angle = torch.arccos((a * b).sum().double() / (a.double().norm() * b.double().norm()))
    weights = [torch.sin(share * angle) / torch.sin(angle) for share in (2 / 3, 1 / 3)]
    noise = (weights[0] * a + weights[1] * b).float()
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    with pipe.turn():
        text = pipe.encode(pipe.check(["a cat", "a dog"], guidance_scale=3.0, seed=[5, 6])).context
    negative, mixed = (half[:1] * (2 / 3) + half[1:] * (1 / 3) for half in text.split(2))
    made = pipe.generate(prompt_embeds=mixed, negative_prompt_embeds=negative, latents=noise, **FAST)
    walk = fastldm.interpolate(pipe, ["a cat", "a dog"], [5, 6], 4, **FAST)
    assert np.abs(walk.images[1] - made.images[0]).max() <= 1e-5


def test_noise_between_equal_and_opposite_keys() -> None:
    from fastldm.interpolation import _along, _slerp

    key = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(_along([key, key], 3, _slerp), key.expand(3, 4, 8, 8), atol=1e-6)
    opposite = _along([key, -key], 4, _slerp)
    assert opposite.isfinite().all() and torch.equal(opposite[0], key) and torch.equal(opposite[-1], -key)
    shares = _along(
        [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0])], 7, _slerp
    )
    turned = torch.arange(7) * math.pi / 6
    torch.testing.assert_close(shares, torch.stack([turned.cos(), turned.sin()], 1), atol=1e-6, rtol=0)


def test_long_prompts_and_lists_of_negatives(pipe: fastldm.Pipeline) -> None:
    """Prompts of two chunks keep their own pictures; so do negative prompts, one a prompt."""
    long = ["a cat " * 50, "a dog " * 50]
    walk = fastldm.interpolate(pipe, long, 3, 2, negative_prompt=["blue", "red"], **FAST)
    for frame, negative in enumerate(("blue", "red")):
        alone = own(pipe, long[frame], 3, negative_prompt=negative)
        assert np.abs(walk.images[frame] - alone).max() <= 1e-5


def test_samplers_that_draw_share_the_first_seeds_noise(pipe: fastldm.Pipeline) -> None:
    walk = fastldm.interpolate(pipe, "a cat", [1, 1], 3, sampler="euler_a", **FAST)
    assert np.abs(walk.images - walk.images[:1]).max() <= 1e-5
    drawn = fastldm.interpolate(pipe, ["a cat", "a dog"], None, 2, **FAST)
    again = fastldm.interpolate(pipe, ["a cat", "a dog"], drawn.seeds[0], 2, **FAST)
    assert np.array_equal(drawn.images, again.images)


@pytest.mark.parametrize(
    ("prompts", "seeds", "frames", "more", "message"),
    [
        ("a", 1, 5, {}, "seeds=1: allowed is several, or several prompts"),
        (["a", "b"], [1, 2, 3], 5, {}, r"prompts=\['a', 'b'\]: allowed is one, or 3"),
        (["a", "b"], 1, 1, {}, "frames=1: allowed is an integer 2…4096"),
        (["a", "b"], 1, 2.0, {}, "frames=2.0"),
        (["a", "b"], 1, 10**9, {}, "frames=1000000000"),
        (["a", 5], 1, 3, {}, r"prompt\[1\]=5"),
        ([], 1, 3, {}, "seeds=1: allowed is several"),
        ("a", [1, "x"], 3, {}, r"seed\[1\]='x'"),
        (None, [1, 2], 3, {}, "this model needs a prompt"),
        ("a", [1, 2], 3, {"num_images": 2}, "num_images=2: allowed is None: interpolate makes it"),
        ("a", [1, 2], 3, {"latents": torch.zeros(1)}, "latents="),
        ("a", [1, 2], 3, {"steps": 0}, "steps=0"),
        ("a", [1, 2], 3, {"image": Image.new("RGB", (64, 64))}, "image="),
        ("a", [1, 2], 3, {"negative_prompt": ["x"] * 3}, "negative_prompt"),
    ],
)
def test_what_is_refused(
    pipe: fastldm.Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    prompts: object,
    seeds: object,
    frames: object,
    more: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(pipe.text, "encode", lambda *given: pytest.fail("work began"))
    with pytest.raises(fastldm.InvalidArgument, match=message):
        fastldm.interpolate(pipe, prompts, seeds, frames, **more)  # type: ignore[arg-type]


def test_unknown_words_are_said_once(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = pipe.text.encode
    monkeypatch.setattr(
        pipe.text, "encode", lambda *given: dataclasses.replace(encode(*given), warnings=("unknown words",))
    )
    assert fastldm.interpolate(pipe, ["a", "b"], 1, 2, **FAST).warnings.count("unknown words") == 1
    assert fastldm.interpolate(pipe, "a", [1, 2], 2, **FAST).warnings.count("unknown words") == 1


def test_the_command_line(
    tiny_eps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Frames as PNG or one GIF by the name; several prompts without a walk are several pictures."""
    monkeypatch.chdir(tmp_path)
    common = ["--model", str(tiny_eps), "--steps", "1", "--quiet"]
    walk = ["generate", "a cat", "a dog", "--seed", "1,2", "--interpolate", "3", *common]
    assert cli.main([*walk, "-o", "walk.gif"]) == 0
    assert capsys.readouterr().out == "walk.gif\n"
    with Image.open("walk.gif") as animation:
        assert (animation.format, animation.n_frames, animation.size) == ("GIF", 3, (64, 64))
    assert cli.main([*walk, "-o", "frame.png"]) == 0
    assert capsys.readouterr().out.split() == ["frame-0.png", "frame-1.png", "frame-2.png"]
    assert cli.main(["generate", "a cat", "a dog", *common, "--num-images", "2", "-o", "each.png"]) == 0
    assert capsys.readouterr().out.split() == [f"each-{k}.png" for k in range(4)]
    before = sorted(path.name for path in tmp_path.iterdir())
    for options in (
        ["a cat", "--interpolate", "3"],
        ["a cat", "--seed", "1,2", "--interpolate", "1"],
        ["a cat", "--seed", "1,2", "--interpolate", "3", "-o", "none/walk.gif"],
        ["a cat", "--seed", "1,2", "--interpolate", "3", "-o", "walk.mp4"],
        ["a cat", "--seed", "1,2", "--interpolate", "3", "--grid", "-o", "other.gif"],
        ["a cat", "-o", "one.gif"],
    ):
        assert cli.main(["generate", *options, *common]) == 2
        assert capsys.readouterr().err.startswith("fastldm: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
