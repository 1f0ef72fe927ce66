"""The judge that fastldm ships, where its weights are."""

from __future__ import annotations

import pytest

from fastldm.scenes.judge import WEIGHTS, Judge


@pytest.fixture(scope="session")
def judge() -> Judge:
    if not WEIGHTS.exists():
        pytest.skip("the judge's weights come with the next weights commit")
    return Judge.load()
