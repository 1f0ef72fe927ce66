"""What training costs: a step beside the same net in diffusers, cached latents beside the bare encoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import bars
from benchmarks.training import TrainingStep
from fastldm.bench.contenders import CHANNELS_LAST, OURS, missing
from fastldm.bench.race import Table
from fastldm.checkpoint import load_components
from fastldm.models.layers import channels_last
from fastldm.training.autoencoder import encode_all
from fastldm.training.data import to_model

BATCH = 32  # of the shipped model's recipe
LOSS = {"float32": 1e-5, "bfloat16": 2**-8}


@pytest.mark.skipif(missing(CHANNELS_LAST) is not None, reason=str(missing(CHANNELS_LAST)))
@pytest.mark.parametrize("dtype", LOSS)
def test_training_step(
    race: Callable[..., Table], effort: int, pytestconfig: pytest.Config, dtype: str
) -> None:
    model, batch = pytestconfig.getoption("model") or "default", BATCH if effort else 2
    with torch.inference_mode(False):
        steps = {
            name: TrainingStep(model, name != OURS, batch, dtype == "bfloat16")
            for name in (OURS, CHANNELS_LAST)
        }
        table = race(
            f"Training step of {model}'s UNet and text encoder, {batch} rows, {dtype}",
            steps,
            budget=40.0,
            truth=CHANNELS_LAST,
            tolerance=LOSS[dtype],
        )
    table.notes.append(bars.TRAINING.judge(table))


def test_caching_latents(race: Callable[..., Table], effort: int, pytestconfig: pytest.Config) -> None:
    model, batches = pytestconfig.getoption("model") or "default", 2 if effort else 1
    components = load_components(model)
    vae = channels_last(components.vae)
    side = components.unet.config.sample_size * vae.config.factor
    pictures = torch.randint(256, (BATCH * batches, side, side, 3), dtype=torch.uint8)
    ready = to_model(pictures).split(BATCH)

    def encoded() -> None:
        for images in ready:
            vae.encoder(images)

    def means() -> Tensor:
        return torch.cat([vae.encode(images).mean for images in ready])

    assert torch.equal(encode_all(vae, pictures, BATCH)[0], means())
    table = race(
        f"Caching the latents of {len(pictures)} pictures of {side} pixels by {model}'s autoencoder, float32",
        {OURS: lambda: encode_all(vae, pictures, BATCH) and None, bars.ENCODER: encoded},
        budget=20.0,
    )
    table.notes.append(bars.CACHING.judge(table))
