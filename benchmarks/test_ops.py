"""Ops with a compiled stand-in at the models' shapes: it, the reference, that compiled, and a plain copy for
those that memory bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.calls import SHAPES, TOKENS, TOLERANCES, Call, Shape, copy, product
from benchmarks.compare import compiled
from fastldm import ops
from fastldm.bench.race import Table

# PyTorch has no fast path for these on a CPU without bfloat16: a call takes minutes.
SLOW_IN_BFLOAT16 = {"conv2d", "geglu", "linear", "upsample_conv"}
BACKENDS = [backend for backend in ops.resolve(None) if backend != "reference"]
CASES = [
    pytest.param(name, dtype, shape, id=f"{name}-{str(dtype)[6:]}-{'x'.join(map(str, shape))}")
    for name, op in ops.OPS.items()
    if op.stand_ins.keys() & set(BACKENDS)
    for dtype in TOLERANCES
    for shape in SHAPES[name][1]  # a KeyError here: an op has its first stand-in, and no shapes yet
]


@pytest.mark.parametrize(("name", "dtype", "shape"), CASES)
def test_op(race: Callable[..., Table], effort: int, name: str, dtype: torch.dtype, shape: Shape) -> None:
    make, shapes = SHAPES[name]
    if not effort and (dtype != torch.float32 or shape != shapes[0]):
        pytest.skip("--quick takes one shape of each op")
    if (
        dtype == torch.bfloat16
        and name in SLOW_IN_BFLOAT16
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        pytest.skip("oneDNN has no bfloat16 on this CPU; PyTorch's other path takes minutes")

    def call() -> Call:
        torch.manual_seed(3)
        return make(dtype, *shape)

    op, moved, operations = ops.OPS[name], call().moved, call().operations
    contenders: dict[str, Callable[[], object]] = {}
    title = f"{name} {'x'.join(map(str, shape))}, {str(dtype)[6:]}"
    for backend in BACKENDS:
        if backend in op.stand_ins:
            if why := op.stand_ins[backend].refuses(*call().arguments):
                title += f"; {backend}: {why}"
            else:
                contenders[backend] = call().of(op.stand_ins[backend].run)
    contenders["reference"] = call().of(op.reference)
    if effort > bool(operations):  # with --full alone where a call takes seconds
        contenders["reference, torch.compile"] = call().of(compiled(op.reference))
    if operations:
        contenders["product of as many operations"] = product(operations, dtype)
    else:
        contenders["copy of as many bytes"] = copy(moved)
    race(
        title,
        contenders,
        budget=1.5,
        # A convolution in float64 takes minutes; tests/ops hold the ops to it at small sizes.
        truth="reference" if operations else call().in_float64().of(op.reference)(),
        tolerance=TOLERANCES[dtype],
        work=(operations or moved) / 1e9,
        unit="GFLOP/s" if operations else "GB/s",
    )


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the compiled extension is missing")
@pytest.mark.parametrize("shape", TOKENS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_geglu_gate(race: Callable[..., Table], effort: int, dtype: torch.dtype, shape: Shape) -> None:
    """What follows the product in geglu: ours in one pass, PyTorch's in two."""
    from fastldm.ops.cpp.geglu import gate

    if not effort and (dtype != torch.float32 or shape != TOKENS[0]):
        pytest.skip("--quick takes one shape")
    rows, tokens, width = shape
    x = torch.randn(rows, tokens, 8 * width).to(dtype)

    def unfused(x: Tensor) -> Tensor:
        hidden, gates = x.chunk(2, dim=-1)
        return hidden * torch.nn.functional.gelu(gates)

    moved = x.nbytes + x.nbytes // 2
    race(
        f"geglu's gate {'x'.join(map(str, shape))}, {str(dtype)[6:]}",
        {
            "cpp": lambda: gate(x),
            "chunk, gelu, mul": lambda: unfused(x),
            "copy of as many bytes": copy(moved),
        },
        budget=1.0,
        truth=unfused(x.double()),
        tolerance=TOLERANCES[dtype],
        work=moved / 1e9,
        unit="GB/s",
    )
