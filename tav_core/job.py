"""A whole edit with its files: a clip in, tuned weights, noise, edited videos, pictures and a summary out."""

import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import errors, pipeline
from .atomic import atomic_path, sole_user
from .checkpoint import Checkpoint, decode_video
from .errors import TavError
from .events import Callback, Note, ignored
from .inflation import VideoUNet
from .kept import Kept
from .limits import check
from .metrics import frame_difference, psnr
from .noise import InvertedNoise, save_noise
from .precision import DTYPES
from .presets import Preset
from .steps import STEP_STRIP, edits_of_step, file_of_step
from .subject import SOFTNESS
from .tuned_weights import base_fingerprint, tuned_info, write_tuned
from .tuning import TuneResult
from .tuning_state import hash_tensors
from .video import Clip, save_video
from .visuals import loss_curve, side_by_side, spotlight, step_strip, strip

# in the output folder, until all that they are for is written
STATE, UNFINISHED = "tuning-state.safetensors", "unfinished"
TUNED_FILES = ["tuned.safetensors", "loss.png", STATE]  # and one for each step whose weights are kept


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
        contrasts: the sentence with other subjects, to find the subject by.
        softness: width of the edge of the subject's mask, in pixels.
        inflation: options of `inflate` that aren't as by default.
        word: of the sentence that names the subject, to find it by; with contrasts, what either of them finds.
        mask: of the subject, drawn or found elsewhere, 0 ... 1, `f h w` of pixels: it isn't looked for then.
        rank: of what the files of tuned weights hold (see `save_tuned`).

    Raises:
        TavError: an empty sentence, a region whose subject nothing tells, or a contrast that says nothing of another
            subject.
    """

    prompt: str
    edits: Sequence[Edit]
    preset: Preset
    contrasts: Sequence[str] = ()
    softness: int = SOFTNESS
    negative_prompt: str = ""
    inflation: dict[str, Any] = field(default_factory=dict)
    word: str = ""
    mask: Tensor | None = field(default=None, repr=False, compare=False)
    rank: int | None = None

    def __post_init__(self):
        pipeline.check_prompt(self.prompt)
        pipeline.check_text("negative_prompt", self.negative_prompt)
        check(softness=self.softness)
        for edit in self.edits:
            if edit.prompt.strip() and edit.region != "everything" and not self.knows_subject:
                others = f"{errors.field('word')} or {errors.field('mask')}"
                remedy = f"give {errors.field('contrast')}, the clip's sentence with another subject, {others}"
                raise TavError("region", edit.region, "needs to know where the subject is", remedy)
            pipeline.check_edit(edit.prompt, edit.region, self.knows_subject)
        pipeline.check_contrasts(self.prompt, self.contrasts)

    @property
    def knows_subject(self) -> bool:
        return bool(self.contrasts or self.word) or self.mask is not None

    @property
    def files(self) -> list[str]:
        """Names of all files that `run_edit` writes."""
        edits = [f"{file_name(number, edit.prompt)}.mp4" for number, edit in enumerate(self.edits, 1)]
        others = ["noise.safetensors", "source.mp4", "reconstruction.mp4", "comparison.mp4", "strip.png"]
        others += [STEP_STRIP] if self.preset.tuning.keep else []
        return [*tuned_files(self.preset), *others, *edits, "summary.json"]


def tuned_files(preset: Preset) -> list[str]:
    """Names of all files that `tune_into` writes."""
    return [*TUNED_FILES, *map(file_of_step, preset.tuning.keep)]


def check_folder(folder: Path, files: Sequence[str], of: str = "output", **inputs: Path | None):
    """Says before any work that files can't be written into a folder, which needn't be there.

    Args:
        files: their names.
        of: the field that errors are about.
        inputs: by their field what is read, must be there, and not be written over.

    Raises:
        TavError: no folder, none to write to, names too long for it, a folder in the way of a file; no input, or one in
            the way.
    """
    read = {path.resolve(): path for path in inputs.values() if path is not None}
    for name, path in inputs.items():
        if path is not None and not (path.is_file() or path.is_dir()):  # in a pipe readers would wait for ever
            problem = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise TavError(name, path, problem, "check where it is")
    remedy, parent = f"choose another {errors.field(of)}", folder
    if folder.resolve() in read:
        raise TavError(of, folder, "is what is read from", remedy)
    while not os.path.exists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise TavError(of, folder, "is a file" if parent == folder else f"lies in a file, {parent}", remedy)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TavError(of, folder, f"can't be made: nothing may be written to {parent}", remedy)
    for name in [*files, *(f"{'x' * 60}/{name}" for name in files)]:  # while they are written they lie deeper
        file = folder / name
        try:
            if stat.S_ISDIR(file.lstat().st_mode):
                raise TavError(of, folder, f"holds a folder where {name} is to be", remedy)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise TavError(of, folder, f"can't be used ({error.strerror})", remedy) from error
        if (found := read.get(file.resolve())) is not None:
            raise TavError(of, folder, f"is where {found} lies, which {name} would take the place of", remedy)


def check_file(path: Path, suffixes: Sequence[str], of: str = "output", **inputs: Path | None):
    """`check_folder` for a single file, whose name must have one of the suffixes."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise TavError(of, path, f"doesn't end in {' or '.join(suffixes)}", "give it a name that does")
    check_folder(path.parent, [path.name], of, **inputs)


def check_unfinished(folder: Path, resume: bool):
    """Raises a TavError for a folder with an unfinished tuning that nobody wants to resume."""
    if (folder / STATE).exists() and not resume:
        go_on, start_over = f"add {errors.field('resume')} to go on with it", f"delete {STATE} to start over"
        raise TavError("output", folder, "holds an unfinished tuning", f"{go_on}, or {start_over}")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other runs out of it.

    Raises:
        TavError: nothing can be written there, or another run does.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except OSError as error:
        remedy = f"choose another {errors.field('output')}"
        raise TavError("output", folder, f"can't be written to ({error.strerror})", remedy) from error
    with sole_user(folder):
        yield


def tune_into(
    folder: Path,
    checkpoint: Checkpoint,
    sources: Sequence[pipeline.Source],
    preset: Preset,
    *,
    inflation: dict[str, Any] | None = None,
    rank: int | None = None,
    resume: bool = True,
    callback: Callback = ignored,
) -> tuple[VideoUNet, TuneResult]:
    """Tunes on the clips, with the state kept in the folder; tuned weights and loss curve are written there.

    Args:
        rank: of what the files of tuned weights hold (see `save_tuned`).

    Returns: the U-Net, in the dtype of the preset, and the result.

    Raises:
        TavError: a folder that can't be written to, or that holds an unfinished tuning and `resume` is off.
        Cancelled: by the callback.
    """
    check_folder(folder, tuned_files(preset))
    check_unfinished(folder, resume)
    state, (source, *more) = folder / STATE, sources
    unet, result = pipeline.tune_on(
        checkpoint, sources, preset, inflation=inflation, state_path=state, resume=resume, callback=callback
    )
    frames, height, width = source.frames.shape[:3]
    info = tuned_info(
        base_fingerprint(unet),
        unet.inflation,
        prompt=source.prompt,
        num_frames=preset.tuning.context_length or frames,
        width=width,
        height=height,
        config=asdict(preset.tuning),
        base_name=checkpoint.name,
        more_prompts=[other.prompt for other in more],
    )
    small = {} if rank is None else dict(rank=rank, before=pipeline.untuned_weights(checkpoint, **(inflation or {})))
    for step, weights in result.kept.items():
        write_tuned(folder / file_of_step(step), weights, replace(info, config=info.config | {"steps": step}), **small)
    write_tuned(folder / TUNED_FILES[0], result.weights, info, **small)
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
    check(fps=clip.fps)

    def timed(stage: str, function: Callable, *args, **kwargs):
        started = time.monotonic()
        value = function(*args, **kwargs)
        seconds[stage] = round(seconds.get(stage, 0) + time.monotonic() - started, 2)
        return value

    if job.word:  # a wrong one should not surface after the tuning
        pipeline.places_of(checkpoint, job.prompt, job.word, preset)
    source = timed("encode", pipeline.prepare, checkpoint, clip.frames, job.prompt)
    unet, result = timed("tune", tune_into, folder, checkpoint, [source], preset, inflation=job.inflation,
                         rank=job.rank, resume=resume, callback=callback)  # fmt: skip
    kept = Kept(folder / UNFINISHED, _depends_on(job, source, result))
    noise = kept("noise", lambda: timed("invert", pipeline.invert, checkpoint, unet, source, preset, callback=callback))
    subject = None if job.mask is None else pipeline.drawn_subject(job.mask, clip.frames, job.softness)
    if job.knows_subject and subject is None:
        args = (checkpoint, unet, source, job.contrasts, preset, job.softness, job.word)
        subject = kept("subject", lambda: timed("find the subject", pipeline.find_subject, *args))
    inverted = InvertedNoise(noise, job.prompt, subject, clip.frames, clip.fps, clip.sound)
    save_noise(folder / "noise.safetensors", inverted, preset)
    save_video(clip.frames, folder / "source.mp4", clip.fps, clip.sound)
    videos, files, regions = {"source": clip.frames}, {}, {}

    def sampled(unet: VideoUNet, noise: Tensor, edit: Edit) -> Tensor:
        return timed("sample", pipeline.sample, checkpoint, unet, noise, edit.prompt, preset,
                     source_prompt=job.prompt, negative_prompt=job.negative_prompt, subject=subject,
                     region=edit.region, source_frames=clip.frames, callback=callback)  # fmt: skip

    for number, edit in enumerate([Edit(job.prompt), *job.edits]):
        label = edit.prompt if number else "reconstruction"
        if number and label in ("subject", "reconstruction", *videos):
            label = f"{label} ({number})"

        def draw(edit=edit, label=label) -> Tensor:
            callback(Note(f"{label} ..."))
            return sampled(unet, noise, edit)

        videos[label] = kept(str(number), draw, prompt=edit.prompt, region=edit.region)
        files[label] = f"{file_name(number, edit.prompt) if number else label}.mp4"
        save_video(videos[label], folder / files[label], clip.fps, clip.sound)
        regions |= {label: edit.region} if number else {}
    shown = videos if subject is None else {"source": clip.frames, "subject": spotlight(clip.frames, subject), **videos}
    strip(list(shown.values()), list(shown), folder / "strip.png")
    together = side_by_side(list(videos.values()), list(videos))
    save_video(together, folder / "comparison.mp4", clip.fps, clip.sound)
    if preset.tuning.keep:
        unet = None  # makes room for that of a step
        at = {step: edits_of_step(step, folder, checkpoint, source, job, kept, sampled, callback)
              for step in result.kept if step < result.steps}  # fmt: skip
        step_strip(at | {result.steps: [videos[label] for label in regions]}, list(regions), folder / STEP_STRIP)
    ceiling = psnr(decode_video(checkpoint, source.take.latents), clip.frames)  # what the VAE alone leaves of the clip
    summary = {
        "prompt": job.prompt, "checkpoint": checkpoint.name, "frames": len(clip.frames), "fps": round(clip.fps, 3),
        "size": [clip.frames.shape[2], clip.frames.shape[1]], "settings": asdict(preset), "steps": result.steps,
        "probe_loss": {"before": result.probe_losses[0][1], "after": result.probe_losses[-1][1]},
        "reconstruction_psnr": round(psnr(videos["reconstruction"], clip.frames), 2), "vae_psnr": round(ceiling, 2),
        "frame_difference": {label: round(frame_difference(video), 4) for label, video in videos.items()},
        "regions": regions, "files": files, "seconds": seconds,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    kept.remove()
    (folder / STATE).unlink(missing_ok=True)
    return summary, videos


def _depends_on(job: EditJob, source: pipeline.Source, result: TuneResult) -> dict[str, Any]:
    """What decides on noise, subject and edits, but for an edit's own sentence and region."""
    settings = asdict(job.preset)
    tuning = settings.pop("tuning")  # its weights tell of the rest
    return {
        "weights": hash_tensors(result.weights.values()),
        "latents": hash_tensors([source.take.latents, source.frames]),
        "prompts": [job.prompt, job.negative_prompt, *job.contrasts, job.softness, job.word],
        "mask": None if job.mask is None else hash_tensors([job.mask]),
        "settings": settings | {name: tuning[name] for name in ("seed", "dtype", "context_length")},
        "versions": [torch.__version__, str(source.take.latents.device)],
    }


def file_name(number: int, prompt: str) -> str:
    """Of an edit, without suffix."""
    return f"edit-{number}-{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}"


def write_json(path: Path, content: dict):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
