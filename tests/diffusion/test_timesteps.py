"""LossSecondMoment against improved-diffusion's resampler."""

import torch

from fastldm.diffusion import LossSecondMoment


def test_improved_diffusion_resampler(kit):
    """Weights after so many losses, and the history at the end: not warmed up, just warmed up, later."""
    case = kit.load_case("iddpm/loss_second_moment_resampler")
    length = case.config["T"]
    sampler = LossSecondMoment(length, case.config["history_per_term"], case.config["uniform_prob"])
    done = 0
    for count in case.config["weights_after"]:
        sampler.update(case.input["ts"][done:count], case.input["losses"][done:count])
        done = count
        p = sampler.probabilities()
        weights = case.out[f"weights.{count}"]
        torch.testing.assert_close(p, weights / weights.sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(1 / (length * p), case.out[f"importance.{count}"], rtol=1e-12, atol=0)
    assert torch.equal(sampler.counts, case.out[f"loss_counts.{done}"])  # recorded at the end only
    assert torch.equal(sampler.losses, case.out[f"loss_history.{done}"])


def test_draws_follow_the_probabilities():
    sampler = LossSecondMoment(4, history=1)
    sampler.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    times, weights = sampler.draw(40_000, torch.Generator().manual_seed(1))
    p = sampler.probabilities()
    torch.testing.assert_close(p, 0.999 * torch.tensor([1.0, 2, 3, 4]).double() / 10 + 0.001 / 4)
    torch.testing.assert_close(times.bincount() / 40_000, p.float(), rtol=0, atol=5 * 0.5 / 200)
    assert torch.equal(weights, 1 / (4 * p[times]))


def test_losses_of_zero_leave_the_times_uniform():
    sampler = LossSecondMoment(3, history=1)
    sampler.update(torch.arange(3), torch.zeros(3))
    assert sampler.probabilities().tolist() == [1 / 3] * 3
