"""What numbers a setting may have: limits that Python, the nodes and the command line keep alike."""

import argparse
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from .errors import TavError, field, shortened


@dataclass(frozen=True)
class Range:
    """Whole numbers if `least` is one, else any; both ends belong to it."""

    least: int | float
    most: int | float

    def __contains__(self, value: Any) -> bool:
        kind = int if isinstance(self.least, int) else Real
        return isinstance(value, kind) and not isinstance(value, bool) and self.least <= value <= self.most

    @property
    def remedy(self) -> str:
        if isinstance(self.least, int):
            return f"give an integer from {self.least} to {self.most}"
        return f"give a number from {self.least:g} to {self.most:g}"

    def __call__(self, text: str) -> int | float:
        """The number of an option of the command line, as its type in argparse."""
        kind = int if isinstance(self.least, int) else float
        try:
            value = kind(text)
        except ValueError:
            told = f"{shortened(text, 40)!r} is no {'integer' if kind is int else 'number'}"
            raise argparse.ArgumentTypeError(f"{told}; {self.remedy}") from None
        if value not in self:
            raise argparse.ArgumentTypeError(f"{shortened(str(value), 40)} is out of range; {self.remedy}")
        return value


LIMITS = {
    # tuning
    "steps": Range(1, 100_000),
    "learning_rate": Range(1e-8, 1.0),
    "weight_decay": Range(0.0, 100.0),
    "eps": Range(1e-30, 1.0),
    "warmup_steps": Range(0, 100_000),
    "weight_average": Range(0.0, 0.9999),
    "seed": Range(0, 2**63 - 1),
    "probe_every": Range(1, 100_000),
    "probe_size": Range(1, 1000),
    "save_every": Range(1, 100_000),
    "save_minutes": Range(0.0, 1440.0),
    "rank": Range(1, 1280),  # the most that a matrix of Stable Diffusion has
    # inversion and sampling
    "sampling_steps": Range(1, 1000),
    "guidance_scale": Range(0.0, 100.0),
    "guidance_rescale": Range(0.0, 1.0),
    "guidance_start": Range(0.0, 1.0),
    "guidance_end": Range(0.0, 1.0),
    "attention_injection": Range(0.0, 1.0),
    "caption_as_negative": Range(0.0, 1.0),
    "context_length": Range(3, 10_000),  # frame 0, the previous frame, and one that sees both
    "context_overlap": Range(2, 9_999),
    "softness": Range(0, 512),
    "eta": Range(0.0, 1.0),
    "edits_at_once": Range(1, 64),
    "lora_strength": Range(-10.0, 10.0),
    "control_strength": Range(0.0, 10.0),
    "control_start": Range(0.0, 1.0),
    "control_end": Range(0.0, 1.0),
    # clips
    "start": Range(0, 10_000_000),
    "stride": Range(1, 1000),
    "count": Range(1, 10_000),
    "width": Range(1, 4096),
    "height": Range(1, 4096),
    "fps": Range(0.01, 1000.0),
    "threads": Range(1, 1024),
    # batches
    "gpus_per_job": Range(0.0, 64.0),
    "workers": Range(1, 10_000),
    "retries": Range(0, 100),
}
PIXELS = 2**28  # of all frames of a clip: a thousand of 512 x 512, which take several GB at once


def check(**values: Any):
    """Raises a TavError for the first value out of its limits in `LIMITS`."""
    for name, value in values.items():
        if value not in LIMITS[name]:
            raise TavError(name, value, "is out of range", LIMITS[name].remedy)


def check_fields(settings: Any):
    """`check` of all fields of a dataclass that have limits; None is good where it is the default."""
    given = {each.name: getattr(settings, each.name) for each in fields(settings)}
    optional = {each.name for each in fields(settings) if each.default is None and given[each.name] is None}
    check(**{name: value for name, value in given.items() if name in LIMITS and name not in optional})


def check_pixels(count: int | None, width: int, height: int):
    """Raises a TavError for a clip that no memory would hold."""
    if (pixels := (count or 1) * width * height) > PIXELS:
        problem = f"of {width} x {height} pixels are {pixels / 1e6:.0f} million, more than {PIXELS / 1e6:.0f}"
        raise TavError("count", count, problem, f"give fewer, or a smaller {field('size')}")
