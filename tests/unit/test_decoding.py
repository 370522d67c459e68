"""What pixels become, whatever format and type they are stored in."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2ft_hpc.data.decoding import decode
from d2ft_hpc.data.loader import eval_loader
from d2ft_hpc.data.packed import open_packed
from d2ft_hpc.data.packing import pack_by_name
from d2ft_hpc.errors import DataError
from tests.splits import open_images

WORDS = np.array([[0, 8000], [50000, 65535]], np.uint16)
BYTES = [0, 31, 195, 255]
"""The same in 8 bits."""


def encoded(pixels: Any, format: str, mode: str | None = None, **options: Any) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    file = io.BytesIO()
    (picture if mode is None else picture.convert(mode)).save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, row: bytes) -> bytes:
    """A PNG of kinds that PIL does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(bits: int, photometric: int, row: bytes, sample_format: int = 1) -> bytes:
    """A TIFF of two pixels."""
    numbers = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 1)]
    numbers += [(279, len(row)), (339, sample_format)]
    start = 8 + 2 + 12 * len(numbers) + 4
    entries = b"".join(
        struct.pack("<HHIHH", tag, 3, 1, start if tag == 273 else value, 0) for tag, value in numbers
    )
    return b"II*\0" + struct.pack("<IH", 8, len(numbers)) + entries + bytes(4) + row


def greys(data: bytes) -> list[int]:
    pixels = np.asarray(decode(data))
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert (pixels == pixels[..., :1]).all()
    values: list[int] = pixels[..., 0].ravel().tolist()
    return values


def colours(data: bytes) -> list[list[int]]:
    values: list[list[int]] = np.asarray(decode(data)).reshape(-1, 3).tolist()
    return values


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_by_their_range(format: str) -> None:
    assert greys(encoded(WORDS, format)) == BYTES


def test_other_depths() -> None:
    assert greys(b"P5 2 1 4095\n" + struct.pack(">2H", 2048, 4095)) == [128, 255]
    assert greys(tiff(12, 1, bytes([0x80, 0x0F, 0xFF]))) == [128, 255]
    assert greys(tiff(16, 0, struct.pack("<2H", 8000, 65535))) == [224, 0]  # where 0 is white
    assert greys(png(4, 1, 2, 0, bytes([0b00011011]))) == [0, 85, 170, 255]
    assert greys(encoded(np.array([[False, True]]), "PNG")) == [0, 255]
    assert colours(png(2, 1, 16, 2, struct.pack(">6H", 8000, 50000, 65535, 0, 8000, 50000))) == [
        [31, 195, 255],
        [0, 31, 195],
    ]


def test_what_is_transparent_shows_white() -> None:
    rgba = np.array([[[0, 0, 0, 0], [10, 20, 30, 255], [100, 100, 100, 128]]], np.uint8)
    shown = [[255, 255, 255], [10, 20, 30], [177, 177, 177]]
    assert colours(encoded(rgba, "PNG")) == shown
    assert colours(encoded(rgba, "WEBP", lossless=True, exact=True)) == shown
    assert greys(encoded(np.array([[[0, 0], [9, 255]]], np.uint8), "PNG")) == [255, 9]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    assert colours(encoded(palette, "PNG")) == [[9, 9, 9], [50, 60, 70]]
    assert colours(encoded(palette, "PNG", transparency=0)) == [[255, 255, 255], [50, 60, 70]]
    assert colours(encoded(palette, "GIF", transparency=1)) == [[9, 9, 9], [255, 255, 255]]
    assert greys(encoded(np.array([[5, 6]], np.uint8), "PNG", transparency=5)) == [255, 6]


def test_other_colours_and_first_pictures() -> None:
    assert colours(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [[255, 0, 0]]
    first, second = (Image.new("L", (1, 1), value) for value in (7, 200))
    assert greys(encoded(first, "TIFF", save_all=True, append_images=[second])) == [7]
    turned = Image.new("RGB", (2, 1))
    exif = turned.getexif()
    exif[274] = 6
    assert decode(encoded(turned, "PNG", exif=exif)).size == (2, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(np.zeros((2, 2), np.float32), "TIFF"), "its pixels are floats, whose range is not known"),
        (encoded(np.zeros((2, 2), np.float32), "PPM"), "floats"),
        (encoded(WORDS.astype(np.int32), "TIFF"), "signed or 32-bit integers"),
        (tiff(16, 1, struct.pack("<2h", -5, 30000), sample_format=2), "signed or 32-bit integers"),
        (png(20000, 20000, 8, 0, b"\0"), "400000000 pixels.*replace or remove it"),
        (encoded(np.zeros((64, 64), np.uint8), "JPEG")[:200], "not a readable image"),
        (b"", "an empty file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "in no format"),
        (b"text", "in no format that PIL reads"),
    ],
)
def test_what_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes that differ in bits which a clip to 8 would lose."""
    for split in ("train", "test"):
        for name, value in (("cat", 8000), ("dog", 50000)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("encoding", ["original", "pixels"])
def test_16_bits_reach_the_model_and_the_packed_file(folder: Path, encoding: str) -> None:
    pack_by_name("image_folder", folder, folder / "packed.h5", encoding=encoding)
    for name, root in (("image_folder", folder), ("packed", folder / "packed.h5")):
        images = open_images(name, root=root, image_size=8, split="train", mean=(0, 0, 0), std=(1, 1, 1))
        assert [round(float(images[i][0].mean() * 255)) for i in (0, 4)] == [31, 195]
    assert open_packed(folder / "packed.h5", "test").images.tensor(4)[0, 0, 0] == 195


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_name_a_damaged_file_in_one_line(folder: Path, workers: int) -> None:
    (folder / "train" / "dog" / "1.png").write_bytes(png(20000, 20000, 8, 0, b"\0"))
    images = open_images("image_folder", root=folder, image_size=8, split="train")
    with pytest.raises(DataError) as caught:
        list(eval_loader(images, batch_size=2, num_workers=workers))
    text = str(caught.value)
    assert text.startswith(f"{folder}/train/dog/1.png: not a readable image")
    assert len(text) < len(str(folder)) + 250
    assert "\n" not in text
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        pack_by_name("image_folder", folder, folder / "no.h5", encoding="jpeg")
    assert not (folder / "no.h5").exists()
