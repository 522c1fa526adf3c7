"""Figures of videos, uint8 `f h w c`, that need no model and no known truth."""

import math

from torch import Tensor


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal to noise ratio in dB of a video against another of the same shape; inf if they are equal."""
    error = (video.float() - reference.float()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def frame_difference(video: Tensor) -> float:
    """Mean absolute difference of neighbouring frames, 0..1: motion and flicker together."""
    return (video[1:].float() - video[:-1].float()).abs().mean().item() / 255
