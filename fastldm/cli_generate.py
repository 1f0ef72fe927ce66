"""`fastldm generate`: its options, and what it does.

Options have no defaults here: what is not given is not passed. Nothing heavy is imported before a command
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TypeAlias

import fastldm
from fastldm.errors import InvalidArgument

Facts: TypeAlias = Mapping[str, Any]

# What --replay takes from a file. A path in a foreign file is never followed.
REPLAYED = (
    "prompt negative_prompt label layout steps sampler guidance_scale eta seed width height strength blend "
    "upscale shortcuts"
).split()
GIVEN = "image mask segmentation".split()  # pictures that no PNG holds, but for a hash
SHOWN = "prompt label layout".split()  # what the picture is to show: one of them
SAMPLER_HELP = "ddpm, ddim, ddim_compvis, euler, euler_a, dpmpp_2m, flow_euler (the model's)"
CONFIG_HELP = "of a single file: a JSON file, a diffusers folder, v_prediction or epsilon"
PICKLE_HELP = "read the tensors of a .ckpt, .pt or .bin file; nothing in it is run"
TOKENIZER_HELP = "a tokenizer folder or tokenizer.json"
SHORTCUTS = "guidance_interval whole_every".split()
LOADING = "model device dtype config tokenizer backends offload_text_encoder allow_pickle".split()
CHECKED_PATHS = 4096  # more images than this are refused by the memory limit


def generate(options: dict[str, Any]) -> None:
    """Make pictures and print the path of each."""
    from fastldm import images

    if len(options.get("prompt", ())) == 1:
        (options["prompt"],) = options["prompt"]
    as_grid, quiet = options.pop("grid", False), options.pop("quiet", False)
    replay, output = options.pop("replay", None), options.pop("output", None)
    if output is None:
        output = "out.png" if replay is None else f"{os.path.splitext(replay)[0]}-replay.png"
    loading = {name: options.pop(name) for name in LOADING if name in options}
    loras, frames = options.pop("lora", []), options.pop("interpolate", None)
    shortcuts = {name: options.pop(name) for name in SHORTCUTS if name in options}
    if shortcuts:
        options["shortcuts"] = shortcuts
    if "pad" in options:
        _pad(options)
    made: Facts = {}
    if replay is not None:
        model, recorded, made = _replayed(replay, options, loading, loras)
        options = recorded | options
        loading.setdefault("model", model)
    several = options["prompt"] if isinstance(options.get("prompt"), list) else [None]
    count = options.get("num_images", 1) * len(several) if frames is None else max(frames, 2)
    images.output_paths(output, count if 1 <= count <= CHECKED_PATHS and not as_grid else 1)

    started = time.perf_counter()
    pipe = fastldm.load(loading.pop("model", "default"), **loading)
    for lora, weight in loras:
        pipe.load_lora(lora, weight)
    loaded = time.perf_counter() - started
    options["progress"] = not quiet and is_terminal(sys.stderr)
    if frames is None:
        result = pipe.generate(**options)
    else:
        prompts, seeds = options.pop("prompt", None), options.pop("seed", 0)
        result = fastldm.interpolate(pipe, prompts, seeds, frames, **options)
    for warning in (*result.warnings, *_others(made, result)):
        print(f"fastldm: warning: {one_line(warning)}", file=sys.stderr)
    for path in result.save(output, as_grid=as_grid):
        print(path)
    if not quiet:
        seconds = {"load": loaded} | result.timings
        split = ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())
        print(f"fastldm: seed {', '.join(map(str, dict.fromkeys(result.seeds)))}; {split}", file=sys.stderr)


def _replayed(
    path: str, options: Facts, loading: Facts, loras: list[Any]
) -> tuple[str, dict[str, Any], Facts]:
    """The model that a PNG records, its arguments in so far as no option given beside --replay replaces them,
    and all that it tells.
    """
    from fastldm import images

    made = images.read_metadata(path)["fastldm"] or {}
    arguments = made.get("arguments")
    if not isinstance(arguments, dict):
        raise InvalidArgument("replay", path, "a PNG made by fastldm, with its `fastldm` chunk")
    model = loading.get("model", made.get("model"))
    here = isinstance(model, str) and (model == "default" or "model" in loading or os.path.exists(model))
    if not here:
        raise InvalidArgument("model", model, "--model PATH: what the picture was made with is not here")
    if made.get("loras") and not loras:
        names = json.dumps(made["loras"])[:200]
        raise InvalidArgument("lora", None, f"--lora FILE:WEIGHT, as the picture was made with: {names}")
    replaced = SHOWN if any(name in options for name in SHOWN) else ()
    recorded = {name: arguments[name] for name in REPLAYED if name in arguments and name not in replaced}
    for name in _not_recorded(made):
        if name not in GIVEN:
            raise InvalidArgument("replay", path, f"a picture made without {name}=, which no PNG holds")
        if name not in options:
            raise InvalidArgument(name, None, f"--{name} FILE: what this picture was made from")
    return model, recorded, made


def _pad(options: dict[str, Any]) -> None:
    """The image and the mask of --pad."""
    sides, image = options.pop("pad"), options.get("image")
    if image is None or "mask" in options:
        raise InvalidArgument("pad", " ".join(map(str, sides)), "beside --image, without --mask")
    named = dict(zip(("left", "top", "right", "bottom"), sides, strict=True))
    options["image"], options["mask"] = fastldm.padded(image, **named)


def _others(made: Facts, result: Any) -> list[str]:
    """Of the model, the LoRAs and the pictures that a replayed one was made from, those which are not what
    this one was made from.
    """
    if not made:
        return []
    now = result.describe(0)
    hashes = made.get("model_hash"), now["model_hash"]
    others = ["the model"] if all(hashes) and hashes[0] != hashes[1] else []
    if _lora_hashes(made) != _lora_hashes(now):
        others.append("--lora")
    before, after = _not_recorded(made), _not_recorded(now)
    others += [f"--{name}" for name in GIVEN if name in before and before[name] != after.get(name)]
    return [f"{name} is not the one used before" for name in others]


def _lora_hashes(made: Facts) -> list[Any]:
    """Those of a picture's LoRAs, in their order."""
    loras = made.get("loras")
    return [lora.get("hash") for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else []


def _not_recorded(made: Facts) -> Facts:
    """What a picture was made from and no PNG holds, by name."""
    missing = made["arguments"].get("not_recorded")
    return missing if isinstance(missing, dict) else {}


def add_options(command: argparse.ArgumentParser) -> None:
    """All that `generate` takes."""
    command.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="what the picture shows; several make several"
    )
    add = command.add_argument_group("the picture").add_argument
    add("--negative", dest="negative_prompt", metavar="TEXT", help="what it does not show")
    add("--steps", type=int, metavar="N", help="sampling steps (25)")
    add(
        "--guidance",
        dest="guidance_scale",
        type=float,
        metavar="G",
        help="its scale (the model's own); 1: none",
    )
    add("--seed", type=_seed, metavar="SEED", help="of the first image, the next count up (0); 7,8,9; random")
    add("--num-images", type=int, metavar="N", help="images to make (1)")
    add("--width", type=int, metavar="PIXELS", help="the model's, or that of --image")
    add("--height", type=int, metavar="PIXELS", help="likewise")
    add("--sampler", metavar="NAME", help=SAMPLER_HELP)
    add("--eta", type=float, metavar="ETA", help="noise of ddim, euler or dpmpp_2m, 0 to 1 (0)")
    add("--image", metavar="FILE", help="start from this picture (PNG, JPEG, WebP), resized")
    add("--strength", type=float, metavar="S", help="how far to leave it, above 0 to 1 (0.8; with --mask 1)")
    add("--mask", metavar="FILE", help="draw anew where this picture is white, and leave --image elsewhere")
    add("--blend", type=int, metavar="PIXELS", help="over which new and old meet, inside the mask (0)")
    add("--pad", type=int, nargs=4, metavar="N", help="pixels to draw around --image: left top right bottom")
    add("--upscale", action="store_true", help="enlarge --image")
    add("--segmentation", metavar="FILE", help="a map: each pixel's palette number or grey level is a class")
    add("--label", type=_label, metavar="NAME", help="a class in place of a prompt, by name or number")
    add(
        "--layout",
        type=_box,
        action="append",
        metavar="OBJECT:L,T,R,B",
        help="an object in a box, in shares of the sides, in place of a prompt; several make a scene",
    )
    add(
        "--interpolate",
        type=int,
        metavar="FRAMES",
        help="so many pictures, from the first PROMPT or SEED on to the last",
    )
    add("--replay", metavar="PNG", help="make this picture again; other options replace its own")
    add = command.add_argument_group("faster, but another picture").add_argument
    add("--guidance-interval", nargs=2, type=float, metavar=("A", "B"), help="guide this share only (0 1)")
    add("--whole-every", type=int, metavar="N", help="whole steps; the others reuse deep features (1)")
    add = command.add_argument_group("the files").add_argument
    add("-o", "--output", metavar="FILE", help="out.png; several go to out-0.png, ..., or all into a .gif")
    add("--grid", action="store_true", help="one file that shows all images, instead of one file each")
    add("--quiet", action="store_true", help="no progress bar and no timings; the paths and warnings stay")
    _loading_options(command)


def _loading_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("the model").add_argument
    add("--model", metavar="PATH", help="folder, single file or Hub id (the shipped model)")
    add("--allow-pickle", action="store_true", help=PICKLE_HELP)
    add("--lora", type=_lora, action="append", metavar="FILE[:WEIGHT]", help="merge it (1); several add up")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (the best there is)")
    add("--dtype", metavar="NAME", help="fp32, bf16 or fp16 (the device's)")
    add("--config", metavar="CONFIG", help=CONFIG_HELP)
    add("--tokenizer", metavar="PATH", help=TOKENIZER_HELP)
    add("--backends", metavar="NAMES", help="cuda,triton,cpp in this order, or reference")
    add("--offload-text-encoder", action="store_true", help="in the host's memory between prompts")


def _seed(text: str) -> int | list[int] | None:
    """7, a list as 7,8,9, or 'random'."""
    if text == "random":
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        allowed = "an integer, several as 7,8,9, or random"
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: allowed is {allowed}") from None
    return seeds if len(seeds) > 1 else seeds[0]


def _label(text: str) -> str | int:
    """A number, or a name."""
    return int(text) if text.isascii() and text.isdigit() else text


def _box(text: str) -> tuple[str | int, tuple[float, ...]]:
    """red circle:0.1,0.2,0.5,0.6"""
    name, _, numbers = text.rpartition(":")
    try:
        return _label(name), tuple(float(number) for number in numbers.split(","))
    except ValueError:
        allowed = "an object and its box, as 'red circle:0.1,0.2,0.5,0.6'"
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: allowed is {allowed}") from None


def _lora(text: str) -> tuple[str, float]:
    """A path, and after a colon a weight."""
    path, colon, weight = text.rpartition(":")
    if colon and not os.path.exists(text):
        try:
            return path, float(weight)
        except ValueError:
            pass
    return text, 1.0


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def one_line(text: str) -> str:
    return " ".join(text.split())
