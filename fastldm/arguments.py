"""The one validator of generate(): library, command line and server refuse the same calls in the same words.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import inspect
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastldm import images
from fastldm.abilities import Abilities
from fastldm.canvas import MAX_COUNT, check_canvas
from fastldm.checks import choice, integer, number, refuse, tensor
from fastldm.prompts import Content, Layout, check_content
from fastldm.shortcuts import Shortcuts, check_shortcuts

if TYPE_CHECKING:
    from fastldm.checks import Tensor

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# What other programs call our arguments; anything else is matched by spelling.
MEANT = {
    "steps": ("num_inference_steps", "num_steps", "inference_steps", "ddim_steps", "n_steps"),
    "guidance_scale": ("cfg", "cfg_scale", "guidance", "scale", "unconditional_guidance_scale"),
    "num_images": ("n", "num_images_per_prompt", "n_samples", "num_samples", "batch_size", "batch_count"),
    "sampler": ("scheduler", "sampler_name", "sampling_method", "method"),
    "seed": ("generator", "seeds", "manual_seed", "random_seed"),
    "prompt": ("text", "prompts", "caption"),
    "negative_prompt": ("negative", "neg_prompt", "n_prompt", "uncond", "unconditional_prompt"),
    "image": ("init_image", "init_img", "input_image"),
    "strength": ("denoising_strength", "denoise"),
    "mask": ("mask_image", "inpaint_mask"),
    "segmentation": ("segmentation_map", "semantic_map", "seg", "map"),
    "label": ("labels", "class_label", "class_labels", "class_id", "y"),
    "layout": ("boxes", "bboxes", "bounding_boxes"),
    "upscale": ("super_resolution", "sr", "upsample"),
    "blend": ("feather", "mask_blur"),
    "eta": ("ddim_eta",),
    "latents": ("noise", "x_T", "init_latents", "init_noise"),
    "output_type": ("output", "return_type", "output_format"),
    "callback": ("callback_on_step_end", "step_callback"),
    "progress": ("show_progress", "progress_bar", "verbose"),
    "width": ("w",),
    "height": ("h",),
    "cuda_graph": ("cuda_graphs", "use_cuda_graph"),
}
_ALIASES = {alias: name for name, aliases in MEANT.items() for alias in aliases}


@dataclass(frozen=True)
class Limits:
    """What one loaded model accepts, in the units of the public arguments.

    `factor` is pixels a latent cell and side; `context_dim` the width of a text embedding; `context_length`
    tokens a chunk of prompt; `abilities` what the model can be asked for. The peak of a request is taken as
    `bytes_per_pixel` × width × height × images and has to fit into `memory_bytes`.
    """

    max_steps: int
    samplers: tuple[str, ...]
    default_sampler: str
    factor: int
    latent_channels: int
    default_width: int
    default_height: int
    context_dim: int
    memory_bytes: int
    bytes_per_pixel: float
    context_length: int = 77
    abilities: Abilities = Abilities()


@dataclass(frozen=True, eq=False)
class Request:
    """One accepted call: nothing is left to check, and nothing in it is shared with the caller.

    Lists have one entry an image: image `i * num_images + j` is the j-th of prompt i.

    prompts   None only with prompt_embeds, or for a model that takes no prompt; labels and layouts are words
              of it where the model reads text
    negatives "" where none was given; not read when `guidance_scale` is 1
    labels, layouts   for a model that reads no text: numbers of classes; objects with boxes; else None
    seeds     of the images' own CPU generators
    latents   float32 tensor or array [n, C, height/f, width/f], unit normal as a generator draws it, or None
    prompt_embeds, negative_prompt_embeds   float32 [prompts, L, D], not yet repeated `num_images` times, or
              None; negative_prompt_embeds None with guidance: L is one chunk, `negatives` are to be encoded
    image     float32 array [n or 1, height, width, 3] in 0…1, already resized, or None; to be upscaled: the
              small one, its edges repeated until the large one's sides are multiples of the factor
    strength  0 < s ≤ 1 with an image, int(steps × strength) ≥ 1; 1.0 without one
    mask      bool array [n or 1, height, width], True where the image is to be drawn anew, or None
    blend     pixels inside the mask over which the new passes into the old
    segmentation   int64 array [n or 1, height, width] of classes, or None
    starts_from_image   whether the first step sees the image, noised, and not noise alone
    shown     (width, height) of the finished images: less than width and height where edges were repeated
    callback  callable(step, x0_preview_or_None), False stops; or None
    progress  callable(done, total) after each step, or None (True was turned into a bar on stderr)
    warnings  what was changed on the way, for `result.warnings`
    """

    prompts: list[str] | None
    negatives: list[str]
    seeds: list[int]
    num_images: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    sampler: str
    eta: float
    latents: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    image: np.ndarray[Any, Any] | None
    strength: float
    mask: np.ndarray[Any, Any] | None
    blend: int
    segmentation: np.ndarray[Any, Any] | None
    upscale: bool
    starts_from_image: bool
    labels: list[int] | None
    layouts: list[Layout] | None
    shown: tuple[int, int]
    output_type: str
    callback: Callable[[int, Any], object] | None
    progress: Callable[[int, int], object] | None
    cuda_graph: bool | None
    shortcuts: Shortcuts
    warnings: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many images the call makes."""
        return len(self.seeds)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that the model draws."""
        return self.width, self.height

    @property
    def guided(self) -> bool:
        """Whether an unconditional half runs beside each row."""
        return self.guidance_scale != 1.0

    def arguments(self, index: int) -> dict[str, Any]:
        """The generate() keywords that make image `index` alone again, as JSON can hold them.

        Arrays are not held: they are named under "not_recorded", the input image with its `pixel_hash`.
        """
        kept: dict[str, Any] = {
            "prompt": self.prompts[index] if self.prompts else None,
            "negative_prompt": self.negatives[index] or None,
            "steps": self.steps,
            "sampler": self.sampler,
            "guidance_scale": self.guidance_scale,
            "eta": self.eta,
            "seed": self.seeds[index],
            "width": self.shown[0],
            "height": self.shown[1],
        }
        if self.labels is not None:
            kept["label"] = self.labels[index]
        if self.layouts is not None:
            kept["layout"] = self.layouts[index]
        if self.shortcuts != Shortcuts():
            kept["shortcuts"] = asdict(self.shortcuts)
        arrays = ("latents", "prompt_embeds", "negative_prompt_embeds")
        missing: dict[str, Any] = {name: True for name in arrays if getattr(self, name) is not None}
        if self.upscale:
            kept["upscale"] = True
        elif self.image is not None:
            kept["strength"] = self.strength
        if self.mask is not None:
            kept["blend"] = self.blend
        for name in ("image", "mask", "segmentation"):
            given = getattr(self, name)
            if given is not None:
                missing[name] = images.pixel_hash(given[index if len(given) > 1 else 0])
        if missing:
            kept["not_recorded"] = missing
        return kept


def check_generate(
    limits: Limits,
    *,
    prompt: object = None,
    steps: object = 25,
    guidance_scale: object = None,
    negative_prompt: object = None,
    seed: object = 0,
    num_images: object = 1,
    width: object = None,
    height: object = None,
    sampler: object = None,
    eta: object = 0.0,
    latents: object = None,
    prompt_embeds: object = None,
    negative_prompt_embeds: object = None,
    image: object = None,
    mask: object = None,
    strength: object = None,
    segmentation: object = None,
    label: object = None,
    layout: object = None,
    upscale: object = None,
    blend: object = None,
    output_type: object = "pil",
    callback: object = None,
    progress: object = None,
    cuda_graph: object = None,
    shortcuts: object = None,
    **unknown: object,
) -> Request:
    """The request that these arguments of generate() describe, or the error that names the first wrong one.

    Errors: `InvalidArgument`, one line; `TypeError` for a keyword that does not exist, naming the one meant.
    Without width and height the size is the image's or the map's, each side rounded down to a multiple of the
    factor (one factor at least), else the model's own.
    """
    for name in unknown:
        raise TypeError(unknown_keyword(name))
    count_each = integer("num_images", num_images, 1, MAX_COUNT)
    step_count = integer("steps", steps, 1, limits.max_steps)
    guidance = _check_guidance(limits.abilities, guidance_scale)
    eta_value = number("eta", eta, 0, 1)
    sampler_name = limits.default_sampler if sampler is None else choice("sampler", sampler, limits.samplers)
    kind = choice("output_type", output_type, OUTPUT_TYPES)
    if callback is not None and not callable(callback):
        refuse("callback", callback, "a callable of (step, preview), or None")
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        refuse("progress", progress, "True, False, None or a callable of (done, total)")
    if cuda_graph is not None and not isinstance(cuda_graph, bool):
        refuse("cuda_graph", cuda_graph, "True, False or None")

    content = check_content(
        limits.abilities,
        (limits.context_length, limits.context_dim),
        guidance != 1.0,
        prompt=prompt,
        negative_prompt=negative_prompt,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        label=label,
        layout=layout,
    )
    rows = len(content.negatives)
    count = rows * count_each
    canvas = check_canvas(
        limits.abilities,
        (limits.factor, limits.default_width, limits.default_height),
        (count, step_count),
        image=image,
        mask=mask,
        segmentation=segmentation,
        upscale=upscale,
        strength=strength,
        blend=blend,
        width=width,
        height=height,
    )
    if canvas.starts and latents is not None:
        refuse("latents", latents, "None together with image=")
    size = canvas.size
    _check_memory(limits, *size, count, count_each, _rows_name(content))

    cells = (size[1] // limits.factor, size[0] // limits.factor)

    def each(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [value for value in values for _ in range(count_each)]

    return Request(
        prompts=each(content.prompts),
        negatives=[text for text in content.negatives for _ in range(count_each)],
        seeds=_check_seeds(seed, count),
        num_images=count_each,
        steps=step_count,
        guidance_scale=guidance,
        width=size[0],
        height=size[1],
        sampler=sampler_name,
        eta=eta_value,
        latents=tensor("latents", latents, (count, limits.latent_channels, *cells)),
        prompt_embeds=tensor("prompt_embeds", prompt_embeds, None),
        negative_prompt_embeds=tensor("negative_prompt_embeds", negative_prompt_embeds, None),
        image=canvas.image,
        strength=canvas.strength,
        mask=canvas.mask,
        blend=canvas.blend,
        segmentation=canvas.segmentation,
        upscale=canvas.upscale,
        starts_from_image=canvas.starts,
        labels=each(content.labels),
        layouts=each(content.layouts),
        shown=canvas.shown,
        output_type=kind,
        callback=callback,
        progress=_bar() if progress is True else progress if callable(progress) else None,
        cuda_graph=cuda_graph,
        shortcuts=check_shortcuts(shortcuts, limits.max_steps),
        warnings=canvas.warnings,
    )


def unknown_keyword(name: str) -> str:
    """The message for a keyword that generate() has not: the one meant, else all that exist."""
    known = list(inspect.signature(check_generate).parameters)[1:-1]
    close = difflib.get_close_matches(name.lower(), [*known, *_ALIASES], n=1, cutoff=0.7)
    meant = _ALIASES.get(name) or (_ALIASES.get(close[0], close[0]) if close else None)
    hint = f"did you mean {meant!r}?" if meant else f"it has {', '.join(known)}"
    return f"generate() has no argument {name!r}: {hint}"


def _check_guidance(abilities: Abilities, value: object) -> float:
    if not abilities.guides:
        if value is not None and number("guidance_scale", value, -1000, 1000) != 1:
            refuse("guidance_scale", value, "None or 1: this model has nothing to be guided by")
        return 1.0
    return abilities.guidance_scale if value is None else number("guidance_scale", value, -1000, 1000)


def _rows_name(content: Content) -> str:
    """The argument that the rows come from."""
    if content.labels is not None:
        return "label"
    if content.layouts is not None:
        return "layout"
    return "prompt" if content.prompts else "prompt_embeds"


def _check_memory(limits: Limits, width: int, height: int, count: int, each: int, rows_name: str) -> None:
    pixels = int(limits.memory_bytes / limits.bytes_per_pixel)
    if width * height * count <= pixels:
        return
    allowed = f"width × height × images ≤ {pixels} pixels (in {limits.memory_bytes / 2**30:.1f} GiB)"
    if width * height > pixels:
        name, value = ("width", width) if width >= height else ("height", height)
    elif width * height * each > pixels:
        name, value = "num_images", each
    else:
        name, value = rows_name, count // each
        allowed = f"fewer prompts: {allowed}"
    refuse(name, value, f"{allowed}, not {width}x{height}x{count}")


def _check_seeds(value: object, count: int) -> list[int]:
    """One seed an image: counted up from one, or as listed."""
    if value is None:
        value = secrets.randbits(32)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = list(value)
    if not isinstance(value, list | tuple):
        first = integer("seed", value, MIN_SEED, MAX_SEED)
        if first + count - 1 > MAX_SEED:
            refuse("seed", value, f"{MIN_SEED}…{MAX_SEED - count + 1}: image k of {count} uses seed + k")
        return list(range(first, first + count))
    if len(value) != count:
        refuse("seed", value, f"an integer, or a list of one an image ({count})")
    return [integer(f"seed[{index}]", item, MIN_SEED, MAX_SEED) for index, item in enumerate(value)]


def _bar() -> Callable[[int, int], object]:
    """A progress callable that draws a tqdm bar on stderr and leaves the line free at the end."""
    from tqdm import tqdm

    bar: Any = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="step", leave=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return report
