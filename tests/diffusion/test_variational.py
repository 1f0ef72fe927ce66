"""Likelihoods, the reverse process and the variational bound: recorded values and closed forms."""

import math

import pytest
import torch

from fastldm.diffusion import (
    Chain,
    SchedulerConfig,
    bits_per_dimension,
    bound_term,
    q_sample,
    reverse,
    unit_noise,
)
from fastldm.diffusion.likelihood import discretized_log_likelihood, normal_cdf, normal_kl
from fastldm.diffusion.variational import prior_bits
from fastldm.errors import InvalidArgument

VARIANCES = ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"]

# In prior_bpd the original forms exp(log_variance) - 1 in float32.
ROUNDING = 2**-25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_likelihood_grids(kit, dtype):
    """improved-diffusion's functions over grids, edges and tails included."""
    case = kit.load_case("iddpm/likelihood_grids")
    prefix = "f64." if dtype == torch.float64 else "f32."
    given = {name: value.to(dtype) for name, value in case.input.items()}
    x, mean, scale = given["x"][:, None, None], given["means"][:, None], given["log_scales"]
    likelihood = discretized_log_likelihood(x, mean, scale)
    m1, v1 = given["mean1"][:, None, None, None], given["logvar1"][:, None, None]
    kl = normal_kl(m1, v1, given["mean2"][:, None], given["logvar2"])
    wanted = case.out[prefix + "discretized_gaussian_log_likelihood"]
    rtol, atol = (1e-10, 1e-10) if dtype == torch.float64 else (1e-5, 1e-6)
    torch.testing.assert_close(kl, case.out[prefix + "normal_kl"], rtol=rtol, atol=atol)
    cdf = case.out[prefix + "approx_standard_normal_cdf"]
    torch.testing.assert_close(normal_cdf(given["cdf_x"]), cdf, rtol=rtol, atol=atol)
    if dtype == torch.float32:  # which cancels in the tails
        clear = case.out["f64.discretized_gaussian_log_likelihood"] > -10
        likelihood, wanted = likelihood[clear], wanted[clear]
        atol = case.tol["f32_where_f64_loglik_above_-10"]
    torch.testing.assert_close(likelihood, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["lin1000", "cos4000_rescaled_t"])
def test_improved_diffusion_values(kit, name):
    """p_mean_variance and _vb_terms_bpd of every mean and variance, clipped or not, at times 0 to T - 1."""
    case = kit.load_case(f"iddpm/ops_{name}")
    x0, noise, t = (case.input[key] for key in ("x_start", "noise", "t"))
    scale = 1000 / case.config["T"] if case.config["rescale_timesteps"] else 1.0
    for mean in ("EPSILON", "START_X"):
        for variance in VARIANCES:
            chain = Chain.of(kit.iddpm_config(case, mean, variance))
            x = q_sample(chain.alphas_cumprod, x0.double(), t, noise.double()).float()
            kind = "L" if variance.startswith("LEARNED") else "F"
            weight = {key[2:]: value for key, value in case.weight.items() if key[0] == kind}
            out = kit.toyconv(case, weight, scale=scale)(x, t)
            for clip, clamp in ((0, math.inf), (1, 1.0)):
                p = reverse(chain, x, out, t, clamp)
                key = f"p_mean_variance.{mean}.{variance}.clip{clip}"
                if f"{key}.mean" in case.out:
                    kit.assert_recorded(case, f"{key}.mean", p.mean)
                    kit.assert_recorded(case, f"{key}.pred_xstart", p.x0)
                log_variance = p.log_variance if kind == "L" else p.log_variance[:, :1, 0, 0].expand(-1, 3)
                if kind == "L" or name == "lin1000":
                    kit.assert_recorded(case, f"p_mean_variance.{variance}.log_variance", log_variance)
                term = bound_term(chain, x0, x, out, t, clamp)
                kit.assert_recorded(case, f"vb_terms_bpd.{mean}.{variance}.clip{clip}", term)
    kit.assert_recorded(case, "prior_bpd", prior_bits(chain, x0), slack=ROUNDING)
    kept = chain.alphas_cumprod[-1]
    nats = 0.5 * (kept * x0.double().square().flatten(1).mean(1) - kept - torch.log1p(-kept))
    torch.testing.assert_close(prior_bits(chain, x0.double()) * math.log(2), nats, rtol=1e-6, atol=1e-16)


@pytest.mark.parametrize("name, steps", [("cos20", None), ("lin1000_spaced20", 20)])
def test_improved_diffusion_bound(kit, name, steps):
    """calc_bpd_loop, whole and strided: total, prior, every term and the error of x0."""
    case = kit.load_case(f"iddpm/bpd_loop_{name}")
    for mean, variance in case.config["combos"]:
        chain = Chain.of(kit.iddpm_config(case, mean, variance), steps)
        kind = "L" if variance.startswith("LEARNED") else "F"
        model = kit.toyconv(case, {key[2:]: w for key, w in case.weight.items() if key[0] == kind})
        for clip, clamp in ((0, math.inf), (1, 1.0)):
            bound = bits_per_dimension(model, case.input["x_start"], chain, case.input["noise"], clamp)
            key = f"{mean}.{variance}.clip{clip}"
            kit.assert_recorded(case, f"{key}.total_bpd", bound.total)
            kit.assert_recorded(case, f"{key}.prior_bpd", bound.prior, slack=ROUNDING)
            kit.assert_recorded(case, f"{key}.vb", bound.terms.flip(1))
            kit.assert_recorded(case, f"{key}.xstart_mse", bound.x0_mse.flip(1))


def test_latent_diffusion_bound_weights(kit):
    """With the small variance a term in nats is latent-diffusion's lvlb_weights times the error of eps."""
    case = kit.load_case("ldm/lvlb_weights")
    draw = torch.Generator().manual_seed(2)
    t = torch.arange(1, 1000)
    x0, noise, out = torch.randn(3, 999, 2, 3, 3, generator=draw, dtype=torch.float64)
    compared = 0
    for key, about in case.config["variants"].items():
        if about["parameterization"] == "eps" and "v_posterior" not in about:
            betas = {"beta_start": about["linear_start"], "beta_end": about["linear_end"]}
            chain = Chain.of(SchedulerConfig(beta_schedule="scaled_linear", **betas))
            x = q_sample(chain.alphas_cumprod, x0, t, noise)
            nats = bound_term(chain, x0, x, out, t) * math.log(2)
            error = (out - noise).square().flatten(1).mean(1)
            torch.testing.assert_close(nats / error, case.out[key][1:].double(), rtol=1e-4, atol=0)
            compared += 1
    assert compared == 4


class Gauss:
    """Data N(0, variance) and its exact net: eps, and beside it the reverse process's exact log variance."""

    def __init__(self, chain, variance):
        self.chain, self.variance = chain, variance

    def __call__(self, x, t):
        step = torch.searchsorted(self.chain.times, t.long())
        alpha, sigma = (level.to(x.dtype).reshape(-1, 1, 1, 1) for level in self.chain.levels(step))
        noisy = alpha**2 * self.variance + sigma**2
        q = self.chain.posterior
        spread = (q.variance + q.mean_x0**2 * self.spread_of_x0())[step].log().to(x.dtype)
        return torch.cat([sigma * x / noisy, spread.reshape(-1, 1, 1, 1).expand(x.shape)], 1)

    def spread_of_x0(self):
        """The variance of x0 given x_t, at every time."""
        kept = self.chain.alphas_cumprod
        return self.variance * (1 - kept) / (kept * self.variance + 1 - kept)


def test_the_bound_is_tight_for_an_exact_model():
    """Its total is the entropy of the pixels, summed by erf from the data's own distribution.

    Terms are quadratic in the noise, so pairs of signs average them without error; the decoder's is nearly
    so, and sees the normal's quantiles. The rest, 6e-4 bits, is the pixels' width and the tanh for erf.
    """
    draw = torch.Generator().manual_seed(3)
    chain = Chain.of(SchedulerConfig(variance_type="learned"))
    x0 = 0.2 * torch.randn(4, 1, 32, 32, generator=draw, dtype=torch.float64)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    quantiles = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    once = quantiles[torch.randperm(4096, generator=draw)].reshape(x0.shape)
    last = torch.cat([once, -once])
    x0 = torch.cat([x0, x0])
    bound = bits_per_dimension(Gauss(chain, 0.04), x0, chain, [last.sign()] * 999 + [last])
    edges = (torch.stack([x0 - 1 / 255, x0 + 1 / 255]) / 0.2 / math.sqrt(2)).erf() / 2
    entropy = -(edges[1] - edges[0]).log2().mean()
    assert bound.terms.shape == (8, 1000) and bound.total.dtype == torch.float64
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(1))
    assert bound.total.mean().item() == pytest.approx(entropy.item(), abs=2e-3)
    distortion = bound.x0_mse.mean(0)
    torch.testing.assert_close(distortion, Gauss(chain, 0.04).spread_of_x0(), rtol=0.05, atol=0)


def test_unit_noise_is_the_generators():
    like = torch.zeros(2, 3, dtype=torch.float64)
    drawn = unit_noise(like, torch.Generator().manual_seed(1))
    again = torch.Generator().manual_seed(1)
    for _ in range(3):
        assert torch.equal(next(drawn), torch.randn(2, 3, generator=again, dtype=torch.float64))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_of_an_exact_mean(variance):
    """E[term] in closed form, with the fixed variances: the mean's error is that of x0 given x_t."""
    draw = torch.Generator().manual_seed(4)
    chain = Chain.of(SchedulerConfig(variance_type=variance), 50)
    exact = Gauss(chain, 0.04)
    step = torch.arange(1, 50)
    x0, noise = torch.randn(2, 49, 1, 100, 100, generator=draw, dtype=torch.float64)
    x0 = 0.2 * x0
    x = q_sample(chain.alphas_cumprod, x0, step, noise)
    out = exact(x, chain.times[step])[:, :1]
    small, before = chain.posterior.variance, torch.cat([torch.ones(1), chain.alphas_cumprod[:-1]])
    p = small if variance == "fixed_small" else 1 - chain.alphas_cumprod / before
    error = chain.posterior.mean_x0**2 * exact.spread_of_x0()
    wanted = 0.5 * (small / p - 1 - (small / p).log() + error / p) / math.log(2)
    # 10,000 squares a term: a relative deviation of sqrt(2/10,000)
    got = bound_term(chain, x0, x, out, step)
    torch.testing.assert_close(got, wanted[step], rtol=5 * math.sqrt(2e-4), atol=0)


def test_bad_chains_are_refused():
    flow = SchedulerConfig(class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(InvalidArgument, match="beta schedule"):
        Chain.of(flow)
    for steps in (1, 0, 1001, 2.0, True):
        with pytest.raises(InvalidArgument, match="steps"):
            Chain.of(SchedulerConfig(), steps)
    with pytest.raises(InvalidArgument, match="prediction_type"):
        Chain.of(SchedulerConfig(rescale_betas_zero_snr=True))
    chain, x0 = Chain.of(SchedulerConfig(), 5), torch.zeros(1, 1, 2, 2)
    with pytest.raises(InvalidArgument, match="noise"):
        bits_per_dimension(lambda x, t: x, x0, chain, [x0] * 4)
