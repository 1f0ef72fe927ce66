"""How a model of scenes learns: the judge's shares at the averages that training kept, and where they lead.

    python -m benchmarks.training_curve fastldm/training/scenes.toml --every 10 --json curve.json

reads the states in the run's folder (`keep_every`), so run it where the model was trained, before or after
the end. The extrapolation is a line through the log odds over the logarithm of the rows seen: of whole
pictures right (overall), and of objects that are there (found), which are right sooner.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastldm.bench import machine, scenes
from fastldm.checkpoint import save_folder
from fastldm.training.config import TrainConfig, read_config
from fastldm.training.latents import latents_and_hints
from fastldm.training.run import first_stages, scenes_to_learn
from fastldm.training.session import Session

BAR = 0.85


def kept_averages(folder: Path) -> list[tuple[int, Path]]:
    """The steps at which averages were kept, and their files."""
    files = folder.glob("diffusion-*.pt")
    return sorted((int(file.stem.split("-")[1]), file) for file in files)


def rows_until(points: Sequence[tuple[int, float]], bar: float) -> float | None:
    """How many rows a line through the log odds of the shares reaches `bar` after; None if it never does."""
    inner = [(rows, share) for rows, share in points if 0 < share < 1]
    if len(inner) < 2:
        return None
    x = [math.log(rows) for rows, _ in inner]
    y = [math.log(share / (1 - share)) for _, share in inner]
    slope, start = np.polyfit(x, y, 1)
    wanted = (math.log(bar / (1 - bar)) - start) / slope if slope > 0 else math.inf
    return math.exp(wanted) if wanted < 100 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--every", type=int, default=10, help="every N-th question of the judge (10)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = read_config(options.config)
    if not isinstance(config, TrainConfig):
        parser.error(f"{options.config} trains no model of scenes")
    torch.set_num_threads(config.threads)
    session = Session(config, report=lambda text: None)
    vae, tokenizer, model, scheduler = first_stages(session, None)
    latents_and_hints(session, vae, scenes_to_learn(config))  # gives the autoencoder its scale
    found: list[dict[str, Any]] = []
    for step, file in kept_averages(config.folder):
        kept = torch.load(file, weights_only=True)
        model.load_state_dict(
            {name.removeprefix("model."): value for name, value in kept.items()}, strict=False
        )
        with tempfile.TemporaryDirectory() as folder:
            save_folder(
                Path(folder) / "model",
                unet=model.unet,
                vae=vae,
                text_encoder=model.text_encoder,
                tokenizer=tokenizer,
                scheduler=scheduler,
                dtype=torch.bfloat16,
            )
            report = scenes.measure(model=f"{folder}/model", every=options.every, guidance=options.guidance)
        rows = step * config.diffusion.fit.batch * config.diffusion.fit.accumulate
        found.append({"steps": step, "rows": rows, **asdict(report)})
        shares = ", ".join(f"{name} {share:.0%}" for name, share in report.categories.items())
        said = f"overall {report.overall:.1%}, {report.found:.1%} of the objects asked for"
        print(f"{step} steps, {rows} rows: {said} ({shares})", flush=True)
    until = {}
    for name in ("overall", "found"):
        rows_needed = rows_until([(each["rows"], each[name]) for each in found], BAR)
        until[name] = rows_needed
        reached = f"after about {rows_needed:.2e} rows" if rows_needed else "on no line through these"
        print(f"{name} {BAR} {reached}")
    if options.json is not None:
        result = {"machine": machine.describe(), "curve": found, "rows until the bar": until}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
