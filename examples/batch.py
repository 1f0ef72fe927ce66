"""A file of prompts to a folder of pictures; run again, it goes on where it stopped.

python examples/batch.py [PROMPTS] [FOLDER] [--model PATH] [--steps N]

PROMPTS is text, one prompt a line, or JSON: a list of prompts, or of objects with the keywords of
`fastldm.generate`. A picture's name is its place and a hash of all that makes it, so that a changed line is
made anew and an unchanged one is not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import fastldm

HERE = Path(__file__).parent


def read_jobs(path: Path, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """The keywords of each picture."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        entries = json.loads(text)
    else:
        entries = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [defaults | (entry if isinstance(entry, dict) else {"prompt": entry}) for entry in entries]


def name_of(place: int, job: dict[str, Any], model: str) -> str:
    made_of = json.dumps([model, job], sort_keys=True)
    return f"{place:04d}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.png"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="?", type=Path, default=HERE / "prompts.txt")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("pictures"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    jobs = read_jobs(options.prompts, {"steps": options.steps})
    paths = [options.folder / name_of(place, job, options.model) for place, job in enumerate(jobs)]
    left = [(job, path) for job, path in zip(jobs, paths, strict=True) if not path.exists()]
    print(f"{len(jobs)} pictures, {len(jobs) - len(left)} already there")
    pipe = fastldm.load(options.model) if left else None
    failures = 0
    for job, path in left:
        try:
            pipe.generate(**job).save(path)  # whole or not at all: what exists is complete
            print(path)
        except (fastldm.FastLDMError, TypeError) as error:  # TypeError: an unknown keyword, named
            failures += 1
            print(f"{path.name}: {error}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
