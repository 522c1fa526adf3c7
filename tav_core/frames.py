"""Frames and masks as callers hand them over: one check, and one form, for all that takes a clip."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import TavError
from .pictures import flat

Frames = Tensor | np.ndarray | Sequence[Image.Image]
_OVERSHOOT = 0.5  # that a resize may leave beyond 0 ... 1; more of it, and the numbers are in another scale


def as_frames(frames: Frames, field: str = "frames", floats: bool = False) -> Tensor:
    """A clip in the form that the package works on.

    Args:
        frames: a tensor or an array, uint8 `f h w 3` (RGB), or a list of Pillow's images of one size, of any mode: over
            black where they are transparent.
        field: what an error calls it.
        floats: numbers from 0 to 1 will do as well, clamped where a resize went a little beyond.

    Returns:
        uint8 `f h w 3` on the CPU; a tensor that is one already is given back as it is.

    Raises:
        TavError: numbers of another type or scale, another shape (grey, with alpha, channels first), no frame.
    """
    if isinstance(frames, (list, tuple)):
        frames = _stacked(frames, field)
    if not isinstance(frames, (Tensor, np.ndarray)):
        remedy = "give uint8 f h w 3, a tensor or an array, or a list of Pillow's images"
        raise TavError(field, None, f"is of type {type(frames).__name__}, which is no clip", remedy)
    shape, dtype = tuple(frames.shape), str(frames.dtype).removeprefix("torch.")
    real = dtype in ("float16", "bfloat16", "float32", "float64")
    if dtype != "uint8" and not (floats and real):
        remedy = "give uint8 from 0 to 255" + (", which is numbers from 0 to 1 times 255, rounded" if real else "")
        raise TavError(field, None, f"has dtype {dtype} and shape {shape}", remedy)
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise TavError(field, None, f"has shape {shape}, which is no video", _remedy(shape))
    frames = _tensor(frames)
    return frames if dtype == "uint8" else _whole_numbers(frames, field)


def as_mask(mask: Tensor | np.ndarray, frames: Tensor) -> Tensor:
    """A mask of a clip (`f h w 3`) as float32 `f h w` on the CPU.

    Args:
        mask: such a tensor or array, 0 ... 1 or bool.

    Raises:
        TavError: another size or length than the clip's, or another scale.
    """
    if not isinstance(mask, (Tensor, np.ndarray)) or mask.ndim != 3:
        told = f"has shape {tuple(mask.shape)}" if hasattr(mask, "shape") else f"is of type {type(mask).__name__}"
        raise TavError("mask", None, told, "give f h w, of 0 ... 1, a tensor or an array")
    if mask.shape != frames.shape[:3]:
        (f, h, w), (g, i, j, _) = mask.shape, frames.shape
        raise TavError("mask", None, f"is {f} of {w}x{h} for {g} frames of {j}x{i}", "give it in the clip's size")
    mask = _tensor(mask).float()
    if not (0 <= (low := mask.min().item()) <= (high := mask.max().item()) <= 1):
        raise TavError("mask", None, f"has numbers from {low:g} to {high:g}", "bring them to 0 ... 1")
    return mask


def told(frames: Tensor) -> str:
    """Frames `f h w c`, for people."""
    return f"{_count(len(frames), 'frame')} of {frames.shape[2]}x{frames.shape[1]}"


def told_latents(latents: Tensor) -> str:
    """Latents `b c f h w`, for people."""
    if latents.ndim != 5:
        return f"latents of shape {tuple(latents.shape)}, {told_numbers([latents])}"
    b, c, f, h, w = latents.shape
    several = f"{b} videos of " if b > 1 else ""
    return f"{several}{_count(f, 'frame')} of {w}x{h} latents in {c} channels, {told_numbers([latents])}"


def told_numbers(tensors: Iterable[Tensor]) -> str:
    """What kinds of numbers they are, and where."""
    kinds = {f"{str(each.dtype).removeprefix('torch.')} on {each.device}" for each in tensors}
    return " and ".join(sorted(kinds))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _tensor(of: Tensor | np.ndarray) -> Tensor:
    # a copy of an array: torch can't take one that is read-only or turned around
    return of.detach().cpu() if isinstance(of, Tensor) else torch.from_numpy(np.array(of, order="C"))


def _stacked(frames: Sequence[Any], field: str) -> np.ndarray:
    """Images of Pillow as an array `f h w 3`."""
    kinds = {type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)}
    if kinds:
        remedy = "stack them, into one tensor or array f h w 3"
        raise TavError(field, None, f"is a list of {', '.join(sorted(kinds))}", remedy)
    if len(sizes := {f"{frame.width}x{frame.height}" for frame in frames}) != 1:
        told = f"is of several sizes ({', '.join(sorted(sizes))})" if sizes else "is empty"
        raise TavError(field, None, told, "bring them to one" if sizes else "give one frame or more")
    return np.stack([flat(frame) for frame in frames])


def _whole_numbers(frames: Tensor, field: str) -> Tensor:
    """Frames from 0 to 1 as uint8."""
    low, high = (each.item() for each in frames.float().aminmax())
    if not (-_OVERSHOOT <= low and high <= 1 + _OVERSHOOT):
        remedy = "bring them to 0 ... 1, or to uint8 from 0 to 255"
        raise TavError(field, None, f"has numbers from {low:g} to {high:g}", remedy)
    return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)


def _remedy(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        one = "give a picture alone as frames[None]"
        return one if shape[2] == 3 else "give f h w 3: grey ones with their channel three times"
    if len(shape) == 4 and 0 not in shape:
        if shape[3] in (1, 4):
            return {1: "repeat the grey channel three times", 4: "leave out alpha, as frames[..., :3]"}[shape[3]]
        if shape[1] == 3:
            return "put the channels last, as frames.permute(0, 2, 3, 1)"
    return "give f h w 3, one frame or more"
