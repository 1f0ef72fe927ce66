"""Samplers against trajectories recorded from diffusers, k-diffusion, improved-diffusion and SD3's code."""

import pytest
import torch

from fastldm.diffusion import SchedulerConfig, build_table

DIFFUSERS = [
    "ddim_leading",
    "ddim_leading_v",
    "ddim_linspace",
    "ddim_trailing",
    "ddim_trailing_v_zero_snr",
    "ddpm_leading",
    "ddpm_trailing_v",
    "dpmpp_2m_euler_at_final",
    "dpmpp_2m_heun_sigma_min",
    "dpmpp_2m_karras",
    "dpmpp_2m_leading",
    "dpmpp_2m_linspace",
    "dpmpp_2m_sde",
    "dpmpp_2m_trailing_v",
    "euler_ancestral_leading",
    "euler_ancestral_trailing",
    "euler_ancestral_v",
    "euler_karras",
    "euler_leading",
    "euler_leading_v",
    "euler_linspace",
    "euler_trailing",
    "euler_trailing_v_zero_snr",
    "flow_euler_shift1",
    "flow_euler_shift3",
]
SD = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_schedulers(kit, name):
    case = kit.load_case(f"schedulers/{name}")
    config = SchedulerConfig.from_dict(
        {"_class_name": case.config["scheduler"], **case.config["scheduler_config"]}
    )
    assert config.warnings == ()
    model = kit.GaussModel(config.prediction, case.weight["mu"], case.weight["mix"])
    in_sigma_space = config.sampler in ("euler", "euler_a")
    for variant, settings in case.config["variants"].items():
        if variant == "churn":
            continue  # Karras churn is no setting of scheduler_config.json
        for steps in case.config["steps"]:
            table = build_table(config, steps, eta=settings.get("eta", 0.0))
            start = f"{variant}.{steps}" if variant else f"{steps}"
            x_start = case.input["x_T"] * table.initial_scale
            xs, x0s = kit.run_table(table, model, x_start, case.input["noise"])
            # The original's float32 alpha_bar moves sigma_min, where one linspace step starts, by 1.3e-5,
            floor = 2e-5 if steps == 1 else 0.0
            # and its float32 latents are as large as sigma_max (4096 with zero terminal SNR).
            slack = 2**-24 * float(case.out[f"{steps}.init_noise_sigma"] * case.input["x_T"].abs().max())
            times = case.out[f"{steps}.timesteps"].double()
            torch.testing.assert_close(table.timesteps, times, rtol=2e-5, atol=0)
            kit.assert_recorded(case, f"{steps}.first_model_input", x_start, floor=floor)
            if in_sigma_space:
                sigma = case.out[f"{steps}.sigmas"][1:].double()
                xs *= (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1, 1)
            kit.assert_recorded(case, f"{start}.x", xs, floor=floor, slack=slack)
            if f"{start}.pred_x0_first_last" in case.out:
                kit.assert_recorded(
                    case, f"{start}.pred_x0_first_last", x0s[[0, -1]], floor=floor, slack=slack
                )


@pytest.mark.parametrize("largest", [30, pytest.param(1000, marks=pytest.mark.long)])
def test_diffusers_step_counts(kit, largest):
    """Where diffusers runs the steps asked for, the size of its result is ours; ours is finite everywhere."""
    case = kit.load_case("schedulers/step_count_sweep")
    compared = 0
    for name, about in case.config["cases"].items():
        entries = {"_class_name": about["scheduler"], **about["scheduler_config"]}
        if entries["_class_name"] in ("PNDMScheduler", "UniPCMultistepScheduler", "LCMScheduler"):
            continue
        config = SchedulerConfig.from_dict(entries)
        model = kit.GaussModel(config.prediction, case.weight["mu"], case.weight["mix"])
        status_and_size = (case.out[f"{name}.loop_status"], case.out[f"{name}.loop_final_absmax"])
        for steps, status, absmax in zip(case.out["loop_n"].tolist(), *status_and_size, strict=True):
            if steps > largest:
                break
            table = build_table(config, steps)
            noise = case.input["noise"][torch.arange(steps) % len(case.input["noise"])]
            xs, _ = kit.run_table(table, model, case.input["x_T"] * table.initial_scale, noise)
            assert xs.isfinite().all()
            works = status == 1 and case.out[f"{name}.len"][steps - 1] == steps
            if works and (entries.get("timestep_spacing"), steps) != ("leading", 1000):
                assert xs[-1].abs().max().item() == pytest.approx(absmax.item(), rel=3e-5), (name, steps)
                compared += 1
    assert compared > (350 if largest == 1000 else 250)


@pytest.mark.parametrize(
    "file", ["sample_eps", "sample_eps_quantized", "sample_v", "sample_eps_more_samplers"]
)
def test_k_diffusion(kit, file):
    """k-diffusion's own loops, wherever a scheduler config expresses its sigmas and times.

    Karras sigmas are Euler's with linspace, and DPM-Solver's, which rounds times: the quantised runs. The
    discrete sigmas are Euler's linspace where the times are whole (10 steps); between them k-diffusion
    interpolates log sigma.
    """
    case = kit.load_case(f"kdiffusion/{file}")
    prediction, quantized = case.config["model"]["prediction"], case.config["quantize"]
    model = kit.GaussModel(prediction, case.weight["mu"], case.weight["mix"])
    wanted = {"euler": 0.0, "euler_ancestral": 1.0, "euler_ancestral_eta0.5": 0.5, "dpmpp_2m": 0.0}
    compared = 0
    for label, _, settings in case.config["samplers"]:
        for schedule in case.config["schedules"]:
            for steps in case.config["steps"]:
                karras, dpm = schedule == "karras", label == "dpmpp_2m"
                expressible = (karras and quantized) if dpm else (not quantized and (karras or steps == 10))
                if label not in wanted or not expressible:
                    continue
                name = "DPMSolverMultistepScheduler" if dpm else "EulerDiscreteScheduler"
                entries = {"prediction_type": prediction, "use_karras_sigmas": karras}
                config = SchedulerConfig.from_dict({**SD, **entries, "_class_name": name})
                table = build_table(config, steps, eta=wanted[label])
                sigma = case.out[f"{schedule}.{steps}.sigmas"].double()
                noise = case.input["noise"] * settings.get("s_noise", 1.0)
                start = case.input["x_T"] * sigma[0] / (1 + sigma[0] ** 2).sqrt()
                xs, _ = kit.run_table(table, model, start, noise)
                xs *= (1 + sigma[1:] ** 2).sqrt().reshape(-1, 1, 1, 1, 1)
                times = case.out[f"{schedule}.{steps}.{label}.t"].double()
                torch.testing.assert_close(table.timesteps, times, rtol=1e-4, atol=1e-3)
                kit.assert_recorded(case, f"{schedule}.{steps}.{label}.x", xs)
                compared += 1
    assert (
        compared
        == {"sample_eps": 8, "sample_eps_quantized": 1, "sample_v": 4, "sample_eps_more_samplers": 2}[file]
    )


@pytest.mark.parametrize(
    "sampler, eta, clip",
    [("ddpm", 0.0, True), ("ddpm", 0.0, False)]
    + [("ddim", 0.0, True), ("ddim", 0.0, False), ("ddim", 0.5, False), ("ddim", 1.0, True)],
)
def test_improved_diffusion(kit, sampler, eta, clip):
    """On 'ddim25': p_sample with the large variance; ddim_sample, its noise taken from the clipped x0."""
    case = kit.load_case("iddpm/sample_lin1000_ddim25_eps_fixedlarge")
    key = (
        f"p_sample.clip_denoised={clip}"
        if sampler == "ddpm"
        else f"ddim_sample.clip_denoised={clip}.eta={eta}"
    )
    net = kit.toyconv(case, case.weight)
    config = SchedulerConfig(clip_sample=clip, variance_type="fixed_large")
    table = build_table(config, 25, sampler=sampler, eta=eta)
    xs, x0s = kit.run_table(
        table, lambda x, t: net(x, torch.tensor(t)), case.input["x_T"], case.input["noise"]
    )
    assert table.timesteps.tolist() == case.out["t_seen_by_model"].tolist()
    kit.assert_recorded(case, f"{key}.x", xs)
    kit.assert_recorded(case, f"{key}.first_pred_xstart", x0s[0])
    kit.assert_recorded(case, f"{key}.last_pred_xstart", x0s[-1])


def test_sd3_euler(kit):
    """sd3-ref's Euler loop with guidance; net(x, sigma, c, y) as the case's `conditioning` states."""
    case = kit.load_case("sd3/sample_euler_dpmpp2m")
    flow = kit.GaussModel("flow", case.weight["mu"], case.weight["mix"], amp=case.config["model"]["amp"])
    scale = case.config["cond_scale"]

    def net(x, t, context, pooled):
        m, r = (part.double().flatten(1).mean(1).reshape(-1, 1, 1, 1) for part in (context, pooled))
        return flow(x, t) + 0.3 * m * x.tanh() + 0.2 * r

    def guided(x, t):
        unconditional = net(x, t, case.input["uc"], case.input["uy"])
        return unconditional + scale * (net(x, t, case.input["c"], case.input["y"]) - unconditional)

    config = SchedulerConfig.from_dict(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": case.config["shift"]}
    )
    for steps in case.config["steps"]:
        table = build_table(config, steps, guidance_scale=scale)
        sigmas = case.out[f"steps{steps}.sigmas"].double()
        torch.testing.assert_close(table.timesteps / 1000, sigmas[:-1], rtol=1e-6, atol=0)
        xs, _ = kit.run_table(table, guided, case.input["x_T"])
        kit.assert_recorded(case, f"euler.cfg.steps{steps}.x", xs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sd3_sigmas(kit, shift):
    """The sigmas of sd3-ref and its image-to-image cut at 0.6."""
    case = kit.load_case("sd3/sigmas_and_latent_format")
    config = SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift})
    for steps in case.config["steps"]:
        for strength, key in ((1.0, ""), (0.6, "denoise0.6.")):
            table = build_table(config, steps, strength=strength)
            sigmas = case.out[f"shift{shift}.steps{steps}.{key}sigmas"].double().tolist()
            assert (table.timesteps / 1000).tolist() == pytest.approx(sigmas[:-1], rel=1e-6)
            assert (table.start_alpha, table.start_sigma) == pytest.approx(
                (1 - sigmas[0], sigmas[0]), abs=1e-6
            )
