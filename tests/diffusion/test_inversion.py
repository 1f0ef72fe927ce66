"""Inverse tables: the way back from latents to noise, on recorded runs and on a smooth analytic model."""

import pytest
import torch

from fastldm.diffusion import SchedulerConfig, alphas_cumprod, build_table, inverse_table, sample
from fastldm.errors import InvalidArgument

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
CASES = {
    "ddim": ("ddim", SchedulerConfig(**SD, set_alpha_to_one=False, steps_offset=1)),
    "ddim_compvis": ("ddim_compvis", SchedulerConfig(**SD)),
    "ddim-v": ("ddim", SchedulerConfig(**SD, prediction_type="v_prediction")),
    "ddim-v-zero-snr": (
        "ddim",
        SchedulerConfig(
            **SD,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    ),
    "euler": (
        "euler",
        SchedulerConfig(**SD, class_name="EulerDiscreteScheduler", timestep_spacing="linspace"),
    ),
    "flow": ("flow_euler", SchedulerConfig(class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)),
}


class Mixture:
    """The exact net for a mixture of six Gaussians of deviation 0.4 in [4, 3, 5]."""

    def __init__(self, config):
        self.prediction, self.flow = config.prediction, config.prediction == "flow"
        self.kept = None if self.flow else alphas_cumprod(config)
        draw = torch.Generator().manual_seed(3)
        self.means = torch.randn(6, 4, 3, 5, generator=draw, dtype=torch.float64)

    def level(self, t):
        if self.flow:
            return 1 - t / 1000, t / 1000
        kept = self.kept[t.round().long()]
        return kept.sqrt(), (1 - kept).sqrt()

    def __call__(self, x, t):
        alpha, sigma = self.level(t[0].double())
        means, spread = self.means.to(x.dtype), 0.4**2 * alpha**2 + sigma**2
        away = x[:, None] - alpha * means
        share = (-away.square().flatten(2).sum(2) / (2 * spread)).softmax(1)[..., None, None, None]
        eps = (share * away).sum(1) * sigma / spread
        x0 = (share * (means + 0.4**2 * alpha * away / spread)).sum(1)
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[
            self.prediction
        ].to(x.dtype)

    def data(self, rows):
        draw = torch.Generator().manual_seed(4)
        noise = torch.randn(rows, 4, 3, 5, generator=draw, dtype=torch.float64)
        return self.means[torch.arange(rows) % 6] + 0.4 * noise


def off(got, wanted):
    """The RMS error in units of the RMS."""
    return ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()


@pytest.mark.parametrize("case", CASES)
def test_latents_return(case):
    """Latents → noise → latents in 100 steps: each refinement brings them nearer; 2 % is what is asked for.

    Without one, a row between two Gaussians may come back in the other (20 % of the RMS of 24 rows).
    """
    sampler, config = CASES[case]
    model, table = Mixture(config), build_table(config, 100, sampler=sampler)
    clean = model.data(24)
    errors = []
    for refinements in (0, 1, 2):
        noise = sample(inverse_table(table, refinements), model, clean)
        errors.append(off(sample(table, model, table.initial_scale * noise), clean))
    assert errors[1] <= min(1e-3, errors[0] / 8) and errors[2] <= errors[1] / 3
    assert noise.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("case", CASES)
def test_enough_refinements_are_exact(case):
    """Noise → latents → noise, to rounding; also in float32 rows, which a GPU runs."""
    sampler, config = CASES[case]
    model, table = Mixture(config), build_table(config, 50, sampler=sampler)
    noise = torch.randn(8, 4, 3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    clean = sample(table, model, table.initial_scale * noise)
    inverse = inverse_table(table, 40)
    assert off(sample(inverse, model, clean), noise) <= 1e-6
    assert torch.equal(inverse.rows, inverse.rows64.float()) and inverse.rows.shape == (50 * 41 + 1, 9)
    assert torch.equal(inverse.rows[-1], table.rows[-1]) and not any(inverse.draws)
    assert inverse.timesteps.tolist() == table.timesteps.flip(0).repeat_interleave(41).tolist()


def test_improved_diffusions_ddim_is_undone(kit):
    """The recorded ddim_sample run, backwards: from its last x to the noise it began with."""
    case = kit.load_case("iddpm/sample_lin1000_ddim25_eps_fixedlarge")
    table = build_table(SchedulerConfig(clip_sample=False), 25)
    end = case.out["ddim_sample.clip_denoised=False.eta=0.0.x"][-1].double()
    noise = sample(inverse_table(table, 60), kit.toyconv(case, case.weight), end)
    assert off(noise, case.input["x_T"].double()) <= 1e-5


def test_guided_steps_are_inverted_too():
    """The guided answer is what is inverted: two halves in, the same row's guidance."""
    config = CASES["ddim"][1]
    model, table = Mixture(config), build_table(config, 100, guidance_scale=2.0)

    def halves(x, t):
        return torch.cat([model(x, t) * 0.9, model(x, t)])

    clean = model.data(6)
    noise = sample(inverse_table(table, 4), halves, clean)
    assert off(sample(table, halves, noise), clean) <= 1e-3


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("euler_a", 0.0), ("dpmpp_2m", 0.0), ("ddim", 0.5)])
def test_what_cannot_be_inverted_is_refused(sampler, eta):
    table = build_table(SchedulerConfig(**SD), 10, sampler=sampler, eta=eta)
    with pytest.raises(InvalidArgument, match="ddim, ddim_compvis, euler, flow_euler, with eta 0"):
        inverse_table(table)


def test_a_net_of_x0_is_refused():
    table = build_table(SchedulerConfig(**SD, prediction_type="sample"), 10, sampler="ddim")
    with pytest.raises(InvalidArgument, match="prediction_type"):
        inverse_table(table)
