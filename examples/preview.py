# %% [markdown]
# Previews while a picture is made, in a notebook (the `# %%` cells are Jupyter's and VS Code's) or as a
# script: `python examples/preview.py [PNG]` writes all previews and the picture side by side.

# %%
from __future__ import annotations

import sys

import torch
from PIL import Image
from torch import Tensor

import fastldm

pipe = fastldm.load()
prompt = "three black stars on a white background"

# %% [markdown]
# A decode in every step costs as much as several steps. A linear map from a latent to the mean colour of the
# pixels that it stands for costs nothing. It is fitted once, to the latents and pixels of a few pictures.


# %%
def fit_colours(pipe: fastldm.Pipeline, prompt: str, pictures: int = 4) -> Tensor:
    """[C + 1, 3]: the colour, 0…1, that each channel of the latents adds, and a constant."""
    latents = pipe.generate(prompt, steps=8, num_images=pictures, output_type="latent").images
    pixels = pipe.decode(latents, "pt")
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels, latents.shape[2:])
    return torch.linalg.lstsq(with_constant(latents), colours.movedim(1, -1).flatten(0, 2)).solution


def with_constant(latents: Tensor) -> Tensor:
    """Latents [n, C, h, w] → [n·h·w, C + 1]."""
    rows = latents.movedim(1, -1).flatten(0, 2)
    return torch.cat((rows, torch.ones_like(rows[:, :1])), dim=1)


def show(latents: Tensor, colours: Tensor, size: tuple[int, int]) -> Image.Image:
    """The first of these latents as a small picture, enlarged."""
    levels = (with_constant(latents[:1]) @ colours).clamp(0, 1).mul(255).round().to(torch.uint8)
    small = levels.view(*latents.shape[2:], 3).cpu().numpy()
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


colours = fit_colours(pipe, prompt)

# %% [markdown]
# The callback gets the step and the clean latents as estimated so far.

# %%
previews: list[Image.Image] = []


def watch(step: int, clean: Tensor) -> None:
    if step % 3 == 0:
        previews.append(show(clean, colours, (128, 128)))
        # In a notebook: IPython.display.display(previews[-1], display_id=True)


result = pipe.generate(prompt, steps=16, seed=7, callback=watch)

# %%
width = sum(preview.width for preview in previews) + result.image.width
strip = Image.new("RGB", (width, result.image.height))
for place, picture in enumerate([*previews, result.image]):
    strip.paste(picture, (128 * place, 0))
path = sys.argv[1] if len(sys.argv) > 1 else "preview.png"
strip.save(path)
print(f"{len(previews)} previews and the picture: {path}")
