"""One guided step of a UNet in float32: fastldm against diffusers with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import Table, compiled, elapsed, seconds
from fastldm import ops
from fastldm.models.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

THEIRS = "diffusers, channels last"
STEPS, STEP = 25, 12
TOLERANCE = 1e-5  # float32 sums in another order; the parity tests hold the same bar
NOISE = 1.10  # medians of interleaved rounds of equal programs differ by so much on a busy machine

SCENES = UNetConfig(  # what fastldm/training/scenes.toml trains
    in_channels=8,
    out_channels=8,
    block_out_channels=(32, 96, 160),
    layers_per_block=1,
    heads=(2, 3, 5),
    transformer_depth=(0, 1, 1),
    cross_attention_dim=128,
    norm_num_groups=8,
)
SIZES = {"scenes": (SCENES, 16, 32), "SD1.5": (UNetConfig(), 64, 77)}  # side of the latents, tokens


@pytest.mark.parametrize("name", SIZES)
def test_unet_step(race: Callable[..., Table], effort: int, name: str) -> None:
    full_size = name == "SD1.5"
    if full_size and not effort:
        pytest.skip("full size is not for --quick")
    config, side, tokens = SIZES[name]
    fields = {field: value for field, value in config.to_dict().items() if field != "_class_name"}
    with torch.device("meta"):
        ours, theirs = UNet(config).eval(), diffusers.UNet2DConditionModel(**fields).eval()
    torch.manual_seed(1)
    latents = torch.randn(2, config.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    context = torch.randn(2, tokens, config.cross_attention_dim)
    timesteps = torch.linspace(999, 0, STEPS)
    with FlopCounterMode(display=False) as counter:  # nominal: what a step of the plain model takes
        theirs(latents.to("meta"), timesteps[STEP].to("meta"), context.to("meta"))
    ours.to_empty(device="cpu").to(memory_format=torch.channels_last)
    for parameter in ours.parameters():
        bound = 1.0 if parameter.dim() == 1 else (3 / parameter[0].numel()) ** 0.5  # keeps the variance
        parameter.uniform_(-bound, bound)
    theirs.load_state_dict(ours.state_dict(), assign=True)

    condition = ours.condition(context, timesteps)
    step = torch.full((2,), STEP)

    def reference() -> Tensor:
        with ops.use_backends("reference"):
            return ours(latents, condition, step)

    def diffuse(network: Any) -> Tensor:
        return network(latents, timesteps[STEP], context, return_dict=False)[0]

    contenders = {
        "fastldm": lambda: ours(latents, condition, step),
        "fastldm, reference ops": reference,
        THEIRS: lambda: diffuse(theirs),
    }
    if effort > full_size:  # at full size, compiling takes minutes
        fast = compiled(theirs)
        contenders["diffusers, torch.compile"] = lambda: diffuse(fast)
    table = race(
        f"UNet step of {name}, latents {side}x{side}, batch 2 (guided), float32",
        contenders,
        budget=150.0 if full_size else 10.0,
        truth=THEIRS,
        tolerance=TOLERANCE,
        work=counter.get_total_flops() / 1e9,
        unit="GFLOP/s",
    )
    once = min(elapsed(lambda: ours.condition(context, timesteps)) for _ in range(3))
    share = once / STEPS / table.rows["fastldm"].minimum
    table.notes.append(f"condition of {STEPS} steps, apart: {seconds(once)}, {share:.1%} of a step for each")
    ratio = table.rows[THEIRS].ratio
    assert not effort or ratio >= 1 / NOISE, f"fastldm takes {1 / ratio:.2f} times as long as {THEIRS}"
