"""The options of `fastldm bench`, and which of its programs they are for. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import Any

from fastldm.errors import InvalidArgument

JUDGED = ("scenes", "tasks")
REPRODUCED = ("ddim", "tradeoff", "objectives", "guidance")
_FILES = {"parts", "json_file"}
# What each program takes; a race takes all that none of the others has to itself.
_RACE = set("model device dtype contenders steps size batch rounds minutes plot".split()) | _FILES
_SCENES = set("model device dtype steps every guidance eta judge".split()) | _FILES
_REPRODUCTION = set("minutes seeds dry_run pixel plot judge".split()) | _FILES


def add(command: argparse.ArgumentParser) -> None:
    """All of them, without defaults: what is not given is not passed."""
    add = command.add_argument
    add(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"step, vae, image, cold, growth, memory (all); or one of {', '.join((*JUDGED, *REPRODUCED))}",
    )
    add("--model", metavar="NAME", help="default, sd15, sd21, sdxl-shape (random weights), or a model's path")
    add("--device", metavar="NAME", help="cpu or cuda (the best there is)")
    add("--dtype", metavar="NAME", help="fp32, bf16 or fp16 (the device's)")
    add(
        "--contenders", metavar="NAMES", help="fastldm,reference,eager,channels-last,compile,max-autotune,..."
    )
    add("--steps", type=int, metavar="N", help="of a picture (25)")
    add("--size", type=int, metavar="PIXELS", help="along a side (the model's)")
    add("--batch", type=int, metavar="N", help="pictures at once (1)")
    add("--rounds", type=int, metavar="N", help="at most so many (20)")
    add(
        "--minutes",
        type=float,
        metavar="N",
        help="of racing, a part (5), 3 rounds at least; or of measuring (all)",
    )
    add(
        "--json",
        dest="json_file",
        metavar="FILE",
        help="write the tables and the machine; or where rows are kept",
    )
    add("--plot", metavar="FILE.png", help="draw them")
    add = command.add_argument_group("scenes, tasks: read by the judge").add_argument
    add("--every", type=int, metavar="N", help="every N-th of its prompts only (1)")
    add("--guidance", type=float, metavar="G", help="guidance scale (the model's own)")
    add("--eta", type=float, metavar="ETA", help="noise of DDIM's steps, 0 to 1 (0)")
    add("--judge", metavar="FILE", help="another judge's weights (the shipped one's)")
    add = command.add_argument_group(f"the papers' findings: {', '.join(REPRODUCED)}").add_argument
    add("--seeds", type=int, metavar="N", help="trainings of every model (3)")
    add("--pixel", action="store_true", help="with ddim: the model of pixels, f = 1")
    add("--dry-run", action="store_true", help="say what the missing cells cost, and run none")


def run(options: dict[str, Any]) -> None:
    """Start the program that the parts name. InvalidArgument for an option of another one."""
    parts = options.get("parts", [])
    alone = next((part for part in parts if part in (*JUDGED, *REPRODUCED)), None)
    if alone is not None and len(parts) > 1:
        raise InvalidArgument("part", " ".join(parts), f"{alone} alone, or parts of a race")
    takes, names = _RACE, "in a race"
    if alone is not None:
        takes, names = _SCENES if alone in JUDGED else _REPRODUCTION, f"with {alone}"
    for name in sorted(options.keys() - takes):
        raise InvalidArgument(name, options[name], _where(name, names))
    options = {name: value for name, value in options.items() if name != "parts"}
    if alone is None:
        from fastldm.bench import command

        command.run(parts=parts, **options)
    elif alone == "scenes":
        from fastldm.bench import scenes

        scenes.run(**options)
    elif alone == "tasks":
        from fastldm.bench import tasks

        tasks.run(**options)
    else:
        from fastldm.bench.reproduction import command as reproduction

        reproduction.run(table=alone, **options)


def _where(name: str, here: str) -> str:
    """Where an option belongs that does not belong here."""
    places = []
    if name in _RACE:
        places.append("in a race")
    if name in _SCENES:
        places.append(f"with {', '.join(JUDGED)}")
    if name in _REPRODUCTION:
        places.append(f"with {', '.join(REPRODUCED)}")
    return f"only {' or '.join(places)}, not {here}"
