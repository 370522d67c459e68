"""From a file's bytes (JPEG, PNG, TIFF, ...) to RGB with 8 bits a channel.

- Integers of more bits are scaled by their type's range, not by what an image happens to hold; floats and signed
  or 32-bit integers have no range that could be known and are refused.
- Transparent areas become white. - Of animations and files with several pages the first picture counts. - The
orientation that cameras note beside the pixels (EXIF) is not applied: most pretrained weights were trained on photos
without it.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from d2ft_hpc.errors import DataError

_NO_PICTURES = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that PIL names but does not decode itself (for EPS it starts Ghostscript), and FITS, whose numbers have no
range."""
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""TIFF's tags, and a value of the second."""
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Of an image; PIL opens none that has more."""


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read, as PIL names them, the common ones first."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in _NO_PICTURES)


@functools.cache
def endings() -> frozenset[str]:
    """Of the files in these formats: ".jpg", ".png", ..., in lower case."""
    known = formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def size(data: bytes) -> tuple[int, int]:
    """(width, height). Raises DataError, without a name, for what `decode` refuses before it looks at the pixels."""
    with _open(data) as picture:
        return picture.width, picture.height


def look(data: bytes) -> None:
    """Raises DataError as `size` does, and where a JPEG or PNG lacks its end mark, also as `decode` does."""
    size(data)
    if any(data.startswith(begin) and end not in data[-_TAIL_BYTES:] for begin, end in _ENDS):
        decode(data)


_ENDS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND"))
"""How files begin and end, apart from what some cameras and programs append."""
_TAIL_BYTES = 1024


def decode(data: bytes) -> Image.Image:
    """The picture in mode RGB. Raises DataError, without a name, if it is damaged or of no known range."""
    with _open(data) as picture:
        try:
            return _in_rgb(picture)
        except Exception as error:  # PIL answers damage with many kinds
            raise _unreadable(str(error).strip() or type(error).__name__) from error


def _open(data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError as error:
        fault = "in no format that PIL reads" if data else "an empty file"
        raise _unreadable(fault) from error
    except Exception as error:  # too many pixels, damage
        raise _unreadable(str(error).strip() or type(error).__name__) from error
    # PIL keeps 16 bits of PNG and PGM in mode I, scaled to 0..65535.
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        kind = "floats" if picture.mode == "F" else "signed or 32-bit integers"
        raise DataError(f"its pixels are {kind}, whose range is not known: scale them to 8 or 16 bits")
    return picture


def _unreadable(fault: str) -> DataError:
    return DataError(f"not a readable image ({fault}); replace or remove it")


def _in_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;"):
        return _grey(picture).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    if picture.mode in ("La", "RGBa"):  # multiplied by the transparency
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}[picture.mode])
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _grey(picture: Image.Image) -> Image.Image:
    """Integers of up to 16 bits in mode L."""
    of_tiff = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    most = 2 ** int(of_tiff.get(_BITS, (16,))[0]) - 1
    values = np.minimum(np.asarray(picture).astype(np.int64), most)
    if of_tiff.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = most - values
    return Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
