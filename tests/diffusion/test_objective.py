"""Objectives: every recorded loss and gradient, min-SNR and flows by definition, and what is refused."""

import math

import pytest
import torch

from fastldm.diffusion import (
    PREDICTIONS,
    Chain,
    Criterion,
    Objective,
    SchedulerConfig,
    add_noise,
    bound_term,
    min_snr_weight,
    target,
    to_x0,
)
from fastldm.errors import InvalidArgument

FLOW = SchedulerConfig(class_name="FlowMatchEulerDiscreteScheduler")
LEARNED = SchedulerConfig(variance_type="learned_range")


def objective_of(loss, variance, length):
    """The Objective of one of improved-diffusion's LossTypes, and what its losses are to be divided by."""
    if loss.endswith("KL"):
        return Objective("vlb"), 1 if loss == "RESCALED_KL" else length
    if variance.startswith("FIXED"):
        return Objective("simple"), 1
    return Objective("hybrid", vlb_weight=1e-3 if loss == "RESCALED_MSE" else 1 / length), 1


@pytest.mark.parametrize("name", ["lin1000", "cos4000_rescaled_t"])
def test_improved_diffusion_losses(kit, name):
    """training_losses of every mean, variance and loss type, and its gradients: L_simple, L_hybrid, L_vlb."""
    case = kit.load_case(f"iddpm/losses_{name}")
    x0, noise, t = (case.input[key] for key in ("x_start", "noise", "t"))
    length, compared = case.config["T"], 0
    scale = 1000 / length if case.config["rescale_timesteps"] else 1.0
    for mean in ("EPSILON", "START_X"):
        for variance in case.config["vars"]:
            for loss in case.config["losses"]:
                objective, divisor = objective_of(loss, variance, length)
                criterion = Criterion(objective, kit.iddpm_config(case, mean, variance))
                kind = "L" if variance.startswith("LEARNED") else "F"
                weight = {
                    key[2:]: value.clone().requires_grad_()
                    for key, value in case.weight.items()
                    if key[0] == kind
                }
                places = criterion.at(t)
                x = add_noise(x0, noise, places.alpha, places.sigma)
                out = kit.toyconv(case, weight, scale=scale)(x, places.t)
                losses = criterion.losses(x0, noise, x, out, places) / divisor
                kit.assert_recorded(case, f"{mean}.{variance}.{loss}.loss", losses.detach())
                compared += 1
                if [mean, variance, loss] in case.config["grads"]:
                    losses.mean().backward()
                    for key, value in weight.items():
                        kit.assert_recorded(case, f"{mean}.{variance}.{loss}.grad.{key}", value.grad)
                        compared += 1
    assert compared == 2 * 4 * 4 + 4 * 5


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_latent_diffusion_losses(kit, loss, prediction):
    """p_losses of latent-diffusion, at the recorded times and noise."""
    case = kit.load_case("ldm/p_losses")
    ddpm, linear = case.config["ddpm"], case.config["eps"]
    config = SchedulerConfig(
        beta_schedule="scaled_linear",
        beta_start=ddpm["linear_start"],
        beta_end=ddpm["linear_end"],
        prediction_type={"eps": "epsilon", "x0": "sample"}[prediction],
    )
    criterion = Criterion(Objective({"l1": "absolute", "l2": "simple"}[loss]), config)
    x0, noise, t = (case.input[key] for key in ("x0", "noise", "t"))
    places = criterion.at(t)
    x = add_noise(x0, noise, places.alpha, places.sigma)
    out = linear["a"] * x * (places.t.float() / 1000).cos().reshape(-1, 1, 1, 1) + linear["b"]
    got = criterion.losses(x0, noise, x, out, places).mean()
    for model in ("DDPM", "LatentDiffusion"):
        assert got.item() == pytest.approx(case.out[f"{model}.{loss}.{prediction}.loss"].item(), rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x0(prediction):
    """Weight times the net's squared error is min(SNR, gamma) times that of the x0 it stands for."""
    draw = torch.Generator().manual_seed(1)
    x, out, truth = torch.randn(3, 5, 2, 3, 4, generator=draw, dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)
    alpha = 1 - sigma if prediction == "flow" else (1 - sigma**2).sqrt()
    error = (out - truth).square().flatten(1).mean(1)
    x0_error = to_x0(prediction, x, out, alpha, sigma) - to_x0(prediction, x, truth, alpha, sigma)
    for gamma in (5.0, 1.0):
        wanted = ((alpha / sigma) ** 2).clamp(max=gamma) * x0_error.square().flatten(1).mean(1)
        torch.testing.assert_close(min_snr_weight(prediction, alpha, sigma, gamma) * error, wanted)


def test_min_snr_is_finite_without_signal_and_without_noise():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert min_snr_weight("epsilon", ends, 1 - ends, 5.0).tolist() == [1, 0]
    assert min_snr_weight("v_prediction", ends, 1 - ends, 5.0).tolist() == [1, 0]
    assert min_snr_weight("sample", ends, 1 - ends, 5.0).tolist() == [1, 5]
    assert min_snr_weight("flow", ends, 1 - ends, 5.0).tolist() == [1, 0]


class Recorder:
    """A model that answers from its inputs, and keeps them."""

    def __init__(self, channels=1):
        self.channels = channels

    def __call__(self, x, t, *condition):
        self.x, self.t, self.condition = x, t, condition
        self.out = torch.cat([(k + 1) * x.tanh() for k in range(self.channels)], 1)
        return self.out


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_training_step(prediction, weighting):
    """Noise first, then uniform times, from one generator; the target of the config's prediction."""
    config = SchedulerConfig(prediction_type=prediction)
    criterion = Criterion(Objective(weighting=weighting), config)
    clean = torch.randn(64, 2, 3, 3, generator=torch.Generator().manual_seed(7))
    model = Recorder()
    losses = criterion(model, clean, "a", 1, generator=torch.Generator().manual_seed(8))
    again = torch.Generator().manual_seed(8)
    noise = torch.randn(clean.shape, generator=again)
    times = torch.randint(1000, (64,), generator=again)
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[times]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    assert model.condition == ("a", 1) and model.t.dtype == torch.float32
    assert model.t.tolist() == times.tolist()
    torch.testing.assert_close(model.x, add_noise(clean, noise, alpha, sigma))
    wanted = (model.out - target(prediction, clean, noise, alpha, sigma)).square().mean((1, 2, 3))
    if weighting == "min_snr":
        wanted = wanted * min_snr_weight(prediction, alpha, sigma).float()
    torch.testing.assert_close(losses, wanted)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_a_flow_training_step(timesteps, shift):
    """x = (1 - sigma)*x0 + sigma*noise, t = 1000*sigma, target noise - x0; sigma from its distribution."""
    config = SchedulerConfig(class_name="FlowMatchEulerDiscreteScheduler", shift=shift)
    given = {"logit_mean": 0.5, "logit_deviation": 0.8} if timesteps == "logit_normal" else {}
    objective = Objective(timesteps=timesteps, **given)
    clean = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(7))
    model = Recorder()
    losses = Criterion(objective, config)(model, clean, generator=torch.Generator().manual_seed(8))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(8))
    sigma = model.t.double() / 1000
    torch.testing.assert_close(model.x, add_noise(clean, noise, 1 - sigma, sigma))
    torch.testing.assert_close(losses, (model.out - (noise - clean)).square().mean((1, 2, 3)))
    assert 0 <= sigma.min() and sigma.max() <= 1
    # The shift multiplies the odds by itself. Means of 4000 draws, to five standard errors.
    unshifted = (sigma / (1 - sigma)).log() - math.log(shift)
    if timesteps == "logit_normal":
        assert unshifted.mean().item() == pytest.approx(0.5, abs=5 * 0.8 / math.sqrt(4000))
        assert unshifted.std().item() == pytest.approx(0.8, abs=5 * 0.8 / math.sqrt(8000))
    else:
        uniform = unshifted.sigmoid()
        assert uniform.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / 4000))
        assert uniform.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_hybrid_trains_the_variance_by_the_bound_alone():
    """L_simple leaves the variance alone, the bound the mean; together they are the sum, weight and all."""
    draw = torch.Generator().manual_seed(3)
    clean, noise = torch.randn(2, 6, 2, 4, 4, generator=draw)
    criterion = Criterion(Objective("hybrid", vlb_weight=0.01), LEARNED)
    places = criterion.at(torch.tensor([0, 1, 10, 100, 500, 999]))
    x = add_noise(clean, noise, places.alpha, places.sigma)
    out = (0.3 * torch.randn(6, 4, 4, 4, generator=draw)).requires_grad_()
    criterion.losses(clean, noise, x, out, places).sum().backward()
    mean, variance = out.grad.chunk(2, 1)
    simple = out.detach()[:, :2].requires_grad_()
    (simple - noise).square().mean((1, 2, 3)).sum().backward()
    torch.testing.assert_close(mean, simple.grad)
    free = out.detach().requires_grad_()
    bound = bound_term(Chain.of(LEARNED), clean, x, free, places.step)
    (1000 * 0.01 * bound).sum().backward()
    torch.testing.assert_close(variance, free.grad[:, 2:])
    assert (variance.flatten(1).abs().amax(1) > 0).all()


def test_losses_of_all_processes_are_remembered():
    """As if two of them had seen the same."""
    config = SchedulerConfig(num_train_timesteps=10, beta_end=0.5)
    clean = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    alone, pair = (
        Criterion(Objective("vlb", timesteps="loss_second_moment"), config, gathered)
        for gathered in (lambda rows: rows, lambda rows: torch.cat([rows, rows]))
    )
    for criterion in (alone, pair):
        criterion(Recorder(), clean, generator=torch.Generator().manual_seed(2))
    assert int(alone.resampler.counts.sum()) == 6
    assert torch.equal(pair.resampler.counts, 2 * alone.resampler.counts)


def test_resampling_keeps_the_loss_and_remembers():
    """Weighted losses average to the uniform loss; the state is that of an unbroken run."""
    config = SchedulerConfig(num_train_timesteps=10, variance_type="learned_range", beta_end=0.5)
    objective = Objective("vlb", timesteps="loss_second_moment")
    clean = torch.rand(400, 1, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    draw, model = torch.Generator().manual_seed(2), Recorder(channels=2)
    criterion = Criterion(objective, config)
    for _ in range(3):
        criterion(model, clean, generator=draw)
    p = criterion.resampler.probabilities()
    assert p.max() > 2 * p.min() and p.sum().item() == pytest.approx(1)
    resumed = Criterion(objective, config)
    resumed.load_state_dict(criterion.state_dict())
    both = [c(model, clean, generator=torch.Generator().manual_seed(9)) for c in (criterion, resumed)]
    assert torch.equal(*both)
    assert torch.equal(criterion.resampler.losses, resumed.resampler.losses)
    plain = Criterion(Objective("vlb"), config)
    many = torch.cat([plain(model, clean, generator=draw) for _ in range(100)])
    drawn = torch.cat([criterion(model, clean, generator=draw) for _ in range(100)])
    error = 5 * math.sqrt(many.var() / len(many) + drawn.var() / len(drawn))
    assert drawn.mean().item() == pytest.approx(many.mean().item(), abs=error)
    assert drawn.var() < many.var()


def test_losses_are_float32_of_a_bfloat16_answer():
    criterion = Criterion(Objective("hybrid"), LEARNED)
    clean = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1))

    def model(x, t):
        return torch.cat([x, x], 1).bfloat16()

    losses = criterion(model, clean, generator=torch.Generator().manual_seed(2))
    assert losses.dtype == torch.float32 and losses.shape == (4,) and losses.isfinite().all()


@pytest.mark.parametrize(
    "argument, settings",
    [
        ("loss", {"loss": "l2"}),
        ("weighting", {"weighting": "snr"}),
        ("timesteps", {"timesteps": "cosine"}),
        ("gamma", {"gamma": 0}),
        ("gamma", {"gamma": math.nan}),
        ("vlb_weight", {"vlb_weight": -1.0}),
        ("logit_mean", {"logit_mean": "0"}),
        ("logit_deviation", {"logit_deviation": 0.0}),
        ("gamma", {"gamma": 1.0}),
        ("vlb_weight", {"loss": "vlb", "vlb_weight": 1.0}),
        ("logit_mean", {"logit_mean": 1.0}),
        ("logit_deviation", {"timesteps": "uniform", "logit_deviation": 0.5}),
        ("weighting", {"loss": "vlb", "weighting": "min_snr"}),
        ("weighting", {"loss": "absolute", "weighting": "min_snr"}),
    ],
    ids=str,
)
def test_bad_objectives_are_refused(argument, settings):
    with pytest.raises(InvalidArgument) as caught:
        Objective(**settings)
    assert caught.value.name == argument


@pytest.mark.parametrize(
    "argument, objective, config",
    [
        ("loss", Objective("hybrid"), FLOW),
        ("loss", Objective("vlb"), FLOW),
        ("timesteps", Objective(timesteps="loss_second_moment"), FLOW),
        ("timesteps", Objective(timesteps="logit_normal"), SchedulerConfig()),
        ("variance_type", Objective("hybrid"), SchedulerConfig()),
        ("variance_type", Objective("simple"), LEARNED),
        ("variance_type", Objective("absolute"), LEARNED),
        ("prediction_type", Objective(), SchedulerConfig(rescale_betas_zero_snr=True)),
    ],
    ids=str,
)
def test_contradictions_with_the_model_are_refused(argument, objective, config):
    with pytest.raises(InvalidArgument) as caught:
        Criterion(objective, config)
    assert caught.value.name == argument


def test_the_state_of_another_objective_is_refused():
    config = SchedulerConfig(num_train_timesteps=10, beta_end=0.5)
    resampled = Criterion(Objective("vlb", timesteps="loss_second_moment"), config)
    plain = Criterion(Objective("vlb"), config)
    assert plain.state_dict() == {}
    plain.load_state_dict({})
    with pytest.raises(InvalidArgument, match="state"):
        plain.load_state_dict(resampled.state_dict())
    with pytest.raises(InvalidArgument, match="losses=None"):
        resampled.load_state_dict({})
    longer = Criterion(Objective("vlb", timesteps="loss_second_moment"), SchedulerConfig())
    with pytest.raises(InvalidArgument, match=r"losses=.*allowed is a tensor \[10, 10\]"):
        resampled.load_state_dict(longer.state_dict())


@pytest.mark.parametrize(
    "objective, config, channels",
    [
        (Objective("hybrid"), LEARNED, 2),
        (Objective("vlb"), LEARNED, 3),
        (Objective("vlb"), SchedulerConfig(), 4),
        (Objective("simple"), SchedulerConfig(), 4),
        (Objective("simple"), FLOW, 1),
    ],
    ids=str,
)
def test_a_model_of_other_channels_is_refused(objective, config, channels):
    clean = torch.zeros(2, 2, 3, 3)

    def model(x, t):
        return torch.zeros(2, channels, 3, 3)

    with pytest.raises(InvalidArgument, match=f"model='an answer of {channels} channels'"):
        Criterion(objective, config)(model, clean, generator=torch.Generator().manual_seed(1))
