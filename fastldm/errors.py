"""The errors that fastldm raises on purpose; each names what is wrong and what would be right."""

from __future__ import annotations

import os


class FastLDMError(Exception):
    """Base of every error that fastldm raises on purpose."""


class InvalidArgument(FastLDMError, ValueError):
    """An argument that cannot be used: its name, the value given and what is allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        shown = " ".join(repr(value).split())
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{name}={shown}: allowed is {allowed}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.allowed)


class CheckpointError(FastLDMError):
    """A model file that cannot be loaded: the file, the key at fault (None: the whole file) and why."""

    def __init__(self, file: str | os.PathLike[str], key: str | None, why: str) -> None:
        why = " ".join(why.split())  # a library's message may be pages long
        if len(why) > 1000:
            why = why[:997] + "..."
        place = f"{os.fspath(file)}: {key}" if key else os.fspath(file)
        super().__init__(f"{place}: {why}")
        self.file, self.key, self.why = os.fspath(file), key, why

    def __reduce__(self) -> tuple[type, tuple[str, str | None, str]]:
        return type(self), (self.file, self.key, self.why)


class OutOfMemory(FastLDMError, MemoryError):
    """The request does not fit into memory, found before or during the work; the pipeline still works."""


class NonFiniteOutput(FastLDMError, ArithmeticError):
    """The model produced NaN or Inf instead of a picture."""


class BackendUnavailable(FastLDMError, RuntimeError):
    """A backend asked for by name cannot run here, or cannot run this call; the message says why."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
