"""`fastldm tune`: a model's calls, measured on this GPU, into a table that the kernels are chosen by."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.checkpoint.atomic import replacing
from fastldm.checkpoint.load import open_source
from fastldm.checkpoint.networks import build
from fastldm.errors import BackendUnavailable, InvalidArgument
from fastldm.models.layers import channels_last
from fastldm.models.pixels import Autoencoder
from fastldm.models.unet import UNet, UNetCondition
from fastldm.models.vae import AutoencoderKL
from fastldm.models.vae_strips import decode
from fastldm.ops import missing
from fastldm.ops.recording import Call, recording
from fastldm.presets import PRESETS
from fastldm.runtime.slots import Group, Slots

TOKENS = 77  # of a prompt
CAPABILITIES = (80, 90, 100)

Report = Callable[[str], None]


def calls_of(model: str, dtype: torch.dtype) -> list[Call]:
    """Every call of an op in one guided step and one decode of an image of the model's own size.

    model: a preset (no files needed), or what `fastldm.load` takes; no weights are read. The tensors are
    on the meta device.
    """
    with torch.device("meta"), torch.no_grad():
        vae: Autoencoder
        if model in PRESETS:
            unet, vae = UNet(PRESETS[model].unet), AutoencoderKL(PRESETS[model].vae)
        else:
            unet, vae, *_ = build(open_source(model))
        for network in (unet, vae):
            channels_last(network.eval().to(dtype))
        shape = unet.config
        latents = torch.empty(1, shape.latent_channels, shape.sample_size, shape.sample_size)
        context = torch.empty(2, TOKENS, shape.cross_attention_dim or 0, dtype=dtype)
        beside = shape.in_channels - shape.latent_channels  # a mask and masked latents
        concat = torch.empty(1, beside, *latents.shape[2:], dtype=dtype) if beside else None
        once = unet.condition(context, torch.empty(1), concat)
        group = Group(
            latents=latents,
            table=torch.empty(2, 9),
            draws=(False,),
            generators=(),
            context=list(once.context),
            lengths=None,
            time_bias=once.time_bias[0],
            concat_bias=once.concat_bias,
        )

        def predict(
            x: Tensor,
            context: Tensor,
            lengths: Tensor | None,
            concat_bias: Tensor | None,
            bias: Tensor,
            step: Tensor,
        ) -> Tensor:
            return unet(x, UNetCondition(context, bias, lengths, concat_bias), step)

        slots = Slots(predict, group, 1, guided=True, dtype=dtype)
        with recording() as calls:
            slots.launch()
            decode(vae, latents.to(dtype))
    return calls


def run(
    *,
    model: str = "sd15",
    ops: str | None = None,
    minutes: float | None = None,
    out: str | None = None,
    report: Report | None = None,
) -> Path:
    """Measure the kernels at a model's shapes on the current CUDA device, write the table, give its path.

    ops: names, with commas (all). minutes: about how long (as long as it takes). out: the table, in place of
    this machine's own. What the file already holds of other shapes stays. BackendUnavailable without a CUDA
    device or Triton, InvalidArgument.
    """
    if minutes is not None and not minutes > 0:
        raise InvalidArgument("minutes", minutes, "a number above 0")
    if why := missing("triton"):
        raise BackendUnavailable(f"fastldm tune: {why}")
    if not torch.cuda.is_available():
        raise BackendUnavailable("fastldm tune: Triton runs in its interpreter, which says nothing of speed")
    from fastldm.kernels import measuring, tune, tuned

    names = _names(ops, tuple(tune.KERNELS))
    device = torch.cuda.get_device_name()
    file = tuned.own_file(device) if out is None else Path(out)
    if out is not None and not file.parent.is_dir():
        raise InvalidArgument("out", out, "a file in a folder that exists")
    calls = [call for call in calls_of(model, torch.bfloat16) if call.op in names]
    with torch.inference_mode():
        made = tune.tune(
            calls,
            device=torch.device("cuda", torch.cuda.current_device()),
            race=measuring.race,
            seconds=float("inf") if minutes is None else 60 * minutes,
            now=time.monotonic,
            report=report or _to_stderr,
        )
    if not made:
        raise BackendUnavailable("fastldm tune: nothing could be measured")
    write(file, made)
    return file


def write(file: Path, made: Any) -> None:
    """Add entries to a table, or begin it; whole or not at all."""
    from fastldm.kernels import tuned

    before = tuned.read(file)
    whole = {op: {**before.get(op, {}), **made.get(op, {})} for op in sorted({*before, *made})}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    tuned.table.cache_clear()


def compile_only(targets: Sequence[str] | None = None, report: Report | None = None) -> int:
    """Compile the shipped kernels ahead of time for GPUs named as sm_90; how many they are.

    targets: this machine's GPU, or without one sm_80, sm_90 and sm_100.
    """
    capabilities = [_capability(target) for target in targets or ()]
    if not capabilities and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        capabilities = [10 * major + minor]
    from fastldm.kernels.ahead import compile_all

    return compile_all(capabilities or CAPABILITIES, report or _to_stderr)


def _capability(target: str) -> int:
    number = target.removeprefix("sm_")
    if not number.isdecimal() or int(number) < CAPABILITIES[0]:
        raise InvalidArgument("target", target, "sm_80 or a later one, as sm_90")
    return int(number)


def _names(ops: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    names = known if ops is None else tuple(name.strip() for name in ops.split(","))
    for name in names:
        if name not in known:
            raise InvalidArgument("ops", name, f"some of {', '.join(known)}, with commas")
    return names


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
