"""What a long stage tells while it runs. A callback gets every event; it stops the stage by raising, `Cancelled` as a
rule.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Note:
    """A line for people, and the setting that it is about, if any."""

    text: str
    about: str = ""


@dataclass(frozen=True)
class Reading:
    """A clip is being read: so many of its parts have been looked at, with those that aren't wanted."""

    parts: int


@dataclass(frozen=True)
class Stage:
    """A part of a job.

    Attributes:
        name: that of its `Step`.
        steps: of all of it; those of several samplings together.
        cost: of a step beside those of other stages, in forward passes of the clip.
    """

    name: str
    steps: int
    cost: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A job begins, whose stages these are, in their order."""

    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Step:
    """A step is done.

    Attributes:
        stage: "encode", "tune", "invert", "subject" or "sample".
        step: from 1 to total.
    """

    stage: str
    step: int
    total: int


@dataclass(frozen=True)
class TuningStep(Step):
    """A step of the tuning.

    Attributes:
        probe_loss: the latest loss on the fixed draws.
        lr: the learning rate.
        seconds: since this call began, after `started` steps of earlier ones.
    """

    loss: float
    grad_norm: float
    probe_loss: float
    lr: float
    seconds: float
    started: int


@dataclass(frozen=True)
class DDIMStep(Step):
    """A step of inversion or sampling; `latents` and the clean ones seen in them, `pred_x0`, are `b c f h w`."""

    timestep: int
    latents: Tensor
    pred_x0: Tensor

    def __repr__(self) -> str:
        return f"DDIMStep({self.stage} {self.step}/{self.total}, timestep {self.timestep})"


Event = Note | Reading | Plan | Step
Callback = Callable[[Event], None]


def ignored(event: Event):
    """The callback of those who don't want to know."""
