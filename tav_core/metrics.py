"""Figures of videos that need no model: how near a video is to another, how it moves, how it flickers.

Videos are uint8 `f h w c` (see `as_frames`). A mask says where the edit may change something, 0 ... 1, `f h w`:
fidelity is measured outside of it, as in PIE-Bench (arXiv 2310.01506): both videos are multiplied by its complement,
and compared whole.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from .errors import TavError
from .flow import Flow, at, dis_flow, followed
from .frames import as_frames, as_mask

_TRACKS = 200  # points that are followed, at most
_STILL = 0.5  # pixels: a track that moves less from frame to frame has no direction


def outside(video: Tensor, reference: Tensor, mask: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Both in 0 ... 1, float64, black where the mask is."""
    video, reference = as_frames(video), as_frames(reference, "reference")
    if video.shape != reference.shape:
        problem = f"has shape {tuple(video.shape)}, the reference {tuple(reference.shape)}"
        raise TavError("video", None, problem, "bring both to one size and length")
    kept = 1 if mask is None else 1 - as_mask(mask, video).numpy()[..., None]
    return tuple(x.numpy().astype(np.float64) / 255 * kept for x in (video, reference))


def psnr(video: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal to noise ratio in dB against another video of the same shape; inf if they are equal."""
    error = mse(video, reference, mask)
    return -10 * math.log10(error) if error else math.inf


def mse(video: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Mean squared error against another video of the same shape, for pixels in 0 ... 1."""
    video, reference = outside(video, reference, mask)
    return float(((video - reference) ** 2).mean())


def ssim(video: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Structural similarity (Wang et al. 2004) against another video, -1 ... 1, mean over frames and channels.

    A Gaussian window of sigma 1.5 in 11 pixels, as usual, and the pixels whose window lies inside of the frame.

    Raises:
        TavError: frames smaller than the window.
    """
    import cv2

    video = as_frames(video)
    if min(video.shape[1:3]) < 11:
        raise TavError("video", None, f"has frames of {video.shape[2]}x{video.shape[1]}", "give 11 pixels or more")
    values = []
    for a, b in zip(*outside(video, reference, mask)):
        blurred = [cv2.GaussianBlur(x, (11, 11), 1.5)[5:-5, 5:-5] for x in (a, b, a * a, b * b, a * b)]
        mean_a, mean_b, square_a, square_b, product = blurred
        variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
        covariance = product - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        values.append((luminance * (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)).mean())
    return float(np.mean(values))


def frame_difference(video: Tensor) -> float:
    """Mean absolute difference of neighbouring frames, 0 ... 1: motion and flicker together."""
    frames = as_frames(video).float()
    return (frames[1:] - frames[:-1]).abs().mean().item() / 255


def flicker(video: Tensor) -> float:
    """Mean absolute difference of a frame from the mean of its neighbours, 0 ... 1: even motion leaves little of it.

    nan for fewer than three frames.
    """
    frames = as_frames(video).float()
    return (frames[1:-1] - (frames[:-2] + frames[2:]) / 2).abs().mean().item() / 255


def warp_errors(videos: Sequence[Tensor], source: Tensor, flow: Flow | None = None) -> list[float]:
    """How little videos follow the motion of another: for each, the mean squared error of its frames (0 ... 1) against
    the next ones brought back along the source's flow, where nothing is hidden (Lai et al., arXiv 1808.00449).

    Hidden is what the flow's way there and back doesn't bring to the same place; nan where all is.

    Args:
        flow: OpenCV's DIS without it.
    """
    flow, source = flow or dis_flow(), as_frames(source, "source").numpy()
    drawn, errors = [as_frames(video).numpy() for video in videos], [[] for _ in videos]
    for i, (now, then) in enumerate(pairwise(source)):
        target, seen = followed(flow(now, then), flow(then, now))
        if seen.any():
            for own, frames in zip(errors, drawn):
                here, there = (frame.astype(np.float32) / 255 for frame in frames[i : i + 2])
                own.append(((at(there, target) - here) ** 2).mean(-1)[seen].mean())
    return [float(np.mean(own)) if own else math.nan for own in errors]


def motion_fidelity(video: Tensor, source: Tensor) -> float:
    """How much a video moves as its source does, wherever that is, -1 ... 1: for each track of one the most similar
    track of the other, both ways, and the mean of these (Yatim et al., arXiv 2311.17009, section 4).

    Tracks are of corners that OpenCV follows (Lucas-Kanade); two are similar as their steps have the same direction.
    nan where one of the videos has no track that moves.
    """
    ours, theirs = _moving_tracks(video), _moving_tracks(source)  # n f-1 2
    if not len(ours) or not len(theirs):
        return math.nan
    units = [steps / np.maximum(np.linalg.norm(steps, axis=-1, keepdims=True), _STILL) for steps in (ours, theirs)]
    similar = np.einsum("n f d, m f d -> n m", *units) / ours.shape[1]
    return float((similar.max(1).mean() + similar.max(0).mean()) / 2)


def mask_iou(mask: Tensor, truth: Tensor) -> float:
    """How much of what either of two masks, 0 ... 1, `f h w`, has both of them have: 0 ... 1, mean over frames.

    nan where no frame has anything in either of them.
    """
    mask, truth = mask > 0.5, truth > 0.5
    either = (mask | truth).sum((1, 2))
    return ((mask & truth).sum((1, 2)) / either)[either > 0].mean().item()


def missed(mask: Tensor, truth: Tensor) -> float:
    """The share of the truth that a mask lacks, 0 ... 1, both `f h w` of 0 ... 1, mean over the frames that have some.

    nan where the truth is empty.
    """
    mask, truth = mask > 0.5, truth > 0.5
    all_ = truth.sum((1, 2))
    return ((truth & ~mask).sum((1, 2)) / all_)[all_ > 0].mean().item()


def _moving_tracks(video: Tensor) -> np.ndarray:
    """Steps from frame to frame, `n f-1 2`, of points that are seen in all frames and move."""
    import cv2

    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in as_frames(video).numpy()]
    points = cv2.goodFeaturesToTrack(grey[0], _TRACKS, 0.01, 3)
    if points is None or len(grey) < 2:
        return np.zeros((0, 0, 2), np.float32)
    track, found = [points], np.ones(len(points), bool)
    for now, then in pairwise(grey):
        points, status, _ = cv2.calcOpticalFlowPyrLK(now, then, track[-1], None, winSize=(15, 15))
        again, back, _ = cv2.calcOpticalFlowPyrLK(then, now, points, None, winSize=(15, 15))
        returned = np.linalg.norm(again - track[-1], axis=-1)[:, 0] < 1  # a pixel
        found &= status[:, 0].astype(bool) & back[:, 0].astype(bool) & returned
        track.append(points)
    steps = np.diff(np.concatenate(track, 1)[found], axis=1)
    return steps[np.linalg.norm(steps, axis=-1).mean(-1) > _STILL]
