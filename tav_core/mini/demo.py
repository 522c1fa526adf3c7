"""The clip of `python -m tav_core demo`: content that the checkpoint has never seen, and four kinds of edit."""

from pathlib import Path

import numpy as np

from . import world
from .clips import KINDS, REGIONS, BenchmarkClip
from .judge import load_judge
from .scores import score_edit

__all__ = ["CLIP", "CONTRASTS", "DEMO", "EDITS", "PROMPT", "REGIONS", "score"]

CLIP = Path(__file__).parent / "demo.mp4"
DEMO = BenchmarkClip(
    world.Scene("ball", "red", "grass", pattern="dots", second_colour="yellow", layout=5),
    "slide",
    {"subject": "star", "colour": "blue", "background": "snow", "style": "sketch"},
)
PROMPT = DEMO.caption()
CONTRASTS = DEMO.contrasts()
EDITS = {kind: DEMO.caption(**{KINDS[kind]: value}) for kind, value in DEMO.edits.items()}


def score(kind: str, video: np.ndarray) -> dict[str, float]:
    """How well a video (uint8 `f h w 3`) shows an edit: shares of right attributes and agreement of the motion."""
    figures = score_edit(load_judge(), video, DEMO, kind)
    return {name: round(figures[name], 3) for name in ("edited", "kept", "trajectory_corr")}
