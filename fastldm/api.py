"""The two functions that most programs need: `load` a model, and `generate` with a cached one."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from fastldm import ops
from fastldm.checkpoint import load_components
from fastldm.errors import InvalidArgument
from fastldm.ops.registry import order_in_force
from fastldm.pipeline import Pipeline
from fastldm.result import Result

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def load(
    path: str | os.PathLike[str] = "default",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    config: Any = None,
    tokenizer: Any = None,
    backends: str | tuple[str, ...] | list[str] | None = None,
    offload_text_encoder: bool = False,
    allow_pickle: bool = False,
) -> Pipeline:
    """Load a model: a diffusers folder, a single file, "default" (the shipped one) or a Hub id.

    device: "cuda" where there is one, else "cpu". dtype: "fp32", "fp16" or "bf16"; float32 on a CPU,
    bfloat16 on a GPU unless given. config: fields that override what the files say. tokenizer: a folder
    with another one. backends: the order in which ops look for a kernel (see FASTLDM_BACKENDS).
    offload_text_encoder: its weights stay in the host's memory and visit a GPU for new prompts only.
    allow_pickle: read .ckpt, .pt and .bin files too, their tensors alone; nothing in them is run. Raises
    CheckpointError naming file and key, InvalidArgument, BackendUnavailable.
    """
    place = _device(device)
    kind = _dtype(dtype, place)
    chosen = None if backends is None else ops.resolve(backends)
    components = load_components(
        path, dtype=kind, device=place, config=config, tokenizer=tokenizer, allow_pickle=allow_pickle
    )
    with ops.use_backends(chosen):
        order_in_force()  # loads the kernels, for which the first picture would wait
    return Pipeline(components, place, kind, chosen, offload_text_encoder)


def generate(
    prompt: str | list[str] | None = None, *, model: str | os.PathLike[str] = "default", **arguments: Any
) -> Result:
    """Make images; the model is loaded at the first call and kept.

    prompt, negative_prompt   a string or a list of strings
    label, layout             in place of a prompt: a class; objects in boxes, [(object, (left, top, right,
                              bottom))] in shares of the sides; or a list of them
    steps=25, guidance_scale (the model's own, most often 7.5; 1: no unconditional half), sampler (likewise),
    eta=0.0
    seed=0                    an integer, or one an image; image k uses seed + k; None: drawn and reported
    num_images=1, width, height
    image, strength=0.8       start from a picture
    mask, blend=0             draw image= anew where the mask is white, from noise unless strength is given;
                              outside every bit stays; blend: pixels over which new and old meet inside
    segmentation              a map of classes, drawn in its size
    upscale                   True: draw image= several times as large
    latents, prompt_embeds, negative_prompt_embeds   in place of noise and text
    output_type="pil"         or "np", "pt", "latent"
    callback(step, x0)        after each step; False stops. x0: estimate of the clean latents [n, C, h, w]
    shortcuts                 `Shortcuts` that are faster and change the pictures; None: exact
    progress                  True for a bar, or callable(done, total)
    cuda_graph                on a GPU: None, where it can be; True, or an error; False, not

    What a model can be asked for: `pipe.limits.abilities`, `fastldm info MODEL`, docs/tasks.md.
    Returns a `Result`. Raises InvalidArgument before any work, TypeError for an unknown keyword,
    CheckpointError, OutOfMemory, NonFiniteOutput, BackendUnavailable (cuda_graph=True that cannot be).
    """
    if not isinstance(model, str | os.PathLike):
        raise InvalidArgument("model", model, 'a path, a Hub id or "default"')
    return _default(os.fspath(model)).generate(prompt, **arguments)


_pipelines: dict[str, Pipeline] = {}
_lock = threading.Lock()


def _default(model: str) -> Pipeline:
    """The one pipeline of this process for a model; loaded once, however many threads ask."""
    with _lock:
        if model not in _pipelines:
            _pipelines[model] = load(model)
        return _pipelines[model]


def _device(given: str | torch.device | None) -> torch.device:
    """The device, with its number: which one "cuda" is differs from thread to thread."""
    try:
        own = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(own if given is None else given)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument("device", given, '"cpu", "cuda" or "cuda:N"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(
            "device", given, f"a device of this machine, which has {torch.cuda.device_count()} CUDA devices"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _dtype(given: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if given is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    kind = DTYPES.get(given) if isinstance(given, str) else given
    if kind is None or kind not in DTYPES.values():
        raise InvalidArgument("dtype", given, "fp32, fp16 or bf16")
    return kind
