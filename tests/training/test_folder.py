"""Training on a folder of one's own: what is read, what is skipped, and a whole run from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastldm
from fastldm.errors import InvalidArgument
from fastldm.training import run
from fastldm.training.folder import FolderData
from tests.training.test_train import of_folder


def picture(
    file: Path, width: int = 40, height: int = 40, colour: tuple[int, int, int] = (9, 90, 200)
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(file)
    return file


def captioned(folder: Path, name: str, text: str, **options: object) -> None:
    picture(folder / name, **options).with_suffix(".txt").write_text(text)


def test_text_files_and_metadata_say_the_same(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        picture(folder / "one.png", 64, 32)
        picture(folder / "deep" / "two.jpg", 32, 50)
    (tmp_path / "a" / "one.txt").write_text(" A blue  sky.\n")
    (tmp_path / "a" / "deep" / "two.txt").write_text("the sea")
    rows = [
        {"file_name": "deep/two.jpg", "text": "the sea"},
        {"file_name": "one.png", "text": "A blue  sky."},
    ]
    (tmp_path / "b" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    a, b = (FolderData.read(tmp_path / name, 32, report=pytest.fail) for name in "ab")
    assert a.texts == b.texts == ("the sea", "A blue  sky.") and torch.equal(a.images, b.images)
    assert a.images.shape == (2, 32, 32, 3) and tuple(a.images[1, 5, 5].tolist()) == (9, 90, 200)
    assert a.vocabulary() == ["the", "sea", "a", "blue", "sky", "."]
    assert [text for text, _ in a.captions([1, 0, 1], torch.Generator())] == [a.texts[i] for i in (1, 0, 1)]


def test_a_caption_may_hold_any_character_and_a_file_a_byte_order_mark(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    for folder in (tmp_path / "a", tmp_path / "b"):
        picture(folder / "one.png")
    row = json.dumps({"file_name": "one.png", "text": text}, ensure_ascii=False)
    (tmp_path / "a" / "metadata.jsonl").write_bytes((row + "\r\n").encode("utf-8-sig"))
    (tmp_path / "b" / "one.txt").write_bytes(text.encode("utf-8-sig"))
    for name in "ab":
        assert FolderData.read(tmp_path / name, 32, report=pytest.fail).texts == (text,)


def test_a_picture_is_shrunk_to_its_shorter_side_and_cropped_to_its_middle(tmp_path: Path) -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("white")
    assert FolderData.read(tmp_path, 32).images.float().mean() > 240


def test_what_cannot_be_used_is_counted_and_listed_or_an_error(tmp_path: Path) -> None:
    captioned(tmp_path, "good.png", "fine")
    captioned(tmp_path, "small.png", "too small", width=20)
    picture(tmp_path / "silent.png")
    captioned(tmp_path, "empty.png", "  ")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "broken.txt").write_text("damaged")
    said: list[str] = []
    data = FolderData.read(tmp_path, 32, report=said.append)
    assert data.texts == ("fine",)
    (text,) = said
    assert text.startswith("4 of 5 pictures")
    for name, why in (
        ("small", "32 pixels"),
        ("silent", "caption"),
        ("empty", "caption"),
        ("broken", "readable"),
    ):
        assert any(f"{name}.png" in line and why in line for line in text.splitlines()), text
    with pytest.raises(InvalidArgument, match="4 of 5") as caught:
        FolderData.read(tmp_path, 32, strict=True)
    assert caught.value.name == "data"


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": "no file"}', '{"file_name": "../out.png", "text": "x"}']
)
def test_a_bad_line_of_metadata_is_named(tmp_path: Path, line: str) -> None:
    picture(tmp_path / "out.png")
    folder = tmp_path / "data"
    picture(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(InvalidArgument, match="line 2"):
        FolderData.read(folder, 32)


def test_no_folder_and_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="a folder of pictures"):
        FolderData.read(tmp_path / "none", 32)
    with pytest.raises(InvalidArgument, match="with captions"):
        FolderData.read(tmp_path, 32)


def test_a_model_is_trained_on_a_folder_and_generates(tmp_path: Path) -> None:
    for i in range(6):
        captioned(tmp_path / "data", f"{i}.png", f"number {i} is blue", colour=(0, 0, 40 * i))
    config = tmp_path / "mine.toml"
    config.write_text(of_folder(tmp_path).replace("save_every = 2", "sample_every = 4"))
    said: list[str] = []
    output = run.main(config, said.append)
    assert "reconstruction of the first pictures" in "".join(said)
    result = fastldm.load(output).generate("number 3 is green", steps=2)
    assert result.image.size == (32, 32) and result.warnings == ("unknown words: green",)
    samples = Image.open(tmp_path / "run" / "samples-4.png")
    assert samples.size[0] > 4 * 32 and (tmp_path / "run" / "diffusion.png").exists()
