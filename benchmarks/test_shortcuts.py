"""What shortcuts save and what they cost, beside the exact run: `-k shortcuts`.

Pictures of the shipped model, with the distance of each from the exact one of the same seed; steps of SD1.5
with random weights, by which the times of its runs follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
import torch

import fastldm
from fastldm import Shortcuts
from fastldm.models.unet import UNet, UNetCondition, UNetConfig
from fastldm.scenes.exam import questions
from fastldm.scenes.judge import Judge

STEPS = 25
MEASURED = {
    "exact": Shortcuts(),
    "guided 0 to 0.8": Shortcuts((0.0, 0.8)),
    "guided 0.2 to 0.8": Shortcuts((0.2, 0.8)),
    "guided 0 to 0.5": Shortcuts((0.0, 0.5)),
    "whole every 2": Shortcuts(whole_every=2),
    "whole every 3": Shortcuts(whole_every=3),
    "whole every 5": Shortcuts(whole_every=5),
    "guided 0 to 0.8, whole every 2": Shortcuts((0.0, 0.8), 2),
}


def test_pictures_with_shortcuts(race: Callable[..., Any], effort: int, pytestconfig: pytest.Config) -> None:
    pipe = fastldm.load(pytestconfig.getoption("model") or "default")
    steps = STEPS if effort else 6
    asked = questions()[:: 11 if effort else 97]
    judge = Judge.load()

    def drawn(shortcuts: Shortcuts, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        made = pipe.generate(prompts, seed=seeds, steps=steps, shortcuts=shortcuts, output_type="latent")
        return made.images

    def draw(shortcuts: Shortcuts) -> None:
        drawn(shortcuts, [asked[0].prompt], [0])

    table = race(
        f"one picture of {pipe.components.path.name} as latents, {steps} steps",
        {name: partial(draw, shortcuts) for name, shortcuts in MEASURED.items()},
        budget=20.0,
    )
    prompts, seeds = [question.prompt for question in asked], list(range(len(asked)))
    exact = drawn(Shortcuts(), prompts, seeds)
    for name, shortcuts in MEASURED.items():
        latents = drawn(shortcuts, prompts, seeds)
        with pipe.turn():
            pictures, wanted = (pipe.decode(each, "np") for each in (latents, exact))
            shown = pipe.decode(latents, "pil")
        distance = float((latents - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        ratios = [peak_ratio(*pair) for pair in zip(pictures, wanted, strict=True)]
        marks = [each.is_right(seen) for each, seen in zip(asked, judge.read(shown), strict=True)]
        assert (distance == 0) == (shortcuts == Shortcuts()), name
        table.notes.append(
            f"{name}: latents' RMS off by {distance:.1%}; PSNR of {len(asked)} pictures: median "
            f"{median(ratios):.1f} dB, worst {min(ratios):.1f}; right {sum(marks) / len(marks):.0%}"
        )


def peak_ratio(picture: Any, wanted: Any) -> float:
    """PSNR in dB of a picture in 0…1."""
    return float(-10 * torch.tensor(((picture - wanted) ** 2).mean()).log10())


def test_steps_with_shortcuts(race: Callable[..., Any], effort: int) -> None:
    if not effort:
        pytest.skip("full size is not for --quick")
    config, side, dtype = UNetConfig(), 64, torch.bfloat16
    with torch.device("meta"):
        unet = UNet(config).eval().to(dtype)
    unet.to_empty(device="cpu").to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    for parameter in unet.parameters():
        bound = 1.0 if parameter.dim() == 1 else (3 / parameter[0].numel()) ** 0.5  # keeps the variance
        parameter.uniform_(-bound, bound)
    latents = torch.randn(1, config.in_channels, side, side, dtype=dtype)
    context = torch.randn(2, 77, config.cross_attention_dim, dtype=dtype)
    timesteps, step = torch.linspace(999, 0, STEPS), torch.tensor([STEPS // 2])
    conditions = [unet.condition(context[:rows], timesteps) for rows in (2, 1)]
    deep = torch.empty(2, config.block_out_channels[0], side, side, dtype=dtype)
    deep = deep.contiguous(memory_format=torch.channels_last)

    def run(network: Callable[..., torch.Tensor], condition: UNetCondition, *deep: torch.Tensor) -> None:
        network(latents, condition, step, *deep)

    contenders = {}
    for name, condition in zip(("guided", "unguided"), conditions, strict=True):
        features = deep[: len(condition.context)]
        contenders[f"{name}, exact"] = partial(run, unet, condition)
        contenders[f"{name}, features kept"] = partial(run, unet, condition, features)
        contenders[f"{name}, cached"] = partial(run, unet.shallow, condition, features)
    table = race(f"UNet step of SD1.5, latents {side}x{side}, bfloat16", contenders, budget=60.0)
    for name, shortcuts in MEASURED.items():
        spent = sum(table.rows[kind].ratio for kind in kinds(shortcuts, STEPS)) / STEPS
        table.notes.append(f"{name}: {STEPS} steps take {spent:.2f} of the exact time")


def kinds(shortcuts: Shortcuts, steps: int) -> Iterator[str]:
    """The contender that runs each step."""
    guided, whole = shortcuts.guided(steps), "features kept" if shortcuts.whole_every > 1 else "exact"
    for start, stop in pairwise(sorted({0, steps, guided.start, guided.stop})):
        for i in range(stop - start):
            kind = "cached" if i % shortcuts.whole_every else whole
            yield f"{'guided' if start in guided else 'unguided'}, {kind}"
