"""What a GPU makes of fastldm: `python -m benchmarks.gpu --out FOLDER`, from an uninstalled checkout too.

Parts, each also alone with --only: `build` compiles the extensions beside the package; `correctness` runs
every kernel at the models' shapes against its reference in float64; `ops` times each against its reference,
that compiled by torch.compile, and a copy of as many bytes. A table comes last; gpu.json lies under --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.calls import SHAPES, Call, Shape, copy
from benchmarks.compare import seconds
from fastldm import ops

ROOT = Path(__file__).parents[1]
PARTS = ("build", "correctness", "ops")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CALLS_A_GRAPH, ROUNDS = 20, 15
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for; 1 where a kernel is wrong, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="correctness and speed of fastldm's kernels on a GPU")
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="this part; may be given several times"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for gpu.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device", file=sys.stderr)
        return 2
    parts, began = options.only or PARTS, time.perf_counter()
    if "build" in parts:
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    found: dict[str, Any] = {"machine": machine()}
    with torch.device("cuda"), torch.inference_mode():
        if "correctness" in parts:
            found["correctness"] = list(correctness(("cuda", "triton"), DTYPES, SHAPES))
        if "ops" in parts:
            found["ops"] = list(speeds(("cuda", "triton"), DTYPES[:1], SHAPES))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{table(found)}\n{time.perf_counter() - began:.0f} s")
    return 1 if any(row["right"] is False for row in found.get("correctness", ())) else 0


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


def cases(
    backends: Iterable[str], dtypes: Iterable[torch.dtype], shapes: dict[str, tuple[Any, list[Shape]]]
) -> Iterator[tuple[str, str, torch.dtype, Shape, Callable[[], Call]]]:
    """Backend, op, dtype, shape and a maker of equal calls, for every kernel there is."""
    for backend in [name for name in backends if ops.missing(name) is None]:
        for name, op in ops.OPS.items():
            for dtype in dtypes if backend in op.stand_ins else ():
                make, sizes = shapes[name]
                for shape in sizes:

                    def call(make: Any = make, dtype: torch.dtype = dtype, shape: Shape = shape) -> Call:
                        torch.manual_seed(3)
                        return make(dtype, *shape)

                    yield backend, name, dtype, shape, call


def correctness(
    backends: Iterable[str], dtypes: Iterable[torch.dtype], shapes: dict[str, tuple[Any, list[Shape]]]
) -> Iterator[Row]:
    """Errors from float64 of kernel and reference; right: at most twice the reference's and 4 units in the
    last place of the largest value.
    """
    for backend, name, dtype, shape, call in cases(backends, dtypes, shapes):
        row = {"op": name, "backend": backend, "dtype": str(dtype)[6:], "shape": shape, "right": None}
        stand_in, reference = ops.OPS[name].stand_ins[backend], ops.OPS[name].reference
        row["refused"] = stand_in.refuses(*call().arguments)
        if row["refused"] is None:
            truth = flat(call().in_float64().of(reference)())
            scale = float(truth.abs().max())
            ours, plain = (
                float((flat(call().of(run)()) - truth).abs().max()) / scale
                for run in (stand_in.run, reference)
            )
            row |= {"error": ours, "reference": plain}
            row["right"] = ours <= 2 * plain + 4 * torch.finfo(dtype).eps
        yield row


def flat(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All that a call gives, as one float64 vector; NaN in it makes every comparison false."""
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.double().flatten() for part in parts])


def speeds(
    backends: Iterable[str], dtypes: Iterable[torch.dtype], shapes: dict[str, tuple[Any, list[Shape]]]
) -> Iterator[Row]:
    """Times of one call in a captured graph, contenders in turn, medians over the rounds."""
    done: dict[tuple[str, str, Shape], Row] = {}
    makers: dict[tuple[str, str, Shape], dict[str, Callable[[], object]]] = {}
    for backend, name, dtype, shape, call in cases(backends, dtypes, shapes):
        if ops.OPS[name].stand_ins[backend].refuses(*call().arguments) is None:
            key = name, str(dtype)[6:], shape
            makers.setdefault(key, {})[backend] = call().of(ops.OPS[name].stand_ins[backend].run)
            done.setdefault(key, {"op": name, "dtype": key[1], "shape": shape, "call": call})
    for key, contenders in makers.items():
        row = done[key]
        call, reference = row.pop("call"), ops.OPS[key[0]].reference
        torch.compiler.reset()
        compiled = torch.compile(reference, dynamic=False, mode="max-autotune-no-cudagraphs")
        contenders |= {"reference": call().of(reference), "torch.compile": call().of(compiled)}
        contenders["copy"] = copy(call().moved)
        graphs = {name: capture(run) for name, run in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                times[name].append(replay(graph))
        row["seconds"] = {name: median(spent) for name, spent in times.items()}
        row["bytes"], row["operations"] = call().moved, call().operations
        yield row


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of several calls, so that neither launches nor the clock count."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_A_GRAPH):
            run()
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one call of the graph's."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS_A_GRAPH


def table(found: dict[str, Any]) -> str:
    """The short of it: what is wrong or refused, then one line an op and shape."""
    lines = [json.dumps(found["machine"])]
    rows = found.get("correctness", ())
    lines += [f"WRONG {row}" for row in rows if row["right"] is False]
    lines += [f"refused {row['backend']} {row['op']}: {why}" for row in rows if (why := row["refused"])]
    if rows:
        lines.append(f"{sum(row['right'] is True for row in rows)} of {len(rows)} kernel calls right")
    for row in found.get("ops", ()):
        shape = "x".join(map(str, row["shape"]))
        times = ", ".join(f"{name} {seconds(spent)}" for name, spent in row["seconds"].items())
        lines.append(f"{row['op']} {row['dtype']} {shape}: {times}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
