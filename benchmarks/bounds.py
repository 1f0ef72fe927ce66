"""What an op has to move and compute, the time at best that a machine needs for it, and issue 3's targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.kernels.tuned import key_of
from fastldm.ops.recording import Call

MULTIPROCESSOR, CLUSTER = 227 * 1024, 8  # bytes on chip for a program, programs that can share them (sm_90)


@dataclass(frozen=True)
class Machine:
    """Rates a second, of a copy, a product of matrices and exponentials; bytes of the L2 cache."""

    name: str
    bytes: float
    operations: float
    exponentials: float
    cache: int


# What is sustained; the exponentials are those of an H100. (shared/performance.md section 2)
H200 = Machine("H200", bytes=4.3e12, operations=790e12, exponentials=3.9e12, cache=50 * 2**20)


@dataclass(frozen=True)
class Work:
    """Of one call: bytes its algorithm must move, operations (2 a multiply-add) and exponentials."""

    bytes: int
    operations: int = 0
    exponentials: int = 0

    def bound(self, machine: Machine) -> tuple[float, str]:
        """Seconds at best, and what sets them."""
        times = {
            "bytes": self.bytes / machine.bytes,
            "operations": self.operations / machine.operations,
            "exponentials": self.exponentials / machine.exponentials,
        }
        slowest = max(times, key=times.__getitem__)
        return times[slowest], slowest


def work(op: str, arguments: tuple[Any, ...]) -> Work:
    """The work of a call; all its arguments in order, from the meta device or a real one."""
    given = sum(each.nbytes for each in arguments if isinstance(each, Tensor))
    if op == "channel_moments":
        return Work(given)
    x, second = arguments[0], arguments[1]
    if op == "attention":
        pairs = x[..., 0].numel() * second.shape[2]
        return Work(given + x.nbytes, 4 * pairs * x.shape[3], pairs)
    if op == "guided_step":  # reads all, writes latents, x0 and model_input
        return Work(given + x.nbytes + second.nbytes)  # model_input is not read
    if op == "layer_norm":
        return Work(given + x.nbytes)
    if op == "group_norm_silu":  # x is read twice where a group does not stay on chip
        group = x.nbytes // (x.shape[0] * arguments[3])
        return Work(given + x.nbytes + (x.nbytes if group > CLUSTER * MULTIPROCESSOR else 0))
    if op == "linear":
        outputs = x.numel() // x.shape[-1] * second.shape[0]
        return Work(given + outputs * x.element_size(), 2 * outputs * x.shape[-1])
    if op == "geglu":
        outputs = x.numel() // x.shape[-1] * second.shape[0]
        return Work(given + outputs // 2 * x.element_size(), 2 * outputs * x.shape[-1])
    if op == "upsample_conv":  # as plain PyTorch does it: 9 taps, where our four 2×2 convolutions take 4
        outputs = 4 * x.shape[0] * second.shape[0] * x.shape[2] * x.shape[3]
    elif op == "conv2d":
        stride, padding = arguments[3], arguments[4]
        height, width = ((side + 2 * padding - second.shape[2]) // stride + 1 for side in x.shape[2:])
        outputs = x.shape[0] * second.shape[0] * height * width
    else:
        raise ValueError(f"the work of {op} is not known")
    return Work(given + outputs * x.element_size(), 2 * outputs * second[0].numel())


@dataclass(frozen=True)
class Target:
    """A goal of issue 3: how many times as fast as the best of the rivals named so, PyTorch's own choice
    among them, or what share of the bound or of a copy of as many bytes.
    """

    wanted: float
    against: str  # "SDPA", "cuDNN", "PyTorch"; or "bound", "copy"

    def __str__(self) -> str:
        if self.against in ("bound", "copy"):
            return f"≥ {self.wanted:.0%} of {'the bound' if self.against == 'bound' else 'a copy'}"
        return f"≥ {self.wanted:g} × {self.against}"


def targets(op: str, arguments: tuple[Any, ...], machine: Machine) -> list[Target]:
    """What issue 3 wants of a call."""
    x = arguments[0]
    if op == "attention":
        long = x.shape[3] == 40 and x.shape[2] == arguments[1].shape[2] == 4096
        return [Target(1.3 if long else 1.0, "SDPA")]
    if op == "group_norm_silu":
        beyond = [Target(0.8, "copy")] if x.nbytes > machine.cache else []
        return [Target(2.0, "PyTorch"), *beyond]
    if op in ("conv2d", "upsample_conv"):
        return [Target(1.0, "cuDNN")]
    if op in ("channel_moments", "guided_step"):  # has no kernel; is too small for any bound: one launch
        return []
    return [Target(0.7, "bound")]


@dataclass
class Line:
    """Equal calls of an op in a program."""

    op: str
    shape: str
    work: Work
    targets: list[Target]
    count: int = 0

    def seconds(self, machine: Machine) -> float:
        """Of all of them, at best."""
        return self.count * self.work.bound(machine)[0]

    def row(self, machine: Machine) -> str:
        """Shape, count, and of one call what it moves and computes, its time at best and what is wanted."""
        seconds, by = self.work.bound(machine)
        wanted = "; ".join(map(str, self.targets)) or "one launch"
        return (
            f"{self.shape} | {self.count} | {self.work.bytes / 1e6:.1f} | {self.work.operations / 1e9:.2f}"
            f" | {1e6 * seconds:.1f} | {by} | {wanted}"
        )


def lines(calls: Iterable[Call], machine: Machine) -> list[Line]:
    """The calls by op and shape of the tensors."""
    found: dict[tuple[str, str], Line] = {}
    for call in calls:
        sizes = [each for each in call.arguments[:2] if isinstance(each, Tensor)]
        shape = key_of(tuple("x".join(map(str, each.shape)) for each in sizes))
        if (call.op, shape) not in found:
            told = work(call.op, call.arguments), targets(call.op, call.arguments, machine)
            found[call.op, shape] = Line(call.op, shape, *told)
        found[call.op, shape].count += 1
    return list(found.values())


def prediction(machine: Machine = H200) -> str:
    """Two tables of one guided step of SD1.5 and one decode at 512 pixels, bfloat16: every op and shape with
    its bytes, operations, time at best and what issue 3 wants; then each op's sum and its heaviest shape.
    """
    from fastldm.tuning import calls_of

    calls = calls_of("sd15", torch.bfloat16)
    split = next(i for i, call in enumerate(calls) if call.op == "guided_step") + 1
    columns = "MB | GFLOP | at best, µs | bound by | wanted"
    full = [f"| {machine.name} | calls | {columns} |", "| --- |" + " --- |" * 6]
    short = [f"| {machine.name} | calls | all, µs | heaviest | calls | {columns} |", "| --- |" + " --- |" * 9]
    for phase, part in (("step", calls[:split]), ("decode", calls[split:])):
        everything = sorted(lines(part, machine), key=lambda line: (line.op, -line.seconds(machine)))
        total = sum(line.seconds(machine) for line in everything)
        short.append(f"| **{phase}** | {len(part)} | **{1e6 * total:.0f}** |" + " |" * 7)
        full += [f"| {phase}: {line.op} {line.row(machine)} |" for line in everything]
        for op in sorted({line.op for line in everything}):
            ours = [line for line in everything if line.op == op]
            total = sum(line.seconds(machine) for line in ours)
            calls_in_all = sum(line.count for line in ours)
            short.append(f"| {op} | {calls_in_all} | {1e6 * total:.1f} | {ours[0].row(machine)} |")
    return "\n".join([*full, "", *short])
