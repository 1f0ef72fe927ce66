"""scheduler_config.json: every field is followed, refused or known to be inert; none is dropped silently."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest

from fastldm.diffusion import SchedulerConfig
from fastldm.errors import CheckpointError, InvalidArgument

# What the model folders of these families hold.
SD15 = json.loads("""{"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
    "clip_sample": false}""")
SD21 = json.loads("""{"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": false,
    "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null}""")
SDXL = json.loads("""{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": false,
    "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "sample_max_value": 1.0, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1,
    "timestep_spacing": "leading", "trained_betas": null, "use_karras_sigmas": false}""")
SD3 = json.loads("""{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000, "shift": 3.0}""")


def read(entries):
    return SchedulerConfig.from_dict(entries, file="model/scheduler/scheduler_config.json")


def test_the_families_own_files():
    sd15, sd21, sdxl, sd3 = map(read, (SD15, SD21, SDXL, SD3))
    assert (sd15.sampler, sd15.prediction, sd15.clip_range) == ("ddim", "epsilon", math.inf)
    assert sd15.warnings == ("scheduler PNDMScheduler runs as its nearest relative, 'ddim'",)
    assert (sd15.steps_offset, sd15.set_alpha_to_one, sd15.num_train_timesteps) == (1, False, 1000)
    assert (sd21.sampler, sd21.prediction, sd21.warnings) == ("ddim", "v_prediction", ())
    assert (sdxl.sampler, sdxl.timestep_spacing, sdxl.warnings) == ("euler", "leading", ())
    assert (sd3.sampler, sd3.prediction, sd3.shift, sd3.warnings) == ("flow_euler", "flow", 3.0, ())
    assert sd3.samplers == ("flow_euler",) and "flow_euler" not in sd15.samplers


@pytest.mark.parametrize("entries", [SD15, SD21, SDXL, SD3], ids=lambda entries: entries["_class_name"])
def test_written_and_read_again(entries):
    config = read(entries)
    again = read(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config) and pickle.loads(pickle.dumps(config)) == config
    assert config.to_dict()["_class_name"] == entries["_class_name"]
    lost = {key for key, value in entries.items() if key[0] != "_" and value is not None} - set(
        config.to_dict()
    )
    assert lost <= {"interpolation_type", "use_karras_sigmas"}  # at their defaults


CHANGED = {
    "num_train_timesteps": 500,
    "beta_start": 0.002,
    "beta_end": 0.03,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": [0.01, 0.02],
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": True,
    "clip_sample_range": 2.0,
    "variance_type": "fixed_large",
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "sigma_min": 0.1,
    "sigma_max": 10,
    "final_sigmas_type": "sigma_min",
    "solver_order": 1,
    "solver_type": "heun",
    "algorithm_type": "sde-dpmsolver++",
    "lower_order_final": False,
    "euler_at_final": True,
    "lambda_min_clipped": -5.1,
    "shift": 3.0,
}


@pytest.mark.parametrize("key, value", CHANGED.items())
def test_every_field_is_kept(key, value):
    entries = {"_class_name": "DPMSolverMultistepScheduler", key: value}
    if key == "trained_betas":
        entries["num_train_timesteps"] = 2
    config = read(entries)
    assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)
    assert read(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()[key] == value


def test_pndm_has_a_default_of_its_own():
    config = read({"_class_name": "PNDMScheduler"})
    assert not config.set_alpha_to_one and read({"_class_name": "DDIMScheduler"}).set_alpha_to_one
    assert read(config.to_dict()) == config
    assert read({"_class_name": "PNDMScheduler", "set_alpha_to_one": True}).set_alpha_to_one


def test_no_field_is_left_out_of_these_tests():
    assert {field.name for field in fields(SchedulerConfig)} - {"class_name", "inert"} == set(CHANGED)


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("DDIMScheduler", "ddim"),
        ("DDPMScheduler", "ddpm"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("FlowMatchEulerDiscreteScheduler", "flow_euler"),
    ],
)
def test_honoured_classes_say_nothing(name, sampler):
    config = read({"_class_name": name, "clip_sample": False})
    assert (config.sampler, config.warnings) == (sampler, ())


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("PNDMScheduler", "ddim"),
        ("LMSDiscreteScheduler", "euler"),
        ("HeunDiscreteScheduler", "euler"),
        ("KDPM2AncestralDiscreteScheduler", "euler_a"),
        ("UniPCMultistepScheduler", "dpmpp_2m"),
        ("DEISMultistepScheduler", "dpmpp_2m"),
        ("FlowMatchHeunDiscreteScheduler", "flow_euler"),
        ("SomeFutureScheduler", "ddim"),
    ],
)
def test_other_classes_run_as_the_nearest_and_say_so(name, sampler):
    config = read(
        {"_class_name": name, "beta_start": 0.00085} if sampler != "flow_euler" else {"_class_name": name}
    )
    assert config.sampler == sampler
    assert config.warnings == (f"scheduler {name} runs as its nearest relative, {sampler!r}",)


def test_what_dpm_solver_cannot_follow_is_said():
    entries = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "algorithm_type": "dpmsolver"}
    assert read(entries).warnings == (
        "solver_order 3 runs as order 2",
        "algorithm_type dpmsolver runs as dpmsolver++",
    )


def test_a_class_brings_its_own_training_process():
    lcm = read({"_class_name": "LCMScheduler", "beta_start": 0.001})
    assert (lcm.beta_start, lcm.beta_end, lcm.beta_schedule) == (0.001, 0.012, "scaled_linear")


def test_clipping_is_on_by_default_only_in_classes_that_clip():
    assert read({"_class_name": "DDPMScheduler"}).clip_range == 1.0
    assert read({"_class_name": "DDIMScheduler", "clip_sample_range": 3.0}).clip_range == 3.0
    assert "use_clipped_model_output" in read({"_class_name": "DDIMScheduler"}).warnings[0]
    assert read({"_class_name": "EulerDiscreteScheduler"}).clip_range == math.inf
    assert read({"_class_name": "PNDMScheduler", "clip_sample": True}).clip_range == 1.0


def test_inert_fields_survive_and_change_nothing():
    entries = {
        "_class_name": "UniPCMultistepScheduler",
        "disable_corrector": [0, 1],
        "predict_x0": True,
        "solver_p": None,
    }
    config = read(entries)
    assert config.to_dict()["disable_corrector"] == [0, 1] and "solver_p" not in config.to_dict()
    assert hash(config) == hash(read(entries))


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", None),
        ("_class_name", 3),
        ("_class_name", "EDMEulerScheduler"),
        ("snr_shift_scale", 3.0),
        ("use_wonderful_sigmas", True),
        ("new_option", 0),
        ("thresholding", True),
        ("use_beta_sigmas", True),
        ("use_lu_lambdas", True),
        ("use_flow_sigmas", True),
        ("use_dynamic_shifting", True),
        ("stochastic_sampling", True),
        ("invert_sigmas", True),
        ("shift_terminal", 0.1),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", 10**9),
        ("num_train_timesteps", 1000.0),
        ("num_train_timesteps", True),
        ("prediction_type", "flow_prediction"),
        ("prediction", "epsilon"),
        ("prediction_type", "velocity"),
        ("prediction_type", ["epsilon"]),
        ("beta_start", 0),
        ("beta_start", "0.00085"),
        ("beta_end", 1.0),
        ("beta_end", math.nan),
        ("beta_schedule", "sigmoid"),
        ("beta_schedule", {"a": 1}),
        ("trained_betas", [0.1]),
        ("trained_betas", [0.1, 2.0]),
        ("trained_betas", "0.1"),
        ("timestep_spacing", "quad"),
        ("steps_offset", -1),
        ("steps_offset", 0.5),
        ("set_alpha_to_one", 1),
        ("clip_sample", "no"),
        ("clip_sample_range", 0),
        ("clip_sample_range", math.inf),
        ("variance_type", "magic"),
        ("sigma_max", -1.0),
        ("final_sigmas_type", "one"),
        ("solver_order", 4),
        ("solver_type", "magic"),
        ("algorithm_type", "magic"),
        ("lambda_min_clipped", math.nan),
        ("shift", 0.0),
    ],
    ids=str,
)
def test_bad_entries_name_the_file_and_the_field(key, value):
    with pytest.raises(CheckpointError) as raised:
        read({"_class_name": "DDIMScheduler", key: value})
    assert raised.value.key == key and raised.value.file == "model/scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    "entries, key",
    [
        ({"beta_start": 0.5, "beta_end": 0.99}, "beta_schedule"),
        ({"beta_start": 1e-20, "beta_end": 1e-20}, "beta_schedule"),
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 1e-18, 0.1]}, "trained_betas"),
    ],
    ids=["no signal left", "no noise at all", "a level twice"],
)
def test_schedules_that_float64_cannot_hold(entries, key):
    with pytest.raises(CheckpointError) as raised:
        read({"_class_name": "DDIMScheduler", **entries})
    assert raised.value.key == key


def test_two_curves_at_once():
    with pytest.raises(CheckpointError, match="use_exponential_sigmas"):
        read(
            {
                "_class_name": "EulerDiscreteScheduler",
                "use_karras_sigmas": True,
                "use_exponential_sigmas": True,
            }
        )


def test_a_null_is_not_given_and_a_false_unknown_is_off():
    assert (
        read({"_class_name": "DDIMScheduler", "use_wonderful_sigmas": False, "beta_end": None})
        == SchedulerConfig()
    )


def test_built_in_code():
    with pytest.raises(InvalidArgument, match="beta_schedule"):
        SchedulerConfig(beta_schedule="cosine")
    with pytest.raises(InvalidArgument, match="prediction_type"):
        SchedulerConfig(prediction_type="flow")
    assert SchedulerConfig(prediction_type="original_sample").prediction == "sample"
    with pytest.raises(FrozenInstanceError):
        SchedulerConfig().beta_end = 0.5
