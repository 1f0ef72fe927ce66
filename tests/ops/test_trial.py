"""The trial that a backend's kernels pass before any is used, here with the C++ kernels on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastldm.errors import BackendUnavailable
from fastldm.ops import group_norm_silu, guided_step
from fastldm.ops.trial import run_trial

pytest.importorskip("fastldm.ops.cpp", exc_type=BackendUnavailable)


def test_right_kernels_pass() -> None:
    run_trial("cpp", "cpu")


def test_a_kernel_that_gives_other_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = group_norm_silu.stand_ins["cpp"]
    wrong = replace(right, run=lambda *call: right.run(*call) * 1.001)
    monkeypatch.setitem(group_norm_silu.stand_ins, "cpp", wrong)
    with pytest.raises(BackendUnavailable, match="group_norm_silu is .* off its reference"):
        run_trial("cpp", "cpu")


@pytest.mark.parametrize("changed", range(3))
def test_every_tensor_that_a_step_changes_is_compared(monkeypatch: pytest.MonkeyPatch, changed: int) -> None:
    right = guided_step.stand_ins["cpp"]

    def spoils_one(*call: Any) -> None:
        right.run(*call)
        call[changed][-1, -1, -1, -1] += 1

    monkeypatch.setitem(guided_step.stand_ins, "cpp", replace(right, run=spoils_one))
    with pytest.raises(BackendUnavailable, match="guided_step is .* off its reference"):
        run_trial("cpp", "cpu")


def test_a_kernel_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(guided_step.stand_ins, "cpp", replace(guided_step.stand_ins["cpp"], run=fails))
    with pytest.raises(BackendUnavailable, match="does not run on this device: no kernel image"):
        run_trial("cpp", "cpu")
