"""What generate() promises whatever the model: seeds, batches, outputs, callbacks, stopping, errors,
threads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fastldm
from fastldm import images, ops
from fastldm.origin import Origin

FAST = {"steps": 2, "guidance_scale": 3.0}


def test_output_types_agree(pipe: fastldm.Pipeline) -> None:
    made = {
        kind: pipe.generate("a cat", output_type=kind, **FAST).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["np"].dtype == np.float32 and made["np"].shape == (1, 64, 64, 3)
    assert np.array_equal(made["pt"].permute(0, 2, 3, 1).numpy(), made["np"])
    assert np.abs(np.asarray(made["pil"][0]) - made["np"][0] * 255).max() <= 0.5 + 1e-4
    assert np.array_equal(pipe.decode(made["latent"], "np"), made["np"])


def test_image_k_of_a_request_is_the_image_of_seed_plus_k(pipe: fastldm.Pipeline) -> None:
    together = pipe.generate("a cat", num_images=3, seed=40, output_type="np", **FAST)
    alone = pipe.generate("a cat", seed=42, output_type="np", **FAST)
    assert together.seeds == [40, 41, 42]
    assert np.abs(together.images[2] - alone.images[0]).max() <= 1e-5
    assert np.abs(together.images[1] - together.images[2]).max() > 1e-2


def test_more_images_than_a_bucket_holds(pipe: fastldm.Pipeline) -> None:
    many = pipe.generate("a cat", num_images=10, seed=1, output_type="np", **FAST)
    assert many.images.shape[0] == 10 and many.seeds == list(range(1, 11))
    assert (
        np.abs(many.images[9] - pipe.generate("a cat", seed=10, output_type="np", **FAST).images[0]).max()
        <= 1e-5
    )


def test_seed_none_is_drawn_and_reported(pipe: fastldm.Pipeline) -> None:
    drawn = pipe.generate("a cat", seed=None, output_type="np", **FAST)
    again = pipe.generate("a cat", seed=drawn.seeds[0], output_type="np", **FAST)
    assert np.array_equal(drawn.images, again.images)


def test_callback_sees_every_step_and_may_stop(pipe: fastldm.Pipeline) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def watch(step: int, x0: torch.Tensor) -> bool:
        seen.append((step, tuple(x0.shape)))
        return step < 2

    result = pipe.generate("a cat", steps=6, callback=watch)
    assert seen == [(0, (1, 4, 16, 16)), (1, (1, 4, 16, 16)), (2, (1, 4, 16, 16))]
    assert result.stopped and result.image.size == (64, 64)
    assert not pipe.generate("a cat", steps=2, callback=lambda step, x0: None).stopped


def test_progress_counts_to_the_end(pipe: fastldm.Pipeline) -> None:
    counted: list[tuple[int, int]] = []
    pipe.generate("a cat", num_images=9, progress=lambda done, total: counted.append((done, total)), **FAST)
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_ddim_of_the_original_counts_its_own_steps(pipe: fastldm.Pipeline) -> None:
    """Here the scheduler's fields make both the same, but where the original runs a step more."""
    counted: list[tuple[int, int]] = []
    made = [
        pipe.generate("a cat", steps=5, sampler=sampler, output_type="np").images
        for sampler in ("ddim", "ddim_compvis")
    ]
    assert np.array_equal(*made)
    pipe.generate("a cat", steps=6, sampler="ddim_compvis", progress=lambda *at: counted.append(at))
    assert counted == [(i + 1, 7) for i in range(7)]


def test_a_failing_callback_leaves_the_pipeline_usable(pipe: fastldm.Pipeline) -> None:
    def fail(step: int, x0: torch.Tensor) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe.generate("a cat", callback=fail, **FAST)
    assert pipe.generate("a cat", **FAST).image.size == (64, 64)


def test_nan_raises_and_leaves_the_pipeline_usable(pipe: fastldm.Pipeline) -> None:
    class Poisoned(torch.nn.Module):
        def __init__(self, unet: torch.nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def __getattr__(self, name: str) -> object:
            return getattr(super().__getattr__("unet"), name) if name != "unet" else super().__getattr__(name)

        def forward(self, *arguments: object) -> torch.Tensor:
            return self.unet(*arguments) * float("nan")

    healthy = pipe.components
    poisoned = fastldm.Pipeline(
        type(healthy)(**{**vars(healthy), "unet": Poisoned(healthy.unet)}), pipe.device, pipe.dtype, None
    )
    with pytest.raises(fastldm.NonFiniteOutput, match="not finite"):
        poisoned.generate("a cat", **FAST)
    assert pipe.generate("a cat", **FAST).image.size == (64, 64)


def test_running_out_of_memory_is_typed(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*arguments: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: not enough memory: you tried"
        )

    monkeypatch.setattr(type(pipe.components.vae), "decode", starve)
    with pytest.raises(fastldm.OutOfMemory, match="64x64"):
        pipe.generate("a cat", **FAST)
    monkeypatch.undo()
    assert pipe.generate("a cat", **FAST).image.size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"width": 66}, "width"),
        ({"sampler": "flow_euler"}, "sampler"),
        ({"sampler": "ddim_compvis", "steps": 3}, "steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], name: str
) -> None:
    monkeypatch.setattr(pipe.text, "encode", lambda *given: pytest.fail("work began"))
    with pytest.raises(fastldm.InvalidArgument) as caught:
        pipe.generate(**{"prompt": "a cat", **arguments})
    assert caught.value.name == name


@pytest.mark.parametrize("model", [None, 5, b"default"])
def test_what_names_no_model_is_refused(model: object) -> None:
    with pytest.raises(fastldm.InvalidArgument, match="^model=.*: allowed is a path"):
        fastldm.generate("a cat", model=model)


def test_threads_see_what_serial_calls_see(pipe: fastldm.Pipeline) -> None:
    calls = [
        {"prompt": f"cat {i}", "seed": i, "steps": 1 + i % 3, "sampler": sampler, "output_type": "np"}
        for i, sampler in enumerate(["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m"] * 2)
    ]
    serial = [pipe.generate(**call).images for call in calls]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda call: pipe.generate(**call).images, calls))
    assert all(np.array_equal(a, b) for a, b in zip(serial, threaded, strict=True))


def test_no_global_state_is_touched(pipe: fastldm.Pipeline) -> None:
    torch.manual_seed(1)
    before = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    pipe.generate("a cat", seed=None, eta=1.0, sampler="ddim", **FAST)
    after = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_compiled_ops_and_reference_agree_within_a_grey_level(tiny_eps: Path) -> None:
    made = []
    for backends in ("reference", None):
        pipe = fastldm.load(tiny_eps, backends=backends)
        made.append(pipe.generate("a cat", steps=8, seed=3, output_type="np").images)
    assert ops.missing("cpp") is not None or not np.array_equal(*made), "the compiled ops did not run"
    assert np.abs(made[0] - made[1]).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near_float32(tiny_eps: Path, dtype: str) -> None:
    exact = fastldm.load(tiny_eps).generate("a cat", steps=4, seed=3, output_type="np").images
    half = fastldm.load(tiny_eps, dtype=dtype).generate("a cat", steps=4, seed=3, output_type="np").images
    assert 0 < np.sqrt(np.mean((exact - half) ** 2)) < 0.05


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_process_changes_nothing(tiny_eps: Path, default: torch.dtype) -> None:
    """Whoever embeds fastldm may have set one."""
    asked = {"prompt": "a (red:1.4) cat", "steps": 3, "eta": 1.0, "seed": 3, "output_type": "np"}
    want = fastldm.load(tiny_eps).generate(**asked).images
    torch.set_default_dtype(default)
    try:
        made = fastldm.load(tiny_eps).generate(**asked).images
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(made, want)


def test_saved_picture_says_how_it_was_made(pipe: fastldm.Pipeline, tmp_path: Path) -> None:
    result = pipe.generate("a cat", negative_prompt="dog", num_images=2, seed=8, **FAST)
    paths = result.save(tmp_path / "cat.png")
    assert [path.name for path in paths] == ["cat-0.png", "cat-1.png"]
    made = images.read_metadata(paths[1])["fastldm"]
    assert made["arguments"]["seed"] == 9 and made["arguments"]["prompt"] == "a cat"
    assert made["model"] == str(pipe.components.path) and len(made["model_hash"]) == 64
    assert result._repr_png_()[:4] == b"\x89PNG"


def test_a_picture_is_saved_whatever_became_of_the_model(
    tiny_eps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a relative path, from another folder; a hash is told of the files that were loaded alone."""
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    changes: dict[str, Callable[[Path], object]] = {
        "kept": lambda folder: None,
        "replaced": lambda folder: os.replace(shutil.copy(tiny_eps / weights, tmp_path), folder / weights),
        "deleted": shutil.rmtree,
    }
    for name, change in changes.items():
        monkeypatch.chdir(tmp_path)
        shutil.copytree(tiny_eps, name)
        result = fastldm.load(name).generate("a cat", **FAST)
        monkeypatch.chdir("/")
        change(tmp_path / name)
        made = images.read_metadata(*result.save(tmp_path / "cat.png"))["fastldm"]
        assert made["model"] == name and (made["model_hash"] is not None) == (name == "kept")


def test_the_shipped_model_alone_is_the_default(tmp_path: Path) -> None:
    assert Origin(tmp_path / "assets" / "default", ()).model != "default"
    assert Origin(Path(fastldm.__file__).parent / "assets" / "default", ()).model == "default"


def test_tensors_are_the_callers_own(pipe: fastldm.Pipeline) -> None:
    """To be written to and differentiated, as those made of them in a callback."""
    mine: list[torch.Tensor] = []
    for kind in ("pt", "latent"):
        made = pipe.generate(
            "a cat", output_type=kind, callback=lambda _, x0: mine.extend((x0, x0 * 2)), **FAST
        )
        mine.append(made.images)
    assert len(mine) == 10
    for tensor in mine:
        tensor.mul_(0.5).requires_grad_().square().sum().backward()
        assert torch.equal(tensor.grad, 2 * tensor)


def test_long_prompts_and_their_negatives_run(pipe: fastldm.Pipeline) -> None:
    long = ", ".join(["a red cat on a green roof"] * 20)
    mixed = pipe.generate([long, "a cat"], seed=[1, 2], output_type="np", **FAST)
    alone = pipe.generate("a cat", seed=2, output_type="np", **FAST)
    assert np.abs(mixed.images[1] - alone.images[0]).max() <= 1e-4
