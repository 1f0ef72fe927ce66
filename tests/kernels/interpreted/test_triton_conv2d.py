"""ops.conv2d on the Triton backend, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastldm.errors import BackendUnavailable
from fastldm.kernels.conv2d import Tiles, launch, shape_of
from fastldm.ops import conv2d, use_backends

DTYPES = [torch.float32, torch.float16]
TILES = Tiles(rows=32, columns=32, depth=32, splits=1, warps=4, stages=1)
SPLIT = Tiles(rows=32, columns=32, depth=16, splits=4, warps=4, stages=1)
Case = dict[str, Any]


def make(
    dtype: torch.dtype,
    images: int = 2,
    channels: int = 24,
    size: tuple[int, int] = (5, 6),
    width: int = 20,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    biased: bool = True,
    adds: bool = True,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def image(*shape: int) -> Tensor:
        return normal(*shape).contiguous(memory_format=torch.channels_last)

    x = image(images, channels, *size)
    weight = image(width, channels, kernel, kernel) * (channels * kernel**2) ** -0.5
    out = [(side + 2 * padding - kernel) // stride + 1 for side in size]
    return {
        "x": x,
        "weight": weight,
        "bias": normal(width) if biased else None,
        "stride": stride,
        "padding": padding,
        "residual": image(images, width, *out) if adds else None,
    }


def run(case: Case, tiles: Tiles, result: Tensor | None = None) -> Tensor:
    made = torch.full_like(conv2d.reference(**case), float("nan")) if result is None else result
    launch(tiles, **case, result=made)
    return made


def wide(case: Case) -> Case:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in case.items()}


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_errors_stay_within_those_of_pytorch(
    dtype: torch.dtype, tiles: Tiles, error_rule: Any, shapes: int
) -> None:
    rule = error_rule()

    @settings(max_examples=shapes)
    @given(
        images=st.integers(1, 2),
        channels=st.sampled_from([2, 3, 16, 24, 33]),
        size=st.one_of(st.tuples(st.integers(3, 4), st.integers(3, 4)), st.just((5, 7))),
        width=st.sampled_from([1, 4, 16, 20, 40]),
        layer=st.sampled_from([(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0)]),
        biased=st.booleans(),
        adds=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def check(layer: tuple[int, int, int], **shape: Any) -> None:
        kernel, stride, padding = layer
        case = make(dtype, kernel=kernel, stride=stride, padding=padding, **shape)
        rule.add(
            run(case, tiles), conv2d.reference(**case), conv2d.reference(**wide(case)), label=(layer, shape)
        )

    check()
    rule.close(at_least=shapes)


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["whole", "split"])
def test_nothing_outside_the_result_is_written(tiles: Tiles, guarded: Any) -> None:
    case, guard = make(torch.float32, size=(3, 5), width=7), guarded()
    wanted = run(case, tiles)
    result = guard.cut(torch.full_like(wanted, float("nan")))
    run(case, tiles, result)
    guard.check()
    assert torch.equal(result, wanted)


@pytest.fixture
def measured(measure: Any) -> Case:
    """A call whose shape is in the table."""
    case = make(torch.float32)
    measure("conv2d", shape_of(case["x"], case["weight"], 1, 1), SPLIT)
    return case


def test_a_measured_shape_is_served(measured: Case) -> None:
    with use_backends("triton"):
        result = conv2d(**measured)
    assert torch.equal(result, run(measured, SPLIT))
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fastldm.triton_conv2d.default, tuple(measured.values()))


def test_refused_calls_say_why(measured: Case) -> None:
    refused: dict[str, Case] = {
        "no measurement": make(torch.float32, images=1),
        "one type": measured | {"weight": measured["weight"].half()},
        "is empty": measured | {"x": measured["x"][:0]},
        "for the channels": measured | {"x": measured["x"][:, :3]},
        "does not fit": measured | {"x": measured["x"][:, :, :1, :1], "padding": 0},
        "channels-last": measured | {"x": measured["x"].contiguous()},
        "bias is not": measured | {"bias": measured["bias"][:3]},
        "shape of the result": measured | {"residual": measured["residual"][:1]},
        "autograd records": measured | {"bias": measured["bias"].clone().requires_grad_()},
    }
    for why, call in refused.items():
        with use_backends("triton"), pytest.raises(BackendUnavailable, match=f"conv2d: triton: .*{why}"):
            conv2d(**call)
