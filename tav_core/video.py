"""Clips in and out: decoding only the frames that are wanted, and writing videos that a browser plays.

PyAV and OpenCV are imported where they are used: the method itself, and its benchmark on a rented GPU, need neither.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .atomic import atomic_path
from .errors import TavError, field
from .limits import check

FITS = ("crop", "pad", "stretch")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FOLDER_FPS = 8.0  # a folder of images says nothing of time


@dataclass
class Clip:
    """Frames uint8 `f h w c` (RGB) and their rate."""

    frames: Tensor
    fps: float
    source: str


def load_video(
    path: str | Path,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    width: int | None = None,
    height: int | None = None,
    fit: str = "crop",
) -> Clip:
    """Reads frames start, start + stride, ... of an mp4, webm or gif file or of a folder of images.

    Args:
        count: how many; all to the end without it.
        width, height: size to bring the frames to; if one is missing it follows from the aspect ratio (even).
        fit: "crop" covers the size and cuts the rest, "pad" fits in with black bars, "stretch" distorts.

    Raises:
        TavError: no such file, not a video, fewer frames than asked for, a value out of range.
    """
    path = Path(path)
    given = {"start": start, "stride": stride, "count": count, "width": width, "height": height}
    check(**{name: value for name, value in given.items() if value is not None})
    if fit not in FITS:
        raise TavError("fit", fit, "is unknown", f"choose one of {', '.join(FITS)}")
    if not path.exists():
        raise TavError("video", path, "does not exist", "check where it is")
    source = _folder(path, start, stride) if path.is_dir() else _file(path, start, stride)
    fps = next(source)
    frames = []
    try:
        for frame in source:
            frames.append(_fit(frame, width, height, fit))
            if len(frames) == count:
                break
    finally:
        source.close()  # the decoder stops here, whatever is left in the file
    if not frames:
        raise TavError("start", start, f"is past the end of {path}", "give a smaller number")
    if count is not None and len(frames) < count:
        raise TavError(
            "count",
            count,
            f"is more than the {len(frames)} frames of {path} from {field('start')} {start} with "
            f"{field('stride')} {stride}",
            f"give {len(frames)}, or a smaller {field('stride')}",
        )
    if len({frame.shape for frame in frames}) > 1:
        raise TavError("video", path, "holds images of several sizes", f"give {field('size')} to bring them to one")
    return Clip(torch.from_numpy(np.stack(frames)), fps / stride, str(path))


def _folder(path: Path, start: int, stride: int) -> Iterator[float | np.ndarray]:
    """The rate, then the wanted images in natural order (2 before 10)."""
    names = [p for p in path.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".")]
    names.sort(key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name.lower())])
    if not names:
        raise TavError("video", path, "is a folder without images", f"put some there ({', '.join(IMAGES)})")
    yield FOLDER_FPS
    for name in names[start::stride]:
        try:
            yield _image(name)
        except (UnidentifiedImageError, OSError) as error:
            raise TavError("video", name, f"can't be read as an image ({error})", "remove or replace it") from error


def _image(path: Path) -> np.ndarray:
    """An image `h w 3`, upright, over black where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))


def _file(path: Path, start: int, stride: int) -> Iterator[float | np.ndarray]:
    """The rate, then the wanted frames, upright.

    PyAV rather than OpenCV: it counts frames exactly, reads gif and webm alike, and tells the rotation of phones.
    Frames before `start` and between strides are decoded, as codecs need, but never converted to RGB.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise TavError(
                    "video", path, "has no video stream", "give an mp4, webm or gif file or a folder of images"
                )
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield float(stream.average_rate or stream.base_rate or FOLDER_FPS)
            for index, frame in enumerate(container.decode(stream)):
                if index >= start and (index - start) % stride == 0:
                    turns = round(getattr(frame, "rotation", 0) / 90) % 4
                    yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            index = getattr(
                stream, "index_entries", ()
            )  # of mp4, from PyAV 17 on; the decoder takes a missing rest for the end
            if len(index) and (last := index[len(index) - 1]).pos + last.size > path.stat().st_size:
                raise TavError("video", path, "is cut off, its last frames are missing", "copy it again")
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TavError(
            "video", path, f"can't be decoded ({reason})", "if it is a video, convert it to mp4 again"
        ) from error


def _fit(frame: np.ndarray, width: int | None, height: int | None, fit: str) -> np.ndarray:
    """A frame `h w 3` at `width` x `height`."""
    h, w = frame.shape[:2]
    if width is None and height is None:
        return frame
    width = width or max(2, round(w * height / h / 2) * 2)
    height = height or max(2, round(h * width / w / 2) * 2)
    if fit == "stretch":
        return _resize(frame, width, height)
    scale = (max if fit == "crop" else min)(width / w, height / h)
    frame = _resize(frame, max(1, round(w * scale)), max(1, round(h * scale)))
    h, w = frame.shape[:2]
    if fit == "crop":
        top, left = (h - height) // 2, (w - width) // 2
        return np.ascontiguousarray(frame[top : top + height, left : left + width])
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    canvas[top : top + h, left : left + w] = frame
    return canvas


def _resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    import cv2

    h, w = frame.shape[:2]  # one axis may shrink while the other grows: INTER_AREA only averages where none grows
    shrunk = cv2.resize(frame, (min(w, width), min(h, height)), interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def save_video(frames: Tensor | np.ndarray, path: str | Path, fps: float):
    """Writes .mp4 (H.264, yuv420p, plays in browsers), .webm (VP9) or .gif, whole or not at all.

    Args:
        frames: `f h w c` RGB, uint8 or float in 0..1. Odd sizes grow by one pixel, a copy of the edge.
        fps: frames a second, 0.01 to 1000. A gif keeps time in hundredths of a second, 50 frames a second at most, and
            joins equal neighbours into one longer frame.

    Raises:
        TavError: another suffix, no frames, a rate out of range, or a file that can't be written.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    path = Path(path)
    codecs = {".mp4": ("libx264", {"crf": "17"}), ".webm": ("libvpx-vp9", {"crf": "24", "b": "0"}), ".gif": None}
    if path.suffix.lower() not in codecs:
        raise TavError("output", path, "ends in the suffix of no known format", "use .mp4, .webm or .gif")
    check(fps=fps)
    frames = torch.as_tensor(frames)
    if frames.ndim != 4 or len(frames) == 0 or frames.shape[-1] != 3:
        raise TavError(
            "frames", None, f"has shape {tuple(frames.shape)}, which is no video", "give f h w 3, one frame or more"
        )
    if frames.dtype != torch.uint8:
        frames = (frames * 255).round().clamp(0, 255).to(torch.uint8)
    frames = frames.cpu().numpy()
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".gif":
            images = [Image.fromarray(frame) for frame in frames]
            images[0].save(
                temporary, save_all=True, append_images=images[1:], duration=max(20, round(100 / fps) * 10), loop=0
            )
            return
        _, h, w, _ = frames.shape
        frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        codec, options = codecs[path.suffix.lower()]
        flags = {"movflags": "faststart"} if path.suffix.lower() == ".mp4" else {}
        try:
            with av.open(str(temporary), "w", options=flags) as container:
                stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = "yuv420p"
                # said aloud, because players guess BT.709 for large pictures
                stream.codec_context.colorspace = int(Colorspace.ITU601)
                stream.codec_context.color_range = int(ColorRange.MPEG)
                for frame in frames:
                    container.mux(
                        stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
                    )
                container.mux(stream.encode())
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise  # the disk: atomic_path says so
            raise TavError("output", path, f"can't be encoded ({error})", f"try another {field('size')}") from error


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 `f h w c` to float32 `1 c f h w` in -1..1, as the VAE takes them."""
    return rearrange(frames, "f h w c -> 1 c f h w").float() / 127.5 - 1


def to_frames(pixels: Tensor) -> Tensor:
    """`1 c f h w` in -1..1 (clamped) to uint8 `f h w c`."""
    pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "1 c f h w -> f h w c").contiguous()
