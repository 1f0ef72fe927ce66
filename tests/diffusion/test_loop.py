"""The plain loop over a table, and learned-variance sampling, strided too."""

import math

import pytest
import torch

from fastldm.diffusion import Chain, SchedulerConfig, build_table, denoise, sample, unit_noise
from fastldm.errors import InvalidArgument


@pytest.mark.parametrize("steps", [2, 25])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_a", "dpmpp_2m"])
def test_the_loop_applies_the_table(kit, sampler, steps):
    """The same states as the tests' own loop, which every sampler is held to."""
    config = SchedulerConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    table, model = build_table(config, steps, sampler=sampler), kit.random_model("epsilon")
    draw = torch.Generator().manual_seed(1)
    x = table.initial_scale * torch.randn(2, 4, 3, 5, generator=draw, dtype=torch.float64)
    noise = torch.randn(steps, *x.shape, generator=draw, dtype=torch.float64)
    xs, x0s = kit.run_table(table, model, x, noise)
    drawn = [noise[step] for step, draws in enumerate(table.draws) if draws]
    states = list(denoise(table, lambda x, t: model(x, t[0]), x, drawn))
    torch.testing.assert_close(torch.stack([state.x for state in states]), xs)
    torch.testing.assert_close(torch.stack([state.x0 for state in states]), x0s)
    assert torch.equal(sample(table, lambda x, t: model(x, t[0]), x, drawn), states[-1].x)


@pytest.mark.parametrize("name", ["lin1000_25_eps_learnedrange", "cos4000_25_eps_learned_rescaled_t"])
def test_improved_diffusion_samplers(kit, name):
    """p_sample with the learned variance and ddim_sample, which leaves it out, on 25 of T times."""
    case = kit.load_case(f"iddpm/sample_{name}")
    scale = 1000 / case.config["T"] if case.config["rescale_timesteps"] else 1.0
    model = kit.toyconv(case, case.weight, scale=scale)
    spacing = {"timestep_spacing": "linspace"}
    for kind, settings in case.config["samplers"]:
        clip, eta = settings["clip_denoised"], settings.get("eta")
        config = kit.iddpm_config(case, case.config["mean"], case.config["var"], clip_sample=clip, **spacing)
        if kind == "p_sample":
            table, key = build_table(config, 25, sampler="ddpm"), f"p_sample.clip_denoised={clip}"
            assert table.draws == (True,) * 24 + (False,)
            times = case.out["timestep_map"].flip(0)
            assert table.timesteps.tolist() == times.tolist()
            states = list(denoise(table, model, case.input["x_T"].double(), case.input["noise"].double()))
            kit.assert_recorded(case, f"{key}.x", torch.stack([state.x for state in states]))
            kit.assert_recorded(case, f"{key}.first_pred_xstart", states[0].x0)
            kit.assert_recorded(case, f"{key}.last_pred_xstart", states[-1].x0)
        else:
            table, x = build_table(config, 25, sampler="ddim", eta=eta), case.input["x_T"].double()
            plain = list(denoise(table, lambda x, t: model(x, t)[:, :3], x, case.input["noise"].double()))
            assert table.log_variances is None
            for state, same in zip(
                denoise(table, model, x, case.input["noise"].double()), plain, strict=True
            ):
                assert torch.equal(state.x, same.x)


def test_strided_sampling_is_exact_with_the_exact_variance():
    """For data N(0, 0.25) reverse steps are Gaussian: the learned variance keeps 0.25, a fixed one not."""
    numbers, variance = 200_000, 0.25
    spread = {}
    for kind in ("learned_range", "fixed_small", "fixed_large"):
        config = SchedulerConfig(variance_type=kind, clip_sample=False, timestep_spacing="linspace")
        chain = Chain.of(config, 5)
        kept, q = chain.alphas_cumprod, chain.posterior
        of_x0 = variance * (1 - kept) / (kept * variance + 1 - kept)
        exact = (q.variance + q.mean_x0**2 * of_x0).log()
        place = 2 * (exact - chain.log_low) / (chain.log_high - chain.log_low) - 1

        def model(x, t, kept=kept, place=place, chain=chain):
            step = int(torch.searchsorted(chain.times, t[0].long()))
            level = kept[step]
            eps = (1 - level).sqrt() * x / (level * variance + 1 - level)
            return torch.cat([eps, torch.full_like(x, float(place[step]))], 1) if chain.learned else eps

        draw = torch.Generator().manual_seed(1)
        x = torch.randn(numbers, 1, generator=draw, dtype=torch.float64)
        spread[kind] = sample(build_table(config, 5, sampler="ddpm"), model, x, unit_noise(x, draw)).var()
    # The last step returns x0's mean: what is missing is the spread of x0 at the first time, 1e-4.
    assert spread["learned_range"].item() == pytest.approx(variance, rel=5 * math.sqrt(2 / numbers) + 1e-3)
    assert spread["fixed_small"] < 0.9 * variance and spread["fixed_large"] > 1.1 * variance


def test_guidance_mixes_the_mean_alone():
    """Two halves, the unconditional first; the variance is the conditional half's."""
    config = SchedulerConfig(variance_type="learned_range", clip_sample=False)
    draw = torch.Generator().manual_seed(1)
    x, u, c, v, w = torch.randn(5, 2, 3, 4, 4, generator=draw, dtype=torch.float64)
    table = build_table(config, 10, sampler="ddpm", guidance_scale=3.0)
    halves = torch.cat([torch.cat([u, v], 1), torch.cat([c, w], 1)])
    single = torch.cat([u + 3 * (c - u), w], 1)
    noise = [torch.randn(x.shape, generator=draw, dtype=torch.float64)] * 9
    got, want = (next(denoise(table, lambda x, t, out=out: out, x, noise)) for out in (halves, single))
    torch.testing.assert_close(got, want)
    assert not torch.equal(got.x0, next(denoise(table, lambda x, t: halves[:2], x, noise)).x0)


def test_too_little_noise_is_refused():
    table = build_table(SchedulerConfig(), 5, sampler="ddpm")
    with pytest.raises(InvalidArgument, match="noise='too few, at step 2': allowed is 4 draws"):
        sample(table, lambda x, t: x, torch.zeros(1, 1), [torch.zeros(1, 1)] * 2)


def test_a_missing_variance_is_refused():
    table = build_table(SchedulerConfig(variance_type="learned_range"), 5, sampler="ddpm")
    with pytest.raises(InvalidArgument, match="allowed is 2: the variance is learned"):
        sample(table, lambda x, t: x, torch.zeros(1, 1), [torch.zeros(1, 1)] * 4)
