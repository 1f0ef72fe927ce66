"""Sampler tables against the papers' formulas; orders of convergence, every step count, bad arguments."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastldm.diffusion import COLUMNS, SAMPLERS, SchedulerConfig, alphas_cumprod, build_table
from fastldm.errors import InvalidArgument

SD = SchedulerConfig(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
)
FLOW = SchedulerConfig(class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)
SPACINGS = ["leading", "linspace", "trailing"]
COL = {name: index for index, name in enumerate(COLUMNS)}


# The formulas as their papers and k-diffusion write them, on schedules built with numpy.


def alpha_bar():
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)


def denoised(prediction, out, x, kept):
    """x0 from the net's answer at x = sqrt(kept)*x0 + sqrt(1 - kept)*eps."""
    if prediction == "epsilon":
        return (x - math.sqrt(1 - kept) * out) / math.sqrt(kept)
    return math.sqrt(kept) * x - math.sqrt(1 - kept) * out if prediction == "v_prediction" else out


def integer_times(spacing, steps):
    if spacing == "linspace":
        return np.linspace(0, 999, steps).round()[::-1].astype(int)
    if spacing == "leading":
        return np.arange(steps)[::-1] * (1000 // steps) + 1
    return np.arange(1000, 0, -1000 / steps)[:steps].round().astype(int) - 1


def reference_ddim(model, prediction, spacing, x, noise, eta):
    """Song et al. 2021, eq. 12 with sigma of eq. 16; the last step lands on alpha_bar = 1."""
    kept, steps, xs = alpha_bar(), len(noise), []
    for t, z in zip(integer_times(spacing, steps), noise, strict=True):
        a, a_prev = kept[t], kept[t - 1000 // steps] if t >= 1000 // steps else 1.0
        x0 = denoised(prediction, model(x, t), x, a)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        x = math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0)) * eps + sigma * z
        xs.append(x)
    return xs


def reference_ddpm(model, prediction, spacing, x, noise, eta):
    """Ho et al. 2020, eq. 7 and algorithm 2, on the respaced chain."""
    kept, times, xs = alpha_bar(), integer_times(spacing, len(noise)), []
    for t, t_prev, z in zip(times, [*times[1:], None], noise, strict=True):
        a, a_prev = kept[t], 1.0 if t_prev is None else kept[t_prev]
        beta = 1 - a / a_prev
        x0 = denoised(prediction, model(x, t), x, a)
        mean = math.sqrt(a_prev) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * (1 - a_prev) / (1 - a) * x
        x = mean + math.sqrt((1 - a_prev) / (1 - a) * beta) * z
        xs.append(x)
    return xs


def sigma_times(spacing, steps):
    times = np.linspace(0, 999, steps)[::-1] if spacing == "linspace" else integer_times(spacing, steps)
    kept = alpha_bar()
    return times, np.append(np.interp(times, np.arange(1000), np.sqrt((1 - kept) / kept)), 0)


def in_sigma_space(model, prediction, x, sigma, t):
    """k-diffusion's denoiser: x = x0 + sigma*eps, the net sees x/sqrt(1 + sigma^2)."""
    kept = 1 / (1 + sigma**2)
    return denoised(prediction, model(x * math.sqrt(kept), t), x * math.sqrt(kept), kept)


def reference_euler(model, prediction, spacing, x, noise, eta):
    """k-diffusion's sample_euler_ancestral; eta 0 is sample_euler. x comes and goes in VP space."""
    times, sigmas = sigma_times(spacing, len(noise))
    x, xs = x * math.sqrt(1 + sigmas[0] ** 2), []
    for t, sigma, after, z in zip(times, sigmas[:-1], sigmas[1:], noise, strict=True):
        slope = (x - in_sigma_space(model, prediction, x, sigma, t)) / sigma
        up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        x = x + slope * (math.sqrt(after**2 - up**2) - sigma) + z * up
        xs.append(x / math.sqrt(1 + after**2))
    return xs


def reference_dpmpp_2m(model, prediction, spacing, x, noise, eta):
    """k-diffusion's sample_dpmpp_2m on DPM-Solver's whole times: x0 of half a step ahead, in log sigma."""
    steps, kept = len(noise), alpha_bar()
    times = {
        "leading": np.arange(1, steps + 1)[::-1] * (1000 // (steps + 1)) + 1,
        "linspace": np.linspace(0, 999, steps + 1).round()[:0:-1].astype(int),
        "trailing": integer_times("trailing", steps),
    }[spacing]
    sigmas = np.append(np.sqrt((1 - kept[times]) / kept[times]), 0)
    x, xs, old = x * math.sqrt(1 + sigmas[0] ** 2), [], None
    for i, t in enumerate(times):
        x0 = in_sigma_space(model, prediction, x, sigmas[i], t)
        if sigmas[i + 1] == 0:
            x = x0
        else:
            h = math.log(sigmas[i] / sigmas[i + 1])
            ahead = x0
            if old is not None:
                r = math.log(sigmas[i - 1] / sigmas[i]) / h
                ahead = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
            x = sigmas[i + 1] / sigmas[i] * x - math.expm1(-h) * ahead
        old = x0
        xs.append(x / math.sqrt(1 + sigmas[i + 1] ** 2))
    return xs


REFERENCES = [
    ("ddim", 0.0, reference_ddim),
    ("ddim", 0.4, reference_ddim),
    ("ddim", 1.0, reference_ddim),
    ("ddpm", 0.0, reference_ddpm),
    ("euler", 0.0, reference_euler),
    ("euler", 0.4, reference_euler),
    ("euler_a", 1.0, reference_euler),
    ("dpmpp_2m", 0.0, reference_dpmpp_2m),
]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler, eta, reference", REFERENCES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_papers_formulas(kit, sampler, eta, reference, spacing, prediction):
    """Every step within 1e-10 of the transcription."""
    config = replace(SD, timestep_spacing=spacing, prediction_type=prediction)
    model = kit.random_model(prediction)
    draw = torch.Generator().manual_seed(7)
    for steps in (1, 2, 13, 50):
        x, noise = (torch.randn(n, 1, 4, 3, 5, generator=draw, dtype=torch.float64) for n in (1, steps))
        table = build_table(config, steps, sampler=sampler, eta=0.0 if sampler == "euler_a" else eta)
        ours, _ = kit.run_table(table, model, x[0], noise)
        for mine, wanted in zip(ours, reference(model, prediction, spacing, x[0], noise, eta), strict=True):
            assert (mine - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 13, 50])
def test_flow_euler_formula(kit, steps):
    """Esser et al. 2024: x moves along the velocity by the difference of the shifted sigmas."""
    model = kit.random_model("flow")
    x = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    low = 3 * 0.001 / (1 + 2 * 0.001)
    even = np.linspace(1, low, steps)
    sigmas = np.append(3 * even / (1 + 2 * even), 0)
    ours, _ = kit.run_table(build_table(FLOW, steps), model, x)
    for mine, sigma, after in zip(ours, sigmas[:-1], sigmas[1:], strict=True):
        x = x + (after - sigma) * model(x, 1000 * sigma)
        assert (mine - x).abs().max() <= 1e-10 * x.abs().max()
    if steps == 50:
        assert (build_table(FLOW, 28).timesteps / 1000)[[0, 1, -1]].tolist() == pytest.approx(
            [1, 0.98738, 0.00892857], abs=5e-6
        )


def gaussian_error(kit, config, sampler, steps):
    """How far a run ends from the exact solution of the probability flow ODE for data N(0.5, 0.3)."""
    table = build_table(config, steps, sampler=sampler)
    alphas = iter((1 / table.rows64[:-1, COL["x0_x"]]).tolist())

    def exact(x, t):
        alpha = next(alphas)
        kept = alpha**2
        return math.sqrt(1 - kept) * (x - alpha * 0.5) / (kept * 0.3 + 1 - kept)

    start = torch.full((1, 1, 1, 1), 1.3, dtype=torch.float64)
    xs, _ = kit.run_table(table, exact, start)
    first, last = table.start_alpha, math.sqrt(alphas_cumprod(config)[0])
    spread = math.sqrt((last**2 * 0.3 + 1 - last**2) / (first**2 * 0.3 + 1 - first**2))
    return abs(xs[-1].item() - (last * 0.5 + spread * (1.3 - first * 0.5)))


@pytest.mark.parametrize(
    "sampler, settings, order",
    [
        ("ddim", {"timestep_spacing": "trailing", "set_alpha_to_one": False}, 1),
        ("dpmpp_2m", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 2),
        ("dpmpp_2m", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"}, 2),
        ("dpmpp_2m", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 1}, 1),
    ],
    ids=["ddim", "dpmpp_2m", "dpmpp_2m-heun", "dpmpp_2m-first-order"],
)
def test_order_of_convergence(kit, sampler, settings, order):
    """Halving the step divides the error by 2^order."""
    errors = [gaussian_error(kit, replace(SD, **settings), sampler, steps) for steps in (25, 50, 100, 200)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes[1:] - order).max() < 0.25, (errors, slopes)


def check_table(config, sampler, steps):
    """The count is right, all is finite, times fall, and every step ends where the next begins."""
    table = build_table(config, steps, sampler=sampler)
    rows, flow = table.rows64, config.prediction == "flow"
    assert rows.shape == (steps + 1, len(COLUMNS)) and table.rows.dtype == torch.float32
    assert len(table.timesteps) == len(table.draws) == steps
    assert table.timesteps.diff().max() < 0 if steps > 1 else True
    assert table.timesteps.min() >= 0 and table.timesteps.max() <= (1000 if flow else 999)
    assert rows[:, : COL["clamp"]].isfinite().all() and (rows[:-1, COL["noise"]] >= 0).all()
    # From alpha*x0 + sigma*eps and the exact x0 a step lands on the next level: less noise, at last none.
    if flow:
        sigma = table.timesteps / 1000
        alpha = 1 - sigma
    else:
        alpha = 1 / rows[:-1, COL["x0_x"]]
        sigma = (1 - alpha**2).sqrt()
    signal = rows[:-1, COL["next_x"]] * alpha + rows[:-1, COL["next_x0"]] + rows[:-1, COL["next_prev"]]
    spread = ((rows[:-1, COL["next_x"]] * sigma) ** 2 + rows[:-1, COL["noise"]] ** 2).sqrt()
    assert (signal > alpha).all() and (spread < sigma).all()
    if sampler == "ddim":
        assert (
            signal[-1] > 0.999 and spread[-1] < 0.04
        )  # time 0 or clean, and near the next grid point before
    else:
        torch.testing.assert_close(signal, torch.cat([alpha[1:], alpha.new_ones(1)]), rtol=0, atol=1e-9)
        torch.testing.assert_close(spread, torch.cat([sigma[1:], sigma.new_zeros(1)]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize("counts", ["some", pytest.param("all", marks=pytest.mark.long)])
def test_every_count(sampler, spacing, counts):
    """Also where diffusers gives n+1 steps (61, 103, 121, ...), raises (1000) or ends in NaN (999)."""
    some = {*range(1, 31), 61, 103, 121, 122, 201, 206, 217, 499, 500, 501, 666, 667, 998, 999, 1000}
    for steps in sorted(some) if counts == "some" else range(1, 1001):
        check_table(replace(SD, timestep_spacing=spacing), sampler, steps)


@pytest.mark.parametrize(
    "counts", [(*range(1, 31), 61, 999, 1000), pytest.param(range(1, 1001), marks=pytest.mark.long)]
)
def test_every_count_of_flow(counts):
    for steps in counts:
        check_table(FLOW, "flow_euler", steps)


@pytest.mark.parametrize("settings", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}], ids=str)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_every_count_of_curved_sigmas(sampler, settings):
    """DPM-Solver rounds its times, so that they may repeat; the noise level never does."""
    for steps in (1, 2, 5, 44, 45, 100, 1000):
        table = build_table(replace(SD, **settings), steps, sampler=sampler)
        assert len(table.timesteps) == steps and table.rows64[:, : COL["clamp"]].isfinite().all()
        assert steps == 1 or (
            table.timesteps.diff().max() <= 0 and table.rows64[:-1, COL["x0_x"]].diff().max() < 0
        )


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_a_last_step_that_does_not_move(solver):
    """A run that reaches the lowest sigma and is told to end on it; diffusers divides 0 by 0 there."""
    for settings in ({"timestep_spacing": "linspace"}, {"use_karras_sigmas": True}):
        config = replace(SD, final_sigmas_type="sigma_min", solver_type=solver, **settings)
        last = build_table(config, 1000, sampler="dpmpp_2m").rows64[-2]
        assert last[COL["next_x"]].item() == pytest.approx(1, abs=1e-12)
        assert last[[COL["next_x0"], COL["next_prev"]]].abs().max() < 1e-12


def test_a_short_schedule_runs_every_count():
    for spacing in SPACINGS:
        for steps in range(1, 13):
            for sampler in ("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m"):
                config = replace(
                    SD, num_train_timesteps=12, beta_start=0.01, beta_end=0.3, timestep_spacing=spacing
                )
                table = build_table(config, steps, sampler=sampler)
                assert len(table.timesteps) == steps and table.rows64[:, : COL["clamp"]].isfinite().all()


def test_every_sampler_is_in_the_sweep():
    names = {"ddpm", "ddim", "ddim_compvis", "euler", "euler_a", "dpmpp_2m", "flow_euler"}
    assert set(SAMPLERS) == names
    assert set(SD.samplers) | set(FLOW.samplers) == set(SAMPLERS)


def test_the_last_row_rests():
    table = build_table(SD, 4, guidance_scale=7.5)
    assert dict(zip(COLUMNS, table.rows[-1].tolist(), strict=True)) == {
        **dict.fromkeys(COLUMNS, 0.0),
        "next_x": 1.0,
        "clamp": math.inf,
    }
    assert table.rows[:-1, COL["guidance"]].tolist() == [7.5] * 4
    assert table.rows.double() == pytest.approx(table.rows64, rel=1e-7)


def test_where_a_run_starts_and_draws():
    sigma_max = 14.614641
    euler = build_table(SD, 25, sampler="euler")
    assert euler.initial_scale == pytest.approx(sigma_max / math.sqrt(1 + sigma_max**2), rel=1e-7)
    assert build_table(replace(SD, timestep_spacing="leading"), 25, sampler="euler").initial_scale == 1
    assert build_table(SD, 25).initial_scale == 1 and not any(build_table(SD, 25).draws)
    assert build_table(SD, 25, sampler="euler_a").draws == (True,) * 24 + (False,)
    assert build_table(replace(SD, set_alpha_to_one=False), 25, eta=0.1).draws == (True,) * 25
    assert build_table(FLOW, 5).initial_scale == 1 and (
        build_table(FLOW, 5).start_alpha,
        build_table(FLOW, 5).start_sigma,
    ) == (0, 1)


def test_clamp_belongs_to_ddim_and_ddpm():
    clipped = replace(SD, clip_sample=True, clip_sample_range=2.5)
    for sampler in clipped.samplers:
        bound = build_table(clipped, 5, sampler=sampler).rows[:-1, COL["clamp"]].tolist()
        assert bound == [2.5 if sampler in ("ddim", "ddpm") else math.inf] * 5


def test_zero_terminal_snr_with_eta_stays_real():
    """1 - alpha_bar_prev - sigma^2 is a negative rounding error at first: NaN in diffusers for 39 counts."""
    config = replace(
        SD, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    for steps in (1, 2, 3, 6, 7, 16, 25):
        table = build_table(config, steps, eta=1.0)
        assert table.rows64[:, : COL["clamp"]].isfinite().all()
        assert table.start_alpha == 0 and table.rows64[0, COL["next_x"]].item() == pytest.approx(0, abs=1e-7)


def test_image_to_image_keeps_the_last_steps():
    whole, part = build_table(SD, 20), build_table(SD, 20, strength=0.34)
    assert part.timesteps.tolist() == whole.timesteps[-6:].tolist()
    assert torch.equal(part.rows, whole.rows[-7:])
    assert part.start_alpha**2 == pytest.approx(alphas_cumprod(SD)[int(part.timesteps[0])].item(), rel=1e-14)
    assert part.start_alpha**2 + part.start_sigma**2 == pytest.approx(1, rel=1e-14)


def test_a_cut_multistep_run_begins_at_first_order():
    whole, part = (
        build_table(SD, 20, sampler="dpmpp_2m"),
        build_table(SD, 20, sampler="dpmpp_2m", strength=0.5),
    )
    first = part.rows64[0]
    assert whole.rows64[10, COL["next_prev"]] != 0 and first[COL["next_prev"]] == 0
    assert first[COL["next_x0"]] == whole.rows64[10, COL["next_x0"]] + whole.rows64[10, COL["next_prev"]]
    assert torch.equal(part.rows64[1:], whole.rows64[11:])


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("steps", {"steps": 0}),
        ("steps", {"steps": -1}),
        ("steps", {"steps": 1001}),
        ("steps", {"steps": 2.5}),
        ("steps", {"steps": "4"}),
        ("steps", {"steps": True}),
        ("steps", {"steps": None}),
        ("sampler", {"sampler": "plms"}),
        ("sampler", {"sampler": ""}),
        ("sampler", {"sampler": 3}),
        ("sampler", {"sampler": "flow_euler"}),
        ("eta", {"eta": -0.1}),
        ("eta", {"eta": 1.1}),
        ("eta", {"eta": math.nan}),
        ("eta", {"eta": "0"}),
        ("eta", {"eta": 0.5, "sampler": "ddpm"}),
        ("eta", {"eta": 0.5, "sampler": "euler_a"}),
        ("guidance_scale", {"guidance_scale": math.inf}),
        ("guidance_scale", {"guidance_scale": math.nan}),
        ("guidance_scale", {"guidance_scale": 1e30}),
        ("guidance_scale", {"guidance_scale": "7"}),
        ("strength", {"strength": 0}),
        ("strength", {"strength": 1.01}),
        ("strength", {"strength": math.nan}),
        ("strength", {"strength": 0.01}),
    ],
    ids=str,
)
def test_bad_arguments(name, arguments):
    with pytest.raises(InvalidArgument) as raised:
        build_table(SD, **{"steps": 25, **arguments})
    assert raised.value.name == name


def test_numpy_numbers_are_numbers():
    ours = build_table(
        SD, np.int64(7), eta=np.float32(0.5), guidance_scale=np.float64(3.0), strength=np.float64(1.0)
    )
    assert torch.equal(ours.rows, build_table(SD, 7, eta=0.5, guidance_scale=3.0).rows)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_flow_model_runs_flow_samplers_only(sampler):
    with pytest.raises(InvalidArgument, match="flow_euler"):
        build_table(FLOW, 10, sampler=sampler)


def test_epsilon_has_no_answer_in_pure_noise():
    """eps-prediction at alpha_bar = 0 says nothing of x0; a grid that does not reach it is fine."""
    config = replace(SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(InvalidArgument, match="v_prediction"):
        build_table(config, 20)
    assert build_table(config, 20, strength=0.9).rows64[:, : COL["clamp"]].isfinite().all()
    assert build_table(replace(config, timestep_spacing="leading"), 20).start_alpha > 0


def test_steps_beyond_a_clipped_schedule():
    config = replace(SD, beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-2.0)
    with pytest.raises(InvalidArgument, match="lambda_min_clipped"):
        build_table(config, 1000, sampler="dpmpp_2m")
