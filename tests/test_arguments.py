"""The validator: every rule at both edges, the odd calls of quality.md, and junk for any argument."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastldm.abilities import Abilities
from fastldm.arguments import Limits, check_generate, unknown_keyword
from fastldm.errors import InvalidArgument
from fastldm.shortcuts import Shortcuts

LIMITS = Limits(
    max_steps=1000,
    samplers=("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "flow_euler"),
    default_sampler="ddim",
    factor=8,
    latent_channels=4,
    default_width=64,
    default_height=32,
    context_dim=6,
    memory_bytes=2**20,
    bytes_per_pixel=16.0,  # 65,536 pixels: 256 x 256, or 32 images of the default size
    context_length=5,
)
LATENTS = (1, 4, 4, 8)


def check(**arguments):
    return check_generate(LIMITS, **({"prompt": "a house"} | arguments))


def with_value(shape, value):
    array = np.zeros(shape, np.float32)
    array.flat[-1] = value
    return array


def test_defaults():
    made = check()
    assert (made.prompts, made.negatives, made.seeds, made.steps) == (["a house"], [""], [0], 25)
    assert (made.guidance_scale, made.sampler, made.eta, made.strength) == (7.5, "ddim", 0.0, 1.0)
    assert (made.width, made.height, made.output_type, made.count, made.guided) == (64, 32, "pil", 1, True)
    assert made.latents is made.image is made.callback is made.progress is made.cuda_graph is None
    assert made.warnings == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.steps = 3


# quality.md section 2: what diffusers 0.42 turns into garbage or a traceback, and such mistakes elsewhere.
ODD_CALLS = [
    ("steps", 0),
    ("steps", -1),
    ("steps", 1001),
    ("steps", 2.5),
    ("steps", "4"),
    ("steps", True),
    ("steps", None),
    ("height", 0),
    ("height", 64.0),
    ("height", -64),
    ("height", 100),
    ("width", 10**30),
    ("width", 257 * 256),
    ("guidance_scale", math.nan),
    ("guidance_scale", math.inf),
    ("guidance_scale", 1e30),
    ("guidance_scale", "7"),
    ("prompt", []),
    ("prompt", "\ud800"),
    ("prompt", 42),
    ("prompt", None),
    ("prompt", b"a house"),
    ("negative_prompt", 3),
    ("num_images", 0),
    ("num_images", -1),
    ("num_images", True),
    ("seed", 1.5),
    ("seed", "7"),
    ("seed", torch.Generator()),
    ("eta", 2),
    ("sampler", "plms"),
    ("output_type", "jpeg"),
    ("latents", np.zeros((1, 4, 3, 8), np.float32)),
    ("latents", with_value(LATENTS, math.nan)),
    ("strength", 0.5),
    ("callback", 3),
    ("progress", "yes"),
    ("cuda_graph", 1),
]


@pytest.mark.parametrize(("name", "value"), ODD_CALLS, ids=lambda item: re.sub(r"\W+", " ", ascii(item)[:20]))
def test_odd_calls_are_refused_by_name(name, value):
    with pytest.raises(InvalidArgument) as caught:
        check(**{name: value})
    assert caught.value.name.split("[")[0] == name
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [
        ("num_inference_steps", "steps"),
        ("cfg", "guidance_scale"),
        ("cfg_scale", "guidance_scale"),
        ("guidance", "guidance_scale"),
        ("n", "num_images"),
        ("num_images_per_prompt", "num_images"),
        ("scheduler", "sampler"),
        ("generator", "seed"),
        ("promt", "prompt"),
        ("Prompt", "prompt"),
        ("negativ_prompt", "negative_prompt"),
        ("num_infrence_steps", "steps"),
        ("hight", "height"),
    ],
)
def test_unknown_keyword_names_the_one_meant(given_name, meant):
    with pytest.raises(TypeError, match=f"no argument '{given_name}': did you mean '{meant}'"):
        check(**{given_name: 3})


@pytest.mark.parametrize("name", ["clip_skip", "vae_tiling", "limitz"])
def test_unknown_keyword_without_a_likely_meaning_lists_all(name):
    with pytest.raises(TypeError, match=f"no argument '{name}': it has prompt, steps"):
        check(**{name: 99})


EDGES = [
    ("steps", 1, 0),
    ("steps", 1000, 1001),
    ("guidance_scale", 1000, 1000.0001),
    ("guidance_scale", -1000.0, -1000.0001),
    ("eta", 0, -1e-9),
    ("eta", 1, 1.0001),
    ("seed", -(2**63), -(2**63) - 1),
    ("seed", 2**64 - 1, 2**64),
    ("prompt", "x" * 32_000, "x" * 32_001),
    ("negative_prompt", "x" * 32_000, "x" * 32_001),
    ("width", 8, 7),
    ("width", 2048, 2056),  # x 32: the memory limit
    ("num_images", 1, 0),
    ("num_images", 32, 33),
    ("prompt", ["a"] * 32, ["a"] * 33),
]


@pytest.mark.parametrize(("name", "last", "beyond"), EDGES, ids=lambda item: ascii(item)[:20])
def test_limits_at_both_edges(name, last, beyond):
    check(**{name: last})
    with pytest.raises(InvalidArgument) as caught:
        check(**{name: beyond})
    assert caught.value.name == name


def test_strength_edges():
    image = Image.new("RGB", (64, 32))
    assert check(image=image).strength == 0.8
    assert check(image=image, strength=1).strength == 1.0
    assert check(image=image, strength=0.04).strength == 0.04  # one of 25 steps
    for wrong in (0, 0.039, -0.1, 1.01, math.nan, "0.5", True):
        with pytest.raises(InvalidArgument, match=r"^strength="):
            check(image=image, strength=wrong)
    with pytest.raises(InvalidArgument, match=r"^strength=.*None without image="):
        check(strength=0.5)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint16])
def test_numpy_integers_are_integers(kind):
    made = check(steps=kind(4), num_images=kind(2), seed=kind(5), width=kind(16), height=kind(8))
    assert (made.steps, made.seeds, made.width, made.height) == (4, [5, 6], 16, 8)
    assert all(type(value) is int for value in (made.steps, made.width, *made.seeds))


@pytest.mark.parametrize(
    "value", [True, False, np.True_, 4.0, np.float32(4), "4", None, [4], 4j, np.array([4])]
)
@pytest.mark.parametrize("name", ["steps", "num_images", "width", "height", "seed"])
def test_what_is_no_integer(name, value):
    optional = value is None and name in ("width", "height", "seed")
    if optional or (name == "seed" and isinstance(value, list | np.ndarray)):
        return
    with pytest.raises(InvalidArgument):
        check(**{name: value})


@pytest.mark.parametrize("value", [np.float16(2), np.float32(2), np.float64(2), np.int32(2), 2])
def test_numbers_become_floats(value):
    made = check(guidance_scale=value)
    assert made.guidance_scale == 2.0
    assert type(made.guidance_scale) is float


def test_seeds_count_up_or_are_listed():
    assert check(seed=7, num_images=3).seeds == [7, 8, 9]
    assert check(seed=-1, num_images=2).seeds == [-1, 0]
    assert check(prompt=["a", "b"], seed=7, num_images=2).seeds == [7, 8, 9, 10]
    assert check(seed=[5, 5, -3], num_images=3).seeds == [5, 5, -3]
    assert check(seed=np.array([5, 4]), num_images=2).seeds == [5, 4]
    assert check(seed=2**64 - 2, num_images=2).seeds == [2**64 - 2, 2**64 - 1]
    for wrong in (
        [1],
        [1, 2, 3],
        [1, True],
        [1, 2.0],
        [1, 2**64],
        np.zeros((2, 1), int),
        2**64 - 1,
        (),
        {1, 2},
    ):
        with pytest.raises(InvalidArgument, match=r"^seed"):
            check(seed=wrong, num_images=2)


def test_seed_none_draws_one_and_reports_it():
    drawn = [check(seed=None, num_images=2).seeds for _ in range(8)]
    assert len({first for first, _ in drawn}) > 1
    assert all(second == first + 1 and first >= 0 for first, second in drawn)


def test_images_are_prompts_times_num_images():
    made = check(prompt=("a", "b"), negative_prompt=["c", "d"], num_images=2)
    assert made.prompts == ["a", "a", "b", "b"]
    assert made.negatives == ["c", "c", "d", "d"]
    assert made.count == 4
    assert check(prompt=["a", "b"], negative_prompt="c").negatives == ["c", "c"]
    assert check(prompt="a", negative_prompt=["c"], num_images=2).negatives == ["c", "c"]
    for wrong in (["c"], ["c", "d", "e"], [], ["c", None]):
        with pytest.raises(InvalidArgument, match=r"^negative_prompt"):
            check(prompt=["a", "b"], negative_prompt=wrong)
    with pytest.raises(InvalidArgument, match=re.escape("prompt[1]=3: allowed is a string")):
        check(prompt=["a", 3])


def test_too_many_prompts_for_memory_name_the_prompt():
    with pytest.raises(InvalidArgument, match=r"^prompt=17: allowed is fewer prompts"):
        check(prompt=["a"] * 17, num_images=2)
    with pytest.raises(InvalidArgument, match=r"^height=264: .* not 256x264x1"):
        check(width=256, height=264)


def test_guidance_of_one_is_unguided():
    assert not check(guidance_scale=1).guided
    assert check(guidance_scale=0).guided


def test_latents_are_copied_as_float32():
    for given_latents in (
        np.ones(LATENTS, np.float64),
        np.ones(LATENTS, ">f4"),
        np.ones(LATENTS, np.float32)[:, :, ::-1],
        torch.ones(LATENTS, dtype=torch.bfloat16, requires_grad=True),
    ):
        made = check(latents=given_latents).latents
        assert torch.as_tensor(made).dtype == torch.float32
        assert torch.equal(torch.as_tensor(made), torch.ones(LATENTS))
        assert not torch.as_tensor(made).requires_grad
    mine = torch.zeros(LATENTS)
    check(latents=mine).latents.add_(1)
    assert mine.abs().max() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 4, 8, 4),
        torch.zeros(2, 4, 4, 8),
        torch.zeros(4, 4, 8),
        torch.zeros(1, 3, 4, 8),
        torch.zeros(LATENTS, dtype=torch.int64),
        torch.zeros(LATENTS, dtype=torch.complex64),
        torch.zeros(LATENTS, device="meta"),
        torch.zeros(LATENTS).to_sparse(),
        torch.full(LATENTS, math.nan),
        torch.full(LATENTS, 1e300, dtype=torch.float64),
        with_value(LATENTS, math.inf),
        np.full(LATENTS, 1e300),
        np.zeros(LATENTS, int),
        np.full(LATENTS, None),
        np.zeros(LATENTS).tolist(),
        "zeros",
    ],
    ids=str,
)
def test_wrong_latents(wrong):
    with pytest.raises(InvalidArgument, match=r"^latents=[^\n]*$"):
        check(latents=wrong)


def test_latents_and_image_exclude_each_other():
    with pytest.raises(InvalidArgument, match=r"^latents="):
        check(latents=np.zeros(LATENTS), image=Image.new("RGB", (64, 32)))


def embeds(rows=1, length=5, dim=6, value=0.5):
    return torch.full((rows, length, dim), value)


def test_prompt_embeddings_stand_in_for_prompts():
    made = check(prompt=None, prompt_embeds=embeds(2), num_images=2)
    assert made.prompts is None
    assert (made.count, made.negatives) == (4, [""] * 4)
    assert made.prompt_embeds.shape == (2, 5, 6)
    assert check(prompt=None, prompt_embeds=embeds().numpy(), negative_prompt="x").negatives == ["x"]
    both = check(prompt=None, prompt_embeds=embeds(length=9), negative_prompt_embeds=embeds(length=9))
    assert both.negative_prompt_embeds.shape == (1, 9, 6)
    assert check(prompt=None, prompt_embeds=embeds(length=9), guidance_scale=1).prompt_embeds.shape == (
        1,
        9,
        6,
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("prompt", dict(prompt="a", prompt_embeds=embeds())),
        ("prompt_embeds", dict(prompt_embeds=embeds(dim=7))),
        ("prompt_embeds", dict(prompt_embeds=embeds(rows=0))),
        ("prompt_embeds", dict(prompt_embeds=embeds(length=0))),
        ("prompt_embeds", dict(prompt_embeds=embeds()[0])),
        ("prompt_embeds", dict(prompt_embeds=embeds(value=math.inf))),
        ("prompt_embeds", dict(prompt_embeds=embeds(length=9))),  # no negative of 9 tokens
        ("prompt_embeds", dict(prompt_embeds=torch.zeros(1, 1, 6).expand(1, 2**40, 6), guidance_scale=1)),
        ("prompt_embeds", dict(prompt_embeds=torch.zeros(1, 5, 6).expand(2**40, 5, 6))),
        ("prompt_embeds", dict(prompt_embeds=embeds(rows=33))),  # more than fit into memory
        ("negative_prompt_embeds", dict(prompt_embeds=embeds(), negative_prompt_embeds=embeds(length=9))),
        ("negative_prompt_embeds", dict(prompt_embeds=embeds(2), negative_prompt_embeds=embeds(1))),
        (
            "negative_prompt_embeds",
            dict(prompt_embeds=embeds(), negative_prompt_embeds=embeds(value=math.nan)),
        ),
        ("negative_prompt_embeds", dict(prompt="a", negative_prompt_embeds=embeds())),
        (
            "negative_prompt",
            dict(prompt_embeds=embeds(), negative_prompt_embeds=embeds(), negative_prompt="x"),
        ),
        ("negative_prompt", dict(prompt_embeds=embeds(2), negative_prompt=["x"])),
    ],
)
def test_wrong_prompt_embeddings(name, arguments):
    with pytest.raises(InvalidArgument) as caught:
        check_generate(LIMITS, **arguments)
    assert caught.value.name == name


def test_a_model_without_text_takes_no_prompt():
    limits = dataclasses.replace(LIMITS, abilities=Abilities(prompt=False))
    made = check_generate(limits, num_images=3)
    assert (made.prompts, made.seeds) == (None, [0, 1, 2])
    for name, value in (("prompt", "a"), ("negative_prompt", "a"), ("prompt_embeds", embeds())):
        with pytest.raises(InvalidArgument, match=f"^{name}=.*takes no prompt"):
            check_generate(limits, **{name: value})


def test_size_comes_from_the_image():
    made = check(image=Image.new("RGB", (45, 23), "red"))
    assert (made.width, made.height) == (40, 16)
    assert made.image.shape == (1, 16, 40, 3)
    assert made.image.dtype == np.float32
    assert made.warnings == ("image resized from 45x23 to 40x16 (Lanczos)",)
    assert np.array_equal(made.image[0, 3, 5], [1, 0, 0])
    one_side = check(image=Image.new("RGB", (48, 24)), width=16)
    assert (one_side.width, one_side.height) == (16, 24)
    tiny = check(image=Image.new("RGB", (3, 1)))
    assert (tiny.width, tiny.height) == (8, 8)
    exact = check(image=Image.new("RGB", (48, 24)))
    assert exact.warnings == ()


def test_one_image_for_all_or_one_each():
    picture = Image.new("RGB", (16, 8))
    assert check(image=picture, num_images=3).image.shape == (1, 8, 16, 3)
    assert check(image=[picture] * 3, num_images=3).image.shape == (3, 8, 16, 3)
    with pytest.raises(InvalidArgument, match="^image='2 images'"):
        check(image=[picture] * 2, num_images=3)


def test_progress_true_becomes_a_bar(capsys):
    report = check(progress=True).progress
    for done in (1, 2, 3):
        report(done, 3)
    shown = capsys.readouterr().err
    assert "0/3" in shown and shown.endswith("\r")  # drawn, and cleared at the end
    assert check(progress=False).progress is None
    assert check(progress=print).progress is print


def test_recorded_arguments_make_the_same_request():
    made = check(
        prompt=["a", "b"], num_images=2, seed=7, steps=9, eta=0.5, negative_prompt="n", guidance_scale=3
    )
    again = check(**made.arguments(2))
    assert (again.prompts, again.seeds, again.negatives, again.count) == (["b"], [9], ["n"], 1)
    assert (again.steps, again.eta, again.guidance_scale, again.sampler) == (9, 0.5, 3.0, "ddim")
    assert again.arguments(0) == made.arguments(2)


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        (True, "shortcuts=True: allowed is None, Shortcuts or a mapping"),
        ({"whole": 2}, "shortcuts=<dict>: allowed is None, Shortcuts or a mapping"),
        ({"whole_every": 0}, "shortcuts[whole_every]=0: allowed is an integer 1…"),
        ({"whole_every": 2.0}, "shortcuts[whole_every]=2.0: allowed is an integer 1…"),
        ({"guidance_interval": 0.5}, "shortcuts[guidance_interval]=0.5: allowed is two numbers 0…1"),
        ({"guidance_interval": (0.5, 0.5)}, "shortcuts[guidance_interval]=(0.5, 0.5): allowed is two"),
        ({"guidance_interval": (0.8, 0.2)}, "the first below the second"),
        ({"guidance_interval": [0, 1, 1]}, "the first below the second"),
        ({"guidance_interval": (-0.1, 1)}, "shortcuts[guidance_interval]=-0.1: allowed is a number 0…1"),
        ({"guidance_interval": (0, float("nan"))}, "shortcuts[guidance_interval]=nan: allowed is a number"),
    ],
    ids=str,
)
def test_shortcuts_are_checked(value, allowed):
    with pytest.raises(InvalidArgument, match=re.escape(allowed)):
        check(shortcuts=value)
    if isinstance(value, dict) and "whole" not in value:
        with pytest.raises(InvalidArgument, match=re.escape(allowed)):
            check(shortcuts=Shortcuts(**value))


def test_shortcuts_are_recorded():
    made = check(shortcuts=Shortcuts((0.25, 0.75), 3))
    recorded = json.loads(json.dumps(made.arguments(0)))
    assert check(**recorded).shortcuts == made.shortcuts == Shortcuts((0.25, 0.75), 3)
    assert list(made.shortcuts.guided(10)) == [2, 3, 4, 5, 6, 7]
    assert check().shortcuts == Shortcuts() and "shortcuts" not in check().arguments(0)


def test_recorded_arguments_name_what_they_cannot_hold():
    made = check(image=Image.new("RGB", (16, 8), "red"), strength=0.5)
    other = check(image=Image.new("RGB", (16, 8), "blue"), strength=0.5)
    assert made.arguments(0)["strength"] == 0.5
    assert len(made.arguments(0)["not_recorded"]["image"]) == 64
    assert made.arguments(0) != other.arguments(0)
    assert check(latents=np.zeros(LATENTS)).arguments(0)["not_recorded"] == {"latents": True}
    assert "not_recorded" not in check().arguments(0)


class Evil:
    """Its repr fails, and so would any message that shows it."""

    def __repr__(self):
        raise RuntimeError("no repr")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**4000, 10**4400),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(categories=["Cs"]), min_size=1),
    st.binary(),
    st.lists(st.one_of(st.none(), st.integers(), st.text(), st.floats()), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from(
        [
            *(
                Evil(),
                [Evil()],
                object,
                print,
                ...,
                range(3),
                {1},
                iter([1]),
                (),
                ((),),
                "ddim",
                "np",
                64,
                0.5,
            ),
            *(np.zeros(()), np.zeros(0), np.zeros((2, 2)), np.array("a"), np.array([None]), np.int8(-1)),
            *(np.float64("nan"), np.datetime64("NaT"), np.zeros((8, 8, 3)), np.zeros((8, 8, 3), np.uint8)),
            *(torch.zeros(()), torch.zeros(3, 8, 8), torch.zeros(LATENTS), torch.zeros(1, device="meta")),
            *(torch.zeros(1, 5, 6), torch.zeros(2, 0, 6), torch.zeros(3, 8, 8, dtype=torch.complex64)),
            *(Image.new("RGB", (8, 8)), Image.new("L", (0, 8)), Image.new("F", (8, 8)), torch.float32),
        ]
    ),
)
NAMES = tuple(re.search(r"it has (.*)", unknown_keyword("zzzzzzzz"))[1].split(", "))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JUNK, min_size=1, max_size=3))
def test_junk_is_accepted_or_refused_in_one_line(arguments):
    try:
        made = check(**arguments)
    except InvalidArgument as error:
        assert "\n" not in str(error)
        assert error.name.split("[")[0] in NAMES
        pickle.loads(pickle.dumps(error))
    else:
        assert made.count == len(made.seeds) == len(made.negatives) >= 1
        assert made.width % 8 == made.height % 8 == 0


def test_validating_does_not_import_torch():
    code = (
        "import sys; from fastldm.arguments import Limits, check_generate;"
        "check_generate(Limits(25, ('ddim',), 'ddim', 8, 4, 8, 8, 4, 2**20, 1.0), prompt='a', image='{0}');"
        "assert 'torch' not in sys.modules"
    )
    failed = subprocess.run([sys.executable, "-c", code.format("none.png")], capture_output=True, text=True)
    assert "InvalidArgument: image='none.png': allowed is a file that exists" in failed.stderr
    passed = subprocess.run([sys.executable, "-c", code.replace(", image='{0}'", "")], capture_output=True)
    assert passed.returncode == 0, passed.stderr
