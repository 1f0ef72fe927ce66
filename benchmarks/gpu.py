"""What a GPU makes of fastldm: `python -m benchmarks.gpu --out FOLDER`, from an uninstalled checkout too.

Parts, each also alone with --only and within ten minutes: `build` compiles the extensions beside the package;
`correctness` holds every kernel at the models' shapes to float64; `tune` is a `fastldm tune` for SD1.5, its
table under --out; `ops` times every op, by that table where there is one, beside what PyTorch has, and beside
what its bytes and operations allow on this machine. A short table comes last; gpu.json, written after every
row, lies under --out. The other parts are whole models: see `gpu_models`. --predict needs no GPU: the times
at best, and what is wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_models
from benchmarks.bounds import H200, Machine, prediction, targets, work
from benchmarks.calls import SHAPES, Call, Shape, copy
from fastldm import ops
from fastldm.bench.race import seconds
from fastldm.kernels import measuring

ROOT = Path(__file__).parents[1]
PARTS = ("build", "correctness", "tune", "ops", *gpu_models.PARTS)
BACKENDS = ("cuda", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MINUTES = 8.5  # of a part; what is begun by then may take another
NOISE = 0.98  # equal programs differ by so much
COMPILED = 0.6  # of a part's time: from then on torch.compile, which takes most of it, is left out
OURS, COMPILER, COPY = "fastldm", "torch.compile", "copy"
Row = dict[str, Any]
Shapes = dict[str, tuple[Any, list[Shape]]]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for; 1 where something is wrong or failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="correctness and speed of fastldm's kernels on a GPU")
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="this part; may be given several times"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for gpu.json and the table"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of each part ({MINUTES})")
    parser.add_argument("--predict", action="store_true", help="no GPU: what bytes and operations allow")
    options = parser.parse_args(arguments)
    if options.predict:
        print(prediction())
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    began, found = time.perf_counter(), Findings(options.out / "gpu.json")
    parts = options.only or PARTS
    for part in [name for name in PARTS if name in parts]:
        with found.within(part):
            run(part, options.out, 60 * options.minutes, found)
    print(f"{table(found.facts)}\n{time.perf_counter() - began:.0f} s")
    return 1 if wrong(found.facts) else 0


def run(part: str, out: Path, budget: float, found: Findings) -> None:
    """One part; each of its rows is kept as it comes."""
    if part == "build":
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        required = {**os.environ, "FASTLDM_BUILD": "1"}  # what does not build is an error
        subprocess.run(build, cwd=ROOT, check=True, env=required)
        return
    found.facts.setdefault("machine", machine())
    if part in gpu_models.PARTS:
        gpu_models.run(part, budget, found.add)
        return
    until = time.perf_counter() + budget
    tuned_file = out / "tuned.json"
    if part == "tune":
        from fastldm import tuning

        tuning.run(model="sd15", minutes=budget / 60, out=str(tuned_file), report=found.add)
        return
    with torch.device("cuda"), torch.inference_mode():
        if part == "correctness":
            for row in correctness(BACKENDS, DTYPES, SHAPES, until):
                found.add(row)
        else:
            peaks = measured_peaks()
            found.facts["peaks"] = vars(peaks)
            with table_of(tuned_file):
                for row in speeds(DTYPES[0], SHAPES, peaks, until):
                    found.add(row)


class Findings:
    """What was found, by part; gpu.json holds it as far as it came."""

    def __init__(self, file: Path) -> None:
        self.file, self.part = file, ""
        self.facts: dict[str, Any] = {}

    def add(self, row: Any) -> None:
        """Keep a row of this part."""
        self.facts.setdefault(self.part, []).append(row)
        self.save()

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """A part whose failure is kept and leaves the others to run."""
        self.part, began = part, time.perf_counter()
        try:
            yield
        except Exception as error:
            said = getattr(error, "stderr", None) or f"{type(error).__name__}: {error}"
            self.facts.setdefault("failed", {})[part] = said[-2000:]
        self.facts.setdefault("seconds", {})[part] = round(time.perf_counter() - began, 1)
        self.save()

    def save(self) -> None:
        self.file.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """The device and the software, and what each backend says about itself."""
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "backends": {name: ops.missing(name) or "available" for name in ops.AUTOMATIC},
    }


def measured_peaks() -> Machine:
    """This machine's rates: a copy of 2 GB, a product of bfloat16 matrices; exponentials not measured, but
    those of an H200 with as many multiprocessors.
    """
    device, side = torch.cuda.get_device_properties(0), 8192
    left, right = torch.randn(2, side, side).bfloat16()
    moved, operations = 2 * 2**31, 2 * side**3
    spent = measuring.race({"copy": copy(moved), "product": lambda: left @ right})
    exponentials = H200.exponentials * device.multi_processor_count / 132
    cache = device.L2_cache_size
    return Machine(device.name, moved / spent["copy"], operations / spent["product"], exponentials, cache)


def table_of(file: Path) -> contextlib.AbstractContextManager[None]:
    """The table of the part `tune` in use, if it has run."""
    if ops.missing("triton") is not None:
        return contextlib.nullcontext()
    from fastldm.kernels import tuned

    return tuned.using(tuned.read(file))


def cases(
    backends: Iterable[str], dtypes: Iterable[torch.dtype], shapes: Shapes
) -> Iterator[tuple[str, str, torch.dtype, Shape, Callable[[], Call]]]:
    """Backend, op, dtype, shape and a maker of equal calls, for every kernel there is."""
    for backend in [name for name in backends if ops.missing(name) is None]:
        for name, op in ops.OPS.items():
            for dtype in dtypes if backend in op.stand_ins else ():
                for shape in shapes[name][1]:
                    yield backend, name, dtype, shape, maker(shapes[name][0], dtype, shape)


def maker(make: Any, dtype: torch.dtype, shape: Shape) -> Callable[[], Call]:
    """Makes equal calls."""

    def call() -> Call:
        torch.manual_seed(3)
        return make(dtype, *shape)

    return call


def variants(backend: str, op: str, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Sizes that a kernel is checked with, whatever a table says: those it takes by itself, each of its
    switches turned, and for a convolution, which takes none by itself, those that tuning begins from.
    """
    if backend != "triton":
        yield "", contextlib.nullcontext()
        return
    from fastldm.kernels.tune import KERNELS, with_sizes

    begun_from = KERNELS[op].sizes(*arguments)
    first, *others = begun_from if op == "conv2d" else begun_from[:1]
    switches = [field.name for field in fields(first) if isinstance(getattr(first, field.name), bool)]
    turned = [replace(first, **{name: not getattr(first, name)}) for name in switches]
    for sizes in (first, *others, *turned):
        yield str(sizes), with_sizes(op, sizes)


def correctness(
    backends: Iterable[str], dtypes: Iterable[torch.dtype], shapes: Shapes, until: float = float("inf")
) -> Iterator[Row]:
    """Errors from float64 of every kernel and of its reference; see `measuring.errors`."""
    for backend, name, dtype, shape, call in cases(backends, dtypes, shapes):
        row = {"op": name, "backend": backend, "dtype": str(dtype)[6:], "shape": shape}
        if time.perf_counter() > until:
            yield row | {"failed": "out of time"}
            continue
        stand_in, reference = ops.OPS[name].stand_ins[backend], ops.OPS[name].reference
        truth = plain = None
        try:
            for sizes, applied in variants(backend, name, call().arguments):
                with applied:
                    if why := stand_in.refuses(*call().arguments):
                        yield row | {"refused": why}
                        break
                    if truth is None:
                        truth, plain = call().in_float64().of(reference)(), call().of(reference)()
                    try:
                        with measuring.poisoned():
                            made = call().of(stand_in.run)()
                        yield row | {"sizes": sizes} | measuring.errors(made, plain, truth, dtype)
                    except Exception as error:  # a failing kernel is a row, and no end
                        yield row | {"sizes": sizes, "failed": _short(error)}
        except Exception as error:
            yield row | {"failed": _short(error)}


def speeds(dtype: torch.dtype, shapes: Shapes, peaks: Machine, until: float) -> Iterator[Row]:
    """Each op as a user gets it, each of its kernels, and what PyTorch has; times of one call in a captured
    graph, all contenders in turn.
    """
    compiling = time.perf_counter() + COMPILED * (until - time.perf_counter())
    for name, op in ops.OPS.items():
        for shape in shapes[name][1] if name in shapes else ():
            row = {"op": name, "dtype": str(dtype)[6:], "shape": shape}
            if time.perf_counter() > until:
                yield row | {"failed": "out of time"}
                continue
            call = maker(shapes[name][0], dtype, shape)
            try:
                contenders = contenders_of(op, call, compiled=time.perf_counter() < compiling)
                spent = measuring.race(contenders)
            except Exception as error:  # one op must not lose the others' rows
                yield row | {"failed": _short(error)}
                continue
            yield judged(row, call().arguments, spent, peaks)


def contenders_of(op: ops.Op[..., Any], call: Callable[[], Call], compiled: bool) -> dict[str, measuring.Run]:
    """fastldm's own choice, every kernel that takes the call, the rivals, and a copy of as many bytes."""
    from fastldm.kernels.candidates import rivals

    found: dict[str, measuring.Run] = {OURS: call().of(op)}
    for backend, stand_in in op.stand_ins.items():
        if ops.missing(backend) is None and stand_in.refuses(*call().arguments) is None:
            found[backend] = call().of(stand_in.run)
    found |= rivals(op.name, call().arguments)
    if compiled:
        torch.compiler.reset()
        made = torch.compile(op.reference, dynamic=False, mode="max-autotune-no-cudagraphs")
        found[COMPILER] = call().of(made)
    return found | {COPY: copy(work(op.name, call().arguments).bytes)}


def judged(row: Row, arguments: tuple[Any, ...], spent: dict[str, float], peaks: Machine) -> Row:
    """The row with its work, the rate, the time that bytes and operations allow, and issue 3's targets."""
    done, ours = work(row["op"], arguments), spent[OURS]
    bound, by = done.bound(peaks)
    rate = (done.bytes / 1e9, "GB/s") if by == "bytes" else (done.operations / 1e12, "TFLOP/s")
    goals = []
    for target in targets(row["op"], arguments, peaks):
        if target.against in ("bound", "copy"):
            got = (bound if target.against == "bound" else spent[COPY]) / ours
        else:
            names = [name for name in spent if name == "PyTorch" or name.startswith(target.against)]
            got = min(spent[name] for name in names) / ours
        goals.append({"target": str(target), "got": round(got, 3), "met": got >= NOISE * target.wanted})
    return row | {
        "seconds": spent,
        "bytes": done.bytes,
        "operations": done.operations,
        "bound": bound,
        "bound_by": by,
        "rate": f"{rate[0] / ours:.0f} {rate[1]}",
        "share": round(bound / ours, 3),
        "targets": goals,
    }


def wrong(found: dict[str, Any]) -> list[str]:
    """What a reader must see first: failures, wrong results, an op and dtype whose RMS error is too large."""
    told = [f"FAILED {part}: {why}" for part, why in found.get("failed", {}).items()]
    rms: dict[tuple[str, ...], list[Row]] = {}
    for row in [*found.get("correctness", ()), *found.get("ops", ())]:
        name = " ".join(map(str, (row["op"], row.get("backend", ""), row["dtype"], *row["shape"])))
        if "failed" in row:
            told.append(f"FAILED {name} {row.get('sizes', '')}: {row['failed']}")
        elif row.get("right") is False:
            told.append(f"WRONG {name} {row['sizes']}: {row['error']:.2g}, PyTorch {row['reference']:.2g}")
        if "right" in row:
            rms.setdefault((row["op"], row["backend"], row["dtype"]), []).append(row)
    for case, rows in rms.items():
        ours, plain = (sum(row[name] ** 2 for row in rows) ** 0.5 for name in ("error_rms", "reference_rms"))
        if not ours <= 1.5 * plain:
            told.append(f"WRONG {' '.join(case)}: RMS error {ours:.2g}, PyTorch {plain:.2g}")
    return told + gpu_models.wrong(found)


def table(found: dict[str, Any]) -> str:
    """The short of it: what is wrong or refused, then one line an op and shape."""
    lines = [json.dumps(found.get("machine", {})), *wrong(found)]
    rows = found.get("correctness", ())
    refused = [f"refused {row['backend']} {row['op']}: {row['refused']}" for row in rows if "refused" in row]
    lines += dict.fromkeys(refused)
    if rows:
        lines.append(f"{sum(row.get('right') is True for row in rows)} of {len(rows)} kernel calls right")
    if "peaks" in found:
        peaks = found["peaks"]
        lines.append(
            f"copy {peaks['bytes'] / 1e9:.0f} GB/s, product {peaks['operations'] / 1e12:.0f} TFLOP/s"
        )
    for row in found.get("ops", ()):
        if "failed" not in row:
            shape = "x".join(map(str, row["shape"]))
            times = ", ".join(f"{name} {seconds(spent)}" for name, spent in row["seconds"].items())
            goals = [
                f"{'met' if each['met'] else 'MISSED'} {each['target']}: {each['got']}"
                for each in row["targets"]
            ]
            lines.append(f"{row['op']} {row['dtype']} {shape}: {times}")
            reached = (
                f"{row['rate']}, {row['share']:.0%} of the bound {seconds(row['bound'])} ({row['bound_by']})"
            )
            lines.append(f"    {'; '.join([reached, *goals])}")
    return "\n".join([*lines, *gpu_models.lines(found)])


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    sys.exit(main())
