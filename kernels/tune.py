"""The search behind `fastldm tune`: right sizes only, timed in turn with what PyTorch has for the call.

Nothing here knows the device: calls are on any, and `race` and `now` are given, so that a test can measure by
a table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastldm import ops
from fastldm.kernels import tuned
from fastldm.kernels.candidates import KERNELS, SERVES, neighbours, rivals
from fastldm.kernels.measuring import Run, errors, poisoned
from fastldm.kernels.tuned import ANY, Entry, key_of

__all__ = ["KERNELS", "Shape", "fill", "shapes", "tune", "with_sizes"]

KERNEL = "triton"
IN_PLACE = "guided_step"  # latents, x0 and model_input
GAIN = 0.99  # a step of the search that takes more of the time so far is noise

Race = Callable[[Mapping[str, Run]], Mapping[str, float]]
Report = Callable[[str], None]


class Call(Protocol):
    """An op's name and all its arguments, as `fastldm.ops.recording` lists them."""

    @property
    def op(self) -> str: ...
    @property
    def arguments(self) -> tuple[Any, ...]: ...


@dataclass
class Shape:
    """Calls that share a line of the table; `arguments` are the first one's."""

    op: str
    key: str
    arguments: tuple[Any, ...]
    count: int = 1


def shapes(calls: Iterable[Call]) -> list[Shape]:
    """The calls of ops with a kernel, one line for each op and shape."""
    found: dict[tuple[str, str], Shape] = {}
    for call in calls:
        if call.op in KERNELS:
            key = key_of(KERNELS[call.op].shape(*call.arguments))
            if (call.op, key) in found:
                found[call.op, key].count += 1
            else:
                found[call.op, key] = Shape(call.op, key, call.arguments)
    return list(found.values())


def tune(
    calls: Iterable[Call],
    *,
    device: torch.device,
    race: Race,
    seconds: float,
    now: Callable[[], float],
    report: Report,
) -> dict[str, dict[str, Entry]]:
    """A table of the sizes, or the rival, that was the fastest right one for each op and shape.

    race: seconds of one call of each contender. seconds: the budget by the clock `now`; a shape gets as much
    of it as PyTorch's time for its calls is of all that are left, and what does not fit stays unmeasured.
    Ctrl-C ends the search, and keeps what was measured.
    """
    began, table = now(), dict[str, dict[str, Entry]]()
    left = []
    for shape in shapes(calls):
        try:
            spent = race({SERVES: _bound(shape, device)})[SERVES]
        except RuntimeError as error:
            report(f"{shape.op} {shape.key}: not measured: {_short(error)}")
            continue
        left.append((spent * shape.count, shape))
    left.sort(key=lambda each: each[0], reverse=True)
    while left and now() - began < seconds:
        share = left[0][0] / sum(cost for cost, _ in left)
        _, shape = left.pop(0)
        until = now() + share * (seconds - (now() - began))
        try:
            found = measure(shape, device, race, until, now, report)
        except (RuntimeError, ValueError) as error:
            report(f"{shape.op} {shape.key}: not measured: {_short(error)}")
            continue
        except KeyboardInterrupt:
            report(f"stopped: {1 + len(left)} shapes were not measured")
            return table
        if found is not None:
            table.setdefault(shape.op, {})[shape.key] = found
            report(f"{shape.op} {shape.key}: {_told(found)}")
    if left:
        report(f"out of time: {len(left)} shapes were not measured")
    return table


def _bound(shape: Shape, device: torch.device) -> Run:
    reference, arguments = ops.OPS[shape.op].reference, fill(shape.op, shape.arguments, device)
    return lambda: reference(*arguments)


def measure(
    shape: Shape, device: torch.device, race: Race, until: float, now: Callable[[], float], report: Report
) -> Entry | None:
    """The entry of one op and shape, or None where the kernel cannot take it; the first sizes are tried even
    when the time is over.
    """
    kernel, op = KERNELS[shape.op], ops.OPS[shape.op]
    arguments = fill(shape.op, shape.arguments, device)
    first, *others = kernel.sizes(*arguments)
    with with_sizes(shape.op, first):
        if why := op.stand_ins[KERNEL].refuses(*arguments):
            report(f"{shape.op} {shape.key}: {why}")
            return None
    plain, truth = (
        outcome(shape.op, op.reference, arguments),
        outcome(shape.op, op.reference, wide(arguments)),
    )
    dtype = arguments[3 if shape.op == IN_PLACE else 0].dtype

    def contender(sizes: Any) -> Run:
        def run() -> object:
            with with_sizes(shape.op, sizes):
                return op.stand_ins[KERNEL].run(*arguments)

        return run

    def is_right(sizes: Any) -> bool:
        try:
            with with_sizes(shape.op, sizes), poisoned():
                made = outcome(shape.op, op.stand_ins[KERNEL].run, arguments)
        except Exception as error:  # whatever the compiler or the launch has against these sizes
            if sizes == first:
                report(f"{shape.op} {shape.key}: the kernel's own sizes fail: {_short(error)}")
            return False
        right = errors(made, plain, truth, dtype)["right"]
        if not right:
            report(f"{shape.op} {shape.key}: WRONG with {sizes}")
        return right

    best, tried, batch = None, [first], [first, *(each for each in others if each != first)]
    while batch:
        able = []
        for sizes in batch:
            if sizes != first and now() >= until:
                break
            tried.append(sizes)
            if is_right(sizes):
                able.append(sizes)
        around = {str(sizes): sizes for sizes in ([] if best is None else [best]) + able}
        if not able:
            break
        spent = race({name: contender(sizes) for name, sizes in around.items()})
        winner = min(spent, key=spent.__getitem__)
        if best is not None and spent[winner] > GAIN * spent[str(best)]:
            break
        best = around[winner]
        batch = [each for each in neighbours(best, kernel.limits) if each not in tried]
        if now() >= until:
            break
    return _verdict(race, None if best is None else contender(best), best, rivals(shape.op, arguments))


def _verdict(race: Race, ours: Run | None, sizes: Any, against: dict[str, Run]) -> Entry:
    """Our best beside all rivals in one race. It has to beat what would serve the call in its place."""
    spent = race(({} if ours is None else {KERNEL: ours}) | against)
    seconds = {name: float(f"{took:.4g}") for name, took in spent.items()}
    if ours is not None and spent[KERNEL] < spent[SERVES]:
        return {"sizes": asdict(sizes), "seconds": seconds}
    return {"rival": SERVES, "seconds": seconds}


def with_sizes(op: str, sizes: Any) -> Any:
    """A block in which the op's kernel takes these sizes at every shape."""
    return tuned.using({op: {ANY: {"sizes": asdict(sizes)}}})


def fill(op: str, arguments: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    """The arguments with numbers in them, laid out in memory as the recorded tensors are.

    Normal ones; weights such that a result is of size 1; a sampler table that halves x, so that it stays
    small call after call; all keys seen.
    """
    names = inspect.signature(ops.OPS[op].reference).parameters
    generator = torch.Generator(device).manual_seed(3)

    def filled(name: str, given: Tensor) -> Tensor:
        span = sum((size - 1) * step for size, step in zip(given.shape, given.stride(), strict=True)) + 1
        if not given.is_floating_point():
            value = arguments[1].shape[2] if name == "key_lengths" else 0
            memory = torch.full((span,), value, dtype=given.dtype, device=device)
        elif name == "table":
            memory = torch.full((span,), 0.5, dtype=given.dtype, device=device)
        else:
            memory = torch.randn(span, generator=generator, device=device)
            if name == "weight" and given.dim() > 1:
                memory /= given[0].numel() ** 0.5
        return memory.to(given.dtype).as_strided(given.shape, given.stride())

    return tuple(
        filled(name, each) if isinstance(each, Tensor) else each
        for name, each in zip(names, arguments, strict=True)
    )


def outcome(op: str, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a call gives; of the op that works in place, what it leaves in copies of its tensors."""
    if op != IN_PLACE:
        return run(*arguments)
    own = tuple(each.clone() if isinstance(each, Tensor) else each for each in arguments)
    run(*own)
    return own[:3]


def wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in double precision."""
    return tuple(
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments
    )


def _told(found: Entry) -> str:
    seconds = found["seconds"]
    times = ", ".join(f"{name} {1e6 * took:.3g} µs" for name, took in seconds.items())
    chosen = found.get("rival") or " ".join(f"{name}={size}" for name, size in found["sizes"].items())
    return f"{chosen} ({times})"


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
