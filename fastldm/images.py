"""Pictures in and out: a user's image opened safely, PNG files that say how they were made, atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from fastldm.checks import is_dense, refuse
from fastldm.errors import FastLDMError, InvalidArgument, first_line

Array: TypeAlias = np.ndarray[Any, Any]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26  # 8192 x 8192; a PNG of 140 KB can decode to twice that
MAX_JSON = 2**20  # characters of a foreign file's JSON that we parse
ALLOWED = (
    "a PIL image, a path of a PNG, JPEG or WebP file, an array [height, width, 3] or a tensor "
    "[3, height, width] of uint8 or of floats 0…1, or as many of them as images"
)
FRAME = 100  # milliseconds that each picture of an animation is shown
A1111_SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "dpmpp_2m": "DPM++ 2M"}


@dataclass(frozen=True, eq=False)
class FloatPicture:
    """Float pixels [height, width, 3] in 0…1, with the `size` and `resize` of a PIL image."""

    pixels: Array

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> FloatPicture:
        planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(self.pixels, 2, 0)]
        resized = np.stack([np.asarray(plane.resize(size, resample)) for plane in planes], axis=2)
        return FloatPicture(resized.clip(0.0, 1.0))


Picture: TypeAlias = Image.Image | FloatPicture


def load_pictures(value: object, count: int) -> list[Picture]:
    """The one or `count` RGB pictures that generate()'s `image` names, loaded, each still in its own size.

    Files are PNG, JPEG or WebP by content, at most `MAX_PIXELS` by their header before any decoding. EXIF
    orientation is applied, 16-bit grey scaled to 8 bits, transparency composited on white; of an animation
    the first frame counts. A float array keeps its precision. Errors: `InvalidArgument` "image".
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = _channels_last(value)
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = list(value)
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) not in (1, count):
        refuse("image", f"{len(items)} images", f"one image, or one for each of the {count} results")
    return [_load(item) for item in items]


def stack(pictures: Sequence[Picture], width: int, height: int) -> Array:
    """Float32 [n, height, width, 3] in 0…1; a picture of another size is resized (Lanczos), not cropped."""
    size = (width, height)
    stacked: list[Array] = []
    for picture in pictures:
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        exact = picture.pixels if isinstance(picture, FloatPicture) else np.asarray(picture, np.float32) / 255
        stacked.append(exact)
    return np.stack(stacked)


def pixel_hash(pixels: Array) -> str:
    """SHA-256 of one float32 picture as `stack` gives it, by which a replay knows its input image again."""
    return hashlib.sha256(np.asarray(pixels, np.float32).tobytes()).hexdigest()


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures, of one size, in one: row by row, as nearly square as it goes, black where none is."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """The text that A1111 and its heirs read from a PNG's `parameters` chunk."""
    made = metadata["arguments"]
    lines = [made.get("prompt") or ""]
    if made.get("negative_prompt"):
        lines.append(f"Negative prompt: {made['negative_prompt']}")
    fields = {
        "Steps": made["steps"],
        "Sampler": A1111_SAMPLERS.get(made["sampler"], made["sampler"]),
        "CFG scale": f"{made['guidance_scale']:g}",
        "Seed": made["seed"],
        "Size": f"{made['width']}x{made['height']}",
        "Model hash": str(metadata.get("model_hash") or "")[:10] or None,
        "Model": metadata.get("model"),
        "Denoising strength": f"{made['strength']:g}" if made.get("strength") else None,
        "Eta": f"{made['eta']:g}" if made.get("eta") else None,
        "Version": f"fastldm {metadata['version']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None))
    return "\n".join(lines).replace("\0", "")


def encode_png(picture: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a PNG file, compress_level 1 (1024²: 106 ms; Pillow's own level takes 186).

    `metadata` is version, model, model_hash and arguments (`Request.arguments(index)`); it becomes the chunks
    `parameters` (A1111's text) and `fastldm` (JSON). None writes neither.
    """
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        chunks.add_text("parameters", parameters_text(metadata))
        chunks.add_text("fastldm", json.dumps(metadata, allow_nan=False))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1, pnginfo=chunks)
    return buffer.getvalue()


def encode_gif(pictures: Sequence[Image.Image]) -> bytes:
    """The bytes of a GIF that shows the pictures one after the other, for ever."""
    buffer = io.BytesIO()
    first, *others = pictures
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=FRAME, loop=0)
    return buffer.getvalue()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a PNG says of its making, {"parameters": text or None, "fastldm": dict or None}, no pixel decoded.

    Errors: `InvalidArgument` "path" where the file is no PNG, or its `fastldm` chunk is no JSON object.
    """
    with open_picture(path, "path", ("PNG",)) as picture:
        text, chunk = picture.info.get("parameters"), picture.info.get("fastldm")
    if chunk is None:
        return {"parameters": text, "fastldm": None}
    try:
        made = json.loads(chunk) if isinstance(chunk, str) and len(chunk) <= MAX_JSON else None
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        refuse("path", os.fspath(path), "a PNG whose fastldm chunk is a JSON object; this one is damaged")
    return {"parameters": text, "fastldm": made}


def output_paths(path: str | os.PathLike[str], count: int = 1) -> list[Path]:
    """Where `count` pictures go: out.png for one, out-0.png, out-1.png, … for more, or all of them out.gif.

    Found out before any work: each has to be new or a plain file, in a folder that takes a new file now.
    Errors: `InvalidArgument` "path".
    """
    try:
        first = Path(path)
        animated = first.suffix.lower() == ".gif" and count > 1
        if not animated and first.suffix.lower() != ".png":
            refuse("path", os.fspath(path), "a file name that ends in .png, or for several pictures in .gif")
        numbered = (first.with_stem(f"{first.stem}-{index}") for index in range(count))
        paths = [first] if count == 1 or animated else list(numbered)
        for target in paths:
            if target.exists() and not target.is_file():
                refuse("path", os.fspath(target), "a new or a plain file")
        probe = _temporary(first)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(probe)
    except TypeError:
        refuse("path", path, "a path")
    except InvalidArgument:
        raise
    except (OSError, ValueError) as error:
        refuse("path", os.fspath(path), f"a file in a folder that can be written ({_reason(error)})")
    return paths


def save_pictures(
    path: str | os.PathLike[str],
    pictures: Sequence[Image.Image],
    metadata: Sequence[Mapping[str, Any] | None],
    *,
    as_grid: bool = False,
) -> list[Path]:
    """Write the pictures as PNG and return their paths; errors as in `output_paths` and `write_files`.

    `metadata` has one entry a picture. `as_grid` writes one file of all, with the metadata of the first; a
    path that ends in .gif makes an animation of all, without metadata.
    """
    if as_grid:
        pictures, metadata = [grid(pictures)], metadata[:1]
    paths = output_paths(path, len(pictures))
    if len(paths) < len(pictures):
        write_files({paths[0]: encode_gif(pictures)})
        return paths
    data = (encode_png(picture, made) for picture, made in zip(pictures, metadata, strict=True))
    write_files(dict(zip(paths, data, strict=True)))
    return paths


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write each file beside its place under a temporary name, then rename all: never half a file. One that
    takes the place of another takes its mode.

    Errors: `FastLDMError` naming the file and the system's reason. Until all are written every old file is as
    it was; where a rename fails after that, those renamed before it are the new ones.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            name = temporary[path] = _temporary(path)
            with open(name, "xb") as stream:
                with contextlib.suppress(OSError):  # no old file, or a file system without modes
                    shutil.copymode(path, name)
                stream.write(data)
        for path, name in temporary.items():
            os.replace(name, os.path.realpath(path))
    except OSError as error:
        raise FastLDMError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new hidden name in the folder where `path` really lies, behind any symbolic link."""
    return Path(os.path.realpath(path)).parent / f".fastldm-{secrets.token_hex(6)}.tmp"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _channels_last(tensor: Any) -> object:
    """A torch tensor [3, H, W] or [n, 3, H, W] as an array with the channels last; anything else as it is."""
    if not is_dense(tensor) or tensor.ndim not in (3, 4):
        return tensor
    if tensor.is_floating_point():
        tensor = tensor.float()
    return np.moveaxis(tensor.detach().cpu().numpy(), -3, -1)


def _load(value: object) -> Picture:
    if isinstance(value, Image.Image):
        return _rgb(value, "image", value)
    if isinstance(value, str | os.PathLike):
        with open_picture(value, "image", FORMATS) as picture:
            return _rgb(picture, "image", os.fspath(value))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = _channels_last(value)
    if not isinstance(value, np.ndarray):
        refuse("image", value, ALLOWED)
    if value.ndim != 3 or value.shape[2] != 3 or not 0 < value.shape[0] * value.shape[1] <= MAX_PIXELS:
        refuse("image", value, ALLOWED)
    if value.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(value))
    if value.dtype.kind != "f" or not (np.isfinite(value).all() and value.min() >= 0 and value.max() <= 1):
        refuse("image", value, ALLOWED)
    return FloatPicture(np.array(value, np.float32, order="C"))


def open_picture(path: str | os.PathLike[str], name: str, formats: tuple[str, ...]) -> Image.Image:
    """An image file of one of these formats and of bounded size, its header read, nothing decoded."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, a device has no end
            refuse(name, os.fspath(path), "a plain file")
        return Image.open(path, formats=formats)
    except InvalidArgument:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        _too_large(name, os.fspath(path))
    except FileNotFoundError:
        refuse(name, os.fspath(path), "a file that exists")
    except Exception as error:  # Pillow's readers raise nearly anything on a hostile file
        refuse(name, os.fspath(path), f"a readable {' or '.join(formats)} file ({first_line(error)})")


def _rgb(picture: Image.Image, name: str, shown: object) -> Image.Image:
    """The picture decoded, upright, opaque and in 8-bit RGB; a copy."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        _too_large(name, shown)
    if not width * height or picture.mode in ("I", "F"):
        refuse(name, shown, "a picture of at least one pixel, of 8 bits a channel (or 16-bit grey)")
    try:
        upright = eight_bit(ImageOps.exif_transpose(picture))
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a hostile file
        refuse(name, shown, f"a picture that can be decoded ({first_line(error)})")


def eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would cut off at 255; any other picture as it is."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray(np.round(np.asarray(picture) / 257).astype(np.uint8))


def _too_large(name: str, shown: object) -> NoReturn:
    refuse(name, shown, f"a picture of at most {MAX_PIXELS} pixels")
