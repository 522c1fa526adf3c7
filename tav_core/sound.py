"""The sound of a clip: what is heard while its frames are shown, and its way into written videos."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .containers import opened
from .events import Callback, Reading

# samples a second that AAC has
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
CODECS = {".mp4": ("aac", 192_000), ".webm": ("libopus", 128_000)}
AHEAD = 1.0  # seconds that are decoded before the wanted ones, because codecs need some
GAP = 0.02  # seconds by which stamps may be off before they mean silence, or a cut


@dataclass(frozen=True)
class Sound:
    """Samples float32 `c n` in -1..1, of one channel or two, and how many a second."""

    samples: Tensor
    rate: int

    def __repr__(self) -> str:
        channels, count = self.samples.shape
        return f"Sound({count / self.rate:.2f} s, {'mono' if channels == 1 else 'stereo'}, {self.rate} Hz)"


def read_sound(path: Path, begin: float, seconds: float, callback: Callback) -> Sound | None:
    """The first sound of a video file from `begin` on, silent where it has none; None if it has no sound at all.

    Args:
        begin: on the clock of the file's time stamps, in seconds.

    Raises:
        TavError: it can't be decoded.
    """
    sound = None
    for ahead in (AHEAD, None):
        with opened(path) as container:
            stream = next((stream for stream in container.streams.audio if stream.codec_context), None)
            if stream is None:
                return None
            rate = stream.codec_context.sample_rate
            rate = rate if rate in RATES else 48000
            sound = np.zeros((min(2, stream.codec_context.layout.nb_channels), round(seconds * rate)), np.float32)
            if ahead and not _sought(container, stream, begin - ahead):
                continue
            if _filled(sound, container.decode(stream), rate, begin, callback) or not ahead:
                break
    return Sound(torch.from_numpy(sound), rate)


def _sought(container, stream, time: float) -> bool:
    import av

    try:
        container.seek(int(time / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def _filled(sound: np.ndarray, frames: Iterator, rate: int, begin: float, callback: Callback) -> bool:
    """Writes what is heard from `begin` on into the samples `c n`; whether the frames had begun by then."""
    import av

    channels, count = sound.shape
    resampler = av.AudioResampler("fltp", "mono" if channels == 1 else "stereo", rate)
    clock = position = early = None
    for number, frame in enumerate(frames, 1):
        callback(Reading(number))
        if clock is None:
            clock = begin if frame.time is None else frame.time
            position, early = round((clock - begin) * rate), clock <= begin
        elif frame.time is not None and abs(frame.time - clock) > GAP:
            position += round((frame.time - clock) * rate)
            clock = frame.time
        clock += frame.samples / frame.sample_rate
        for part in resampler.resample(frame):
            samples = part.to_ndarray()
            first, last = max(0, position), min(count, position + samples.shape[1])
            if first < last:
                sound[:, first:last] = samples[:, first - position : last - position]
            position += samples.shape[1]
        if position >= count:
            break
    return bool(early)


def sound_track(container, suffix: str, sound: Sound) -> Callable[[float | None], None]:
    """Adds a track to a container that is written; what is returned writes the sound up to a time in seconds, or the
    rest.
    """
    import av

    codec, bits = CODECS[suffix]
    layout = "mono" if len(sound.samples) == 1 else "stereo"
    stream = container.add_stream(codec, rate=sound.rate if codec == "aac" else 48000, layout=layout)
    stream.bit_rate = bits
    samples, written = sound.samples.cpu().float().numpy(), 0

    def write(until: float | None):
        nonlocal written
        end = samples.shape[1] if until is None else min(samples.shape[1], round(until * sound.rate))
        if end > written:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, written:end]), "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = sound.rate, written, Fraction(1, sound.rate)
            container.mux(stream.encode(frame))
            written = end
        if until is None:
            container.mux(stream.encode())

    return write
