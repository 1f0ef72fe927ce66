"""A tiny pipeline with random weights, made in memory, and what captures its graphs: a GPU, or a double."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastldm.checkpoint import Components
from fastldm.diffusion import SchedulerConfig
from fastldm.models.clip import CLIPTextConfig, CLIPTextModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet, UNetConfig
from fastldm.models.vae import AutoencoderKL, VAEConfig
from fastldm.pipeline import Pipeline
from fastldm.runtime.graphs import CudaRecorder, Graphs
from tests.conftest import sane_weights

WORDS = "a cat dog fish house red blue green on the big small".split()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_components() -> Components:
    """16×16 pictures, f = 2, prompts of 8 tokens; weights of sane size, so that every part matters."""
    torch.manual_seed(5)
    unet = UNet(
        UNetConfig(
            block_out_channels=(16, 32),
            layers_per_block=1,
            heads=(2, 4),
            transformer_depth=(1, 0),
            cross_attention_dim=16,
            norm_num_groups=4,
            sample_size=8,
        )
    )
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))
    text = CLIPTextModel(CLIPTextConfig(len(WORDS) + 4, 16, 32, 2, 2, 8))
    for network in (unet, vae, text):
        network.eval().requires_grad_(False)
        sane_weights(network)
    scheduler = SchedulerConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Components("sd1", unet, vae, text, Tokenizer.from_words(WORDS, 8), scheduler, (), Path("memory"))


def tiny_pipeline(backends: tuple[str, ...] | None = None) -> Pipeline:
    return Pipeline(tiny_components(), DEVICE, torch.float32, backends)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


class Touched(TorchDispatchMode):
    """Notes the tensors from outside that operations read and write; refuses those that wait for a device."""

    WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "lift_fresh"}

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[tuple[object, ...], Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in tensors_in((args, kwargs or {})):
            if tensor.untyped_storage().data_ptr() not in self._made:
                self.outside[tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype] = tensor
        result = func(*args, **(kwargs or {}))
        held = {tensor.untyped_storage().data_ptr() for tensor in self.outside.values()}
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in tensors_in(result)} - held
        return result


@pytest.fixture
def touched() -> Touched:
    return Touched()


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Double:
    """Captures without a GPU: a replay launches again, and has to touch the same memory as the capture did.

    As with a real one, a capture changes nothing. `failure`, if set, is raised in the midst of it.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.failure: Exception | None = None
        self.grows = 0  # bytes of the pool at each capture

    def new_pool(self) -> object:
        return object()

    def warm_up(self, launch: Callable[[], None]) -> None:
        launch()
        with Touched() as touched:
            launch()
        self.known = touched.outside

    def capture(self, launch: Callable[[], None], pool: object) -> tuple[Callable[[], None], int]:
        before = [(tensor, tensor.clone()) for tensor in self.known.values()]
        with Touched() as captured:
            launch()
        for tensor, value in before:
            tensor.copy_(value)
        assert captured.outside.keys() == self.known.keys(), "the work moved after its warm-up"
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)
        self.captures += 1

        def replay() -> None:
            with Touched() as touched:
                launch()
            assert touched.outside.keys() == captured.outside.keys(), "a replay would touch stale memory"
            self.replays += 1

        return replay, self.grows


class Counting(CudaRecorder):
    """Real captures, counted and made to fail as the double's are."""

    def __init__(self) -> None:
        super().__init__(DEVICE)
        self.captures = self.replays = 0
        self.failure: Exception | None = None

    def capture(self, launch: Callable[[], None], pool: object) -> tuple[Callable[[], None], int]:
        def failing() -> None:
            launch()
            if self.failure is not None:
                raise type(self.failure)(*self.failure.args)

        replay, grown = super().capture(failing, pool)
        self.captures += 1

        def count() -> None:
            replay()
            self.replays += 1

        return count, grown


@pytest.fixture
def recorder() -> Double | Counting:
    return Counting() if DEVICE.type == "cuda" else Double()


@pytest.fixture
def captured(recorder: Double | Counting) -> Pipeline:
    """A pipeline of its own whose graphs the recorder makes; on a CPU without the ops that repack weights."""
    pipe = tiny_pipeline(None if DEVICE.type == "cuda" else ("reference",))
    pipe.graphs = Graphs(recorder, 1 << 30)
    return pipe
