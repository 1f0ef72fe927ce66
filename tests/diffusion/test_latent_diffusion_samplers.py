"""The samplers of the latent diffusion paper's code: its recorded runs, through tables and the plain loop."""

import itertools
import math

import pytest
import torch

from fastldm.diffusion import (
    Known,
    SchedulerConfig,
    alphas_cumprod,
    build_table,
    denoise,
    inverse_table,
    plms,
    sample,
    target,
    to_x0,
)
from fastldm.errors import InvalidArgument

# Where the original crashes, as counted for models.md.
CRASHES = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}


def config_of(case, class_name="DDIMScheduler", **entries):
    """The recorded process; `linear_start` and `linear_end` are those of diffusers' scaled_linear."""
    ddpm = case.config["ddpm"]
    betas = {"beta_start": ddpm["linear_start"], "beta_end": ddpm["linear_end"]}
    length = {"num_train_timesteps": ddpm["timesteps"]}
    return SchedulerConfig(class_name, beta_schedule="scaled_linear", **length, **betas, **entries)


def denoiser(case):
    """eps(x, t, c) = a*x*cos(t/1000) + b + g*mean(c over axes 1, 2), the unconditional half first."""
    linear, contexts = case.config["eps"], [case.input.get(name) for name in ("uncond", "cond")]
    contexts = [context.double() for context in contexts if context is not None]

    def model(x, t):
        shifts = [linear["g"] * context.mean((1, 2)).reshape(-1, 1, 1, 1) for context in contexts] or [0.0]
        plain = linear["a"] * x * (t / 1000).cos().reshape(-1, 1, 1, 1) + linear["b"]
        return torch.cat([plain + shift for shift in shifts])

    return model


def same(case, got, want, where=None):
    """Equal within the case's tolerance, in all places or where `where` is 1."""
    error = (got - want).abs() if where is None else ((got - want) * where).abs()
    return error.max() <= case.tol * max(1, want.abs().max())


def check_run(case, states, times):
    """Every x, every x0 and every time at which the model was asked."""
    assert times == case.out["model_calls_t"].tolist()
    for state, x, x0 in zip(states, case.out["x_inter"][1:], case.out["pred_x0"][1:], strict=True):
        assert same(case, state.x, x) and same(case, state.x0, x0)


DDIM = ["ddim_eta0", "ddim_eta0.5", "ddim_eta1", "ddim_cond", "ddim_cfg", "ddim_cfg_eta1"]


@pytest.mark.parametrize("name", DDIM)
@pytest.mark.parametrize("sampler", ["ddim_compvis", "ddim"])
def test_ddim(kit, name, sampler):
    """DDIMSampler; diffusers' fields say the same where both run the steps asked for."""
    case = kit.load_case(f"ldm/{name}")
    run, fields = case.config, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    config = config_of(case, **fields) if sampler == "ddim" else config_of(case)
    scale = run.get("scale", 1.0)
    table = build_table(config, run["S"], sampler=sampler, eta=run["eta"], guidance_scale=scale)
    noise = case.input["step_noise"].double() * run.get("temperature", 1.0) if run["eta"] else ()
    states = list(denoise(table, denoiser(case), case.input["x_T"].double(), noise))
    check_run(case, states, table.timesteps.tolist())


def test_ddim_tables(kit):
    """Times, alpha and sigma of every recorded schedule, step count (30 gives 31) and eta."""
    case = kit.load_case("ldm/ddim_tables")
    for name, ddpm in case.config["schedules"].items():
        case.config["ddpm"] = ddpm
        config = config_of(case)
        for steps in case.config["steps"]["uniform"]:
            key = f"{name}.uniform.S{steps}"
            for eta in case.config["etas"]:
                table = build_table(config, steps, sampler="ddim_compvis", eta=eta)
                assert table.timesteps.flip(0).tolist() == case.out[f"{key}.timesteps"].tolist()
                noise, want = table.rows64[:-1, 6].flip(0), case.out[f"{key}.eta{eta}.sigmas"].double()
                torch.testing.assert_close(noise, want, rtol=1e-5, atol=1e-6)
            kept, want = table.levels[:, 0].flip(0) ** 2, case.out[f"{key}.alphas"].double()
            torch.testing.assert_close(kept, want, rtol=1e-6, atol=0)
            # With eta 1 the step lands on alpha_prev, whose signal is next_x*alpha + next_x0.
            landed = table.rows64[:-1, 3].flip(0) * kept.sqrt() + table.rows64[:-1, 4].flip(0)
            want = case.out[f"{key}.alphas_prev"].double()
            torch.testing.assert_close(landed**2, want, rtol=1e-6, atol=0)


def test_step_counts():
    """As many steps as the original runs, and an error that names others where it crashes."""
    config, other = SchedulerConfig(), 0
    for steps in range(1, 1001):
        if steps in CRASHES:
            with pytest.raises(InvalidArgument, match=f"steps={steps}: allowed is") as caught:
                build_table(config, steps, sampler="ddim_compvis")
            named = caught.value.allowed.split(" near it")[0].split(" or ")
            for near in map(int, named):
                assert near not in CRASHES and set(range(min(near, steps) + 1, max(near, steps))) <= CRASHES
        else:
            table = build_table(config, steps, sampler="ddim_compvis")
            assert table.timesteps.flip(0).tolist() == [t + 1 for t in range(0, 1000, 1000 // steps)]
            other += steps <= 100 and len(table.timesteps) != steps
    assert other == 84  # and 5 of the first 100 crash: 89 do not run what was asked
    assert len(build_table(config, 30, sampler="ddim_compvis").draws) == 31


def test_strength_keeps_its_share_of_the_steps_that_run():
    table = build_table(SchedulerConfig(), 30, sampler="ddim_compvis", strength=0.5)
    whole = build_table(SchedulerConfig(), 30, sampler="ddim_compvis")
    assert torch.equal(table.rows64, whole.rows64[16:]) and torch.equal(table.levels, whole.levels[16:])
    assert (table.start_alpha, table.start_sigma) == tuple(table.levels[0].tolist())


def test_known_latents(kit):
    """DDIM with a mask, mixed in before every call; the end is exact, the original's 0.1 to 0.2 away."""
    case = kit.load_case("ldm/ddim_mask")
    mask, x0 = case.input["mask"].double(), case.input["x0"].double()
    table = build_table(config_of(case), case.config["S"], sampler="ddim_compvis")
    known = Known(mask, x0, case.input["q_noise"].double())
    *states, last = denoise(table, denoiser(case), case.input["x_T"].double(), known=known)
    for state, x, pred in zip(states, case.out["x_inter"][1:], case.out["pred_x0"][1:], strict=False):
        assert same(case, state.x, x) and same(case, state.x0, pred)
    assert same(case, last.x0, case.out["pred_x0"][-1])
    assert same(case, last.x, case.out["x"], 1 - mask) and torch.equal(last.x * mask, x0 * mask)
    assert 0.1 < ((case.out["x"] - x0) * mask).abs().max() < 0.2


def test_known_latents_of_ancestral_sampling(kit):
    """p_sample_loop mixes after a step at the level that it began from: what our net sees one call before."""
    case = kit.load_case("ldm/ancestral_mask")
    mask, x0 = case.input["mask"].double(), case.input["x0"].double()
    length, steps = case.config["ddpm"]["timesteps"], case.config["timesteps"]
    table = build_table(config_of(case, clip_sample=False), length, sampler="ddpm", strength=steps / length)
    assert table.timesteps.tolist() == list(range(steps))[::-1]
    model, seen = denoiser(case), []

    def watched(x, t):
        seen.append(x)
        return model(x, t)

    known = Known(mask, x0, case.input["q_noise"].double())
    drawn = case.input["step_noise"].double()
    states = list(denoise(table, watched, case.input["x_T"].double(), drawn, known=known))
    for state, x, theirs in zip(states, seen, case.out["x_inter"][1:], strict=True):
        assert same(case, state.x, theirs, 1 - mask) and same(case, x, theirs, mask)
    assert torch.equal(states[-1].x * mask, x0 * mask)


def test_ancestral_sampling(kit):
    """p_sample_loop over all 12 steps of a short schedule."""
    case = kit.load_case("ldm/ancestral")
    table = build_table(config_of(case, "DDPMScheduler", clip_sample=False), case.config["ddpm"]["timesteps"])
    states = denoise(table, denoiser(case), case.input["x_T"].double(), case.input["step_noise"].double())
    for state, x in zip(states, case.out["x_inter"][1:], strict=True):
        assert same(case, state.x, x)


def test_quantized_x0(kit):
    """DDIM whose x0 is the nearest code at every step, the noise being that of the x0 before."""
    case = kit.load_case("ldm/ddim_quantize_x0")
    codebook = case.weight["codebook"].double()

    def nearest(x0):
        flat = x0.movedim(1, -1)
        return codebook[torch.cdist(flat.reshape(-1, 3), codebook).argmin(1)].view_as(flat).movedim(-1, 1)

    table = build_table(config_of(case), case.config["S"], sampler="ddim_compvis")
    states = list(denoise(table, denoiser(case), case.input["x_T"].double(), quantize=nearest))
    check_run(case, states, table.timesteps.tolist())
    assert torch.equal(
        sample(table, denoiser(case), case.input["x_T"].double(), quantize=nearest), states[-1].x
    )


@pytest.mark.parametrize("name", ["plms", "plms_cfg"])
def test_plms(kit, name):
    """PLMSSampler, with guidance too; the model is asked once more than there are steps."""
    case = kit.load_case(f"ldm/{name}")
    model, times = denoiser(case), []

    def watched(x, t):
        assert x.dtype == torch.float64 and t.unique().numel() == 1
        times.append(int(t[0]))
        return model(x, t)

    scale = case.config.get("scale", 1.0)
    table = build_table(config_of(case), case.config["S"], sampler="ddim_compvis", guidance_scale=scale)
    check_run(case, list(plms(table, watched, case.input["x_T"].double())), times)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def run(kit, steps, loop, prediction="epsilon"):
    """Where a loop over the times of diffusers' leading spacing starts and ends, for the analytic model."""
    fields = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    config = SchedulerConfig(**BETAS, **fields, prediction_type=prediction)
    noise, draw = kit.random_model("epsilon"), torch.Generator().manual_seed(1)
    start = torch.randn(2, 4, 3, 5, generator=draw, dtype=torch.float64)

    def model(x, t):
        eps, kept = noise(x, t[0]), alphas_cumprod(config)[int(t[0])]
        x0 = to_x0("epsilon", x, eps, kept.sqrt(), (1 - kept).sqrt())
        return target(prediction, x0, eps, kept.sqrt(), (1 - kept).sqrt())

    states = list(loop(build_table(config, steps), model, start))
    assert len(states) == steps
    return start, states[-1].x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 25])
def test_plms_is_that_of_diffusers(kit, steps):
    """PNDMScheduler without Runge-Kutta steps, for eps; of v it averages v, where the original does noise."""
    from diffusers import PNDMScheduler

    theirs = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    theirs.set_timesteps(steps)
    model, (x, ours) = kit.random_model("epsilon"), run(kit, steps, plms)
    for t in theirs.timesteps:
        x = theirs.step(model(x, float(t)), t, x).prev_sample
    assert (ours - x).abs().max() <= 1e-5 * x.abs().max()  # its alpha_bar is float32
    for prediction in ("v_prediction", "sample"):
        torch.testing.assert_close(run(kit, steps, plms, prediction)[1], ours)


def test_plms_is_nearer_than_ddim(kit):
    """To the solution of the probability flow ODE, here DDIM's in 500 steps."""
    exact = run(kit, 500, denoise)[1]
    errors = [(run(kit, 25, loop)[1] - exact).square().mean().sqrt().item() for loop in (plms, denoise)]
    assert errors[0] < errors[1] / 3, errors


def test_what_is_refused():
    config, x, noise = SchedulerConfig(clip_sample=False), torch.zeros(1, 1), torch.zeros(1, 1)
    table, model = build_table(config, 5, sampler="ddim_compvis"), lambda x, t: x
    with pytest.raises(InvalidArgument, match="known.noise='too few, at step 3': allowed is 5 draws"):
        sample(table, model, x, known=Known(torch.ones(1, 1), x, [noise] * 3))
    inverse = inverse_table(table)
    for extra in ({"known": Known(torch.ones(1, 1), x, itertools.repeat(noise))}, {"quantize": torch.round}):
        with pytest.raises(InvalidArgument, match="table='an inverse'"):
            sample(inverse, model, x, **extra)
    multistep = build_table(config, 5, sampler="dpmpp_2m")
    for other in (build_table(config, 5, eta=0.5), multistep, inverse):
        with pytest.raises(InvalidArgument, match="table='random or multistep'"):
            next(plms(other, model, x))
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    with pytest.raises(InvalidArgument, match="without signal"):
        next(plms(build_table(SchedulerConfig(**zero), 5), model, x))
    assert math.isinf(table.row(0)["clamp"])
