"""Forward process, posterior and targets against latent-diffusion's values and their definitions."""

import pytest
import torch

from fastldm.diffusion import (
    PREDICTIONS,
    SchedulerConfig,
    add_noise,
    alphas_cumprod,
    min_snr_weight,
    posterior,
    q_sample,
    simple_loss,
    target,
    to_x0,
)


def rows(values):
    return values.reshape(-1, 1, 1, 1)


def test_latent_diffusion_values(kit):
    """q_sample, the posterior, x0 from eps, p_mean and p_sample, clipped and not, from t = 0 to 999."""
    case = kit.load_case("ldm/ddpm_values")
    ddpm = case.config["ddpm"]
    kept = alphas_cumprod(
        SchedulerConfig(
            beta_schedule="scaled_linear", beta_start=ddpm["linear_start"], beta_end=ddpm["linear_end"]
        )
    )
    t, noise, x0, x_t = case.input["t"], *(case.input[key].double() for key in ("noise", "x0", "x_t"))
    q = posterior(kept)
    alpha, sigma = kept[t].sqrt(), (1 - kept[t]).sqrt()

    def close(got, key):
        want = case.out[key].double()
        assert (got - want).abs().max() <= case.tol * max(1, want.abs().max()), key

    def posterior_mean(x0):
        return rows(q.mean_x0[t]) * x0 + rows(q.mean_xt[t]) * x_t

    close(q_sample(kept, x0, t, noise), "q_sample")
    close(rows(alpha) * x0, "q_mean")
    close(rows(sigma) ** 2, "q_variance")
    close(posterior_mean(x0), "q_posterior_mean")
    close(rows(q.variance[t]), "q_posterior_variance")
    close(to_x0("epsilon", x_t, noise, alpha, sigma), "predict_start_from_noise")
    out = case.out["model_out"].double()
    for prediction, name in (("epsilon", "eps"), ("sample", "x0")):
        for clip in (0, 1):
            guess = to_x0(prediction, x_t, out, alpha, sigma)
            mean = posterior_mean(guess.clamp(-1, 1) if clip else guess)
            close(mean, f"p_mean_{name}_clip{clip}")
            close(mean + rows(q.variance[t].sqrt() * (t > 0)) * noise, f"p_sample_{name}_clip{clip}")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_net_recovers_x0(prediction, dtype):
    """to_x0 of the target is x0, with numbers and with one level a row."""
    draw = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 3, 4, 5, 6, generator=draw, dtype=dtype)
    sigma = torch.tensor([0.1, 0.6, 0.99], dtype=torch.float64)
    alpha = 1 - sigma if prediction == "flow" else (1 - sigma**2).sqrt()
    for a, s in ((alpha, sigma), (float(alpha[1]), float(sigma[1]))):
        x = add_noise(x0, noise, a, s)
        out = target(prediction, x0, noise, a, s)
        assert x.dtype == out.dtype == dtype
        torch.testing.assert_close(
            to_x0(prediction, x, out, a, s), x0, rtol=0, atol=100 * torch.finfo(dtype).eps
        )


def test_targets_are_what_the_papers_say():
    x0, noise = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    assert target("epsilon", x0, noise, 0.6, 0.8).item() == 3
    assert target("v_prediction", x0, noise, 0.6, 0.8).item() == pytest.approx(0.6 * 3 - 0.8 * 2)
    assert target("sample", x0, noise, 0.6, 0.8).item() == 2
    assert target("flow", x0, noise, 0.2, 0.8).item() == 1


def test_the_posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    kept = alphas_cumprod(SchedulerConfig())
    q = posterior(kept)
    alpha, before = kept[1:] / kept[:-1], kept[:-1]
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    torch.testing.assert_close(q.variance[1:], 1 / precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(q.mean_x0[1:], before.sqrt() / (1 - before) / precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(q.mean_xt[1:], alpha.sqrt() / (1 - alpha) / precision, rtol=1e-10, atol=0)
    assert (q.variance[0], q.mean_x0[0], q.mean_xt[0]) == (0, 1, 0) and q.log_variance[0] == q.log_variance[1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_trains_pure_noise_too(prediction):
    """min(SNR, 5) on the loss of x0; at SNR 0, where it would be none, the plain loss of the answer."""
    alpha = torch.tensor([0.0, 0.6, 0.96], dtype=torch.float64)
    sigma = 1 - alpha if prediction == "flow" else (1 - alpha**2).sqrt()
    snr = (alpha / sigma) ** 2
    of_x0 = {"epsilon": sigma / alpha, "sample": torch.ones(3)}.get(prediction, sigma)
    wanted = snr.clamp(max=5) * of_x0**2
    weight = min_snr_weight(prediction, alpha, sigma)
    assert weight.dtype == torch.float64 and weight[0] == 1
    torch.testing.assert_close(weight[1:], wanted[1:], rtol=1e-12, atol=0)


def test_simple_loss_is_a_mean_per_row():
    out, wanted = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 2]).reshape(2, 1, 2, 2)
    assert simple_loss(out, wanted).tolist() == [7.5, 1.0]
    assert simple_loss(out.bfloat16(), wanted.bfloat16()).dtype == torch.float32
