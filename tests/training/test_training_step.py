"""One step of training beside diffusers and transformers: the same loss, and gradients as near the truth."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training import TrainingStep
from fastldm.bench.contenders import CHANNELS_LAST, missing


@pytest.mark.skipif(missing(CHANNELS_LAST) is not None, reason=str(missing(CHANNELS_LAST)))
def test_a_step_of_the_shipped_net_is_that_of_diffusers() -> None:
    """The truth is theirs in float64; our float32 gradients err at most twice as much as theirs, and by
    their sum of squares no more than 1.2 times.
    """
    ours, theirs, truth = (TrainingStep("default", of, batch=4) for of in (False, True, True))
    truth.module.double()
    truth.clean, truth.hint = truth.clean.double(), truth.hint.double()
    before = [parameter.detach().clone() for parameter in ours.module.parameters()]
    losses = [step().item() for step in (ours, theirs, truth)]
    assert losses[:2] == pytest.approx([losses[2]] * 2, rel=1e-6)
    mine, yours, true = (step.gradients() for step in (ours, theirs, truth))
    assert mine.keys() == true.keys() and len(mine) == len(before)
    largest = max(float(each.abs().max()) for each in true.values())
    squares = torch.zeros(2, dtype=torch.float64)
    for name, wanted in true.items():
        errors = [each[name] - wanted for each in (mine, yours)]
        off, plain = (float(each.abs().max()) for each in errors)
        assert off <= 2 * plain + 4 * torch.finfo(torch.float32).eps * largest, name
        squares += torch.stack([each.square().sum() for each in errors])
    assert squares[0] <= 1.2**2 * squares[1]
    assert not any(map(torch.equal, before, ours.module.parameters()))
    assert ours().item() == pytest.approx(theirs().item(), rel=1e-5)  # by the updated weights
