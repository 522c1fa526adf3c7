"""When a clip's frames are shown: from time stamps, however uneven, to numbers at a constant rate.

A frame's number is its place in the clip at a constant rate: what `start` and `stride` count. In a file of constant
rate frame i has number i, whatever its stamps were rounded to. Elsewhere (screen recorders, phones, gifs) the clip is
taken at its usual rate, and each instant shows the frame that is nearest to it: long frames come several times.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .limits import LIMITS

SLOWEST, FASTEST = LIMITS["fps"].least, LIMITS["fps"].most  # frames a second that a video can be written at
NEAR = 0.25  # how far an interval may be from the usual one and still be one of its kind
FOLDER_FPS = 8  # of what says nothing of time, such as a folder of images
SMOOTH = 240  # frames a second; uneven clips are not taken at more


# numbers at which a frame begins and ends to be shown, and what decodes it: pixels `h w 3`, width to height of a pixel
Shown = tuple[int, int, Callable[[], tuple[np.ndarray, float]]]


@dataclass(frozen=True)
class Footage:
    """A clip that is not decoded yet.

    Attributes:
        rate: frames a second.
        total: how many frames at this rate; None where only decoding them tells.
        frames: those that are shown at a number and later.
        finish: from the pixels of frames, brought to their size, to uint8 RGB.
        begin: seconds at which frame 0 is shown, on the clock that the sound has too; None where there can be none.
    """

    rate: Fraction
    total: int | None
    frames: Callable[[int], Iterator[Shown]]
    finish: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels
    begin: float | None = None


@dataclass(frozen=True)
class Timeline:
    """Numbers of a clip's frames at a constant rate.

    Attributes:
        rate: frames a second.
        stamps: when each frame is shown, ascending, in the ticks of its file.
        numbers: of the same frames, from 0, and at last that of the end.
        even: whether the file has this rate itself.
    """

    rate: Fraction
    stamps: Sequence[int]
    numbers: Sequence[int]
    even: bool

    @property
    def total(self) -> int:
        return self.numbers[-1]

    def place(self, stamp: int, repeated: int = 0) -> int:
        """The place in `stamps` of the frame with this stamp, after so many others with the same one."""
        return min(bisect_left(self.stamps, stamp) + repeated, len(self.stamps) - 1)

    def stamp_at(self, number: int) -> int:
        """The stamp of the frame that is shown at this number."""
        return self.stamps[max(0, bisect_left(self.numbers[:-1], number + 1) - 1)]


def timeline_of(
    stamps: Iterable[int], end: int | None, tick: Fraction, declared: Iterable[Fraction | None]
) -> Timeline:
    """The timeline of frames with these stamps.

    Args:
        stamps: of one frame or more, in any order.
        end: when the last frame's time is over; None if nothing says so.
        tick: seconds of a tick.
        declared: rates that the file names, the most trusted first.
    """
    stamps = sorted(stamps)
    count = len(stamps)
    # frames that share a stamp share the time until the next one
    known, first = np.unique(np.array(stamps, np.float64) - stamps[0], return_index=True)
    times = np.interp(np.arange(count), first, known) * float(tick)
    gaps = np.sort(np.diff(times)[np.diff(times) > 0])
    declared = [rate for rate in declared if rate and SLOWEST <= rate <= FASTEST]
    if len(gaps):
        usual = gaps[(len(gaps) - 1) // 2]
        usual = gaps[np.abs(gaps - usual) <= NEAR * usual + float(tick)].mean()
    else:  # one frame, or stamps that say nothing
        usual = 1 / float(declared[0] if declared else FOLDER_FPS)
        times = np.arange(count) * usual
    last = times[-1] + usual if end is None or end <= stamps[-1] else (end - stamps[0]) * float(tick)
    times = np.append(times, last)
    mean = count / last
    for rate in (*declared, *_round(mean), Fraction(mean).limit_denominator(1_000_000)):
        if np.abs(times * float(rate) - np.arange(count + 1)).max() < 0.5:
            return Timeline(rate, stamps, range(count + 1), even=True)
    smooth = min(1 / usual, SMOOTH)
    close = [rate for rate in (*declared, *_round(smooth)) if abs(rate - smooth) < 0.01 * smooth]
    rate = close[0] if close else Fraction(smooth).limit_denominator(1_000_000)
    numbers = np.ceil(times * float(rate) - 0.5).astype(int)
    numbers[-1] = max(numbers[-1], numbers[-2] + 1)
    return Timeline(rate, stamps, numbers.tolist(), even=False)


def _round(rate: float) -> Iterator[Fraction]:
    """The whole rate that is nearest, and the nearest one of television: 30000/1001 for 30."""
    for per in (Fraction(1), Fraction(1000, 1001)):
        if whole := round(rate / per):
            yield whole * per
