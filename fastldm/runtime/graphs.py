"""CUDA graphs: work captured once on buffers that never move, then replayed in one launch.

What changes from request to request (prompt, seed, steps, sampler, guidance) is data in those buffers, and
weights change in place, so a graph is made once for a key of sizes and never again. Before its capture the
work runs a few times on a side stream: what it loads, compiles or cannot do happens there. A capture that
fails all the same leaves the work to be launched without a graph, and `Graphs.failures` says why.

All graphs of a pipeline take their temporary memory from one pool, which is safe because their replays
follow one another. Such a pool grows with the largest graph and is given back when its last graph goes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastldm.errors import BackendUnavailable, first_line
from fastldm.ops.registry import order_in_force

WARM_UP = 3  # runs before capture: libraries choose their algorithms in the first, allocators settle in two

# Captures of all pipelines, one at a time: each empties torch's cache of free memory.
_capturing = threading.Lock()


class Work:
    """Something to run again and again on the same buffers: `launch`, or a replay of its captured graph."""

    replay: Callable[[], None] | None = None
    also: tuple[Work, ...] = ()  # other work on the same buffers, captured with it

    def launch(self) -> None:
        """Do the work, one kernel after the other; never waits for the device."""
        raise NotImplementedError

    def buffers(self) -> Iterable[Tensor]:
        """What it reads and writes beside the weights."""
        raise NotImplementedError

    def run(self) -> None:
        """Do the work in the fastest way there is."""
        (self.replay or self.launch)()


class Function(Work):
    """A function of tensors; `inputs` and `output` are its buffers."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function = function
        self.inputs = tuple(x.clone() for x in inputs)
        self.output: Tensor | None = None

    def launch(self) -> None:
        made = self.function(*self.inputs)
        if self.output is None:  # in the first run, which is no capture
            self.output = torch.empty_like(made)
        self.output.copy_(made)

    def buffers(self) -> Iterable[Tensor]:
        return self.inputs if self.output is None else (*self.inputs, self.output)


class Recorder(Protocol):
    """What captures: CUDA, or a stand-in that tests can look into."""

    def new_pool(self) -> object:
        """Memory that several graphs may share."""

    def warm_up(self, launch: Callable[[], None]) -> None:
        """Launch it a few times; whatever is wrong with it is raised here."""

    def capture(self, launch: Callable[[], None], pool: object) -> tuple[Callable[[], None], int]:
        """The function that replays what one launch does, and by how many bytes the pool grew."""


class CudaRecorder:
    """Captures graphs on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for warm-up and capture: what a library allocates for a stream is there by then.
        self.stream = torch.cuda.Stream(device)

    def new_pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def warm_up(self, launch: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                launch()
        self.stream.synchronize()

    def capture(self, launch: Callable[[], None], pool: Any) -> tuple[Callable[[], None], int]:
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()  # so that what is reserved on top is the graph's
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and launch in the meantime.
            with torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"):
                launch()
            return graph.replay, max(torch.cuda.memory_reserved() - before, 0)


W = TypeVar("W", bound=Work)


class Graphs:
    """The captured work of one pipeline by key and the backends in force at its capture, least recently used
    first out. Its owner's lock guards it.

    `limit` bounds the bytes of buffers and pool; only what is in use may pass it. Without a recorder, on a
    CPU, all work is launched as it is and nothing is kept.
    """

    def __init__(self, recorder: Recorder | None, limit: int) -> None:
        self.recorder, self.limit = recorder, limit
        self.failures: dict[Hashable, str] = {}
        self._kept: OrderedDict[Hashable, Work] = OrderedDict()
        self._pool: object = None
        self._pool_bytes = 0

    @property
    def held(self) -> int:
        """Bytes of the buffers and of the pool."""
        return self._pool_bytes + sum(x.nbytes for work in self._kept.values() for x in work.buffers())

    def get(self, key: tuple[Hashable, ...], build: Callable[[], W], wanted: bool | None = None) -> W:
        """The work of this key, whose first part is its name, captured; as `build` made it where `wanted` is
        False or a capture failed.

        wanted True: BackendUnavailable where it cannot be captured, and an earlier failure is tried again.
        """
        if self.recorder is None or wanted is False:
            return build()
        key = *key, order_in_force()
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept  # type: ignore[return-value]  # a key belongs to one kind of work
        if key in self.failures and not wanted:
            return build()
        self._shrink(self.limit)
        work = build()
        self._capture(key, work, self.recorder)
        if wanted and work.replay is None:
            raise BackendUnavailable(f"cuda_graph=True: {self.failures[key]}")
        return work

    def call(
        self, name: str, function: Callable[..., Tensor], *inputs: Tensor, wanted: bool | None
    ) -> Tensor:
        """function(*inputs), by a graph of its own for each name and sizes of inputs."""
        if self.recorder is None or wanted is False:
            return function(*inputs)
        key = name, *((x.shape, x.stride(), x.dtype) for x in inputs)
        with torch.inference_mode():  # a callback calls outside it, where such buffers could not be written
            work = self.get(key, lambda: Function(function, inputs), wanted)
            if work.replay is not None:
                for buffer, given in zip(work.inputs, inputs, strict=True):
                    buffer.copy_(given)
                work.run()
        if work.replay is None:
            return function(*inputs)
        assert work.output is not None
        return work.output.clone()

    def clear(self) -> None:
        """Forget all graphs: the weights that they read are elsewhere now."""
        self.failures.clear()
        self._shrink(-1)

    def _capture(self, key: tuple[Hashable, ...], work: Work, recorder: Recorder) -> None:
        if self._pool is None:
            self._pool = recorder.new_pool()
        grown, together = 0, (work, *work.also)
        with _capturing:
            for each in together:
                recorder.warm_up(each.launch)
                try:
                    each.replay, more = recorder.capture(each.launch, self._pool)
                except Exception as error:
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
                    self.failures[key] = f"{key[0]} runs without a CUDA graph: {why}"
                    self._pool = None  # torch may not take its memory back; nothing is added to it
                    for captured in together:
                        captured.replay = None
                    return
                grown += more
        self.failures.pop(key, None)
        self._pool_bytes += grown
        self._kept[key] = work
        self._shrink(self.limit, keep=1)
        if self.held > self.limit and self._pool_bytes > grown:  # what graphs now gone left in the pool
            self._shrink(-1)
            self._capture(key, work, recorder)

    def _shrink(self, limit: int, keep: int = 0) -> None:
        while len(self._kept) > keep and self.held > limit:
            self._kept.popitem(last=False)
        if not self._kept:
            self._pool, self._pool_bytes = None, 0


def missing() -> str | None:
    """Why this process cannot capture CUDA graphs, or None: it is tried with a small one."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        graphs = Graphs(CudaRecorder(device), 1 << 30)
        made = graphs.call("x + 1", lambda x: x + 1, torch.ones(8, device=device), wanted=True)
        return None if made.eq(2).all() else "a replay gives other numbers"
    except RuntimeError as error:
        return first_line(error)
