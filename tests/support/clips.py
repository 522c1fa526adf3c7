"""Small video files of every kind, written with PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

BITS = 8  # of the number that a frame shows, as bright and dark columns


def counted(number: int, height: int = 32, width: int = 64) -> np.ndarray:
    """A picture `h w 3` that shows its number."""
    columns = np.array([200 if number >> bit & 1 else 40 for bit in range(BITS)], np.uint8)
    return np.broadcast_to(columns.repeat(width // BITS)[None, :, None], (height, width, 3)).copy()


def shown(frames: torch.Tensor) -> list[int]:
    """The numbers that frames `f h w c` of such pictures show."""
    column = frames.shape[2] // BITS
    bright = frames.float().mean((1, 3)).reshape(len(frames), BITS, column)[:, :, column // 2] > 120
    return (bright.long() << torch.arange(BITS)).sum(1).tolist()


def write(
    path: Path,
    pictures: Sequence[np.ndarray],
    stamps: Sequence[int] | None = None,
    tick: Fraction = Fraction(1, 1000),
    *,
    codec: str = "libx264",
    rate: Fraction = Fraction(30),
    form: str = "yuv420p",
    aspect: Fraction | None = None,
    tags: dict[str, int] | None = None,
    metadata: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Writes pictures `h w 3` or `h w 4`, or frames of PyAV, at their time stamps, or else at the rate.

    Args:
        tags: attributes of the codec's context, such as `colorspace`.
        metadata: of the stream.
        options: of the codec.
    """
    fast = {"libx264": {"preset": "veryfast"}, "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"}}.get(codec, {})
    options = {name.replace("_", "-"): value for name, value in options.items()}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=fast | options)
        stream.metadata.update(metadata or {})
        context = stream.codec_context
        if stamps is None:
            stamps, tick = range(len(pictures)), 1 / rate
        else:
            context.time_base = stream.time_base = tick
        for name, value in (({"sample_aspect_ratio": aspect} if aspect else {}) | (tags or {})).items():
            setattr(context, name, value)
        for picture, stamp in zip(pictures, stamps):
            if isinstance(picture, np.ndarray):
                name = {3: "rgb24", 4: "rgba"}[picture.shape[2]]
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=name)
            if not stream.codec_context.is_open:
                stream.height, stream.width, stream.pix_fmt = picture.height, picture.width, form
            frame = picture.reformat(format=form)
            frame.pts, frame.time_base = stamp, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Gives an mp4 the display matrix a b c d of whole numbers."""
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    a, b, c, d = (n << 16 for n in matrix)
    numbers = b"".join(n.to_bytes(4, "big", signed=True) for n in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(content[:at] + numbers + content[at + 36 :])
    return path
