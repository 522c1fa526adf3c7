"""Many clips, one after the other: each is edited as `run_edit` does, its edits are written as frames and measured.

In the output folder stand

    frames/DAVIS_480p/stunt/style/00000.jpg   as LOVEU-TGVE's own `scripts/run_eval.py` reads them
    runs/DAVIS_480p/stunt/                    what `run_edit` writes, and what is known to be done of the clip
    metrics.csv, summary.csv, metrics.json, metrics.html

What is done is not done again; what failed is told at the end, and ends nothing but its own clip.
"""

import json
import math
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .atomic import atomic_path
from .checkpoint import Checkpoint
from .dataset import Entry, in_words, video_fault
from .errors import Cancelled, TavError
from .errors import field as mentioned
from .events import Callback, Note, Reading, ignored
from .job import EditJob, run_edit
from .measure import FIGURES, MODELS, Measured, Models, as_json, lines_of, mask_of, measure, of_json
from .measure import write_csv as write_figures
from .memory import release
from .noise import read_noise
from .page import page
from .pictures import IMAGES, is_animated
from .pipeline import places_of
from .presets import Preset, with_settings
from .project import changeable, write_json
from .sampling import Edit
from .subject import SOFTNESS
from .video import Clip, load_video
from .windows import ContextWindows

WINDOW = 32  # frames: longer clips are seen in windows of so many, where nothing else is said
REPORT = ("metrics.csv", "summary.csv", "metrics.json", "metrics.html")
SETTINGS = "settings.json"
_NOTED, _FIGURES, _ERROR = "frames.json", "figures.json", "error.txt"  # beside what `run_edit` writes
# what folders of earlier versions, which hadn't these settings, were made with
_ONCE = {"eta": 0.0, "guidance_rescale": 0.0, "guidance_start": 0.0, "guidance_end": 1.0,
         "lora": [], "prompt_weights": False}  # fmt: skip
_NO_MODELS = dict.fromkeys(MODELS, "None")  # earlier versions noted those that they knew
NO_MATTER = ("memory", "save_minutes", "save_every", "probe_every", "edits_at_once")  # to the result


@dataclass(frozen=True)
class ClipJob:
    """A clip of a dataset, and what is done with it: `job` has the edits of `entry` in their order, and no mask yet."""

    entry: Entry
    job: EditJob

    @property
    def name(self) -> str:
        return self.entry.name


@dataclass(frozen=True)
class Frames:
    """How the frames of all clips are read: their size, and how one of another shape is brought to it."""

    width: int
    height: int
    fit: str = "crop"


# ------------------------------------------------------------------------------------------------------ the list


def jobs_of(
    entries: Sequence[Entry], preset: Preset, inflation: dict[str, Any], output: Path
) -> tuple[list[ClipJob], list[str]]:
    """The jobs of a dataset, and all that is wrong with them, a sentence each, before any clip is read.

    Args:
        preset: of all clips; each may have settings of its own.
        inflation: options of `inflate` that aren't as by default.
        output: the folder of the evaluation, which must not have clips in it.
    """
    jobs, faults = [], []
    for entry in entries:
        told = [video_fault(entry.video), _mask_fault(entry)]
        if output.resolve() in entry.video.resolve().parents:
            told.append(f"video {entry.video} lies in the folder that is written to; choose another one of them")
        try:
            own = with_settings(preset, **entry.settings)
            ContextWindows(own.tuning.context_length or WINDOW, own.context_overlap)
        except TavError as error:
            told.append(in_words(error))
            own = preset
        for edit in entry.edits.values():  # one by one, so that each tells what is wrong with it
            try:
                job_of(replace(entry, edits={"": edit}), own, inflation)
            except TavError as error:
                told.append(in_words(error))
        faults += [f"{entry.name}: {each}" for each in dict.fromkeys(told) if each]
        if not any(told):
            jobs.append(ClipJob(entry, job_of(entry, own, inflation)))
    return jobs, faults


def job_of(entry: Entry, preset: Preset, inflation: dict[str, Any]) -> EditJob:
    softness = SOFTNESS if entry.softness is None else entry.softness
    mask = None if entry.mask is None else torch.ones(1, 1, 1)  # till it is read
    return EditJob(entry.prompt, [*entry.edits.values()], preset, entry.contrasts, softness, entry.negative_prompt,
                   inflation, entry.word, mask)  # fmt: skip


def _mask_fault(entry: Entry) -> str | None:
    if entry.mask is None:
        unused = entry.softness is not None and not (entry.contrasts or entry.word)
        return "softness does nothing without contrast, subject or mask; leave it out" if unused else None
    if entry.contrasts or entry.word:
        return "mask says where the subject is, contrast and subject do nothing; leave them out"
    fault = video_fault(entry.mask)
    return fault and fault.replace("video", "mask", 1)


def word_faults(jobs: Sequence[ClipJob], checkpoint: Checkpoint) -> list[str]:
    """What is wrong with the words that name subjects, which the checkpoint's tokenizer must know."""
    faults = []
    for clip in jobs:
        try:
            if clip.job.word:
                places_of(checkpoint, clip.job.prompt, clip.job.word, clip.job.preset)
        except TavError as error:
            faults.append(f"{clip.name}: {in_words(error)}")
    return faults


def check_settings(output: Path, preset: Preset, inflation: dict[str, Any], checkpoint: Checkpoint, frames: Frames):
    """Notes with what settings a folder is filled; figures of several ones would not belong together.

    Raises:
        TavError: it has been filled with others.
    """
    content = mattering(asdict(preset)) | {
        "inflation": inflation,
        "checkpoint": checkpoint.name,
        "frames": asdict(frames),
    }
    content |= {"lora": list(checkpoint.loras), "embedding": dict(checkpoint.embeddings)}
    content["prompt_weights"] = checkpoint.prompt_weights
    flat = {
        f"{of} {name}": value for of, own in content.items() if isinstance(own, dict) for name, value in own.items()
    }
    now = json.loads(json.dumps(flat | {name: own for name, own in content.items() if not isinstance(own, dict)}))
    before = read_json(output / SETTINGS)
    before = before and _ONCE | before
    if before and before != now:
        name = next(name for name in sorted(before.keys() | now) if before.get(name) != now.get(name))
        problem = f"holds clips that were edited with other settings ({name} {before.get(name)}, now {now.get(name)})"
        raise TavError("output", output, problem, f"choose another {mentioned('output')}, or set it as it was")
    write_json(output / SETTINGS, now)


def mattering(preset: dict[str, Any]) -> dict[str, Any]:
    """What of a preset's settings the result depends on."""
    own, tuning = ({name: value for name, value in of.items() if name not in NO_MATTER}
                   for of in (preset, preset["tuning"]))  # fmt: skip
    return own | {"tuning": tuning}


# ------------------------------------------------------------------------------------------------------- the edits


def edit_all(
    jobs: Sequence[ClipJob], checkpoint: Checkpoint, output: Path, frames: Frames, callback: Callback = ignored
) -> dict[str, str]:
    """Edits all clips that aren't done; a tuning that was stopped goes on.

    Returns: why, by the names of the clips that failed.

    Raises:
        TavError: nothing can be written any more.
        Cancelled: by the callback.
    """
    failed = {}
    for number, clip in enumerate(jobs, 1):
        done = is_done(clip, output)
        callback(Note(f"{number} of {len(jobs)}, {clip.name}{' is done' if done else ' ...'}"))
        if done:
            continue
        try:
            edit_clip(clip, checkpoint, output, frames, callback)
        except Cancelled:
            raise
        except Exception as error:  # whatever it is, the others have nothing to do with it
            if isinstance(error, TavError) and error.field == "output":
                raise
            failed[clip.name] = told_of(error, output / "runs" / clip.name)
            callback(Note(f"{clip.name} failed: {failed[clip.name]}"))
        release(checkpoint.vae.device)
    return failed


def told_of(error: Exception, run: Path) -> str:
    """A line; of what nobody foresaw, the whole in a file."""
    if isinstance(error, TavError):
        return in_words(error)
    with atomic_path(run / _ERROR) as path:
        path.write_text("".join(traceback.format_exception(error)), "utf-8")
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]} (see {run / _ERROR})"


def is_done(clip: ClipJob, output: Path) -> bool:
    """Whether all edits of a clip are there, made of it as it is wanted now."""
    before = read_json(output / "runs" / clip.name / _NOTED)
    if not before or before.get("clip") != _identity(clip):
        return False
    same = all(before["edits"].get(kind) == _told_of(edit) for kind, edit in clip.entry.edits.items())
    folders = [output / "frames" / clip.name / kind for kind in clip.entry.edits]
    return same and all(len([*folder.glob("*.jpg")]) == before["frames"] for folder in folders)


def _told_of(edit: Edit) -> dict[str, Any]:
    """An edit as it is noted; what earlier versions didn't know is left out where nothing is given."""
    return {name: value for name, value in asdict(edit).items() if name != "seed" or value is not None}


def _identity(clip: ClipJob) -> dict[str, Any]:
    """What its edits depend on, but for their own sentences and regions, and for the settings of all clips."""
    own = asdict(clip.entry) | {"video": clip.entry.video.name, "mask": clip.entry.mask and clip.entry.mask.name}
    return json.loads(json.dumps({name: value for name, value in own.items() if name != "edits"}))


def edit_clip(clip: ClipJob, checkpoint: Checkpoint, output: Path, frames: Frames, callback: Callback = ignored):
    """Edits a clip, and writes its edits as frames.

    Raises:
        TavError, Cancelled: see `run_edit`.
    """
    run, entry = output / "runs" / clip.name, clip.entry
    before = read_json(run / _NOTED)
    if before is None or before.get("clip") != _identity(clip):
        if before is not None:
            shutil.rmtree(run)  # nothing of another tuning shall be mixed with this one
        # so that whoever goes on with what is unfinished knows what it is of
        write_json(run / _NOTED, {"clip": _identity(clip), "edits": {}, "frames": 0})
    job, video = prepared(clip, frames, callback)
    _, drawn = run_edit(job, checkpoint, video, run, callback=callback)
    for kind, edit in zip(entry.edits, drawn):
        _write_frames(edit, output / "frames" / entry.name / kind)
    edited = {kind: _told_of(edit) for kind, edit in entry.edits.items()}
    write_json(run / _NOTED, {"clip": _identity(clip), "edits": edited, "frames": len(video.frames)})


def prepared(clip: ClipJob, frames: Frames, callback: Callback = ignored) -> tuple[EditJob, Clip]:
    """The job of a clip with its mask and, where it is long, with windows; and the clip, read."""
    entry, job = clip.entry, clip.job
    read = dict(width=frames.width, height=frames.height, fit=frames.fit, callback=callback)
    cut = dict(start=entry.start, stride=entry.stride or 1)
    video = load_video(entry.video, **cut, count=entry.count, **read)
    if entry.mask is not None:
        job = replace(job, mask=_mask(entry.mask, cut | read, len(video.frames)))
    return _windowed(job, video), video


def _mask(path: Path, reading: dict[str, Any], frames: int) -> Tensor:
    """A picture for all frames, or a video or folder that is cut as the clip is."""
    one = path.is_file() and path.suffix.lower() in IMAGES and not is_animated(path)
    cut = dict(start=0, stride=1, count=1) if one else dict(count=frames)
    return mask_of(load_video(path, **(reading | cut), sound=False).frames, frames)


def _windowed(job: EditJob, video: Clip) -> EditJob:
    """Windows for a clip that is longer than one, and none for another."""
    length = job.preset.tuning.context_length or WINDOW
    length = length if len(video.frames) > length else None
    return replace(job, preset=replace(job.preset, tuning=replace(job.preset.tuning, context_length=length)))


def _write_frames(video: Tensor, folder: Path):
    """As 00000.jpg and so on; others that lie there go."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, frame in enumerate(video.numpy()):
        with atomic_path(folder / f"{number:05}.jpg") as path:
            Image.fromarray(frame).save(path, quality=95, subsampling=0)


# ------------------------------------------------------------------------------------------------------ the figures


def measure_all(
    jobs: Sequence[ClipJob], output: Path, models: Models, names: dict[str, str], callback: Callback = ignored
) -> tuple[list[Measured], dict[str, str]]:
    """The figures of all edits that are there, of the frames as they were written, beside their source.

    Args:
        names: of the models; figures that were measured by others are measured anew.

    Returns: the figures, each named "SET/CLIP/KIND"; and why, by the names of the clips where it failed.

    Raises:
        Cancelled: by the callback.
    """
    rows, failed, names = [], {}, _NO_MODELS | names
    ready = [clip for clip in jobs if is_done(clip, output)]
    for number, clip in enumerate(ready, 1):
        callback(Note(f"{number} of {len(ready)}, {clip.name} is measured"))
        callback(Reading(number))  # by which it may be stopped
        path = output / "runs" / clip.name / _FIGURES
        try:
            before = read_json(path)
            # figures of an earlier version don't say what edits they are of
            known = before["videos"] if before and "edits" in before and _NO_MODELS | before["models"] == names else {}
            wanted = {kind: _told_of(edit) for kind, edit in clip.entry.edits.items()}
            own = {kind: of_json(row) for kind, row in known.items() if before["edits"].get(kind) == wanted.get(kind)}
            for measured in _measured(clip, own, output, models, callback):
                own[measured.name.rsplit("/", 1)[1]] = measured
                videos = {kind: as_json(row) for kind, row in own.items()}
                write_json(path, {"models": names, "edits": wanted, "videos": videos})
            rows += [own[kind] for kind in clip.entry.edits]
        except Cancelled:
            raise
        except Exception as error:
            failed[clip.name] = told_of(error, path.parent)
    return rows, failed


def _measured(clip: ClipJob, known: dict[str, Measured], output: Path, models: Models, callback: Callback):
    """The figures of a clip's edits that aren't known yet."""
    wanted = [kind for kind in clip.entry.edits if kind not in known]
    noise = read_noise(output / "runs" / clip.name / "noise.safetensors") if wanted else None
    for kind in wanted:
        edit, name = clip.entry.edits[kind], f"{clip.name}/{kind}"
        video = load_video(output / "frames" / name, sound=False, callback=callback).frames
        mask = changeable(edit.region, noise)
        yield measure(name, video, noise.frames, edit.prompt, clip.job.prompt, mask, models)


def summed_up(rows: Sequence[Measured]) -> list[Measured]:
    """The means of all edits of a kind, of one kind after the other, and those of all edits, as LOVEU-TGVE has them.

    A figure that isn't finite, as the PSNR of two equal videos, is left out of its mean.
    """
    kinds = dict.fromkeys(row.name.rsplit("/", 1)[1] for row in rows)
    groups = {kind: [row for row in rows if row.name.endswith(f"/{kind}")] for kind in kinds} | {"all": list(rows)}
    return [
        Measured(kind, f"{len(own)} edits", means_of([x.figures for x in own]), means_of([x.of_source for x in own]))
        for kind, own in groups.items()
    ]


def means_of(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    of_name = {name: [own[name] for own in figures if math.isfinite(own.get(name, math.nan))] for name in FIGURES}
    return {name: sum(values) / len(values) for name, values in of_name.items() if values}


def write_evaluation(rows: Sequence[Measured], failed: dict[str, str], output: Path):
    """The files of `REPORT`: each edit, the means, both of them for programs, and a page with pictures."""
    means = summed_up(rows)
    write_figures(rows, output / "metrics.csv")
    write_figures(means, output / "summary.csv")
    told = {"figures": FIGURES, "means": [*map(as_json, means)], "videos": [*map(as_json, rows)], "failed": failed}
    write_json(output / "metrics.json", told | {"settings": read_json(output / SETTINGS)})
    clips = {}
    for row in rows:
        name, kind = row.name.rsplit("/", 1)
        clips.setdefault(name, []).append(replace(row, name=kind))
    content = page("evaluation.html", means=means, lines=lines_of(means), failed=failed,
                   clips=[(name, own, lines_of(own)) for name, own in clips.items()])  # fmt: skip
    with atomic_path(output / "metrics.html") as path:
        path.write_text(content, "utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """What was written there; None if nothing was, or nothing that is whole."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
