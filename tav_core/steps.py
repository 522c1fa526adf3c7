"""Weights of several steps of one tuning: their files, and the same edits by each of them, to look at and choose."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import pipeline
from .checkpoint import Checkpoint
from .drawing import draw
from .events import Callback, Note
from .lora import with_loras
from .noise import InvertedNoise, read_noise, save_noise
from .precision import DTYPES
from .project import NOISE, Project
from .trainable import trainable_parameters
from .tuned_weights import load_tuned, weights_fingerprint

if TYPE_CHECKING:
    from .job import EditJob

STEP_STRIP = "strip-steps.png"


def file_of_step(step: int) -> str:
    return f"tuned-{step}.safetensors"


def folder_of_step(step: int) -> str:
    """Of the edits by its weights, in that of the project."""
    return f"step-{step}"


def edits_of_step(
    step: int,
    folder: Path,
    checkpoint: Checkpoint,
    source: pipeline.Source,
    job: "EditJob",
    noise: InvertedNoise,
    callback: Callback,
) -> list[Tensor]:
    """The edits of a job by the weights of a step, uint8 `f h w c`: as if the tuning had ended there.

    They are a project of their own, in a folder of the project's: what it has of them is used again.

    Args:
        folder: of the project, that holds the file of the step; its weights are used as they are there.
        noise: of the project; the step inverts its own.
    """
    project, unet = Project.at(folder / folder_of_step(step)), pipeline.video_unet(checkpoint, **job.inflation)
    load_tuned(folder / file_of_step(step), unet)
    weights, unet = weights_fingerprint(trainable_parameters(unet)), nn.Module.to(unet, DTYPES[job.preset.tuning.dtype])
    callback(Note(f"step {step} ..."))
    project.folder.mkdir(exist_ok=True)
    path = project.folder / NOISE
    if path.exists() and (found := read_noise(path, job.preset)).weights == weights:
        latents = found.latents
    else:
        latents = pipeline.invert(checkpoint, unet, source, job.preset, callback)
        save_noise(path, replace(noise, latents=latents, weights=weights), job.preset)
    own = replace(noise, latents=latents, weights=weights)
    styled = with_loras(checkpoint, unet, job.loras)
    edits = draw(project, job.edits, *styled, job.preset, own, negative_prompt=job.negative_prompt,
                 control=job.control, callback=callback)  # fmt: skip
    return [project.video(edit["file"]) for edit in edits]
