"""Clips in and out: the wanted frames of a clip at a constant rate, and videos that a browser plays.

PyAV and OpenCV are imported where they are used: the method itself, and its benchmark on a rented GPU, need neither.
"""

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from .atomic import atomic_path
from .containers import video_footage
from .errors import TavError, field, shortened
from .events import Callback, Note, ignored
from .frames import Frames, as_frames, told
from .limits import check
from .pictures import folder_footage, picture_footage
from .sound import Sound, read_sound, sound_track
from .timeline import FASTEST, SLOWEST, Footage

MOST = 100_000  # frames that are read without being asked for
FITS = ("crop", "pad", "stretch")


@dataclass
class Clip:
    """A clip, as `load_video` reads it, or made of frames that are at hand.

    Attributes:
        frames: uint8 `f h w 3` (RGB); given in any form that `as_frames` takes, they come to this one.
        fps: frames a second, of these frames.
        source: where it is from, for people.
        sound: what is heard while they are shown.

    Raises:
        TavError: frames that are none.
    """

    frames: Tensor
    fps: float
    source: str
    sound: Sound | None = None

    def __post_init__(self):
        self.frames = as_frames(self.frames)

    def __repr__(self) -> str:
        sound = "silent" if self.sound is None else repr(self.sound)
        return f"Clip({told(self.frames)}, {self.fps:.4g} fps, {sound}, {shortened(self.source, 60)!r})"


def load_video(
    path: str | Path,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    width: int | None = None,
    height: int | None = None,
    fit: str = "crop",
    sound: bool = True,
    callback: Callback = ignored,
) -> Clip:
    """Reads frames start, start + stride, ... of a video, an animation or a folder of images.

    Frames are counted at a constant rate. A video of another kind, as of a screen recorder, is taken at its usual rate,
    and what is shown for longer comes several times (see `Timeline`): the clip plays in the time that it took.
    Pictures come as a player shows them: upright, with square pixels, over black, in the colours of an SDR screen.

    Args:
        path: whatever FFmpeg reads (mp4, webm, mov, gif ...), an animated webp, png or avif, or a folder of images in
            the order of their names.
        start: number of the first frame, from 0.
        stride: every how many-th frame.
        count: how many; all to the end without it.
        width, height: size to bring the frames to; if one is missing it follows from the aspect ratio (even).
        fit: "crop" covers the size and cuts the rest, "pad" fits in with black bars, "stretch" distorts.
        sound: whether to read it too.
        callback: gets a `Reading` for each frame that is looked at, and a `Note` where sound has to be left out; it
            stops the reading by raising.

    Returns: the clip; its rate is that of the frames that were taken, so a stride divides it.

    Raises:
        TavError: no such file, not a video, fewer frames than asked for, a value out of range.
    """
    path = Path(path)
    given = {"start": start, "stride": stride, "count": count, "width": width, "height": height}
    check(**{name: value for name, value in given.items() if value is not None})
    if fit not in FITS:
        raise TavError("fit", fit, "is unknown", f"choose one of {', '.join(FITS)}")
    footage = _footage(path, callback)
    fps = float(footage.rate / stride)
    if not SLOWEST <= fps <= FASTEST:
        problem = f"makes {fps:.2g} frames a second of {path}"
        raise TavError("stride", stride, problem, f"give one that makes {SLOWEST:g} to {FASTEST:g}")
    if footage.total is not None:  # else it shows when they are decoded
        found = len(range(start, footage.total, stride))
        _check_count(path, found, start, stride, count)
        if count is None and found > MOST:  # of a damaged file, as a rule
            raise TavError("count", None, f"is missing, and {path} lasts for {found} frames", "say how many to take")
    shown = _shown(
        footage, start, stride, lambda pixels, aspect: footage.finish(_fit(pixels, aspect, width, height, fit))
    )
    try:
        frames = list(islice(shown, count))
    finally:
        shown.close()  # the decoder stops here, whatever is left in the file
    _check_count(path, len(frames), start, stride, count)
    if len({frame.shape for frame in frames}) > 1:
        raise TavError("video", path, "holds images of several sizes", f"give {field('size')} to bring them to one")
    heard = None
    if sound and footage.begin is not None:
        try:
            heard = read_sound(path, footage.begin + float(start / footage.rate), len(frames) / fps, callback)
        except TavError:
            callback(Note(f"the sound of {path} can't be decoded and is left out"))
    return Clip(torch.from_numpy(np.stack(frames)), fps, str(path), heard)


def _footage(path: Path, callback: Callback) -> Footage:
    """Raises a TavError for what is neither a regular file nor a folder."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TavError("video", path, "does not exist", "check where it is") from error
    except (OSError, ValueError) as error:  # a name too long, a link to itself, a null byte, no permission
        reason = getattr(error, "strerror", None) or str(error)
        raise TavError("video", path, f"can't be read ({reason})", "check where it is") from error
    if stat.S_ISDIR(mode):
        return folder_footage(path, callback)
    if not stat.S_ISREG(mode):  # a pipe would be waited for
        raise TavError("video", path, "is no file", "give a video or a folder of images")
    return picture_footage(path, callback) or video_footage(path, callback)


def _shown(footage: Footage, start: int, stride: int, convert: Callable[[np.ndarray, float], np.ndarray]) -> Iterator:
    """What is shown at the numbers start, start + stride, ...; each frame is converted once, and only if it is."""
    number, frame = start, None
    for first, until, decode in footage.frames(start):
        while frame is not None and number < first:  # the file lacks one: the last one stays
            yield frame
            number += stride
        frame = convert(*decode()) if number < until else None
        while number < until:
            yield frame
            number += stride


def _check_count(path: Path, found: int, start: int, stride: int, count: int | None):
    if not found:
        raise TavError("start", start, f"is past the end of {path}", "give a smaller number")
    if count is not None and found < count:
        raise TavError(
            "count",
            count,
            f"is more than the {found} frames of {path} from {field('start')} {start} with {field('stride')} {stride}",
            f"give {found}, or a smaller {field('stride')}",
        )


def _fit(frame: np.ndarray, aspect: float, width: int | None, height: int | None, fit: str) -> np.ndarray:
    """A frame `h w 3` at `width` x `height`, whose own pixels are `aspect` times as wide as high."""
    h, w = frame.shape[:2]
    if width is None and height is None and aspect == 1:
        return frame
    w, h = (w * aspect, h) if aspect > 1 else (w, h / aspect)  # no pixel is lost
    if width is None and height is None:
        return _resize(frame, round(w / 2) * 2, round(h / 2) * 2)
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
    canvas = np.zeros((height, width, 3), frame.dtype)
    top, left = (height - h) // 2, (width - w) // 2
    canvas[top : top + h, left : left + w] = frame
    return canvas


def _resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    import cv2

    h, w = frame.shape[:2]  # one axis may shrink while the other grows: INTER_AREA only averages where none grows
    shrunk = cv2.resize(frame, (min(w, width), min(h, height)), interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def save_video(frames: Frames, path: str | Path, fps: float, sound: Sound | None = None):
    """Writes .mp4 (H.264, yuv420p, plays in browsers), .webm (VP9) or .gif, whole or not at all.

    The same frames make the same file.

    Args:
        frames: `f h w c` RGB, uint8 or float in 0..1, or images of Pillow (see `as_frames`). Odd sizes grow by one
            pixel, a copy of the edge.
        fps: frames a second, 0.01 to 1000. A gif keeps time in hundredths of a second, 50 frames a second at most, and
            joins equal neighbours into one longer frame.
        sound: is heard beside them, as AAC or Opus; a gif has none.

    Raises:
        TavError: another suffix, no frames, a rate out of range, or a file that can't be written.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    path = Path(path)
    # x264 decides by mbtree where to spend bits, and decides otherwise from run to run
    codecs = {
        ".mp4": ("libx264", {"crf": "17", "x264-params": "mbtree=0"}),
        ".webm": ("libvpx-vp9", {"crf": "24", "b": "0"}),
        ".gif": None,
    }
    if path.suffix.lower() not in codecs:
        raise TavError("output", path, "ends in the suffix of no known format", "use .mp4, .webm or .gif")
    check(fps=fps)
    frames = as_frames(frames, floats=True).numpy()
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
        flags = {"fflags": "bitexact"}  # else a webm gets random numbers as names of its tracks
        flags |= {"movflags": "faststart"} if path.suffix.lower() == ".mp4" else {}
        try:
            with av.open(str(temporary), "w", options=flags) as container:
                stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = "yuv420p"
                stream.codec_context.thread_count = 1  # what is written depends on how many there are
                # said aloud, because players guess BT.709 for large pictures
                stream.codec_context.colorspace = int(Colorspace.ITU601)
                stream.codec_context.color_range = int(ColorRange.MPEG)
                write_sound = None if sound is None else sound_track(container, path.suffix.lower(), sound)
                for number, frame in enumerate(frames, 1):
                    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    container.mux(stream.encode(picture))
                    if write_sound:
                        write_sound(number / fps)
                container.mux(stream.encode())
                if write_sound:
                    write_sound(None)
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
