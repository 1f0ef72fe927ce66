"""Rows, errors and what a table tells; the clocks of a GPU; the fitted exponents."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastldm.bench import clocks
from fastldm.bench.parts import exponent
from fastldm.bench.race import FEWEST, Error, Race, Row, Table, seconds


def test_contenders_take_turns_and_rows_tell_the_rounds() -> None:
    called: list[str] = []
    times = {"a": iter((2.0, 4.0, 2.0)), "b": iter((3.0, 2.0, 6.0))}

    def timer(name: str) -> Callable[[], float]:
        return lambda: called.append(name) or next(times[name])

    made = Race({name: timer(name) for name in times})
    made.run(rounds=3, budget=1e9)
    assert called == ["a", "b"] * 3 and made.rounds == 3
    rows = made.rows(work=12.0, errors={"b": Error(0.5, 0.25)})
    assert (rows["a"].minimum, rows["a"].median, rows["a"].ratio, rows["a"].rate) == (2.0, 2.0, 1.0, 6.0)
    assert rows["b"].ratio == 1.5 and rows["b"].p90 == pytest.approx(5.4)  # of 1.5, 0.5, 3
    assert (rows["b"].error, rows["b"].rms, rows["a"].error) == (0.5, 0.25, None)


def test_a_budget_ends_a_race_but_leaves_it_rounds_to_compare() -> None:
    made = Race({"a": lambda: 1.0})
    made.run(rounds=1000, budget=0.0)
    assert made.rounds == FEWEST


def test_errors_are_relative_to_the_truths_largest_value() -> None:
    error = Error.of(torch.tensor([[1.0, -2.0]]), torch.tensor([1.0, -4.0]))
    assert error.largest == 0.5 and error.rms == pytest.approx(0.5 / math.sqrt(2))
    assert error.within(0.5, 0.36) and not error.within(0.49, 0.36) and not error.within(0.5, 0.35)
    assert not Error.of(torch.tensor([math.nan]), torch.ones(1)).within(9.0, 9.0)


def test_who_is_wrong_stands_in_the_table_without_a_time() -> None:
    rows = {"ours": Row(1.0, 2.0, 3.0, 1.0), "theirs": Row(failed="wrong: error 1, allowed 0.1")}
    lines = str(Table("title", "", 3, rows, ["a note"])).splitlines()
    assert lines[0] == "title; 3 rounds" and lines[-1] == "  a note"
    assert lines[2].split() == ["ours", "1", "s", "2", "s", "3", "s", "1.00"]
    assert lines[3] == "  theirs wrong: error 1, allowed 0.1"


def test_seconds_have_three_digits_and_a_unit() -> None:
    assert [seconds(s) for s in (12.345, 0.0123, 4.5e-6)] == ["12.3 s", "12.3 ms", "4.5 µs"]


def test_the_exponent_of_a_power_and_of_a_sum() -> None:
    assert exponent([(size, 3.0 * size**1.5) for size in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert 0 < exponent([(size, 10.0 + size) for size in (1, 2, 4, 8)]) < 0.5


@pytest.mark.parametrize(("last", "dropped"), [(1980, False), (1900, True)])
def test_a_clock_that_falls_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, dropped: bool
) -> None:
    """nvidia-smi told 8 samples of a card in use, one of an idle card, and half a line."""
    samples = [1980, 1980, 1980, 1980, 1980, 1980, last, last]
    said = "".join(f"{clock}, 600.5, 97\\n" for clock in samples) + "345, 80.0, 0\\n[N/A], 1, 99\\n19"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{said}'\ntouch {tmp_path}/said\nexec sleep 60\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with clocks.watched() as watched:
        for _ in range(200):
            if (tmp_path / "said").exists():
                break
            time.sleep(0.05)
    assert [clock for clock, _ in watched.samples] == samples
    assert (watched.drop > clocks.ALLOWED_DROP) is dropped
    assert str(watched) == f"{min(samples)} to 1980 MHz, 600 W"


def test_without_the_tool_clocks_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with clocks.watched() as watched:
        pass
    assert watched.drop == 0 and str(watched) == "clocks unknown"
