"""Many requests at once in one set of slots: a request joins when slots are free, and leaves at its end.

The slots are always guided ones, so a request gets the same image to the bit whatever runs beside it: that of
its run alone in so many slots. One thread does all the work, between two steps also the text, the start and
the decoding of those that join and leave. It holds the pipeline's turn while requests run; if somebody else
waits for that turn, who may change weights, it begins no more and hands it on when those begun are done.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from fastldm.errors import FastLDMError, InvalidArgument
from fastldm.runtime.slots import SIZES, Group, Outcome, Run, Slots, split
from fastldm.runtime.turns import Turns


class Source(Protocol):
    """What a batcher asks of a pipeline; `fastldm.Pipeline` documents it."""

    turns: Turns

    def check(self, prompt: Any = None, **arguments: Any) -> Any: ...

    def stages(
        self, request: Any, groups: list[range], table: None = None, slots: int | None = None
    ) -> Generator[Group, Outcome | None, Any]: ...

    def turn(self) -> AbstractContextManager[None]: ...

    def slots(self, group: Group, count: int, guided: bool) -> Slots: ...


@dataclass(eq=False)
class Job:
    """A request on its way. Its future counts as pending to the end, so that it can always be cancelled."""

    future: Future[Any]
    stages: Generator[Group, Outcome | None, Any]
    group: Group | None = None  # waits for slots
    run: Run | None = None  # has them

    def proceed(self, outcome: Outcome | None = None) -> bool:
        """Go on to the next group of images; False: that was the last, and the future has the result."""
        try:
            self.group = self.stages.send(outcome)
            return True
        except StopIteration as finished:
            self.end(result=finished.value)
        except BaseException as error:
            self.end(error)
        return False

    def end(self, error: BaseException | None = None, result: Any = None) -> None:
        """Tell the future, unless it was cancelled."""
        self.stages.close()
        if not self.future.set_running_or_notify_cancel():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Batcher:
    """Serves the requests of many callers side by side; to be closed, or used as a context manager.

    Requests of another picture size, prompt length or kind (with a mask, say) than those running wait until
    they are done.
    """

    def __init__(self, pipe: Source, slots: int = 4) -> None:
        """slots: 1, 2, 4 or 8 images at a time. Raises InvalidArgument."""
        if isinstance(slots, bool) or slots not in SIZES:
            raise InvalidArgument("slots", slots, f"one of {', '.join(map(str, SIZES))}")
        self.pipe, self.count = pipe, slots
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="fastldm batcher", daemon=True)
        self._thread.start()

    def submit(self, prompt: str | list[str] | None = None, **arguments: Any) -> Future[Any]:
        """Ask for images; keywords as in `generate`, except cuda_graph and shortcuts.

        Returns a future of the `Result`. Cancelling it frees its slots before the next step. Progress and
        callback are called from the batcher's thread; an error raised there is the future's, as is an
        OutOfMemory, before any work on the request where it will not fit. Several images take several slots,
        up to all of them at a time. Raises InvalidArgument at once; FastLDMError when closed.
        """
        for name in ("cuda_graph", "shortcuts"):
            if arguments.get(name) is not None:
                raise InvalidArgument(name, arguments[name], "None: requests share one step")
        request = self.pipe.check(prompt, **arguments)
        groups = split(request.count, most=self.count)
        job = Job(Future(), self.pipe.stages(request, groups, slots=self.count))
        with self._changed:
            if self._closed:
                raise FastLDMError("the batcher is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self, cancel: bool = False) -> None:
        """Take no more requests and return when the present ones are done, or with `cancel` given up."""
        with self._changed:
            self._closed = True
            present = [*self._waiting, *self._running] if cancel else []
            self._changed.notify()
        for job in present:
            job.future.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while self._wait():
                with self.pipe.turn():
                    self._serve()
        except BaseException as error:  # such as a GPU that is lost: nobody is to wait for ever
            with self._changed:
                self._closed = True
                present = [*self._waiting, *self._running]
            for job in present:
                job.end(error)
            raise

    def _wait(self) -> bool:
        """Wait for a request; False: closed, and there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return bool(self._waiting)

    def _serve(self) -> None:
        """Run what waits until nothing does, or until somebody else waits for the turn."""
        slots = self._admit(None)
        while self._running and slots is not None:
            try:
                slots.advance(paced=True)
            except BaseException as error:  # the step of all is nobody's alone
                for job in self._running[:]:
                    self._leave(job, slots)
                    job.end(error)
            for job in self._running[:]:
                self._look_after(job, slots)
            slots = self._admit(slots, begun_only=self.pipe.turns.awaited)

    def _admit(self, slots: Slots | None, begun_only: bool = False) -> Slots | None:
        """Let in, in order of arrival, those who fit; the slots they are in."""
        with self._changed:
            cancelled = [job for job in self._waiting if job.future.cancelled()]
            self._waiting = deque(job for job in self._waiting if job not in cancelled)
        for job in cancelled:
            job.end()
        while self._waiting:
            job = self._waiting[0]
            if job.group is None and (begun_only or (slots is not None and not slots.free)):
                break
            try:
                if job.group is None and not job.proceed():
                    self._next()
                    continue
                group = job.group
                assert group is not None
                if slots is None or slots.shape != group.shape:
                    if self._running:
                        break
                    slots = self.pipe.slots(group, self.count, guided=True)
                if len(slots.free) < len(group.latents):
                    break
                job.run = slots.admit(group)
            except BaseException as error:
                self._next()
                job.end(error)
                continue
            job.group = None
            self._running.append(self._next())
        return slots

    def _next(self) -> Job:
        """The first that waits, who does so no longer."""
        with self._changed:
            return self._waiting.popleft()

    def _look_after(self, job: Job, slots: Slots) -> None:
        """After a step: report it, and see to the request if it ends here."""
        assert job.run is not None
        error, outcome = None, None
        if not job.future.cancelled():
            try:
                outcome = slots.report(job.run)
                if outcome is None:
                    return
            except BaseException as raised:
                error = raised
        self._leave(job, slots)
        if outcome is None:
            job.end(error)
        elif job.proceed(outcome):
            with self._changed:
                self._waiting.appendleft(job)

    def _leave(self, job: Job, slots: Slots) -> None:
        """Free the slots of a request that runs no longer."""
        assert job.run is not None
        slots.release(job.run)
        job.run = None
        self._running.remove(job)
