"""One picture by a fresh process: `python -m benchmarks.first_picture fastldm|diffusers FOLDER OUTPUT STEPS`.

Prints JSON: each part of the work, in order, and the moment at which it was finished.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT, SEED = "a large red fish on a white background", 7
finished = {"python start": time.time()}


def load_fastldm(folder: str) -> Callable[..., Any]:
    """A function of steps and output type that gives a `Result`."""
    import fastldm

    finished["import fastldm"] = time.time()
    load = fastldm.load
    finished["import torch and the rest"] = time.time()
    pipe = load(folder)
    return lambda steps, kind="pil": pipe.generate(PROMPT, steps=steps, seed=SEED, output_type=kind)


def load_diffusers(folder: str) -> Callable[..., Any]:
    """The same from diffusers, in float32 and channels-last."""
    import torch
    from diffusers import StableDiffusionPipeline

    finished["import"] = time.time()
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    options = {"generator": torch.Generator(), "guidance_scale": 7.5}

    def make(steps: int, kind: str = "pil") -> Any:
        options["generator"].manual_seed(SEED)
        return pipe(PROMPT, num_inference_steps=steps, output_type=kind, **options)

    return make


if __name__ == "__main__":
    library, folder, output, steps = sys.argv[1:]
    make = {"fastldm": load_fastldm, "diffusers": load_diffusers}[library](folder)
    finished["load"] = moment = time.time()
    result = make(int(steps))
    for part, spent in getattr(result, "timings", {"generate": time.time() - moment}).items():
        if part != "total":
            finished[part] = moment = moment + spent
    result.images[0].save(output) if library == "diffusers" else result.save(output)
    finished["save"] = time.time()
    print(json.dumps(finished))
