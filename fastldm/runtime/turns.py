"""Whose turn it is: a lock that is handed on in order of arrival."""

from __future__ import annotations

import threading


class Turns:
    """`with turns:` waits for all who came before; whose turn it is may ask whether others wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[int] = []  # threads, the first of which has its turn

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for the present turn to end."""
        return len(self._line) > 1

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if me in self._line:
                raise RuntimeError("a callback cannot run the pipeline that waits for it")
            self._line.append(me)
            try:
                self._changed.wait_for(lambda: self._line[0] == me)
            except BaseException:  # KeyboardInterrupt
                self._leave(me)
                raise

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._leave(threading.get_ident())

    def _leave(self, thread: int) -> None:
        self._line.remove(thread)
        self._changed.notify_all()
