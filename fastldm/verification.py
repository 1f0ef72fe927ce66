"""Is what is fast here also right? Every op call of a loaded model beside its reference and float64.

One small picture is made. Each op call that it takes, by the backends in force, is repeated by the op's
PyTorch reference on the same inputs, in the same dtype and in float64. Then the picture as a whole: its
latents and pixels, fast, by the references, and by the same networks in float64.

Allowed is twice the error of the reference in the same dtype, plus 4 eps of the largest value; for a norm eps
counts 1 + |mean| / std times, as rounding the mean does, for attention in float32 1 + |score| times, as the
rounding of a score is a relative error of its weight. Where float64 does not fit into memory the reference
stands for it, and what its own error could have been is taken as one eps.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastldm import ops
from fastldm.canvas import side_in_pixels
from fastldm.errors import NonFiniteOutput
from fastldm.ops.registry import REFERENCE, watch
from fastldm.pipeline import Pipeline
from fastldm.runtime.memory import available_bytes

PROMPT = "a large blue square on a white background"
STEPS = 3
CPU_SIDE = 128  # pixels: a step of SD1.5 takes a second here, and 15 at its own size
SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One layer's calls of an op, or the picture as a whole: the worst of them."""

    layer: str
    op: str
    backend: str  # what served it
    shape: tuple[int, ...]  # of the result
    calls: int
    error: float  # largest distance from float64
    reference_error: float  # the same of the plain PyTorch op; nan: the reference stands for float64
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the error is at most what is allowed; NaN is not."""
        return self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """Error over allowed error."""
        if self.right:
            return self.error / self.allowed if self.allowed else 0.0
        return self.error / self.allowed if self.allowed and math.isfinite(self.error) else math.inf


@dataclass(frozen=True)
class Verification:
    """What `verify` found; prints as a table, the worst rows first.

    served: calls by backend. refused: by op, backend and reason, the calls that a backend left to the next.
    unchecked: calls of a kind (op, shapes, backend) seen before, when time was up. notes: what was left out.
    """

    rows: tuple[Row, ...]
    served: Mapping[str, int]
    refused: Mapping[str, int]
    unchecked: int
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every row is right."""
        return all(row.right for row in self.rows)

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        wrong = sum(not row.right for row in self.rows)
        served = ", ".join(f"{count} by {backend}" for backend, count in self.served.items())
        verdict = (
            f"{wrong} of {len(self.rows)} rows are wrong" if wrong else f"all {len(self.rows)} rows right"
        )
        left = f", {self.unchecked} of them unchecked" if self.unchecked else ""
        return f"{verdict}; {sum(self.served.values())} calls ({served}){left}; {self.seconds:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it: NaN and infinity as null."""
        fields = {name: value for name, value in vars(self).items() if name != "rows"}
        rows = [vars(row) | {"right": row.right} for row in self.rows]
        finite = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            for row in rows
        ]
        return {"ok": self.ok, **fields, "rows": finite}

    def __str__(self) -> str:
        shown = [row for i, row in enumerate(self.rows) if i < SHOWN or not row.right]
        head = ("", "layer", "op", "backend", "shape", "error", "reference", "allowed")
        table: list[tuple[str, ...]] = [head]
        for row in shown:
            numbers = (f"{value:.2g}" for value in (row.error, row.reference_error, row.allowed))
            verdict = "right" if row.right else "WRONG"
            table.append((verdict, row.layer, row.op, row.backend, "×".join(map(str, row.shape)), *numbers))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        if len(shown) < len(self.rows):
            lines.append(f"and {len(self.rows) - len(shown)} more, all right")
        lines += [f"{count} calls refused: {why}" for why, count in self.refused.items()]
        return "\n".join((*lines, *self.notes, self.summary))


def verify(
    pipe: Pipeline, *, width: int | None = None, height: int | None = None, seconds: float = 60.0
) -> Verification:
    """Hold what the pipeline computes fast against the plain PyTorch model and float64, layer by layer.

    width, height: of the picture in pixels; else the model's own, on a CPU 128 at most. seconds: after that
    long, calls of a kind already checked are no longer checked, and counted. The pipeline is busy meanwhile;
    it is left as it was. Raises InvalidArgument and OutOfMemory as `generate` does.
    """
    began = time.perf_counter()
    side, factor = pipe.limits.default_width, pipe.limits.factor
    if pipe.device.type == "cpu":
        side = min(side, max(CPU_SIDE // factor, 1) * factor)
    asked = {"width": width, "height": height}
    size = {name: side_in_pixels(name, value, side, factor) for name, value in asked.items()}
    with pipe.turn(), torch.inference_mode(False), torch.no_grad():
        model = _twin(pipe, pipe.dtype)
        calls = Calls(_layers(model), began + seconds)
        with watch(calls):
            _picture(model, size)
        rows, notes = list(calls.rows.values()), []
        weights = sum(weight.numel() for weight in _weights(pipe))
        if 8 * weights <= available_bytes(pipe.device) // 2:
            rows += _end_to_end(pipe, model, size)
        else:
            notes.append(f"end to end unchecked: float64 needs {8 * weights / 2**30:.1f} GiB of weights")
    return Verification(
        rows=tuple(sorted(rows, key=lambda row: -row.ratio)),
        served=dict(calls.served.most_common()),
        refused=dict(calls.refused.most_common()),
        unchecked=calls.unchecked,
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _twin(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    """A pipeline of the same weights, shared where the dtype is the same, that follows the order in force."""

    def remake(network: nn.Module) -> nn.Module:
        weights = {
            id(weight): nn.Parameter(weight.detach().to(dtype), False) for weight in network.parameters()
        }
        return copy.deepcopy(network, weights)

    networks: dict[str, Any] = {name: remake(each) for name, each in pipe.components.networks.items()}
    return Pipeline(dataclasses.replace(pipe.components, **networks), pipe.device, dtype, None)


def _weights(pipe: Pipeline) -> list[Tensor]:
    return [weight for network in pipe.components.networks.values() for weight in network.parameters()]


def _layers(pipe: Pipeline) -> dict[int, str]:
    """The layer of each weight, by the address of its numbers."""
    return {
        weight.data_ptr(): f"{part}.{name.rpartition('.')[0]}"
        for part, network in pipe.components.networks.items()
        for name, weight in network.named_parameters()
    }


def _picture(pipe: Pipeline, size: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """The latents [1, C, h, w] and pixels [1, 3, H, W] in 0…1 of the one picture; NaN where none came."""
    try:
        asked = _asked(pipe, **size)
        latents = pipe.generate(**asked, steps=STEPS, output_type="latent", cuda_graph=False).images
        return latents, pipe.decode(latents, "pt")
    except NonFiniteOutput:
        return (torch.full((1,), torch.nan, device=pipe.device),) * 2


def _asked(pipe: Pipeline, width: int, height: int) -> dict[str, Any]:
    """What the one picture is asked for with: a prompt, or what the model cannot do without."""
    abilities = pipe.limits.abilities
    grey = np.broadcast_to(np.uint8(128), (height, width, 3))
    if abilities.needs == "image":
        return {"image": grey[:: abilities.upscaling, :: abilities.upscaling]}
    told: dict[str | None, dict[str, Any]] = {
        "label": {"label": 0},
        "layout": {"layout": [(0, (0.25, 0.25, 0.75, 0.75))]},
        "segmentation": {"segmentation": np.broadcast_to(0, (height, width))},
        "mask": {"image": grey, "mask": np.broadcast_to(np.arange(width) < width // 2, (height, width))},
    }
    prompt = {"prompt": PROMPT} if abilities.prompt else {}
    return {"width": width, "height": height, **prompt, **told.get(abilities.needs, {})}


def _end_to_end(pipe: Pipeline, model: Pipeline, size: Mapping[str, int]) -> list[Row]:
    fast = _picture(model, size)
    with ops.use_backends(REFERENCE):
        plain = _picture(model, size)
        truth = _picture(_twin(pipe, torch.float64), size)
    eps, rows = torch.finfo(pipe.dtype).eps, []
    for name, *results in zip(("latents", "pixels"), fast, plain, truth, strict=True):
        made, want, exact = (result.double() for result in results)
        judged = Judged.of(made, want, exact, eps)
        rows.append(judged.row(f"{name} after {STEPS} steps", "end to end", "all", tuple(exact.shape)))
    return rows


@dataclass(frozen=True)
class Judged:
    """The errors of one result."""

    error: float
    reference_error: float
    allowed: float

    @classmethod
    def of(cls, fast: Tensor, plain: Tensor, truth: Tensor | None, eps: float, slack: float = 1.0) -> Judged:
        """By the rule at the head of this file; a result of another shape or dtype is infinitely wrong."""
        exact = plain.double() if truth is None else truth
        rounding = eps * _largest(exact[exact.isfinite()])
        own = rounding if truth is None else _largest(_difference(plain, exact))
        allowed = 2 * own + 4 * slack * rounding + (rounding if truth is None else 0.0)
        alike = fast.shape == exact.shape and fast.dtype == plain.dtype
        error = _largest(_difference(fast, exact)) if alike else math.inf
        return cls(error, math.nan if truth is None else own, allowed)

    def row(self, layer: str, op: str, backend: str, shape: tuple[int, ...]) -> Row:
        """As a row of the table."""
        return Row(layer, op, backend, shape, 1, self.error, self.reference_error, self.allowed)


def _difference(x: Tensor, exact: Tensor) -> Tensor:
    """x − exact, zero where both are the same infinity (a sampler's clamp)."""
    x = x.double()
    return torch.where(x == exact, 0.0, x - exact)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@dataclass
class Calls:
    """The watcher: serves each op call and checks it. After a wrong result it goes on with the reference's,
    so that later calls are judged by what they do themselves.
    """

    layers: Mapping[int, str]  # by the address of their weights
    until: float  # time.perf_counter(), from which on only new kinds of calls are checked
    served: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    unchecked: int = 0
    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)
    kinds: set[tuple[Any, ...]] = field(default_factory=set)
    last: str = ""

    def __call__(self, op: ops.Op[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(op.reference).bind(*args, **kwargs).arguments
        backend, refusals = op.explain(*args, **kwargs)
        self.served[backend] += 1
        self.refused.update(f"{op.name} by {name}: {why}" for name, why in refusals.items())
        tensors = _tensors(given)
        layer = self._layer(op, tensors)
        rest = (value for value in given.values() if not isinstance(value, Tensor))
        kind = op.name, backend, *((x.shape, x.dtype, x.stride()) for x in tensors), *rest
        late = time.perf_counter() > self.until and kind in self.kinds
        if backend == REFERENCE or late:
            self.unchecked += backend != REFERENCE
            return op(*args, **kwargs)
        self.kinds.add(kind)
        return self._check(layer, op, backend, lambda: op(*args, **kwargs), given)

    def _check(
        self,
        layer: str,
        op: ops.Op[..., Any],
        backend: str,
        serve: Callable[[], Any],
        given: Mapping[str, Any],
    ) -> Any:
        tensors = _tensors(given)
        in_place = op.reference.__annotations__["return"] == "None"
        plain_given = _copied(given) if in_place else given
        exact_given = _copied(given, torch.float64) if self._affordable(op, tensors) else None

        def results(returned: Any, given: Mapping[str, Any]) -> list[Tensor]:
            return _tensors(given) if in_place else [returned]

        returned = serve()
        plain_returned = op.reference(**plain_given)
        fast, plain = results(returned, given), results(plain_returned, plain_given)
        exact: Iterable[Tensor | None] = [None] * len(plain)
        if exact_given is not None:
            function = _attention_by_head if op is ops.attention else op.reference
            exact = results(function(**exact_given), exact_given)
        slack = _slack(op, given)
        judged = [
            Judged.of(*each, torch.finfo(each[1].dtype).eps, slack)
            for each in zip(fast, plain, exact, strict=True)
            if each[1].is_floating_point()
        ]
        shape = tuple(plain[0].shape)
        row = max((one.row(layer, op.name, backend, shape) for one in judged), key=lambda row: row.ratio)
        self._add(row)
        if row.right:
            return returned
        for result, right in zip(fast, plain, strict=True) if in_place else ():
            result.copy_(right)
        return plain_returned

    def _layer(self, op: ops.Op[..., Any], tensors: list[Tensor]) -> str:
        """The layer whose weight it is; without one, the block of the weight used last."""
        for tensor in tensors:
            if tensor.data_ptr() in self.layers:
                self.last = self.layers[tensor.data_ptr()]
                return self.last
        return "sampler" if op is ops.guided_step else self.last.rpartition(".")[0]

    def _affordable(self, op: ops.Op[..., Any], tensors: list[Tensor]) -> bool:
        """Whether the call in float64, with what a convolution unfolds inside, fits into half the memory."""
        numbers = sum(x.numel() for x in tensors) * 4
        if op is ops.attention:
            numbers += 3 * tensors[0].shape[2] * tensors[1].shape[2]
        elif tensors[0].dim() == 4 and tensors[1].dim() == 4:
            numbers += 4 * tensors[0].numel() * tensors[1].shape[2] * tensors[1].shape[3]
        return 8 * numbers <= available_bytes(tensors[0].device) // 2

    def _add(self, row: Row) -> None:
        key = row.layer, row.op, row.backend, row.shape
        known = self.rows.get(key, row)
        worse = row if row.ratio > known.ratio else known
        count = known.calls + (key in self.rows)
        self.rows[key] = dataclasses.replace(worse, calls=count)


def _tensors(given: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in given.values() if isinstance(value, Tensor)]


def _copied(given: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments with every tensor copied, floating ones to the dtype."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()

    return {name: copied(value) for name, value in given.items()}


def _attention_by_head(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, causal: bool = False
) -> Tensor:
    """ops.attention, with the scores of one head at a time in memory."""
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        lengths = None if key_lengths is None else key_lengths[row : row + 1]
        for head in range(q.shape[1]):
            one = slice(row, row + 1), slice(head, head + 1)
            out[one] = ops.attention.reference(q[one], k[one], v[one], lengths, causal)
    return out


def _slack(op: ops.Op[..., Any], given: Mapping[str, Any]) -> float:
    """1 + the largest |mean| / std that a norm divides by, or |score| of attention in float32; else 1."""
    if op is ops.attention and given["q"].dtype == torch.float32:
        heads = zip(given["q"].flatten(0, 1), given["k"].flatten(0, 1), strict=True)
        return 1.0 + max(_largest(q @ k.mT) for q, k in heads) / given["q"].shape[-1] ** 0.5
    if op is ops.group_norm_silu:
        x = given["x"].double()
        if given.get("row_bias") is not None:
            x = x + given["row_bias"][:, :, None, None]
        groups = x.flatten(2).unflatten(1, (given["groups"], -1)).flatten(2)
    elif op is ops.layer_norm:
        groups = given["x"].double()
    else:
        return 1.0
    variance, mean = torch.var_mean(groups, dim=-1, correction=0)
    return 1.0 + _largest(mean / (variance + given.get("eps", 1e-5)).sqrt())
