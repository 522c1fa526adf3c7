"""A whole edit with its files: a clip in, tuned weights, noise, edited videos, pictures and a summary out."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import errors, pipeline
from .atomic import atomic_path
from .checkpoint import Checkpoint
from .errors import TavError
from .events import Callback, Note, ignored
from .inflation import VideoUNet
from .metrics import frame_difference, psnr
from .noise import save_noise
from .precision import DTYPES
from .presets import Preset
from .subject import SOFTNESS
from .tuned_weights import save_tuned
from .tuning import TuneResult
from .video import Clip, save_video
from .visuals import loss_curve, side_by_side, spotlight, strip

STATE = "tuning-state.safetensors"  # in the output folder, until all that it is for is written


@dataclass(frozen=True)
class Edit:
    """An edited sentence, and what of the clip it may change (see `EditPlaces.of`)."""

    prompt: str
    region: str = "everything"


@dataclass(frozen=True)
class EditJob:
    """What to do with a clip.

    Attributes:
        prompt: one sentence that describes it.
        contrasts: the sentence with other subjects, to find the subject by; none, and it isn't looked for.
        softness: width of the edge of the subject's mask, in pixels.
        inflation: options of `inflate` that aren't as by default.

    Raises:
        TavError: an empty sentence, a region without contrasts, or a contrast that says nothing of another subject.
    """

    prompt: str
    edits: Sequence[Edit]
    preset: Preset
    contrasts: Sequence[str] = ()
    softness: int = SOFTNESS
    negative_prompt: str = ""
    inflation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        pipeline.check_prompt(self.prompt)
        for edit in self.edits:
            if not edit.prompt.strip():
                raise TavError("edit", None, "is empty", "describe the edited clip in one sentence")
            if edit.region != "everything" and not self.contrasts:
                remedy = f"give {errors.field('contrast')}, the clip's sentence with another subject"
                raise TavError("region", edit.region, "needs to know where the subject is", remedy)
        pipeline.check_contrasts(self.prompt, self.contrasts)


def tune_into(
    folder: Path,
    checkpoint: Checkpoint,
    sources: Sequence[pipeline.Source],
    preset: Preset,
    *,
    inflation: dict[str, Any] | None = None,
    resume: bool = True,
    callback: Callback = ignored,
) -> tuple[VideoUNet, TuneResult]:
    """Tunes on the clips, with the state kept in the folder; tuned weights and loss curve are written there.

    Returns: the U-Net, in the dtype of the preset, and the result.

    Raises:
        TavError: a folder that can't be written to, or that holds an unfinished tuning and `resume` is off.
        Cancelled: by the callback.
    """
    _make_folder(folder)
    state, (source, *more) = folder / STATE, sources
    if state.exists() and not resume:
        go_on, start_over = f"add {errors.field('resume')} to go on with it", f"delete {STATE} to start over"
        raise TavError("output", folder, "holds an unfinished tuning", f"{go_on}, or {start_over}")
    unet, result = pipeline.tune_on(
        checkpoint, sources, preset, inflation=inflation, state_path=state, resume=resume, callback=callback
    )
    frames, height, width = source.frames.shape[:3]
    save_tuned(
        folder / "tuned.safetensors",
        unet,
        prompt=source.prompt,
        num_frames=preset.tuning.context_length or frames,
        width=width,
        height=height,
        config=asdict(preset.tuning),
        base_name=checkpoint.name,
        more_prompts=[other.prompt for other in more],
    )
    loss_curve(result.losses, result.probe_losses, folder / "loss.png")
    return torch.nn.Module.to(unet, DTYPES[preset.tuning.dtype]), result


def run_edit(
    job: EditJob, checkpoint: Checkpoint, clip: Clip, folder: Path, *, resume: bool = True, callback: Callback = ignored
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tune, invert, reconstruct, edit; writes everything into the folder.

    Returns: the summary, and the videos by label (uint8 `f h w c`).

    Raises:
        TavError, Cancelled: see `tune_into`; settings that the checkpoint can't follow.
    """
    preset, seconds = job.preset, {}

    def timed(stage: str, function: Callable, *args, **kwargs):
        started = time.monotonic()
        value = function(*args, **kwargs)
        seconds[stage] = round(seconds.get(stage, 0) + time.monotonic() - started, 2)
        return value

    source = timed("encode", pipeline.prepare, checkpoint, clip.frames, job.prompt)
    unet, result = timed("tune", tune_into, folder, checkpoint, [source], preset, inflation=job.inflation,
                         resume=resume, callback=callback)  # fmt: skip
    noise = timed("invert", pipeline.invert, checkpoint, unet, source, preset, callback=callback)
    subject = None
    if job.contrasts:
        args = (checkpoint, unet, source, job.contrasts, preset, job.softness)
        subject = timed("find the subject", pipeline.find_subject, *args)
    save_noise(folder / "noise.safetensors", noise, subject, job.prompt, preset, clip.fps, clip.sound)
    save_video(clip.frames, folder / "source.mp4", clip.fps, clip.sound)
    videos, files = {"source": clip.frames}, {}
    for number, edit in enumerate([Edit(job.prompt), *job.edits]):
        label = edit.prompt if number else "reconstruction"
        callback(Note(f"{label} ..."))
        videos[label] = timed("sample", pipeline.sample, checkpoint, unet, noise, edit.prompt, preset,
                              source_prompt=job.prompt, negative_prompt=job.negative_prompt, subject=subject,
                              region=edit.region, callback=callback)  # fmt: skip
        files[label] = f"{file_name(number, edit.prompt) if number else label}.mp4"
        save_video(videos[label], folder / files[label], clip.fps, clip.sound)
    shown = videos if subject is None else {"source": clip.frames, "subject": spotlight(clip.frames, subject), **videos}
    strip(list(shown.values()), list(shown), folder / "strip.png")
    together = side_by_side(list(videos.values()), list(videos))
    save_video(together, folder / "comparison.mp4", clip.fps, clip.sound)
    summary = {
        "prompt": job.prompt, "checkpoint": checkpoint.name, "frames": len(clip.frames), "fps": round(clip.fps, 3),
        "size": [clip.frames.shape[2], clip.frames.shape[1]], "settings": asdict(preset), "steps": result.steps,
        "probe_loss": {"before": result.probe_losses[0][1], "after": result.probe_losses[-1][1]},
        "reconstruction_psnr": round(psnr(videos["reconstruction"], clip.frames), 2),
        "frame_difference": {label: round(frame_difference(video), 4) for label, video in videos.items()},
        "regions": {edit.prompt: edit.region for edit in job.edits}, "files": files, "seconds": seconds,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    (folder / STATE).unlink(missing_ok=True)
    return summary, videos


def file_name(number: int, prompt: str) -> str:
    """Of an edit, without suffix."""
    return f"edit-{number}-{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}"


def write_json(path: Path, content: dict):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _make_folder(path: Path):
    """Makes the folder, or says now rather than after the tuning that nothing can be written there."""
    remedy = f"choose another {errors.field('output')}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TavError("output", path, f"can't be made ({error.strerror})", remedy) from error
    if not os.access(path, os.W_OK):
        raise TavError("output", path, "can't be written to", remedy)
