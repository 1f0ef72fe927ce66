"""How often the shipped model draws what it is asked: `python benchmarks/shipped_model.py`."""

from __future__ import annotations

import argparse
import json

from PIL import Image

import fastldm
from fastldm.training.evaluation import evaluate, questions


def main() -> None:
    """Print the shares for a model, as a table or JSON."""
    parser = argparse.ArgumentParser(description="how often the model draws the object and colour asked for")
    parser.add_argument("--model", default="default")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--every", type=int, default=1, help="ask every N-th question only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pipe = fastldm.load(options.model)
    guidance = {} if options.guidance is None else {"guidance_scale": options.guidance}

    def generate(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pipe.generate(prompts, seed=seeds, steps=options.steps, **guidance).images

    asked = questions()[:: options.every]
    shares = evaluate(generate, asked)
    if options.json:
        print(json.dumps({"pictures": len(asked), **shares}))
    else:
        print(f"{len(asked)} pictures, {options.steps} steps")
        for name, share in sorted(shares.items()):
            print(f"{name:12} {share:6.1%}")


if __name__ == "__main__":
    main()
