"""Weights of several steps of one tuning: their files, and the same edits by each of them, to look at and choose."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import pipeline
from .checkpoint import Checkpoint
from .events import Callback, Note
from .inflation import VideoUNet
from .kept import Kept
from .precision import DTYPES
from .tuned_weights import load_tuned

if TYPE_CHECKING:
    from .job import Edit, EditJob

STEP_STRIP = "strip-steps.png"


def file_of_step(step: int) -> str:
    return f"tuned-{step}.safetensors"


def edits_of_step(
    step: int,
    folder: Path,
    checkpoint: Checkpoint,
    source: pipeline.Source,
    job: "EditJob",
    kept: Kept,
    draw: Callable[[VideoUNet, Tensor, "Edit"], Tensor],
    callback: Callback,
) -> list[Tensor]:
    """The edits of a job by the weights of a step, from noise that they inverted: as if the tuning had ended there.

    Args:
        folder: that holds the file of the step; its weights are used as they are there.
        kept: where what is finished waits.
        draw: an edit, uint8 `f h w c`, by a U-Net from its noise.
    """
    settings = {"step": step, "rank": job.rank}

    @cache
    def unet() -> VideoUNet:  # only if there is something left to draw
        made = pipeline.video_unet(checkpoint, **job.inflation)
        load_tuned(folder / file_of_step(step), made)
        return nn.Module.to(made, DTYPES[job.preset.tuning.dtype])

    def drawn(edit: "Edit") -> Tensor:
        callback(Note(f"step {step}: {edit.prompt} ..."))
        noise = kept(f"noise-{step}", lambda: pipeline.invert(checkpoint, unet(), source, job.preset, callback),
                     **settings)  # fmt: skip
        return draw(unet(), noise, edit)

    return [
        kept(f"{number}-{step}", lambda edit=edit: drawn(edit), prompt=edit.prompt, region=edit.region, **settings)
        for number, edit in enumerate(job.edits, 1)
    ]
