"""Optical flow: where each place of a frame is found in another one, and what is known there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of two frames, uint8 `h w 3`: pixels from one to the other

REACH = 3  # frames before and behind that are asked
VOTES = 2  # so many of them must agree: one alone may be wrong
ALIKE = 25  # of 255: the mean difference of the channels up to which a place is taken for the same
SIDE = 256  # pixels of the shorter side at which frames are compared, if they are twice as large or more


def dis_flow() -> Flow:
    """OpenCV's DIS (Kroeger et al., arXiv 1603.03590): flow `h w (x y)` in pixels, of the grey frames."""
    import cv2

    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return lambda now, then: dis.calc(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (now, then)), None)


def followed(there: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a frame's places are in another one, and which of them are seen in it.

    Args:
        there, back: the flow to it and from it, `h w (x y)`.

    Returns:
        `h w (x y)` in pixels of the other frame, and bool `h w`: what lies inside of it and comes back by the way there
        and back, within the bound of Sundaram et al. 2010.
    """
    height, width = there.shape[:2]
    target = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32) + there
    returned = there + at(back, target)
    inside = ((target >= 0) & (target <= (width - 1, height - 1))).all(-1)
    bound = 0.01 * ((there**2).sum(-1) + (back**2).sum(-1)) + 0.5
    return target, inside & ((returned**2).sum(-1) <= bound)


def at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What a frame, `h w` or `h w c`, has at places of it, `h w (x y)`."""
    import cv2

    return cv2.remap(values, places, None, cv2.INTER_LINEAR)


@dataclass(frozen=True)
class Neighbour:
    """Where places of a frame are in another one, up to three before or behind it, in every `step`-th pixel.

    Attributes:
        here, there: numbers of the frames.
        target: `h w (x y)` in pixels of the other frame.
        seen: bool `h w`: where the flow leads to it and back, to the same colour.
    """

    here: int
    there: int
    step: int
    target: np.ndarray
    seen: np.ndarray


def neighbours(frames: Tensor) -> list[Neighbour]:
    """All of the frames of a clip, uint8 `f h w 3`."""
    step = max(1, min(frames.shape[1:3]) // SIDE)
    small = [np.ascontiguousarray(frame[::step, ::step]) for frame in frames.numpy()]
    found, flow = [], dis_flow()
    for i in range(len(small)):
        for j in range(i + 1, min(i + REACH + 1, len(small))):
            ways = flow(small[i], small[j]), flow(small[j], small[i])
            for (here, there), way in zip(((i, j), (j, i)), (ways, ways[::-1])):
                target, seen = followed(*way)
                differ = np.abs(at(small[there], target).astype(np.float32) - small[here]).mean(-1)
                found.append(Neighbour(here, there, step, target, seen & (differ < ALIKE)))
    return found


def told_by_neighbours(masks: Tensor, of: Sequence[Neighbour]) -> np.ndarray:
    """What masks of other frames say of a frame: where two or more of the three before and the three behind it have
    what moved there from it, or will: so a mask goes with its thing, and ends where that is hidden or has left the
    picture.

    Args:
        masks: of 0 and 1, `f h w`.
        of: the `neighbours` of the frames.

    Returns:
        bool `f h w`.
    """
    f, h, w = masks.shape
    step = of[0].step if of else 1
    known = [np.ascontiguousarray(mask[::step, ::step], np.float32) for mask in masks.numpy()]
    votes = np.zeros((f, *known[0].shape), np.uint8)
    for each in of:
        votes[each.here] += each.seen & (at(known[each.there], each.target) > 0.5)
    return (votes >= VOTES).repeat(step, 1).repeat(step, 2)[:, :h, :w]
