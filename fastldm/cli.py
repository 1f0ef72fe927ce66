"""The command line: fastldm generate | info | convert | doctor | bench | train | tune.

Every error of the user's is one line on stderr and exit code 2. Nothing but argparse is imported before a
command runs, so that --help and --version answer at once.
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
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import fastldm
from fastldm.bench import options as bench_options
from fastldm.cli_generate import CONFIG_HELP, PICKLE_HELP, TOKENIZER_HELP, add_options, generate, one_line
from fastldm.errors import FastLDMError, InvalidArgument

Facts: TypeAlias = Mapping[str, Any]


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastldm: error: {one_line(message)}\n")


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
        print(f"fastldm: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


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
    add_options(command)

    command = commands.add_parser("info", help=info.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=info)
    command.add_argument("path", metavar="PATH", help="a model folder or file, a Hub id, or a PNG")
    command.add_argument("--config", metavar="CONFIG", help=CONFIG_HELP)
    command.add_argument("--allow-pickle", action="store_true", help=PICKLE_HELP)
    command.add_argument("--json", action="store_true", default=False, help="print JSON")

    command = commands.add_parser("convert", help=convert.__doc__, argument_default=argparse.SUPPRESS)
    command.set_defaults(run=convert)
    command.add_argument("source", metavar="SOURCE", help="a diffusers folder or a single file")
    command.add_argument("destination", metavar="DESTINATION", help="a .safetensors file, or a folder")
    command.add_argument("--config", metavar="CONFIG", help=CONFIG_HELP)
    command.add_argument("--tokenizer", metavar="PATH", help=TOKENIZER_HELP)
    command.add_argument("--overwrite", action="store_true", help="replace what is at the destination")
    command.add_argument("--allow-pickle", action="store_true", help=PICKLE_HELP)

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
