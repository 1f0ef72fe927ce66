"""LoRA fine-tuning: what it learns, what it leaves alone, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fastldm
from fastldm.checkpoint.lora import read_lora
from fastldm.errors import InvalidArgument, NonFiniteOutput
from fastldm.models.unet import UNet
from fastldm.training.fit import FitSettings
from fastldm.training.lora import ATTENTION, TEXT_ATTENTION, LoraSettings, train_lora

FIT = FitSettings(steps=6, batch=2, learning_rate=1e-2, warmup=1, save_every=2)
BOTH = LoraSettings(FIT, rank=3, alpha=6.0, targets=(*ATTENTION, "conv1"), text_targets=TEXT_ATTENTION)


@pytest.fixture
def data() -> list[tuple[Tensor, str]]:
    drawn = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return list(zip(drawn, ("a red circle", "the blue cat", ""), strict=True))


def quiet(_: str) -> None: ...


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def test_the_loss_falls_and_the_model_stays(
    pipe: fastldm.Pipeline,
    bits: Callable[[fastldm.Pipeline], dict[str, Tensor]],
    data: list[tuple[Tensor, str]],
    tmp_path: Path,
) -> None:
    """Learning one picture by heart takes the loss down by a third."""
    before = bits(pipe)
    fit = FitSettings(steps=75, batch=2, learning_rate=5e-2, warmup=5, save_every=1000)
    targets = "conv1", "conv2", "conv_out", "proj_out"
    settings = LoraSettings(fit, rank=8, caption_dropout=0.0, targets=targets)
    train_lora(pipe.components, data[:1], settings, tmp_path, tmp_path / "lora", report=quiet)
    losses = [float(line.split(",")[1]) for line in (tmp_path / "lora.csv").read_text().splitlines()]
    assert losses[-1] < 0.67 * losses[0], losses
    after = bits(pipe)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(weight.requires_grad for weight in pipe.components.unet.parameters())


def test_what_is_written_is_what_was_trained(
    pipe: fastldm.Pipeline,
    data: list[tuple[Tensor, str]],
    tmp_path: Path,
    networks: dict[str, torch.nn.Module],
) -> None:
    """One file for diffusers, one of each network for peft; all three give the same weights."""
    train_lora(pipe.components, data, BOTH, tmp_path, tmp_path / "lora", report=quiet)
    state = torch.load(tmp_path / "lora.pt", weights_only=True)["module"]
    whole = read_lora(tmp_path / "lora", networks)
    assert {change.scale for change in whole.changes.values()} == {2.0}
    assert len(whole.changes) == len([key for key in state if key.startswith("up.")])
    for module, change in whole.changes.items():
        key = module.replace(".", "/")
        assert torch.equal(change.up, state[f"up.{key}"].flatten(1))
        assert torch.equal(change.down, state[f"down.{key}"].flatten(1))
        # Over the one token of the middle there is nothing for queries and keys to choose.
        assert change.up.any() or ("mid_block" in module and ".attn1." in module)
    parts = {}
    for part in networks:
        parts |= read_lora(tmp_path / "lora" / part, networks).changes
    assert parts.keys() == whole.changes.keys()
    for module, change in whole.changes.items():
        other = parts[module]
        assert torch.equal(change.up, other.up) and torch.equal(change.down, other.down)
        assert change.scale == other.scale


def test_a_model_that_learnt_its_variance_learns_on_with_it(
    pipe: fastldm.Pipeline, data: list[tuple[Tensor, str]], tmp_path: Path
) -> None:
    """L_hybrid reaches both halves of what comes out: the prediction and the place of the variance."""
    torch.manual_seed(3)
    config = replace(pipe.components.unet.config, out_channels=8, learned_variance=True)
    scheduler = replace(pipe.components.scheduler, variance_type="learned_range")
    components = replace(pipe.components, unet=UNet(config), scheduler=scheduler)
    settings = LoraSettings(replace(FIT, steps=2), rank=3, targets=("conv_out",))
    train_lora(components, data, settings, tmp_path, tmp_path / "lora", report=quiet)
    [change] = read_lora(tmp_path / "lora", {"unet": components.unet}).changes.values()
    assert (change.up.reshape(2, 4, -1).abs().amax((1, 2)) > 0).all()


def test_the_names_are_those_of_peft(
    pipe: fastldm.Pipeline,
    data: list[tuple[Tensor, str]],
    recorded: Callable[[str], tuple[dict[str, Tensor], dict[str, str]]],
    tmp_path: Path,
) -> None:
    """Trained on the modules of a recorded file, the keys, shapes and metadata's fields are its."""
    theirs, notes = recorded("lora_peft_alpha_in_metadata")
    ends = {key.split(".lora_")[0] for key in theirs}
    settings = replace(
        BOTH,
        rank=4,
        alpha=10.0,
        targets=tuple(end.removeprefix("unet.") for end in ends if end.startswith("unet.")),
        text_targets=tuple(end.removeprefix("text_encoder.") for end in ends if end.startswith("text")),
    )
    train_lora(pipe.components, data, settings, tmp_path, tmp_path / "lora", report=quiet)
    ours = tensors(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    peft = tensors(tmp_path / "lora" / "unet" / "adapter_model.safetensors")
    assert {
        f"base_model.model.{key.removeprefix('unet.')}" for key in ours if key.startswith("unet.")
    } == set(peft)


def test_a_stopped_run_goes_on_to_the_same_bits(
    pipe: fastldm.Pipeline, data: list[tuple[Tensor, str]], tmp_path: Path
) -> None:
    train_lora(pipe.components, data, BOTH, tmp_path / "whole", tmp_path / "one", report=quiet)

    class Stop(Exception):
        pass

    class Stopping(list):
        reads = 0

        def __getitem__(self, row: int) -> tuple[Tensor, str]:
            self.reads += 1
            if self.reads > 7:
                raise Stop
            return super().__getitem__(row)

    with pytest.raises(Stop):
        train_lora(pipe.components, Stopping(data), BOTH, tmp_path / "cut", tmp_path / "two", report=quiet)
    assert not (tmp_path / "two").exists()
    train_lora(pipe.components, data, BOTH, tmp_path / "cut", tmp_path / "two", report=quiet)
    one, two = (tensors(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_gradient_is_that_of_the_factors(pipe: fastldm.Pipeline, data: list[tuple[Tensor, str]]) -> None:
    """∂L/∂up = s · G downᵀ and ∂L/∂down = s · upᵀ G, with G the gradient of the weight itself."""
    from torch.func import functional_call

    from fastldm.checkpoint.lora_names import adaptable
    from fastldm.training.lora import Adapter

    unet = pipe.components.unet
    name = "unet.mid_block.resnets.0.conv1"
    modules = {name: adaptable({"unet": unet})[name]}
    adapter = Adapter(modules, 2, 3.0, torch.Generator().manual_seed(1))
    down, up = adapter.pair(name)
    with torch.no_grad():
        up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(4)))
    weight = modules[name].weight
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(3))

    changed = adapter.weights(modules)[f"{name}.weight"]
    assert torch.allclose(
        changed, weight + 1.5 * (up.flatten(1) @ down.flatten(1)).view(weight.shape), atol=1e-6
    )
    functional_call(modules[name], {"weight": changed}, (x,)).square().sum().backward()
    whole = changed.detach().requires_grad_()
    torch.nn.functional.conv2d(x, whole, modules[name].bias, padding=1).square().sum().backward()
    gradient = whole.grad.flatten(1).double()
    for got, want in (
        (up.grad.flatten(1), 1.5 * gradient @ down.detach().flatten(1).T.double()),
        (down.grad.flatten(1), 1.5 * up.detach().flatten(1).T.double() @ gradient),
    ):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_nan_stops_the_run(pipe: fastldm.Pipeline, data: list[tuple[Tensor, str]], tmp_path: Path) -> None:
    bad = [(latents * float("nan"), text) for latents, text in data]
    with pytest.raises(NonFiniteOutput, match="step 0"):
        train_lora(pipe.components, bad, BOTH, tmp_path, tmp_path / "lora", report=quiet)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"caption_dropout": 1.5}, "caption_dropout=1.5"),
        ({"targets": ("to_query",)}, "the nearest is to_q"),
        ({"targets": (), "text_targets": ()}, "at least one"),
        ({"text_targets": ("to_q",)}, "text_targets='to_q'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_settings_are_named(
    pipe: fastldm.Pipeline, data: list[tuple[Tensor, str]], tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        train_lora(pipe.components, data, replace(BOTH, **changes), tmp_path, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 8), (4, 8, 4)], ids=str)
def test_latents_of_another_shape_are_named(
    pipe: fastldm.Pipeline, data: list[tuple[Tensor, str]], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    settings = replace(BOTH, fit=replace(FIT, batch=64))  # so that both kinds meet
    with pytest.raises(InvalidArgument, match="data"):
        odd = [*data[:2], (torch.zeros(shape), "a")]
        train_lora(pipe.components, odd, settings, tmp_path, tmp_path / "lora")
    with pytest.raises(InvalidArgument, match="data"):
        train_lora(pipe.components, [], settings, tmp_path, tmp_path / "lora")
