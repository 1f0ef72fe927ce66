"""The command line: fastldm generate | info | convert | doctor | bench | train | tune.

Every error of the user's is one line on stderr and exit code 2. Nothing but argparse is imported before a
command runs, so that --help and --version answer at once. Options of `generate` have no defaults here: what
is not given is not passed.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import gc
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import fastldm
from fastldm.bench import options as bench_options
from fastldm.errors import FastLDMError, InvalidArgument

Facts: TypeAlias = Mapping[str, Any]

# What --replay takes from a file. A path in a foreign file is never followed.
REPLAYED = (
    "prompt negative_prompt steps sampler guidance_scale eta seed width height strength shortcuts".split()
)
CONFIG_HELP = "of a single file: a JSON file, a diffusers folder, v_prediction or epsilon"
TOKENIZER_HELP = "a tokenizer folder or tokenizer.json"
SHORTCUTS = "guidance_interval whole_every".split()
LOADING = "model device dtype config tokenizer backends offload_text_encoder".split()
CHECKED_PATHS = 4096  # more images than this are refused by the memory limit


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastldm: error: {_one_line(message)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 if doctor finds a wrong result, 2 after an error, 130
    after Ctrl-C.
    """
    warnings.filterwarnings("ignore", message=".*decompression bomb")  # said by our own error
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or a prompt may be more than the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    atexit.register(gc.freeze)  # the interpreter's last search for garbage, all of torch, costs half a second
    try:
        try:
            options = vars(_parser().parse_args(arguments))
            run = options.pop("run")
            return run(options) or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on: let the interpreter's own flush at exit go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("fastldm: interrupted", file=sys.stderr)
        return 130
    except (FastLDMError, OSError, ImportError) as error:
        print(f"fastldm: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def generate(options: dict[str, Any]) -> None:
    """Make pictures and print the path of each."""
    from fastldm import images

    as_grid, quiet = options.pop("grid", False), options.pop("quiet", False)
    replay, output = options.pop("replay", None), options.pop("output", None)
    if output is None:
        output = "out.png" if replay is None else f"{os.path.splitext(replay)[0]}-replay.png"
    loading = {name: options.pop(name) for name in LOADING if name in options}
    loras = options.pop("lora", [])
    shortcuts = {name: options.pop(name) for name in SHORTCUTS if name in options}
    if shortcuts:
        options["shortcuts"] = shortcuts
    if replay is not None:
        model, recorded = _replayed(replay, options, loading, loras)
        options = recorded | options
        loading.setdefault("model", model)
    count = options.get("num_images", 1)
    images.output_paths(output, count if 1 <= count <= CHECKED_PATHS and not as_grid else 1)

    started = time.perf_counter()
    pipe = fastldm.load(loading.pop("model", "default"), **loading)
    for lora, weight in loras:
        pipe.load_lora(lora, weight)
    loaded = time.perf_counter() - started
    result = pipe.generate(progress=not quiet and _is_terminal(sys.stderr), **options)
    for warning in result.warnings:
        print(f"fastldm: warning: {_one_line(warning)}", file=sys.stderr)
    for path in result.save(output, as_grid=as_grid):
        print(path)
    if not quiet:
        seconds = {"load": loaded} | result.timings
        split = ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())
        print(f"fastldm: seed {', '.join(map(str, result.seeds))}; {split}", file=sys.stderr)


def info(options: dict[str, Any]) -> None:
    """Say what a model, or a picture that fastldm made, is."""
    path, as_json = options.pop("path"), options.pop("json")
    if _is_png(path):
        from fastldm.images import read_metadata

        facts = read_metadata(path)
        if facts["parameters"] is None and facts["fastldm"] is None:
            raise InvalidArgument("path", path, "a model, or a PNG that says how it was made")
        if not as_json:
            print(facts["parameters"] or "")
            facts = facts["fastldm"] or {}
    else:
        from fastldm.checkpoint import inspect

        facts = dataclasses.asdict(inspect(path, **options))
    _show(facts, as_json)


def convert(options: dict[str, Any]) -> None:
    """Turn a diffusers folder into a single file, or back."""
    from fastldm.checkpoint import convert

    print(convert(options.pop("source"), options.pop("destination"), **options))


def doctor(options: dict[str, Any]) -> int:
    """Say what this machine has and what fastldm makes of it, or check what it computes."""
    as_json, model = options.pop("json"), options.pop("verify", None)
    if model is not None:
        report = fastldm.verify(fastldm.load(model, **options))
        print(json.dumps(report.to_dict(), indent=2) if as_json else report)
        return 0 if report.ok else 1
    from fastldm.doctor import diagnose

    for name, value in options.items():
        raise InvalidArgument(name, value, "only beside --verify")
    _show(diagnose(), as_json)
    return 0


def bench(options: dict[str, Any]) -> None:
    """Race a model against diffusers and torch.compile on this machine; or what it can draw (scenes); or
    the papers' findings on small nets (ddim, tradeoff, objectives, guidance).
    """
    bench_options.run(options)


def train(options: dict[str, Any]) -> None:
    """Train the model that a TOML file describes."""
    from fastldm.training import run

    run.main(options["config"], strict=options.get("strict", False))


def tune(options: dict[str, Any]) -> None:
    """Measure this GPU's kernels at a model's shapes against PyTorch's, and keep which is faster where."""
    from fastldm import tuning

    compile_only, targets = options.pop("compile_only", False), options.pop("target", None)
    if compile_only:
        for name, value in options.items():
            raise InvalidArgument(name, value, "nothing beside --compile-only")
        print(f"{tuning.compile_only(targets)} kernels compiled")
    elif targets is not None:
        raise InvalidArgument("target", " ".join(targets), "only beside --compile-only")
    else:
        print(tuning.run(**options))


def _replayed(path: str, options: Facts, loading: Facts, loras: list[Any]) -> tuple[str, dict[str, Any]]:
    """The model and the arguments that a PNG records; options given beside --replay go before them."""
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
    recorded = {name: arguments[name] for name in REPLAYED if name in arguments}
    missing = arguments.get("not_recorded")
    for name, known in missing.items() if isinstance(missing, dict) else ():
        if name != "image":
            raise InvalidArgument("replay", path, f"a picture made without {name}=, which no PNG holds")
        if "image" not in options:
            raise InvalidArgument("image", None, "--image FILE: the picture this one was made from")
        size = options.get("width", arguments.get("width")), options.get("height", arguments.get("height"))
        if all(isinstance(side, int) and 0 < side <= 2**13 for side in size):
            pixels = images.stack(images.load_pictures(options["image"], 1), *size)[0]
            if images.pixel_hash(pixels) != known:
                print("fastldm: warning: --image is not the picture used before", file=sys.stderr)
    return model, recorded


def _show(facts: Facts, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        print("\n".join(_lines(facts, "")))


def _lines(facts: Facts, indent: str) -> list[str]:
    """Nested facts as indented `name: value` lines."""
    lines = []
    for name, value in facts.items():
        label = f"{indent}{name}:"
        if isinstance(value, Mapping) and value:
            lines += [label, *_lines(value, indent + "  ")]
        elif isinstance(value, Mapping | list | tuple):
            lines.append(f"{label} {', '.join(map(str, value)) or 'none'}")
        elif value is not None:
            lines.append(f"{label} {value:,}" if type(value) is int else f"{label} {value}")
    return lines


def _is_png(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as stream:
        return stream.read(8) == b"\x89PNG\r\n\x1a\n"


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _one_line(text: str) -> str:
    return " ".join(text.split())


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


def _lora(text: str) -> tuple[str, float]:
    """A path, and after a colon a weight."""
    path, colon, weight = text.rpartition(":")
    if colon and not os.path.exists(text):
        try:
            return path, float(weight)
        except ValueError:
            pass
    return text, 1.0


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"fastldm {fastldm.__version__}")
        parser.exit()


def _parser() -> Parser:
    parser = Parser(prog="fastldm", description="Fast, exact latent diffusion: from a prompt to a picture.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("generate", help=generate.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=generate)
    command.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the picture shows")
    add = command.add_argument_group("the picture").add_argument
    add("--negative", dest="negative_prompt", metavar="TEXT", help="what it does not show")
    add("--steps", type=int, metavar="N", help="sampling steps (25)")
    add("--guidance", dest="guidance_scale", type=float, metavar="G", help="guidance scale (7.5); 1 is none")
    add("--seed", type=_seed, metavar="SEED", help="of the first image, the next count up (0); 7,8,9; random")
    add("--num-images", type=int, metavar="N", help="images to make (1)")
    add("--width", type=int, metavar="PIXELS", help="the model's, or that of --image")
    add("--height", type=int, metavar="PIXELS", help="likewise")
    add("--sampler", metavar="NAME", help="ddpm, ddim, euler, euler_a, dpmpp_2m, flow_euler (the model's)")
    add("--eta", type=float, metavar="ETA", help="noise of the ddim sampler, 0 to 1 (0)")
    add("--image", metavar="FILE", help="start from this picture (PNG, JPEG, WebP), resized")
    add("--strength", type=float, metavar="S", help="how far to leave it, above 0 to 1 (0.8)")
    add("--replay", metavar="PNG", help="make this picture again; other options replace its own")
    add = command.add_argument_group("faster, but another picture").add_argument
    add("--guidance-interval", nargs=2, type=float, metavar=("A", "B"), help="guide this share only (0 1)")
    add("--whole-every", type=int, metavar="N", help="whole steps; the others reuse deep features (1)")
    add = command.add_argument_group("the files").add_argument
    add("-o", "--output", metavar="PNG", help="out.png; several images go to out-0.png, out-1.png, ...")
    add("--grid", action="store_true", help="one file that shows all images, instead of one file each")
    add("--quiet", action="store_true", help="no progress bar and no timings; the paths and warnings stay")
    _add_loading(command)

    command = commands.add_parser("info", help=info.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=info)
    command.add_argument("path", metavar="PATH", help="a model folder or file, a Hub id, or a PNG")
    command.add_argument("--config", metavar="CONFIG", help=CONFIG_HELP)
    command.add_argument("--json", action="store_true", default=False, help="print JSON")

    command = commands.add_parser("convert", help=convert.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=convert)
    command.add_argument("source", metavar="SOURCE", help="a diffusers folder or a .safetensors file")
    command.add_argument("destination", metavar="DESTINATION", help="the other of the two")
    command.add_argument("--config", metavar="CONFIG", help=CONFIG_HELP)
    command.add_argument("--tokenizer", metavar="PATH", help=TOKENIZER_HELP)
    command.add_argument("--overwrite", action="store_true", help="replace what is at the destination")

    command = commands.add_parser("doctor", help=doctor.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=doctor)
    command.add_argument("--json", action="store_true", default=False, help="print JSON")
    add = command.add_argument
    add("--verify", metavar="MODEL", help="hold every kernel that MODEL runs against its reference")
    add("--device", metavar="NAME", help="with --verify: cpu, cuda, cuda:1 (the best there is)")
    add("--dtype", metavar="NAME", help="with --verify: fp32, bf16 or fp16 (the device's)")

    command = commands.add_parser("bench", help=bench.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=bench)
    bench_options.add(command)

    command = commands.add_parser("train", help=train.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=train)
    command.add_argument("config", metavar="CONFIG.toml", help="what to train, on what, for how long")
    command.add_argument("--strict", action="store_true", help="a picture that cannot be used is an error")

    command = commands.add_parser("tune", help=tune.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=tune)
    add = command.add_argument
    add("--model", metavar="NAME", help="whose shapes: sd15 (the default), sd21, default, or a model's path")
    add("--ops", metavar="NAMES", help="attention,conv2d,... (all that have a kernel)")
    add("--minutes", type=float, metavar="N", help="stop after about so long (as long as it takes)")
    add("--out", metavar="FILE", help="the table (this machine's own, in FASTLDM_CACHE)")
    add(
        "--compile-only",
        action="store_true",
        help="measure nothing: compile the shipped kernels; needs no GPU",
    )
    add(
        "--target",
        nargs="+",
        metavar="GPU",
        help="with --compile-only: sm_80, sm_90, ... (this machine's, or those)",
    )
    return parser


def _add_loading(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("the model").add_argument
    add("--model", metavar="PATH", help="folder, .safetensors file or Hub id (the shipped model)")
    add("--lora", type=_lora, action="append", metavar="FILE[:WEIGHT]", help="merge it (1); several add up")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (the best there is)")
    add("--dtype", metavar="NAME", help="fp32, bf16 or fp16 (the device's)")
    add("--config", metavar="CONFIG", help=CONFIG_HELP)
    add("--tokenizer", metavar="PATH", help=TOKENIZER_HELP)
    add("--backends", metavar="NAMES", help="cuda,triton,cpp in this order, or reference")
    add("--offload-text-encoder", action="store_true", help="in the host's memory between prompts")
