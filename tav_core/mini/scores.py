"""Scores of an edited clip of the rendered world, where the exact right picture is known."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from ..metrics import psnr
from . import world
from .clips import KINDS, BenchmarkClip
from .evaluate import ATTRIBUTES
from .judge import Judge, Verdict, locate, verdict

SCORES = ("edited", "kept", "subject_error", "rest_error", "rest_psnr", "trajectory_corr", "trajectory_px", "stability",
          "outline_flicker", "texture_flicker")  # fmt: skip
PATCH, REACH = 64, 1.4  # pixels of a patch's side, and half of it over the subject's radius
ROOM = 8  # pixels around the subject that count neither as it nor as the rest: a latent
EQUAL = 60.0  # dB that equal pictures count for


def look(judge: Judge, video: np.ndarray) -> Verdict:
    """Judges the frames of a clip, uint8 `f h w 3`."""
    return verdict(judge, rearrange(torch.from_numpy(video), "f h w c -> f c h w").float() / 127.5 - 1)


def rmse(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Root of the mean squared difference of pixels (0..1), where `mask` (`f h w`) holds."""
    error = ((a.astype(np.float32) - b.astype(np.float32)) / 255) ** 2
    error = error.mean(-1)
    return float(np.sqrt(error[mask].mean() if mask is not None else error.mean()))


def _trajectory(centre: torch.Tensor, radius: torch.Tensor) -> np.ndarray:
    """Centre x, y and radius in pixels, `f 3`."""
    return torch.cat([centre, radius[:, None]], 1).numpy() * world.SIZE


def trajectory_agreement(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Correlation of all coordinates that move (pooled, each less its mean), and mean distance of the centres in px."""
    moving = truth.std(0) > 1
    a, b = found[:, moving] - found[:, moving].mean(0), truth[:, moving] - truth[:, moving].mean(0)
    correlation = float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-9))
    return correlation, float(np.linalg.norm(found[:, :2] - truth[:, :2], axis=1).mean())


def masks(scenes: list[world.Scene]) -> np.ndarray:
    """Coverage of the subject, `f h w` in 0..1."""
    return np.stack([world.subject_mask(s) for s in scenes])


def subject_flicker(video: np.ndarray, outline: np.ndarray, scenes: list[world.Scene]) -> tuple[float, float]:
    """How much a subject changes from a frame to the next, once its known motion is taken out of both.

    Args:
        video: uint8 `f h w 3`.
        outline: where the subject is drawn, `f h w`, above 0 inside.
        scenes: where it should be, with the shape that it should have.

    Returns:
        of its outline, 1 - the intersection over union of neighbouring frames; of its texture, the root mean squared
        difference of pixels (0..1) inside of both outlines.
    """
    unit = torch.linspace(-REACH, REACH, PATCH)
    square = torch.stack(torch.meshgrid(unit, unit, indexing="xy"), -1)  # h w (x y)
    grids = []
    for scene in scenes:
        turn = np.radians(scene.angle)
        rotate = torch.tensor([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]], dtype=torch.float32)
        centre = torch.tensor([scene.x, scene.y])
        grids.append((square * scene.radius @ rotate + centre) * 2 - 1)
    pixels = rearrange(torch.from_numpy(video), "f h w c -> f c h w").float() / 255
    inside = torch.from_numpy(outline > 0)[:, None].float()
    patches = F.grid_sample(torch.cat([pixels, inside], 1), torch.stack(grids), align_corners=False)
    texture, inside = patches[:, :3], patches[:, 3] > 0.5
    both, either = inside[1:] & inside[:-1], inside[1:] | inside[:-1]
    shared = both.sum((1, 2)) / either.sum((1, 2)).clamp(min=1)
    changes = (texture[1:] - texture[:-1]).square().mean(1)
    return 1 - shared.mean().item(), changes[both].mean().sqrt().item() if both.any() else 1.0


def score_edit(judge: Judge, video: np.ndarray, clip: BenchmarkClip, kind: str) -> dict[str, float | None]:
    """The figures of one edited video (uint8 `f h w 3`), those of `SCORES`; None where one means nothing."""
    attribute, value = KINDS[kind], clip.edits[kind]
    scenes, before = clip.scenes(**{attribute: value}), clip.scenes()
    exact, source = world.render_clip(scenes), world.render_clip(before)
    seen = look(judge, video)
    wanted = {a: {getattr(scenes[0], a)} for a in ATTRIBUTES}
    if clip.scene.pattern != "solid":
        wanted["colour"].add(clip.scene.second_colour)  # the judge may name either of the two
    if attribute == "colour":
        wanted["colour"] = {value}
    right = {a: float(np.mean([v in wanted[a] for v in getattr(seen, a)])) for a in ATTRIBUTES}
    truth = masks(scenes)
    correlation, distance = trajectory_agreement(
        _trajectory(seen.centre, seen.radius), _trajectory(*locate(torch.from_numpy(truth)))
    )
    either = np.maximum(truth, masks(before))  # the subject as it was and as it should be
    # the stage of two frames, away from the subject in either (as it should be and as it is)
    drawn = np.maximum(truth, seen.mask.numpy())
    wide = np.stack([cv2.dilate(m, np.ones((13, 13))) for m in drawn]) > 0.05
    stage = ~(wide[1:] | wide[:-1])
    steps = np.abs(video[1:].astype(np.float32) - video[:-1]).mean(-1) / 255
    around = np.stack([cv2.dilate(m, np.ones((2 * ROOM + 1, 2 * ROOM + 1))) for m in either]) == 0
    untouched = {"subject": around, "colour": around, "background": truth > 0.99, "style": None}[kind]
    rest_psnr = None
    if untouched is not None:
        rest_psnr = min(EQUAL, psnr(*(torch.from_numpy(x[untouched][None, None]) for x in (video, source))))
    outline, texture = subject_flicker(video, seen.mask.numpy(), scenes)
    return dict(
        edited=right[attribute],
        kept=float(np.mean([right[a] for a in ATTRIBUTES if a != attribute])),
        subject_error=rmse(video, exact, truth > 0.99),
        rest_error=rmse(video, exact, either == 0),
        rest_psnr=rest_psnr,
        trajectory_corr=correlation,
        trajectory_px=distance,
        stability=float(steps[stage].mean()),
        outline_flicker=outline,
        texture_flicker=texture,
    )
