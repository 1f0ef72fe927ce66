"""What the programs of `fastldm bench` share: where a file may go, and a report printed and kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastldm.bench import machine
from fastldm.errors import InvalidArgument
from fastldm.images import write_files


def check_file(name: str, file: str | Path | None) -> None:
    """InvalidArgument for a file that cannot be written; None is no file."""
    if file is not None and (not Path(file).resolve().parent.is_dir() or Path(file).is_dir()):
        raise InvalidArgument(name, str(file), "a file in a folder that exists")


def say(text: str) -> None:
    """Tell on stderr how far the work is."""
    print(f"fastldm: {text}", file=sys.stderr, flush=True)


def as_json(found: dict[str, Any]) -> bytes:
    """The bytes of a JSON file."""
    return (json.dumps(found, indent=1) + "\n").encode()


def publish(name: str, measure: Callable[..., Any], json_file: str | None, asked: dict[str, Any]) -> None:
    """Measure what is asked, print the report and the machine, and write both as JSON, the report under its
    name. InvalidArgument before any work.
    """
    check_file("json", json_file)
    report = measure(say=say, **asked)
    facts = machine.describe()
    print(report)
    print(machine.headline(facts))
    if json_file is not None:
        write_files({Path(json_file): as_json({"machine": facts, name: asdict(report)})})
