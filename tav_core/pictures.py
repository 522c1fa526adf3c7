"""Clips that are pictures: folders of them, and animated ones."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import TavError
from .events import Callback, Reading
from .timeline import FOLDER_FPS, Footage, Shown, timeline_of

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATED = ("WEBP", "PNG", "AVIF")  # formats that may be
ALONE = (*ANIMATED, "JPEG", "BMP", "TIFF")  # formats of files that are one picture


def pictures(folder: Path) -> list[Path]:
    """The images of a folder in natural order (2 before 10)."""
    names = [p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".")]
    return sorted(names, key=lambda p: [int(part) if i % 2 else part
                                        for i, part in enumerate(re.split(r"(\d+)", p.name.lower()))])  # fmt: skip


def is_animated(path: Path) -> bool:
    """Whether a file is a webp, png or avif that moves, told from its first bytes."""
    with open(path, "rb") as file:
        head = file.read(64)
    webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20:21] and head[20] & 2
    return bool(webp or head[4:12] == b"ftypavis" or head[1:4] == b"PNG" and b"acTL" in head)


def folder_footage(folder: Path, callback: Callback) -> Footage:
    """The images of a folder as a clip.

    Args:
        callback: gets a `Reading` for every image that is opened.

    Raises:
        TavError: there are none, or, when they are decoded, one that can't be read.
    """
    try:
        names = pictures(folder)
    except OSError as error:
        raise TavError("video", folder, f"can't be read ({error.strerror})", "check its permissions") from error
    if not names:
        raise TavError("video", folder, "is a folder without images", f"put some there ({', '.join(IMAGES)})")

    def frames(start: int) -> Iterator[Shown]:
        for number, name in enumerate(names[start:], start):
            callback(Reading(number - start + 1))
            yield number, number + 1, partial(_image, name)

    return Footage(Fraction(FOLDER_FPS), len(names), frames)


def picture_footage(path: Path, callback: Callback) -> Footage | None:
    """A file that holds one picture or an animation other than a gif; None if it is no such file.

    Args:
        callback: gets a `Reading` for every picture that is looked at.

    Raises:
        TavError: a damaged one.
    """
    Image.init()
    with _told(path):
        try:
            image = Image.open(path, formats=[name for name in ALONE if name in Image.OPEN])
        except UnidentifiedImageError:
            return None
        last = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        first = int(last > 1 and image.info.get("default_image", False))  # which is for those that know no APNG
    with image:
        if last - first == 1:
            return Footage(Fraction(FOLDER_FPS), 1, lambda start: iter([(0, 1, partial(_image, path))]))
        stamps = [0]
        for index in range(first, last):
            callback(Reading(index + 1))
            with _told(path):
                image.seek(index)
                image.load()  # before it, webp tells the time of the frame before
                duration = round(image.info.get("duration", 0))
            stamps.append(stamps[-1] + (duration if duration > 10 else 100))  # as browsers do
    line = timeline_of(stamps[:-1], stamps[-1], Fraction(1, 1000), ())

    def frames(start: int) -> Iterator[Shown]:
        with _told(path):
            image = Image.open(path)
        with image:
            for place, (number, until) in enumerate(zip(line.numbers, line.numbers[1:])):
                if until > start:
                    callback(Reading(place + 1))
                    with _told(path):
                        image.seek(first + place)
                        picture = flat(image), 1.0
                    yield number, until, partial(tuple, picture)

    return Footage(line.rate, line.total, frames)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever Pillow raises for a file becomes one line: its plugins have no error in common."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 1_000_000
        raise TavError("video", path, f"has more than {most} million pixels", "make it smaller") from error
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TavError("video", path, f"can't be read as an image ({told})", "remove or replace it") from error


def _image(path: Path) -> tuple[np.ndarray, float]:
    """An image `h w 3`, upright, over black where it is transparent."""
    if not path.is_file():  # a pipe would be waited for
        raise TavError("video", path, "is no file", "remove it from the folder")
    with _told(path), Image.open(path) as image:
        return flat(ImageOps.exif_transpose(image)), 1.0


def flat(image: Image.Image) -> np.ndarray:
    """An image of any mode as uint8 `h w 3`, over black where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))
