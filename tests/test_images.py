"""User images opened safely, PNG files that remember their making, writes that are whole or not at all."""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fastldm import images
from fastldm.errors import FastLDMError, InvalidArgument

MADE = {
    "version": "0.1.0",
    "model": "default",
    "model_hash": "0123456789abcdef",
    "arguments": {
        "prompt": "a large red fish, größer",
        "negative_prompt": "blurry\nfish",
        "steps": 25,
        "sampler": "euler_a",
        "guidance_scale": 7.5,
        "eta": 0.0,
        "seed": 7,
        "width": 16,
        "height": 8,
    },
}


def gradient(width=16, height=8):
    x = np.arange(width * height * 3).reshape(height, width, 3) * 255 // (width * height * 3)
    return Image.fromarray(x.astype(np.uint8))


def loaded(value, count=1):
    (picture,) = images.load_pictures(value, count)
    return picture


def refused(value, match=None):
    with pytest.raises(InvalidArgument, match=match) as caught:
        images.load_pictures(value, 1)
    assert caught.value.name == "image"
    assert "\n" not in str(caught.value)


def test_every_kind_of_image_gives_the_same_pixels(tmp_path):
    source = gradient()
    pixels = np.asarray(source)
    path = tmp_path / "in.png"
    source.save(path)
    chw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for value in (source, str(path), path, pixels, chw, pixels[None], chw[None], [source], (path,)):
        assert np.array_equal(np.asarray(loaded(value)), pixels)
    expected = pixels.astype(np.float32) / 255
    for value in (source, pixels / 255, chw / 255, (chw / 255)[None], [chw / 255], chw.double() / 255):
        assert np.allclose(images.stack([loaded(value)], 16, 8)[0], expected, atol=1e-7)


def test_float_pixels_keep_their_precision():
    fine = np.full((8, 16, 3), 0.1234567, np.float32)
    assert np.array_equal(images.stack([loaded(fine)], 16, 8)[0], fine)
    assert np.allclose(images.stack([loaded(fine)], 8, 4)[0], 0.1234567, atol=1e-6)


def test_resize_is_pillows_lanczos():
    source = gradient(37, 21)
    expected = np.asarray(source.resize((16, 8), Image.Resampling.LANCZOS), np.float32) / 255
    assert np.array_equal(images.stack([loaded(source)], 16, 8)[0], expected)
    as_floats = images.stack([loaded(np.asarray(source) / 255)], 16, 8)[0]
    # Pillow rounds to 8 bits after each of two passes; Lanczos weights sum to about 1.3 in absolute value.
    assert np.abs(as_floats - expected).max() <= (0.5 * 1.3 + 0.5) / 255
    hard_edge = np.zeros((8, 8, 3))
    hard_edge[:, 4:] = 1
    enlarged = images.stack([loaded(hard_edge)], 64, 64)
    assert enlarged.min() == 0 and enlarged.max() == 1  # Lanczos overshoots: clipped


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_become_rgb(mode):
    source = gradient().convert(mode)
    assert np.array_equal(np.asarray(loaded(source)), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composited_on_white(mode):
    source = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    source.putpixel((1, 0), (0, 0, 0, 255))
    pixels = np.asarray(loaded(source.convert(mode)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [0, 0, 0]


def test_palette_transparency_from_a_file(tmp_path):
    source = Image.new("P", (2, 1), 1)
    source.putpalette([0, 0, 0, 10, 20, 30])
    source.putpixel((0, 0), 0)
    source.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(loaded(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(loaded(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    source = Image.new("RGB", (32, 16), "red")
    source.paste("blue", (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    source.save(tmp_path / f"turned.{suffix}", exif=exif, quality=95)
    picture = loaded(tmp_path / f"turned.{suffix}")
    assert picture.size == (16, 32)
    red, blue = np.asarray(picture, int)[4, 8], np.asarray(picture, int)[28, 8]
    assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]


def test_the_format_is_decided_by_content(tmp_path):
    gradient().save(tmp_path / "really.png", "PNG")
    os.rename(tmp_path / "really.png", tmp_path / "named.jpg")
    assert loaded(tmp_path / "named.jpg").size == (16, 8)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(loaded(tmp_path / "a.webp"))[0, 0].tolist() == [255, 0, 0]


def test_other_formats_are_refused(tmp_path):
    for suffix in ("bmp", "gif", "tiff", "ppm"):
        gradient().save(tmp_path / f"x.{suffix}")
        refused(tmp_path / f"x.{suffix}", "a readable PNG or JPEG or WEBP file")


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8192, 8193), (12000, 12000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_capped_before_decoding(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        refused(tmp_path / "bomb.png", "at most 67108864 pixels")
    if size[0] == 12000:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused(tmp_path / "bomb.png", "at most 67108864 pixels")


def test_a_lazy_pil_image_is_capped_too(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(8192, 8193))
    with Image.open(tmp_path / "bomb.png") as lazy:
        refused(lazy, "at most 67108864 pixels")


def test_paths_that_are_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    refused(tmp_path / "pipe", "a plain file")
    refused(tmp_path, "a plain file")
    refused("/dev/zero", "a plain file")
    refused(tmp_path / "none.png", "a file that exists")
    refused("https://example.com/a.png", "a file that exists")
    refused(tmp_path / "empty.png", "a readable PNG")
    refused(tmp_path / "text.png", "a readable PNG")
    refused("nul\0.png")
    refused("\ud800.png")
    refused("")


def test_damaged_files_are_refused_or_read(tmp_path):
    """Bytes changed, cut out and cut off, 300 files: a picture or an InvalidArgument, nothing else."""
    chance = random.Random(3)
    sources = []
    for name, options in (
        ("PNG", {}),
        ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08"}),
        ("WEBP", {"lossless": True}),
    ):
        buffer = io.BytesIO()
        gradient(64, 48).save(buffer, name, **options)
        sources.append(buffer.getvalue())
    path, outcomes = tmp_path / "damaged", {"read": 0, "refused": 0}
    for round_number in range(300):
        data = bytearray(sources[round_number % 3])
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if round_number % 4 == 0:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded(path)
            outcomes["read"] += 1
        except InvalidArgument as error:
            assert error.name == "image" and "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8)),
        np.zeros((8, 8, 4)),
        np.zeros((3, 8, 8)),
        np.zeros((0, 8, 3)),
        np.zeros((8, 8, 3), np.int64),
        np.zeros((8, 8, 3), bool),
        np.full((8, 8, 3), 1.01),
        np.full((8, 8, 3), -0.01),
        np.full((8, 8, 3), np.nan),
        np.zeros((2, 8, 8, 3)),
        np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (8192, 8193, 3)),
        torch.zeros(8, 8, 3),
        torch.zeros(3, 8, 8, dtype=torch.int32),
        torch.zeros(3, 8, 8, device="meta"),
        torch.zeros(3, 8, 8).to_sparse(),
        torch.zeros(2, 3, 8, 8),
        Image.new("RGB", (0, 8)),
        Image.new("F", (8, 8)),
        Image.new("I", (8, 8)),
        [],
        [None],
        7,
        b"\x89PNG",
        {},
    ],
    ids=lambda wrong: f"{type(wrong).__name__} {getattr(wrong, 'shape', '')}",
)
def test_wrong_images(wrong):
    refused(wrong)


def test_a_truncated_lazy_pil_image_is_refused():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    with Image.open(io.BytesIO(buffer.getvalue()[:900])) as lazy:
        refused(lazy, "can be decoded")


def test_grid():
    colours = ("red", "lime", "blue", "white", "yellow")
    sheet = images.grid([Image.new("RGB", (4, 2), name) for name in colours])
    assert sheet.size == (12, 4)
    assert [sheet.getpixel((4 * (k % 3), 2 * (k // 3))) for k in range(6)] == [
        *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (255, 255, 0), (0, 0, 0))
    ]
    assert images.grid([gradient()]).tobytes() == gradient().tobytes()
    assert images.grid([gradient()] * 2).size == (32, 8)


def test_parameters_text_as_a1111_writes_it():
    assert images.parameters_text(MADE) == (
        "a large red fish, größer\n"
        "Negative prompt: blurry\nfish\n"
        "Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 16x8, Model hash: 0123456789, "
        "Model: default, Version: fastldm 0.1.0"
    )
    bare = {"prompt": None, "negative_prompt": None, "guidance_scale": 1.0, "sampler": "ddpm"}
    more = {"version": "1", "arguments": MADE["arguments"] | bare | {"strength": 0.75, "eta": 0.5}}
    assert images.parameters_text(more) == (
        "\nSteps: 25, Sampler: ddpm, CFG scale: 1, Seed: 7, Size: 16x8, Denoising strength: 0.75, Eta: 0.5, "
        "Version: fastldm 1"
    )


def test_png_round_trip(tmp_path):
    (path,) = images.save_pictures(tmp_path / "out.png", [gradient()], [MADE])
    assert path == tmp_path / "out.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(gradient()))
    made = images.read_metadata(path)
    assert made == {"fastldm": MADE, "parameters": images.parameters_text(MADE)}
    assert Image.open(path).info["parameters"] == made["parameters"]  # what other programs read
    images.save_pictures(path, [gradient()], [None])
    assert images.read_metadata(path) == {"fastldm": None, "parameters": None}


@pytest.mark.parametrize("prompt", ["", "日本 🐟", "a\0b", "x" * 32_000, "é" * 32_000, '", \\ {"}\r\n\t'])
def test_any_prompt_survives_the_png(tmp_path, prompt):
    made = MADE | {"arguments": MADE["arguments"] | {"prompt": prompt, "seed": 2**64 - 1}}
    images.save_pictures(tmp_path / "out.png", [gradient()], [made])
    assert images.read_metadata(tmp_path / "out.png")["fastldm"] == made


@pytest.mark.parametrize(
    "chunk",
    ["", "{", "[1]", "7", "null", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", " " * 2**20 + "{}"],
    ids=lambda chunk: chunk[:8],
)
def test_damaged_metadata_is_refused(tmp_path, chunk):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("fastldm", chunk)
    gradient().save(tmp_path / "odd.png", pnginfo=chunks)
    with pytest.raises(InvalidArgument, match=r"^path=.*chunk is a JSON object"):
        images.read_metadata(tmp_path / "odd.png")


def test_metadata_of_what_is_no_png(tmp_path):
    gradient().save(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", tmp_path / "none.png", tmp_path):
        with pytest.raises(InvalidArgument, match=r"^path="):
            images.read_metadata(path)


def test_metadata_is_read_without_decoding(tmp_path):
    data = images.encode_png(gradient(), MADE)
    cut = data[: data.index(b"IDAT") + 8]
    (tmp_path / "cut.png").write_bytes(cut)
    assert images.read_metadata(tmp_path / "cut.png")["fastldm"] == MADE


def test_several_pictures_are_numbered(tmp_path):
    pictures = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (1, 2, 3)]
    made = [MADE | {"model": str(index)} for index in range(3)]
    paths = images.save_pictures(tmp_path / "a.b.png", pictures, made)
    assert [path.name for path in paths] == ["a.b-0.png", "a.b-1.png", "a.b-2.png"]
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == [1, 2, 3]
    assert [images.read_metadata(path)["fastldm"]["model"] for path in paths] == ["0", "1", "2"]
    (sheet,) = images.save_pictures(tmp_path / "sheet.png", pictures, made, as_grid=True)
    assert sheet.name == "sheet.png" and Image.open(sheet).size == (16, 16)
    assert sorted(os.listdir(tmp_path)) == ["a.b-0.png", "a.b-1.png", "a.b-2.png", "sheet.png"]


def test_several_pictures_are_an_animation(tmp_path):
    pictures = [gradient(), gradient().transpose(Image.Transpose.FLIP_LEFT_RIGHT), gradient()]
    (path,) = images.save_pictures(tmp_path / "walk.gif", pictures, [MADE] * 3)
    with Image.open(path) as animation:
        assert (animation.format, animation.n_frames, animation.info["loop"]) == ("GIF", 3, 0)
        for index, picture in enumerate(pictures):
            animation.seek(index)
            assert animation.info["duration"] == images.FRAME
            shown, meant = (np.asarray(each.convert("RGB"), np.float32) for each in (animation, picture))
            assert np.abs(shown - meant).mean() < 8  # a palette of 256 colours
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match="for several pictures in .gif"):
        images.save_pictures(path, pictures[:1], [MADE])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["walk.gif"]


@pytest.mark.parametrize(
    "name", ["out", "out.jpg", "missing/out.png", ".png", "", "file.txt/out.png", "\0.png"]
)
def test_bad_output_paths(tmp_path, name):
    (tmp_path / "file.txt").touch()
    with pytest.raises(InvalidArgument, match=r"^path="):
        images.output_paths(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == ["file.txt"]


def test_other_bad_output_paths(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "out-1.png").mkdir()
    for path, count in (
        (7, 1),
        (None, 1),
        (b"out.png", 1),
        ("x" * 300 + ".png", 1),
        (tmp_path / "folder.png", 1),
    ):
        with pytest.raises(InvalidArgument, match=r"^path="):
            images.output_paths(path, count)
    for name, count in (("pipe.png", 1), ("out.png", 2)):
        with pytest.raises(InvalidArgument, match="a new or a plain file"):
            images.output_paths(tmp_path / name, count)
    assert images.output_paths(tmp_path / "out.PNG") == [tmp_path / "out.PNG"]


def test_an_unwritable_folder_is_found_by_trying(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(InvalidArgument, match=r"folder that can be written \(read-only file system\)"):
        images.output_paths(tmp_path / "out.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidArgument, match="permission denied"):
        images.output_paths(tmp_path / "out.png")


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    """The second file does not fit: neither is replaced, nothing is left over."""
    for name in ("out-0.png", "out-1.png"):
        (tmp_path / name).write_bytes(b"old")

    def full(path, mode):
        stream = open(path, mode)
        if len(os.listdir(tmp_path)) > 3:
            stream.close()
            raise OSError(28, "No space left on device")
        return stream

    monkeypatch.setattr(images, "open", full, raising=False)
    with pytest.raises(FastLDMError, match=r"^cannot write .*out-1.png: no space left on device$"):
        images.write_files({tmp_path / "out-0.png": b"new", tmp_path / "out-1.png": b"new"})
    assert sorted(os.listdir(tmp_path)) == ["out-0.png", "out-1.png"]
    assert (tmp_path / "out-0.png").read_bytes() == (tmp_path / "out-1.png").read_bytes() == b"old"


def test_a_replaced_file_keeps_its_mode(tmp_path):
    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    target.chmod(0o600)
    images.write_files({target: b"new"})
    assert target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_write_that_fails_late(tmp_path, monkeypatch):
    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    monkeypatch.setattr(images, "open", lambda path, mode: open("/dev/full", "wb"), raising=False)
    with pytest.raises(FastLDMError, match="no space left"):
        images.write_files({target: b"new"})
    assert target.read_bytes() == b"old"


def test_an_interrupt_leaves_nothing_over(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        images.write_files({tmp_path / "out.png": b"new"})
    assert os.listdir(tmp_path) == []


def test_files_have_the_users_mode_and_links_stay(tmp_path):
    old = os.umask(0o027)
    try:
        (tmp_path / "real").mkdir()
        (tmp_path / "link.png").symlink_to("real/out.png")
        images.write_files({tmp_path / "link.png": b"new"})
    finally:
        os.umask(old)
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real" / "out.png").read_bytes() == b"new"
    assert (tmp_path / "real" / "out.png").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "real") == ["out.png"]


def test_the_json_chunk_is_plain_ascii_json():
    data = images.encode_png(gradient(), MADE)
    text = re.search(rb"tEXtfastldm\0(\{.*?\}\})", data)[1]
    assert json.loads(text) == MADE
