"""A clip and its sentence as the model sees them: what tuning learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .condition import Condition
from .errors import TavError
from .frames import told_latents
from .windows import check_context_length


@dataclass(frozen=True)
class Take:
    """A clip, encoded.

    Attributes:
        latents: mean of the VAE posterior times the scaling factor, `b c f h w`.
        condition: its sentence and labels, for all videos, per video or per frame; the embedding alone will do.
        latents_std: standard deviation of the posterior in the scale of `latents`; without it the mean is used.
    """

    latents: Tensor
    condition: Condition
    latents_std: Tensor | None = None

    def __post_init__(self):
        object.__setattr__(self, "condition", Condition.of(self.condition))

    def __repr__(self) -> str:
        return f"Take({told_latents(self.latents)}, {self.condition!r})"

    def to(self, device: torch.device) -> "Take":
        """On that device, in float32 but for labels."""
        std = self.latents_std
        std = None if std is None else std.to(device).float()
        return Take(self.latents.to(device).float(), self.condition.to(device), std)

    def at(self, frames: Tensor) -> "Take":
        """Those frames of it."""
        (b, _, f, _, _), std = self.latents.shape, self.latents_std
        condition = self.condition.at(b, f, frames)
        return Take(self.latents[:, :, frames], condition, None if std is None else std[:, :, frames])


def check_takes(takes: Sequence[Take], context_length: int | None):
    """Raises a TavError for takes that no tuning can learn from together, or that are shorter than a window."""
    if not takes:
        raise TavError("takes", None, "is empty", "give one clip at least")
    channels = takes[0].latents.shape[1]
    for number, take in enumerate(takes, 1):
        shape, std = tuple(take.latents.shape), take.latents_std
        if len(shape) != 5:
            raise TavError("latents", None, f"must be b c f h w, got shape {shape}", "reshape them")
        if std is not None and std.shape != shape:
            raise TavError("latents_std", None, f"has shape {tuple(std.shape)}, latents {shape}", "give both one shape")
        if shape[1] != channels:
            problem = f"have {shape[1]} channels in take {number}, {channels} in the first"
            raise TavError("latents", None, problem, "encode all takes with one VAE")
        if context_length is not None:
            check_context_length(context_length, shape[2])
