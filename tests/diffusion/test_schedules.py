"""Schedules and spacings against published values and tables recorded from the original code."""

import math

import pytest
import torch

from fastldm.diffusion import SchedulerConfig, alphas_cumprod, posterior
from fastldm.diffusion.schedules import (
    BETA_SCHEDULES,
    cosine_betas,
    exponential_sigmas,
    interpolate,
    karras_sigmas,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    shift_sigmas,
    spaced_times,
    times_of_sigmas,
)


# Counted from the families' configurations: schedule, ends, alpha_bar[0], alpha_bar[999], sigma_max.
@pytest.mark.parametrize(
    "schedule, start, end, first, last, sigma_max",
    [
        ("scaled_linear", 0.00085, 0.012, 0.99915000, 0.0046600985, 14.6146),
        ("scaled_linear", 0.0015, 0.0195, 0.99850000, 0.0001423040, 83.8225),
        ("scaled_linear", 0.0015, 0.0155, 0.99850000, 0.0006686652, 38.6590),
        ("scaled_linear", 0.0015, 0.0205, 0.99850000, 0.0000969109, 101.5764),
        ("scaled_linear", 0.0001, 0.02, 0.99990000, 0.0007334125, 36.9119),
        ("linear", 0.0001, 0.02, 0.99990000, 0.0000403583, 157.4073),
    ],
)
def test_published_ends(schedule, start, end, first, last, sigma_max):
    kept = alphas_cumprod(SchedulerConfig(beta_schedule=schedule, beta_start=start, beta_end=end))
    assert kept.dtype == torch.float64 and len(kept) == 1000
    assert kept[0].item() == pytest.approx(first, abs=5e-9)
    assert kept[-1].item() == pytest.approx(last, abs=5e-11)
    assert ((1 - kept[-1]) / kept[-1]).sqrt().item() == pytest.approx(sigma_max, abs=5e-5)


def test_latent_diffusion_betas(kit):
    """CompVis calls the scaled schedule 'linear' and the plain one 'sqrt_linear'."""
    case = kit.load_case("ldm/beta_schedules")
    for theirs, ours in (
        ("linear", scaled_linear_betas),
        ("sqrt_linear", linear_betas),
        ("cosine", cosine_betas),
    ):
        torch.testing.assert_close(ours(1000, 0.0015, 0.0195), case.out[theirs], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["schedule_0.00085_0.012", "schedule_0.0015_0.0195"])
def test_latent_diffusion_buffers(kit, name):
    case = kit.load_case(f"ldm/{name}")
    ddpm = case.config["ddpm"]
    config = SchedulerConfig(
        beta_schedule="scaled_linear", beta_start=ddpm["linear_start"], beta_end=ddpm["linear_end"]
    )
    kept = alphas_cumprod(config)
    q = posterior(kept)
    ours = {
        "alphas_cumprod": kept,
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "posterior_mean_coef1": q.mean_x0,
        "posterior_mean_coef2": q.mean_xt,
        "posterior_variance": q.variance,
    }
    for key, value in ours.items():
        torch.testing.assert_close(value, case.out[key].double(), rtol=1e-6, atol=1e-7)
    # CompVis floors the logarithm at time 0 with 1e-20; ours repeats time 1, as Nichol & Dhariwal do.
    torch.testing.assert_close(
        q.log_variance[1:], case.out["posterior_log_variance_clipped"][1:].double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000", "cosine_4000"])
def test_improved_diffusion_tables(kit, name):
    case = kit.load_case(f"iddpm/tables_{name}")
    schedule, length = case.config["noise_schedule"], case.config["T"]
    entries = {"linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}[
        schedule
    ]
    kept = alphas_cumprod(SchedulerConfig(num_train_timesteps=length, **entries))
    q = posterior(kept)
    ours = {
        "alphas_cumprod": kept,
        "posterior_mean_coef1": q.mean_x0,
        "posterior_mean_coef2": q.mean_xt,
        "posterior_variance": q.variance,
        "posterior_log_variance_clipped": q.log_variance,
    }
    for key, value in ours.items():
        torch.testing.assert_close(
            value, case.out[key], rtol=1e-9, atol=1e-12 * case.out[key].abs().max().item()
        )


def test_zero_terminal_snr_shifts_and_scales_the_root():
    """Lin et al. 2024, section 3.1: sqrt(alpha_bar) ends at 0, begins as it did, keeps its shape between."""
    before = scaled_linear_betas(1000, 0.00085, 0.012)
    kept = (1 - before).cumprod(0)
    after = rescale_zero_terminal_snr(kept)
    assert after[-1] == 0 and after[0].item() == pytest.approx(kept[0].item(), rel=1e-15)
    share = (
        after.sqrt() / kept[0].sqrt(),
        (kept.sqrt() - kept[-1].sqrt()) / (kept[0].sqrt() - kept[-1].sqrt()),
    )
    torch.testing.assert_close(*share, rtol=1e-12, atol=1e-15)
    assert alphas_cumprod(SchedulerConfig(rescale_betas_zero_snr=True))[-1] == 0


def test_trained_betas_replace_the_schedule():
    betas = (0.1, 0.2, 0.4)
    kept = alphas_cumprod(SchedulerConfig(num_train_timesteps=3, trained_betas=betas))
    assert kept.tolist() == pytest.approx([0.9, 0.72, 0.432], rel=1e-15)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("length", [2, 10, 1000, 4000])
def test_alpha_bar_falls_within_0_and_1(schedule, length):
    kept = alphas_cumprod(SchedulerConfig(num_train_timesteps=length, beta_schedule=schedule))
    assert kept.diff().max() < 0 and 0 < kept[-1] and kept[0] < 1


def test_spacings():
    """Table 2 of Lin et al. 2024, 5 of 1000; DPM-Solver's own counting leaves the lowest of 6 out."""
    assert spaced_times("leading", 5, 1000, 1).tolist() == [801, 601, 401, 201, 1]
    assert spaced_times("linspace", 5, 1000).tolist() == [999, 749.25, 499.5, 249.75, 0]
    assert spaced_times("trailing", 5, 1000).tolist() == [999, 799, 599, 399, 199]
    assert spaced_times("leading", 5, 1000, 1, past_end=True).tolist() == [831, 665, 499, 333, 167]
    assert spaced_times("linspace", 5, 1000, past_end=True).tolist() == pytest.approx(
        [999, 799.2, 599.4, 399.6, 199.8]
    )


def test_an_offset_never_leaves_the_schedule():
    assert spaced_times("leading", 1000, 1000, 1).tolist() == list(range(999, -1, -1))
    assert spaced_times("leading", 999, 1000, 1, past_end=True).tolist() == list(range(999, 0, -1))
    assert spaced_times("leading", 4, 8, 7).tolist() == [7, 5, 3, 1]


def test_k_diffusion_schedules(kit):
    """Karras and exponential sigmas and the times of sigmas, from the float32 alpha_bar of the case."""
    case = kit.load_case("kdiffusion/schedules")
    kept = case.input["alphas_cumprod"].double()
    table = ((1 - kept) / kept).sqrt()
    for steps in case.config["n"]:
        ends = (float(table[-1]), float(table[0]))
        for key, ours in (
            (f"karras.{steps}.rho7.0", karras_sigmas(steps, *ends)),
            (f"karras_0.1_10.{steps}", karras_sigmas(steps, 10.0, 0.1)),
            (f"exponential.{steps}", exponential_sigmas(steps, *ends)),
        ):
            torch.testing.assert_close(ours, case.out[key][:-1].double(), rtol=1e-5, atol=0)
        sigmas = case.out[f"karras.{steps}.rho7.0"][:-1].double()
        wanted = case.out[f"karras.{steps}.rho7.0.sigma_to_t"].double()
        torch.testing.assert_close(times_of_sigmas(table, sigmas), wanted, rtol=1e-5, atol=0.005)
        assert (
            times_of_sigmas(table, sigmas).round().tolist()
            == case.out[f"karras.{steps}.rho7.0.sigma_to_t_quantized"].tolist()
        )
    wanted = case.out["sigma_to_t"].double()
    torch.testing.assert_close(
        times_of_sigmas(table, case.input["sigma"].double()), wanted, rtol=1e-5, atol=0.005
    )


def test_times_of_sigmas_undoes_interpolation_at_whole_times():
    table = torch.tensor([0.1, 0.3, 1.0, 5.0], dtype=torch.float64)
    whole = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(times_of_sigmas(table, interpolate(table, whole)), whole, rtol=0, atol=1e-12)
    assert interpolate(table, whole[:1] + 0.5).item() == pytest.approx(0.2)
    assert times_of_sigmas(
        table, torch.tensor([math.sqrt(0.1 * 0.3), 0.01, 9.0]).double()
    ).tolist() == pytest.approx([0.5, 0, 3])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sd3_training_sigmas(kit, shift):
    case = kit.load_case("sd3/sigmas_and_latent_format")
    wanted = case.out[f"shift{shift}.model_sampling.sigmas"].double()
    torch.testing.assert_close(
        shift_sigmas(torch.arange(1, 1001).double() / 1000, shift), wanted, rtol=1e-6, atol=0
    )
