"""Long videos by overlapping context windows, in the memory of a short one.

Every window has as many frames as the model was tuned on: frame 0 of the clip, which sparse-causal attention looks at
from everywhere, and a run of consecutive frames. What is predicted for a frame that lies in several windows is
blended, step by step, as in Gen-L-Video (arXiv 2305.18264); the shared frame 0 keeps the windows alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import FrameContext
from .condition import at_frames
from .errors import TavError, field
from .inflation import VideoUNet
from .limits import check

if TYPE_CHECKING:
    from .control import ControlledUNet

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ContextWindows:
    """How a clip is divided.

    Attributes:
        context_length: frames of a window, at least 3; best the number that the model was tuned on.
        context_overlap: frames that neighbouring windows share, 2 ... context_length - 1. Frame 0 and the previous
            frame of the first new one are always shared; what goes beyond them is blended.

    Raises:
        TavError: numbers out of range.
    """

    context_length: int
    context_overlap: int = 4

    def __post_init__(self):
        check_context_length(self.context_length)
        if not 2 <= self.context_overlap < self.context_length:
            problem = f"doesn't fit a {field('context_length')} of {self.context_length}"
            raise TavError("context_overlap", self.context_overlap, problem, f"give 2 to {self.context_length - 1}")

    def __call__(
        self, unet: Callable[..., Tensor], latents: Tensor, timesteps: Tensor | float, text: Tensor, **kwargs
    ) -> Tensor:
        """What `VideoUNet.forward` gives, for a clip of any length: `unet` is called once a window.

        Args:
            unet: `VideoUNet.forward` or alike; each call has all videos of the batch, `context_length` frames of them.
            latents: `b c f h w`.
            timesteps, text, kwargs: as there; the timestep of the first video moves the windows (see `windows`).

        Raises:
            TavError: a clip that is shorter than a window; see also `VideoUNet.forward`.
        """
        b, _, f, _, _ = latents.shape
        check_context_length(self.context_length, f)
        if f == self.context_length:
            return unet(latents, timesteps, text, **kwargs)
        blended = torch.zeros(latents.shape, device=latents.device)
        for frames, weights in self.windows(f, torch.as_tensor(timesteps).flatten()[0].item()):
            part = {
                name: at_frames(name, value, b, f, frames)
                for name, value in {"encoder_hidden_states": text, **kwargs}.items()
            }
            out = unet(latents[:, :, frames.to(latents.device)], timesteps, part.pop("encoder_hidden_states"), **part)
            blended[:, :, frames] += weights.to(out.device)[:, None, None] * out.float()
        return blended.to(latents.dtype)

    def windows(self, num_frames: int, timestep: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Frame numbers of each window (int64) and their share in the result, `context_length` of both.

        The shares of a frame add up to 1 and fall off to both ends of a run. The first frame of a run has none: it is
        there to be the previous frame of the next. The windows lie elsewhere at every timestep, so that no frame is
        always at an end, but in inversion and in sampling alike, so that these remain each other's inverse.
        """
        length, stride = self.context_length, self.context_length - self.context_overlap
        last = num_frames - (length - 1)  # the first frame of the last run
        shift = int(timestep * _GOLDEN % 1 * stride)  # neighbouring timesteps lie far apart
        starts = sorted({1, *range(1 + shift, last, stride), last})
        place = torch.arange(length)  # in a window: 0 is frame 0, 1 the first of the run
        falling = (length - place).float()
        rising_and_falling = torch.minimum((place - 1).clamp(min=0), falling)
        windows = [(_window(start, length), falling if start == 1 else rising_and_falling) for start in starts]
        total = torch.zeros(num_frames)
        for frames, weights in windows:
            total[frames] += weights
        return ((frames, weights / total[frames]) for frames, weights in windows)


@dataclass(frozen=True)
class WindowedUNet:
    """A video U-Net that `ddim_invert` and `ddim_sample` can give clips of any length, on any device: it sees them
    window by window, and what overlaps is blended (after Gen-L-Video, arXiv 2305.18264).

    Attributes:
        unet: or one with a ControlNet beside it.

    Raises:
        TavError: when it is called, a clip shorter than a window.
    """

    unet: "VideoUNet | ControlledUNet"
    windows: ContextWindows

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def frame_context(self) -> FrameContext:
        return self.unet.frame_context

    def __call__(self, latents: Tensor, timesteps: Tensor | float, text: Tensor, **per_frame: Tensor) -> Tensor:
        def on_device(latents: Tensor, timesteps: Tensor | float, text: Tensor, **per_frame: Tensor) -> Tensor:
            device = self.unet.device
            per_frame = {name: value.to(device) for name, value in per_frame.items()}
            return self.unet(latents.to(device), timesteps, text.to(device), **per_frame).to(latents.device)

        return self.windows(on_device, latents, timesteps, text, **per_frame)


def check_context_length(context_length: int, num_frames: int | None = None):
    """Raises a TavError for a window that is too short, or longer than a clip of `num_frames`."""
    check(context_length=context_length)
    if num_frames is not None and context_length > num_frames:
        problem = f"is more than the {num_frames} frames of the clip"
        raise TavError("context_length", context_length, problem, f"give it at most {num_frames}, or a longer clip")


def random_window(num_frames: int, context_length: int, generator: torch.Generator) -> Tensor:
    """Frame numbers of one window at a random place, for tuning: `context_length` of them, int64.

    Frames at the end of the clip are as likely as those in the middle.
    """
    run = context_length - 1
    start = torch.randint(2 - run, num_frames, (), generator=generator).clamp(1, num_frames - run)
    return _window(start.item(), context_length)


def even_windows(num_frames: int, context_length: int, count: int) -> list[Tensor]:
    """Frame numbers of `count` windows that are spread over the clip."""
    starts = torch.linspace(1, num_frames - (context_length - 1), count).round().long()
    return [_window(start.item(), context_length) for start in starts]


def _window(start: int, context_length: int) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(start, start + context_length - 1)])
