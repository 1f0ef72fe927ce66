"""Decoding in strips against decoding whole: the same numbers, in less memory, as much of it as estimated."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastldm.errors import InvalidArgument
from fastldm.models import vae_strips
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.models.vae_strips import decode, decode_in_strips, peak_bytes

TINY = {
    # From the smallest map to the largest the width grows, then shrinks: both kinds of shortcut.
    "f4": VAEConfig(
        block_out_channels=(16, 32, 16), layers_per_block=1, norm_num_groups=4, latent_channels=3
    ),
    "f2-plain": VAEConfig(
        block_out_channels=(8, 16),
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        latent_channels=16,
    ),
    "f1": VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=2),
}
SIZES = {"f4": [(5, 7), (6, 2)], "f2-plain": [(9, 5), (1, 3)], "f1": [(1, 1), (11, 4)]}
CASES = [(name, size, rows) for name in TINY for size in SIZES[name] for rows in (1, 3, 8, 1000)]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that nobody has written read as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))


def make(config: VAEConfig, mean: float = 0.0) -> AutoencoderKL:
    """An autoencoder of random weights and norms, `mean` added to what each convolution gives to a norm."""
    torch.manual_seed(5)
    vae = AutoencoderKL(config).eval()
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)
        if name.endswith(("conv_in.bias", "conv1.bias", "conv2.bias", "conv.bias")):
            parameter.data += mean
    return vae


def latents_of(config: VAEConfig, size: tuple[int, int], images: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(images, config.latent_channels, *size, generator=generator)


@pytest.mark.parametrize(("name", "size", "rows"), CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_same_function(name: str, size: tuple[int, int], rows: int) -> None:
    """In float64, where rounding hides no wrong border, halo or statistic; the two images differ in scale."""
    vae, latents = make(TINY[name]).double(), latents_of(TINY[name], size, images=2).double()
    latents[1] *= 3.0
    with torch.inference_mode():
        got, want = decode_in_strips(vae, latents, rows), vae.decode(latents)
    # 30 layers of sums of ≤ 9 · 32 products with eps = 2.2e-16: about 1e-14, and room for what norms amplify.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("mean", [0.0, 100.0], ids="mean-{:g}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_rounds_no_worse_than_the_whole(name: str, dtype: torch.dtype, mean: float) -> None:
    """Against float64: at most twice the plain decode's error in this type, and 4 eps of the largest."""
    vae, latents = make(TINY[name], mean).to(dtype), latents_of(TINY[name], (9, 6)).to(dtype)
    with torch.inference_mode():
        truth = copy.deepcopy(vae).double().decode(latents.double())
        whole = (vae.decode(latents).double() - truth).abs().max()
        errors = [(decode_in_strips(vae, latents, rows).double() - truth).abs().max() for rows in (1, 3, 8)]
    assert max(errors) <= 2 * whole + 4 * torch.finfo(dtype).eps * truth.abs().max()


def test_full_size_in_grey_levels() -> None:
    vae, latents = make(VAEConfig()), latents_of(VAEConfig(), (5, 7))
    with torch.inference_mode():
        got, want = decode_in_strips(vae, latents, 24), vae.decode(latents)
    error = (got - want).abs()
    assert 127.5 * error.max() <= 1.0 and 127.5 * error.mean() <= 0.02  # the promise
    # Rounding alone: against float64, the plain decode is off by 7.3e-6 of the largest, the strips by 7.9e-6.
    assert error.max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "strips"])
def test_the_choice_and_the_independence_of_images(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TINY["f4"]
    vae, latents = make(config), latents_of(config, (5, 6), images=3)
    estimate = peak_bytes(config, 20, 24, 4, None)
    monkeypatch.setattr(vae_strips, "UNTILED_BUDGET", estimate if whole else estimate - 1)
    monkeypatch.setattr(vae_strips, "ROWS", 7)
    images = decode(vae, latents)
    with torch.no_grad():
        alone = [vae.decode(one) if whole else decode_in_strips(vae, one, 7) for one in latents.split(1)]
    assert torch.equal(images, torch.cat(alone)) and not images.requires_grad


def test_leaves_the_latents_alone() -> None:
    vae, latents = make(TINY["f2-plain"]), latents_of(TINY["f2-plain"], (4, 4))
    before = latents.clone()
    decode_in_strips(vae, latents, 3)
    assert torch.equal(latents, before)


def test_refuses_no_rows() -> None:
    with pytest.raises(InvalidArgument, match="rows"):
        decode_in_strips(make(TINY["f1"]), latents_of(TINY["f1"], (2, 2)), 0)


MEASURE = """
import torch
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.models.vae_strips import decode_in_strips, peak_bytes
from fastldm.ops import use_backends

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

config = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)
vae, latents = AutoencoderKL(config).eval(), torch.randn(1, 4, 48, 48)
with torch.inference_mode(), use_backends("reference"):
    decode_in_strips(vae, latents[..., :8, :8], 8), vae.decode(latents[..., :8, :8])
    for rows in (32, None):  # the smaller first: the high-water mark only rises
        before = resident("VmRSS")
        vae.decode(latents) if rows is None else decode_in_strips(vae, latents, rows)
        print(resident("VmHWM") - before, peak_bytes(config, 384, 384, 4, rows))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's high-water mark")
def test_peak_falls_and_is_as_estimated() -> None:
    # Not ru_maxrss, which a child inherits. Maps and strips each in their own pages, so that freed is gone.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    lines = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    (strips, strips_estimate), (whole, whole_estimate) = (map(int, line.split()) for line in lines)
    assert strips <= 0.55 * whole, (strips, whole)  # 16 + 32 channels against 32 + 5 · 16, and the strips
    # A tenth for what convolutions need inside and for the allocator.
    assert strips == pytest.approx(strips_estimate, rel=0.1)
    assert whole == pytest.approx(whole_estimate, rel=0.1)
