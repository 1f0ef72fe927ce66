"""Turns are taken in order of arrival, by one thread at a time."""

from __future__ import annotations

import threading
import time

import pytest

from fastldm.runtime.turns import Turns


def until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_order_of_arrival() -> None:
    turns, order = Turns(), []

    def take(number: int) -> None:
        with turns:
            order.append(number)

    with turns:
        assert not turns.awaited
        threads = []
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            until(lambda number=number: len(turns._line) == number + 2)
        assert turns.awaited and order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4] and not turns.awaited


def test_one_at_a_time() -> None:
    turns, inside = Turns(), []

    def work() -> None:
        for _ in range(200):
            with turns:
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not inside and not turns._line


def test_errors_and_interrupts_end_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        with pytest.raises(RuntimeError, match="cannot run the pipeline"), turns:
            pass

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(turns._changed, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt), turns:
            pass
    with turns:
        assert not turns.awaited
