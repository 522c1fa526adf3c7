"""What a long stage tells while it runs. A callback gets every event; it stops the stage by raising, `Cancelled` as a
rule. An event as a string is one short line, so `print` is such a callback; `Progress` is one that draws bars.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .inflation import VideoUNet


@dataclass(frozen=True)
class Note:
    """A line for people, and the setting that it is about, if any."""

    text: str
    about: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Reading:
    """A clip is being read: so many of its parts have been looked at, with those that aren't wanted."""

    parts: int

    def __str__(self) -> str:
        return f"read {self.parts}"


@dataclass(frozen=True)
class Stage:
    """A part of a job.

    Attributes:
        name: that of its `Step`.
        steps: of all of it; those of several samplings together, with a step of edits that are drawn together once for
            each.
        cost: of a step beside those of other stages, in forward passes of the clip.
    """

    name: str
    steps: int
    cost: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A job begins, whose stages these are, in their order."""

    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        return "plan: " + ", ".join(f"{stage.name} {stage.steps}" for stage in self.stages)


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

    @property
    def videos(self) -> int:
        """So many videos have taken it together."""
        return 1

    def __str__(self) -> str:
        return f"{self.stage} {self.step}/{self.total}"


@dataclass(frozen=True)
class TuningStep(Step):
    """A step of the tuning.

    Attributes:
        loss: of this step.
        grad_norm: L2 norm of the gradient, before it was scaled down.
        probe_loss: the latest loss on the fixed draws.
        lr: the learning rate.
        seconds: since this call began, after `started` steps of earlier ones.
        unet: what is tuned, as it is after this step (with a running average of the weights, that average): for a
            preview it can be inverted and sampled with, within the callback, and must not be changed.
    """

    loss: float
    grad_norm: float
    probe_loss: float
    lr: float
    seconds: float
    started: int
    unet: "VideoUNet" = field(repr=False, compare=False)

    def __str__(self) -> str:
        left = self.seconds / (self.step - self.started) * (self.total - self.step)
        told = f"loss {self.loss:.4f}, probe loss {self.probe_loss:.4f}, {left:.0f} s left"
        return f"{super().__str__()}, {told}"


@dataclass(frozen=True)
class DDIMStep(Step):
    """A step of inversion or sampling; `latents` and the clean ones seen in them, `pred_x0`, are `b c f h w`, with a
    video for each of the edits that are drawn together.
    """

    timestep: int
    latents: Tensor
    pred_x0: Tensor

    @property
    def videos(self) -> int:
        return len(self.latents)

    def __repr__(self) -> str:
        return f"DDIMStep({self.stage} {self.step}/{self.total}, timestep {self.timestep})"

    def __str__(self) -> str:
        return f"{super().__str__()}, timestep {self.timestep}"


Event = Note | Reading | Plan | Step
Callback = Callable[[Event], None]


def ignored(event: Event):
    """The callback of those who don't want to know."""
