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
from fastldm.checks import choice, integer, number, refuse, shape_of, tensor
from fastldm.shortcuts import Shortcuts, check_shortcuts

if TYPE_CHECKING:
    from fastldm.checks import Tensor

MAX_CHARACTERS = 32_000
MAX_EMBEDS = 32_768  # prompts, and tokens of each, in prompt_embeds
MAX_COUNT = 2**31 - 1  # of pixels a side and of images, before memory is asked
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_STRENGTH = 0.8

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

    `factor` is pixels a latent cell and side; `context_dim` the width of a text embedding (None: the model
    takes no prompt); `context_length` tokens a chunk of prompt. The peak of a request is taken as
    `bytes_per_pixel` × width × height × images and has to fit into `memory_bytes`.
    """

    max_steps: int
    samplers: tuple[str, ...]
    default_sampler: str
    factor: int
    latent_channels: int
    default_width: int
    default_height: int
    context_dim: int | None
    memory_bytes: int
    bytes_per_pixel: float
    context_length: int = 77


@dataclass(frozen=True, eq=False)
class Request:
    """One accepted call: nothing is left to check, and nothing in it is shared with the caller.

    Lists have one entry an image: image `i * num_images + j` is the j-th of prompt i.

    prompts   None only with prompt_embeds, or for a model that takes no prompt
    negatives "" where none was given; not read when `guidance_scale` is 1
    seeds     of the images' own CPU generators
    latents   float32 tensor or array [n, C, height/f, width/f], unit normal as a generator draws it, or None
    prompt_embeds, negative_prompt_embeds   float32 [prompts, L, D], not yet repeated `num_images` times, or
              None; negative_prompt_embeds None with guidance: L is one chunk, `negatives` are to be encoded
    image     float32 array [n or 1, height, width, 3] in 0…1, already resized, or None
    strength  0 < s ≤ 1 with an image, int(steps × strength) ≥ 1; 1.0 without one
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
            "width": self.width,
            "height": self.height,
        }
        if self.shortcuts != Shortcuts():
            kept["shortcuts"] = asdict(self.shortcuts)
        arrays = ("latents", "prompt_embeds", "negative_prompt_embeds")
        missing: dict[str, Any] = {name: True for name in arrays if getattr(self, name) is not None}
        if self.image is not None:
            kept["strength"] = self.strength
            missing["image"] = images.pixel_hash(self.image[index if len(self.image) > 1 else 0])
        if missing:
            kept["not_recorded"] = missing
        return kept


def check_generate(
    limits: Limits,
    *,
    prompt: object = None,
    steps: object = 25,
    guidance_scale: object = 7.5,
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
    strength: object = None,
    output_type: object = "pil",
    callback: object = None,
    progress: object = None,
    cuda_graph: object = None,
    shortcuts: object = None,
    **unknown: object,
) -> Request:
    """The request that these arguments of generate() describe, or the error that names the first wrong one.

    Errors: `InvalidArgument`, one line; `TypeError` for a keyword that does not exist, naming the one meant.
    Without width and height the size is the image's, each side rounded down to a multiple of the factor (one
    factor at least), else the model's own.
    """
    for name in unknown:
        raise TypeError(unknown_keyword(name))
    count_each = integer("num_images", num_images, 1, MAX_COUNT)
    step_count = integer("steps", steps, 1, limits.max_steps)
    guidance = number("guidance_scale", guidance_scale, -1000, 1000)
    eta_value = number("eta", eta, 0, 1)
    sampler_name = limits.default_sampler if sampler is None else choice("sampler", sampler, limits.samplers)
    kind = choice("output_type", output_type, OUTPUT_TYPES)
    if callback is not None and not callable(callback):
        refuse("callback", callback, "a callable of (step, preview), or None")
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        refuse("progress", progress, "True, False, None or a callable of (done, total)")
    if cuda_graph is not None and not isinstance(cuda_graph, bool):
        refuse("cuda_graph", cuda_graph, "True, False or None")

    prompts, negatives = _check_prompts(
        limits, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance
    )
    rows = len(negatives)
    count = rows * count_each
    strength_value = _check_strength(strength, image, step_count)
    if image is not None and latents is not None:
        refuse("latents", latents, "None together with image=")
    pictures = [] if image is None else images.load_pictures(image, count)
    factor, default_width, default_height = limits.factor, limits.default_width, limits.default_height
    if pictures:
        default_width, default_height = (max(side // factor, 1) * factor for side in pictures[0].size)
    size = (_side("width", width, default_width, factor), _side("height", height, default_height, factor))
    _check_memory(limits, *size, count, count_each, "prompt" if prompts else "prompt_embeds")

    seeds = _check_seeds(seed, count)
    cells = (size[1] // factor, size[0] // factor)
    resized = sorted({picture.size for picture in pictures if picture.size != size})
    warnings = tuple(f"image resized from {w}x{h} to {size[0]}x{size[1]} (Lanczos)" for w, h in resized)
    return Request(
        prompts=None if prompts is None else [text for text in prompts for _ in range(count_each)],
        negatives=[text for text in negatives for _ in range(count_each)],
        seeds=seeds,
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
        image=images.stack(pictures, *size) if pictures else None,
        strength=strength_value,
        output_type=kind,
        callback=callback,
        progress=_bar() if progress is True else progress if callable(progress) else None,
        cuda_graph=cuda_graph,
        shortcuts=check_shortcuts(shortcuts, limits.max_steps),
        warnings=warnings,
    )


def unknown_keyword(name: str) -> str:
    """The message for a keyword that generate() has not: the one meant, else all that exist."""
    known = list(inspect.signature(check_generate).parameters)[1:-1]
    close = difflib.get_close_matches(name.lower(), [*known, *_ALIASES], n=1, cutoff=0.7)
    meant = _ALIASES.get(name) or (_ALIASES.get(close[0], close[0]) if close else None)
    hint = f"did you mean {meant!r}?" if meant else f"it has {', '.join(known)}"
    return f"generate() has no argument {name!r}: {hint}"


def _check_prompts(
    limits: Limits, prompt: object, negative: object, embeds: object, negative_embeds: object, guidance: float
) -> tuple[list[str] | None, list[str]]:
    """Prompts (None where embeddings, or nothing, stand in) and as many negative prompts."""
    if limits.context_dim is None:
        for name, value in (
            *(("prompt", prompt), ("negative_prompt", negative)),
            *(("prompt_embeds", embeds), ("negative_prompt_embeds", negative_embeds)),
        ):
            if value is not None:
                refuse(name, value, "None: this model takes no prompt")
        return None, [""]
    if embeds is None:
        if prompt is None:
            refuse("prompt", prompt, "a string or a list of strings: this model needs a prompt")
        if negative_embeds is not None:
            refuse("negative_prompt_embeds", negative_embeds, "None without prompt_embeds=")
        prompts = _texts("prompt", prompt)
        return prompts, _negatives(negative, len(prompts))
    if prompt is not None:
        refuse("prompt", prompt, "None together with prompt_embeds=")
    rows, length, _ = shape_of("prompt_embeds", embeds, ("prompts", "tokens", limits.context_dim))
    if max(rows, length) > MAX_EMBEDS:
        refuse("prompt_embeds", embeds, f"at most {MAX_EMBEDS} prompts, and as many tokens")
    if negative_embeds is None:
        if guidance != 1.0 and length != limits.context_length:
            allowed = f"{limits.context_length} tokens, or negative_prompt_embeds= of the same shape"
            refuse("prompt_embeds", embeds, allowed)
        return None, _negatives(negative, rows)
    if negative is not None:
        refuse("negative_prompt", negative, "None together with negative_prompt_embeds=")
    shape_of("negative_prompt_embeds", negative_embeds, (rows, length, limits.context_dim))
    return None, [""] * rows


def _texts(name: str, value: object) -> list[str]:
    """One or more prompts: a string, or a list or tuple of strings."""
    if isinstance(value, list | tuple) and value:
        return [_text(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, list | tuple):
        refuse(name, value, "a string or a list of at least one string")
    return [_text(name, value)]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        refuse(name, value, "a string")
    if len(value) > MAX_CHARACTERS:
        refuse(name, value, f"at most {MAX_CHARACTERS} characters, not {len(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        refuse(name, value, "text without lone surrogates")
    return str(value)


def _negatives(value: object, rows: int) -> list[str]:
    """One negative prompt a prompt."""
    texts = [""] if value is None else _texts("negative_prompt", value)
    if isinstance(value, list | tuple) and len(texts) != rows:
        refuse("negative_prompt", value, f"one string, or one a prompt ({rows})")
    return texts if len(texts) == rows else texts * rows


def _check_strength(value: object, image: object, steps: int) -> float:
    if value is None:
        value = 1.0 if image is None else DEFAULT_STRENGTH
    elif image is None:
        refuse("strength", value, "None without image=")
    strength = number("strength", value, 0, 1)
    if strength == 0 or int(steps * strength) < 1:
        refuse("strength", value, f"0 < strength ≤ 1 with at least one of the {steps} steps left")
    return strength


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


def _side(name: str, value: object, default: int, factor: int) -> int:
    side = default if value is None else integer(name, value, 1, MAX_COUNT)
    if side % factor:
        refuse(name, value, f"a multiple of {factor}")
    return side


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
