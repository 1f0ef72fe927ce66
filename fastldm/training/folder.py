"""Pictures with captions from a folder: Hugging Face's metadata.jsonl, or a text file beside each picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastldm.errors import InvalidArgument
from fastldm.images import load_pictures
from fastldm.scenes.captions import words
from fastldm.training.data import PictureData
from fastldm.training.origin import digest

INDEX = "metadata.jsonl"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_WORDS = 8_000
SHOWN = 10  # of what was skipped


@dataclass(frozen=True)
class FolderData(PictureData):
    """Pictures of one size with one caption each."""

    texts: tuple[str, ...]

    @classmethod
    def read(
        cls, folder: Path, side: int, strict: bool = False, report: Callable[[str], None] = print
    ) -> FolderData:
        """Every picture of a folder that has a caption and at least side × side pixels, shrunk until its
        shorter side fits and cropped to its middle.

        Captions stand in metadata.jsonl, lines of {"file_name": …, "text": …}, or in name.txt beside name.png
        (also .jpg, .jpeg, .webp). What cannot be used is skipped and reported with a count and a list; strict
        makes it an InvalidArgument, as is a folder with nothing to use.
        """
        if not folder.is_dir():
            raise InvalidArgument("data", str(folder), "a folder of pictures")
        pictures: list[NDArray[np.uint8]] = []
        texts: list[str] = []
        skipped: list[str] = []
        for file, text in _captioned(folder):
            try:
                picture, caption = _usable(file, text, side)
            except InvalidArgument as error:
                skipped.append(f"{file.relative_to(folder)}: wants {error.allowed}")
                continue
            pictures.append(_fitted(picture, side))
            texts.append(caption)
        if skipped:
            shown = "\n  ".join(skipped[:SHOWN] + ["…"] * (len(skipped) > SHOWN))
            told = f"{len(skipped)} of {len(skipped) + len(texts)} pictures cannot be used:\n  {shown}"
            if strict:
                raise InvalidArgument("data", str(folder), f"pictures that can all be used; {told}")
            report(told)
        if not texts:
            raise InvalidArgument("data", str(folder), f"pictures of {side} pixels a side with captions")
        images = torch.from_numpy(np.stack(pictures))
        return cls(images, torch.zeros(1, 1, 1, dtype=torch.uint8).expand(images.shape[:3]), tuple(texts))

    @property
    def captions_digest(self) -> str:
        """Of the captions."""
        return digest(self.texts)

    def captions(self, rows: list[int], generator: torch.Generator) -> list[tuple[str, frozenset[str]]]:
        """The caption of each row; no facts are known."""
        return [(self.texts[row], frozenset()) for row in rows]

    def vocabulary(self) -> list[str]:
        """The words of all captions, the commonest first, at most MOST_WORDS."""
        counts = Counter(word for text in self.texts for word in words(text))
        return [word for word, _ in counts.most_common(MOST_WORDS)]


def _captioned(folder: Path) -> Iterator[tuple[Path, object]]:
    """Each picture file with what stands for its caption, None where nothing does."""
    index = folder / INDEX
    if not index.exists():
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in ENDINGS:
                beside = file.with_suffix(".txt")
                yield file, _text(beside) if beside.is_file() else None
        return
    for number, line in enumerate(_text(index).split("\n"), 1):  # a caption may hold other ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = folder / row["file_name"]
        except (ValueError, TypeError, KeyError):
            raise InvalidArgument("data", f"{index}, line {number}", '{"file_name": …, "text": …}') from None
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InvalidArgument("data", f"{index}, line {number}", "a file_name inside the folder")
        yield file, row.get("text")


def _text(file: Path) -> str:
    """UTF-8, with a byte order mark or without."""
    return file.read_text("utf-8-sig", errors="replace")


def _usable(file: Path, text: object, side: int) -> tuple[Image.Image, str]:
    """The picture and its caption; InvalidArgument says what they are not."""
    if not isinstance(text, str) or not text.strip():
        raise InvalidArgument("text", text, "a caption")
    picture = load_pictures(file, 1)[0]
    assert isinstance(picture, Image.Image)
    if min(picture.size) < side:
        raise InvalidArgument("size", picture.size, f"at least {side} pixels a side")
    return picture, text.strip()


def _fitted(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """The middle of a picture whose shorter side was brought to `side`: uint8 [side, side, 3]."""
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + side, top + side)))
