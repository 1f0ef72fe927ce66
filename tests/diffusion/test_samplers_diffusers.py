"""Sampler tables against diffusers' schedulers, stepping the same net from the same noise."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep
from diffusers.schedulers import scheduling_euler_ancestral_discrete as scheduling_euler_a

from fastldm.diffusion import SchedulerConfig, alphas_cumprod, build_table

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
CLASSES = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
}
SPACINGS = ["leading", "linspace", "trailing"]
# sampler, what its config sets beside spacing and prediction
SETTINGS = [
    ("ddim", {"set_alpha_to_one": False, "steps_offset": 1}),
    ("ddim", {}),
    ("ddpm", {"steps_offset": 1}),
    ("ddpm", {"variance_type": "fixed_large", "steps_offset": 1}),
    ("euler", {"steps_offset": 1}),
    ("euler", {"use_karras_sigmas": True}),
    ("euler", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("euler", {"final_sigmas_type": "sigma_min", "steps_offset": 1}),
    ("euler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
    ("euler_a", {"steps_offset": 1}),
    ("dpmpp_2m", {"steps_offset": 1}),
    ("dpmpp_2m", {"use_karras_sigmas": True}),
    ("dpmpp_2m", {"use_exponential_sigmas": True}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("dpmpp_2m", {"solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_2m", {"solver_order": 1}),
]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
CASES = [
    pytest.param(
        sampler,
        settings,
        spacing,
        prediction,
        id="-".join([sampler, *map(str, settings.values()), spacing, prediction]),
    )
    for sampler, settings in SETTINGS
    for spacing in SPACINGS
    for prediction in PREDICTIONS
    # DPM-Solver's curves take no notice of the spacing; diffusers' Euler ancestral has no x0 prediction.
    if (spacing == "linspace" or sampler != "dpmpp_2m" or not any(key.startswith("use_") for key in settings))
    and (sampler, prediction) != ("euler_a", "sample")
]


def draws(shape, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn((steps, *shape), generator=generator)


def run_diffusers(monkeypatch, scheduler, model, x, noise, begin=0, **step_arguments):
    """The loop of diffusers' pipelines from timestep `begin` on; step k draws noise[k]. Returns every x."""
    state = {"k": 0}
    for module in (scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep, scheduling_euler_a):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, dtype=None, **__: noise[state["k"]].to(dtype))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    xs = []
    for k, t in enumerate(scheduler.timesteps[begin:]):
        state["k"] = k
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, float(t)), t, x, **step_arguments).prev_sample
        xs.append(x)
    return torch.stack(xs)


def both(sampler, settings):
    """diffusers' scheduler and the config read from what it would write into a model folder."""
    scheduler = CLASSES[sampler].from_config({**SD, **settings} if sampler != "flow_euler" else settings)
    return scheduler, SchedulerConfig.from_dict(
        dict(scheduler.config) | {"_class_name": CLASSES[sampler].__name__}
    )


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("sampler, settings, spacing, prediction", CASES)
def test_untouched_diffusers_in_float32(kit, monkeypatch, sampler, settings, spacing, prediction):
    """25 steps, both sides in float32. diffusers' own tables are float32, which an x0 net shows most."""
    scheduler, config = both(
        sampler, {**settings, "timestep_spacing": spacing, "prediction_type": prediction}
    )
    assert config.sampler == sampler and config.warnings == ()
    model = kit.random_model(prediction)
    start, noise = draws((2, 4, 3, 5), 25)
    scheduler.set_timesteps(25)
    if sampler == "dpmpp_2m" and config.use_exponential_sigmas:
        scheduler.timesteps[0] = 999  # diffusers truncates its time of the largest sigma, 998.99997
    for eta in (0.0, 0.6) if sampler == "ddim" else (0.0,):
        table = build_table(config, 25, eta=eta)
        # Times found from a sigma move with the float32 rounding of diffusers' sigmas.
        torch.testing.assert_close(table.timesteps, scheduler.timesteps.double(), rtol=0, atol=5e-3)
        theirs = run_diffusers(
            monkeypatch,
            scheduler,
            model,
            start * scheduler.init_noise_sigma,
            noise,
            **({"eta": eta} if eta else {}),
        )
        ours, _ = kit.run_table(table, model, start * table.initial_scale, noise, table.rows, torch.float32)
        assert ours.dtype == theirs.dtype == torch.float32
        assert relative(ours[-1], theirs[-1]) <= (5e-5 if prediction == "sample" else 2e-6)


@pytest.mark.parametrize(
    "settings", [{"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "use_karras_sigmas": True}], ids=str
)
@pytest.mark.parametrize("steps", [1, 4, 25, 50])
def test_untouched_diffusers_flow(kit, monkeypatch, settings, steps):
    scheduler, config = both("flow_euler", settings)
    model = kit.random_model("flow")
    start, noise = draws((2, 4, 3, 5), 1)
    scheduler.set_timesteps(steps)
    table = build_table(config, steps)
    torch.testing.assert_close(table.timesteps, scheduler.timesteps.double(), rtol=1e-6, atol=0)
    theirs = run_diffusers(monkeypatch, scheduler, model, start, noise)
    ours, _ = kit.run_table(table, model, start, None, table.rows, torch.float32)
    assert table.initial_scale == 1 and relative(ours[-1], theirs[-1]) <= 2e-6


@pytest.mark.parametrize(
    "sampler, zero_snr_spacing", [("ddim", "trailing"), ("euler", "trailing"), ("dpmpp_2m", "linspace")]
)
def test_zero_terminal_snr(kit, monkeypatch, sampler, zero_snr_spacing):
    """The first step starts from pure noise; diffusers' Euler latents there are 4096 times ours."""
    settings = {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": zero_snr_spacing,
    }
    scheduler, config = both(sampler, settings)
    model = kit.random_model("v_prediction")
    start, noise = draws((2, 4, 3, 5), 25)
    scheduler.set_timesteps(25)
    table = build_table(config, 25)
    theirs = run_diffusers(monkeypatch, scheduler, model, start * scheduler.init_noise_sigma, noise)
    ours, _ = kit.run_table(table, model, start * table.initial_scale, noise)
    assert relative(ours[-1], theirs[-1]) <= 1e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.3), ("ddim", 1.0), ("ddpm", 0.0)])
def test_diffusers_in_float64(kit, monkeypatch, sampler, eta, spacing, prediction):
    """With our float64 alpha_bar put in, diffusers' DDIM and DDPM give our numbers at every step."""
    settings = {"steps_offset": 1, "timestep_spacing": spacing, "prediction_type": prediction}
    if sampler == "ddim":
        settings["set_alpha_to_one"] = False
    scheduler, config = both(sampler, settings)
    scheduler.alphas_cumprod = alphas_cumprod(config)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    model = kit.random_model(prediction)
    for steps in (1, 7, 25, 50):
        start, noise = (draw.double() for draw in draws((1, 4, 3, 5), steps))
        noise[-1] = 0 if sampler == "ddpm" else noise[-1]  # diffusers' DDPM adds 1e-10*noise at the end
        scheduler.set_timesteps(steps)
        table = build_table(config, steps, eta=eta)
        theirs = run_diffusers(monkeypatch, scheduler, model, start, noise, **({"eta": eta} if eta else {}))
        ours, _ = kit.run_table(table, model, start, noise)
        for mine, other in zip(ours, theirs, strict=True):
            assert relative(mine, other) <= 1e-10


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_clipping(kit, monkeypatch, sampler):
    """x0 is held to clip_sample_range; DDIM takes the noise from it, diffusers' use_clipped_model_output."""
    scheduler, config = both(
        sampler, {"clip_sample": True, "clip_sample_range": 0.7, "timestep_spacing": "trailing"}
    )
    scheduler.alphas_cumprod = alphas_cumprod(config)
    model = kit.random_model("epsilon")
    start, noise = (draw.double() for draw in draws((1, 4, 3, 5), 20))
    noise[-1] = 0
    scheduler.set_timesteps(20)
    table = build_table(config, 20)
    arguments = {"use_clipped_model_output": True} if sampler == "ddim" else {}
    theirs = run_diffusers(monkeypatch, scheduler, model, start, noise, **arguments)
    ours, x0s = kit.run_table(table, model, start, noise)
    assert (x0s.abs() == 0.7).any() and x0s.abs().max() <= 0.7
    assert relative(ours, theirs) <= 1e-10


@pytest.mark.parametrize("lambda_min", [-math.inf, -5.1])
def test_cosine_schedule(kit, monkeypatch, lambda_min):
    """DPM-Solver on cosine betas, whose noisy end its authors cut off (lambda_min_clipped)."""
    settings = {
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": lambda_min,
        "prediction_type": "v_prediction",
    }
    scheduler, config = both("dpmpp_2m", settings)
    model = kit.random_model("v_prediction")
    start, noise = draws((1, 4, 3, 5), 1)
    scheduler.set_timesteps(20)
    table = build_table(config, 20)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    theirs = run_diffusers(monkeypatch, scheduler, model, start, noise)
    ours, _ = kit.run_table(table, model, start)
    # diffusers' float32 1 - alpha_bar near alpha_bar = 0.99996 is off by 1e-3.
    assert relative(ours[-1], theirs[-1]) <= 2e-3


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m"])
def test_timesteps_of_every_count(sampler, spacing):
    """Where diffusers gives as many times as asked for, different and in the schedule, they are ours."""
    scheduler, config = both(sampler, {"timestep_spacing": spacing, "steps_offset": 1})
    equal, counts = (
        0,
        sorted({*range(1, 26), *range(26, 1001, 41), 103, 121, 122, 201, 242, 244, 667, 999, 1000}),
    )
    for steps in counts:
        scheduler.set_timesteps(steps)
        theirs, ours = scheduler.timesteps.double().numpy(), build_table(config, steps).timesteps.numpy()
        assert len(ours) == steps and 0 <= ours.min() and ours.max() <= 999 and (np.diff(ours) < 0).all()
        if len(theirs) == steps and 0 <= theirs.min() and theirs.max() <= 999 and (np.diff(theirs) < 0).all():
            np.testing.assert_allclose(ours, theirs, rtol=2e-7)
            equal += 1
    assert equal >= len(counts) - 10


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize(
    "entries",
    [
        {
            "_class_name": "PNDMScheduler",
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
        {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "timestep_spacing": "trailing"},
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False},
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "final_sigmas_type": "sigma_min",
            "solver_type": "heun",
        },
    ],
    ids=lambda entries: entries["_class_name"],
)
def test_another_sampler_than_the_files(kit, monkeypatch, entries, sampler):
    """sampler= reads the file as diffusers' X.from_config(file) does: what is not in it is X's default."""
    entries = {**SD, **entries}
    scheduler = CLASSES[sampler].from_config(entries)
    config = SchedulerConfig.from_dict(entries)
    model = kit.random_model(config.prediction)
    start, noise = draws((1, 4, 3, 5), 12)
    scheduler.set_timesteps(12)
    table = build_table(config, 12, sampler=sampler)
    torch.testing.assert_close(table.timesteps, scheduler.timesteps.double(), rtol=0, atol=5e-3)
    theirs = run_diffusers(monkeypatch, scheduler, model, start * scheduler.init_noise_sigma, noise)
    ours, _ = kit.run_table(table, model, start * table.initial_scale, noise)
    assert relative(ours[-1], theirs[-1]) <= 5e-6


@pytest.mark.parametrize("strength", [0.09, 0.3, 0.58, 0.6, 0.999, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m"])
def test_image_to_image(kit, monkeypatch, sampler, strength):
    """The start and the steps of diffusers' image-to-image loop: the last int(steps*strength) steps."""
    scheduler, config = both(sampler, {"steps_offset": 1, "timestep_spacing": "leading"})
    model = kit.random_model("epsilon")
    steps = 23
    image, noise = draws((1, 4, 3, 5), steps)
    scheduler.set_timesteps(steps)
    begin = max(steps - min(int(steps * strength), steps), 0)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    start = scheduler.add_noise(image, noise[-1], scheduler.timesteps[begin : begin + 1])
    theirs = run_diffusers(monkeypatch, scheduler, model, start, noise, begin)
    table = build_table(config, steps, strength=strength)
    ours, _ = kit.run_table(table, model, table.start_alpha * image + table.start_sigma * noise[-1], noise)
    assert len(ours) == len(theirs) == steps - begin
    assert relative(ours[-1], theirs[-1]) <= 5e-6


@pytest.mark.long
def test_strength_of_the_pipelines():
    """get_timesteps of diffusers' SD and SD3 image-to-image pipelines, counts to 60 and 50 strengths."""
    from types import SimpleNamespace

    from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline

    for pipeline, sampler in (
        (StableDiffusionImg2ImgPipeline, "euler"),
        (StableDiffusion3Img2ImgPipeline, "flow_euler"),
    ):
        scheduler, config = both(sampler, {})
        for steps in range(1, 61):
            scheduler.set_timesteps(steps)
            for strength in np.linspace(0.02, 1, 50):
                kept, count = pipeline.get_timesteps(
                    SimpleNamespace(scheduler=scheduler), steps, strength, "cpu"
                )
                if count:
                    ours = build_table(config, steps, strength=float(strength)).timesteps
                    torch.testing.assert_close(ours, kept.double(), rtol=1e-6, atol=0)
