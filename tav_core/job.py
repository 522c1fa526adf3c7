"""A whole edit with its files: a clip in, tuned weights, noise, edited videos, pictures and a summary out."""

import functools
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import errors, pipeline, sampling
from .atomic import sole_user
from .checkpoint import Checkpoint, decode_video
from .control import Controls, each_of
from .drawing import draw, reading_of, settings_of
from .errors import TavError
from .events import Callback, Note, Step, ignored
from .inflation import VideoUNet
from .limits import check
from .lora import check_loras, with_loras
from .memory import offloaded
from .metrics import psnr
from .noise import InvertedNoise, read_noise, save_noise
from .precision import DTYPES
from .presets import Preset
from .project import NAMED, NOISE, SHOWN, SUMMARY, Project, file_name, labels
from .remaining import plan_of
from .sampling import Edit
from .sentences import check_sentence
from .steps import STEP_STRIP, edits_of_step, file_of_step
from .subject import SOFTNESS
from .trainable import trainable_parameters
from .tuned_weights import base_fingerprint, load_tuned, tuned_info, weights_fingerprint, write_tuned
from .tuning import TuneResult
from .tuning_state import hash_tensors
from .video import Clip
from .visuals import loss_curve, spotlight, step_strip

STATE = "tuning-state.safetensors"  # in the output folder, until the tuning is done
TUNED_FILES = ["tuned.safetensors", "loss.png", STATE]  # and one for each step whose weights are kept
# settings of a tuning that change none of its weights
ANY_TUNING = ("memory", "probe_every", "save_every", "save_minutes", "keep")
INFLATION = {"attention": "sparse-causal", "temporal_causal": False, "norm": "video"}  # as by default


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
        control: a ControlNet with hints for the edits, or several, which add up.
        loras: files and strengths, for the edits alone; those of the tuning are in the checkpoint (see `load_lora`).

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
    control: Controls = field(default=None, compare=False)
    loras: Sequence[tuple[Path, float]] = ()

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
            edit.preset_of(self.preset)
        pipeline.check_contrasts(self.prompt, self.contrasts)

    def check_fits(self, checkpoint: Checkpoint, frames: int, height: int, width: int):
        """Raises a TavError for sentences, a word, hints, LoRAs or options of `inflate` that don't fit the checkpoint
        or a clip of that shape.
        """
        texts = [("prompt", self.prompt), ("negative_prompt", self.negative_prompt)]
        texts += [("contrast", each) for each in self.contrasts] + [("edit", edit.prompt) for edit in self.edits]
        for name, text in texts:
            check_sentence(text, frames, name, checkpoint.prompt_weights)
        for control in each_of(self.control):
            control.check(checkpoint.unet, frames, height, width)
        check_loras(checkpoint, self.loras)
        pipeline.check_inflation(checkpoint, {**INFLATION, **self.inflation})
        if self.word:
            pipeline.places_of(checkpoint, self.prompt, self.word, self.preset)

    @property
    def knows_subject(self) -> bool:
        return bool(self.contrasts or self.word) or self.mask is not None

    def files(self, first: int = 1) -> list[str]:
        """Names of the files that `run_edit` writes, if the first edit has that number."""
        edits = [f"{file_name(number, edit.prompt)}.mp4" for number, edit in enumerate(self.edits, first)]
        strips = [STEP_STRIP] if self.preset.tuning.keep else []
        named = [f"{name}.mp4" for name in NAMED]
        return [*tuned_files(self.preset), NOISE, *named, *SHOWN, *strips, *edits, SUMMARY]


def tuned_files(preset: Preset) -> list[str]:
    """Names of all files that `tune_into` writes."""
    return [*TUNED_FILES, *map(file_of_step, preset.tuning.keep)]


def check_folder(folder: Path, files: Sequence[str], of: str = "output", **inputs: Path | list[Path] | None):
    """Says before any work that files can't be written into a folder, which needn't be there.

    Args:
        files: their names.
        of: the field that errors are about.
        inputs: by their field what is read, must be there, and not be written over; a path, or several.

    Raises:
        TavError: no folder, none to write to, names too long for it, a folder in the way of a file; no input, or one in
            the way.
    """
    given = [(name, path) for name, of_name in inputs.items()
             for path in (of_name if isinstance(of_name, list) else [of_name]) if path is not None]  # fmt: skip
    read = {path.resolve(): path for _, path in given}
    for name, path in given:
        if not (path.is_file() or path.is_dir()):  # in a pipe readers would wait for ever
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


def check_free(folder: Path, resume: bool):
    """Raises a TavError for a folder that is neither free for a project nor holds one (see `check_unfinished`)."""
    check_unfinished(folder, resume)
    if (folder / "tuned.safetensors").exists() and not ((folder / STATE).exists() or (folder / SUMMARY).exists()):
        remedy = f"choose another {errors.field('output')}, or {errors.field('overwrite')} them"
        raise TavError("output", folder, "holds tuned weights of no project", remedy)


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
    job: EditJob,
    checkpoint: Checkpoint,
    clip: Clip,
    folder: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    callback: Callback = ignored,
) -> tuple[dict[str, Any], list[Tensor]]:
    """Tune, invert, reconstruct, edit; writes everything into the folder.

    The folder is a project: what it has of the clip already, tuned weights, noise and edits, is used again, and edits
    are added.

    Args:
        overwrite: what the folder has of a project is removed first.

    Returns: the summary, and the videos of the job's edits (uint8 `f h w c`).

    Raises:
        TavError, Cancelled: see `tune_into`; settings that the checkpoint can't follow; a project of another clip,
            checkpoint or tuning.
    """
    check(fps=clip.fps)
    job.check_fits(checkpoint, *clip.frames.shape[:3])
    if overwrite:
        _remove(folder)
    check_free(folder, resume)
    run = _Run(Project.at(folder), job, checkpoint, clip, callback)
    run.check_same()
    callback(plan_of(job, run.stages_done()))
    with offloaded(*(control.model for control in each_of(job.control))):  # edits alone need them
        unet, project = run.tuned(resume), run.project
        if "source" not in project.summary:
            project.put("source", clip.frames, clip.fps, clip.sound)
        noise = run.inverted(unet)
        if "reconstruction" not in project.summary:
            run.reconstruct(unet, noise)
    styled = with_loras(checkpoint, unet, job.loras)
    edits = draw(project, job.edits, *styled, job.preset, noise, negative_prompt=job.negative_prompt,
                 control=job.control, callback=callback)  # fmt: skip
    videos = [project.video(edit["file"]) for edit in edits]
    if job.preset.tuning.keep:
        unet = styled = None  # makes room for that of a step
        run.compare_steps(noise, videos, labels(edits))
    project.show_grid(edits, clip.fps)
    project.show(clip.fps, clip.sound)
    return project.summary, videos


def done_in(folder: Path, job: EditJob, checkpoint: Checkpoint, clip: Clip) -> set[str]:
    """What `run_edit` has no need to compute there any more (see `plan_of`).

    Raises:
        TavError: a project of another clip, checkpoint or tuning, or noise of other steps.
    """
    run = _Run(Project.at(folder), job, checkpoint, clip, ignored)
    run.check_same()
    done = run.stages_done()
    if "invert" in done:
        read_noise(folder / NOISE, job.preset)
    return done


def _remove(folder: Path):
    """Removes a project, also one that can't be read any more."""
    try:
        project = Project.at(folder)
    except TavError:
        project = Project(folder, {"edits": []})
    project.remove()
    kept = [path.name for path in folder.glob("tuned-*.safetensors")]
    for name in (*TUNED_FILES, *kept, NOISE, STEP_STRIP):
        (folder / name).unlink(missing_ok=True)
    for of_step in folder.glob("step-*"):
        if (of_step / NOISE).is_file():
            shutil.rmtree(of_step)


@dataclass
class _Run:
    """The stages of a job, as far as its project lacks what they make."""

    project: Project
    job: EditJob
    checkpoint: Checkpoint
    clip: Clip
    callback: Callback

    @functools.cached_property
    def source(self) -> pipeline.Source:
        source = self.project.timed("encode", pipeline.prepare, self.checkpoint, self.clip.frames, self.job.prompt)
        self.callback(Step("encode", 1, 1))
        return source

    def stages_done(self) -> set[str]:
        """Names of the stages that the project has no need of any more, as `plan_of` takes them."""
        done = {"encode", "tune"} if "weights" in self.project.summary else set()
        if (self.project.folder / NOISE).exists():
            done.add("invert")
        return done | {"subject", "reconstruction"}.intersection(self.project.summary)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What all edits of the project share, as its summary has it."""
        job, checkpoint, (f, h, w, _) = self.job, self.checkpoint, self.clip.frames.shape
        base = base_fingerprint(checkpoint.unet)
        if isinstance(checkpoint.unet, VideoUNet):  # which is tuned further
            base += weights_fingerprint(trainable_parameters(checkpoint.unet))
        prediction_type = checkpoint.scheduler.config.prediction_type
        return {
            "prompt": job.prompt, "checkpoint": checkpoint.name, "frames": f, "fps": round(self.clip.fps, 3),
            "size": [w, h], "clip": hash_tensors([self.clip.frames]),
            "model": {**reading_of(checkpoint, job.prompt), "base": base, "prediction_type": prediction_type,
                      **INFLATION, **job.inflation},
            "settings": json.loads(json.dumps(asdict(job.preset))),
        }  # fmt: skip

    def check_same(self):
        """Raises a TavError for another clip, checkpoint or tuning than those of the project."""
        project, known, facts, output = self.project, self.project.summary, self.facts, errors.field("output")
        if "weights" in known and not {"model", "settings"} <= known.keys():
            raise TavError("output", project.folder, "holds samples, and no tuning", f"choose another {output}")
        remedy = f"choose another {output}, or {errors.field('overwrite')} the project"
        project.check_same("prompt", facts["prompt"], known, "prompt", facts["prompt"], remedy)
        project.check_same("video", None, known, "clip", facts["clip"], remedy)
        of_model, of_tuning = known.get("model", {}), known.get("settings", {}).get("tuning", {})
        for name, value in facts["model"].items():
            of, shown = ("checkpoint", facts["checkpoint"]) if name == "base" else (name, value)
            project.check_same(of, shown, of_model, name, value, remedy)
        drawn_anew = f"give {errors.field('eta')} and {errors.field('edit_seed')} to draw edits by another one"
        for name, value in facts["settings"]["tuning"].items():
            if name not in ANY_TUNING:
                also = f"{drawn_anew}, or {remedy}" if name == "seed" else remedy
                project.check_same(name, value, of_tuning, name, value, also)
        if self.job.rank is not None:
            project.check_same("rank", self.job.rank, known, "rank", self.job.rank, remedy)
        if "weights" in known:
            missing = [
                step for step in self.job.preset.tuning.keep if not (project.folder / file_of_step(step)).exists()
            ]
            if missing:
                raise TavError(
                    "keep", missing[0], f"was not kept in {project.folder}", f"leave it out, or choose another {output}"
                )

    def tuned(self, resume: bool) -> VideoUNet:
        """The U-Net with the weights of the project, which are tuned if it has none."""
        project, job, path = self.project, self.job, self.project.folder / TUNED_FILES[0]
        tuned_now = "weights" not in project.summary
        if tuned_now:
            options = dict(inflation=job.inflation, rank=job.rank, resume=resume, callback=self.callback)
            _, result = project.timed("tune", tune_into, project.folder, self.checkpoint, [self.source], job.preset,
                                      **options)  # fmt: skip
            before, after = result.probe_losses[0][1], result.probe_losses[-1][1]
            project.summary |= self.facts | {"rank": job.rank, "steps": result.steps,
                                             "probe_loss": {"before": before, "after": after}}  # fmt: skip
        else:
            self.callback(Note(f"{path} is tuned on this clip already"))
        # in the precision of the file, so that the next run, and `sample`, draw as this one does
        unet = pipeline.video_unet(self.checkpoint, **job.inflation)
        load_tuned(path, unet)
        weights = weights_fingerprint(trainable_parameters(unet))
        if tuned_now:
            project.summary["weights"] = weights
            project.write()
        remedy = f"bring back those, or {errors.field('overwrite')} the project"
        project.check_same("tuned", path, project.summary, "weights", weights, remedy)
        (project.folder / STATE).unlink(missing_ok=True)
        return torch.nn.Module.to(unet, DTYPES[job.preset.tuning.dtype])

    def inverted(self, unet: VideoUNet) -> InvertedNoise:
        """The noise of the project, which is inverted if it has none, with the subject as soon as a job tells it."""
        project, preset, clip, path = self.project, self.job.preset, self.clip, self.project.folder / NOISE
        if path.exists():
            noise = read_noise(path, preset)
            remedy = "delete it to invert the clip again"
            project.check_same("noise", path, project.summary, "weights", noise.weights, remedy)
        else:
            latents = project.timed("invert", pipeline.invert, self.checkpoint, unet, self.source, preset,
                                    callback=self.callback)  # fmt: skip
            weights = project.summary["weights"]
            noise = InvertedNoise(latents, self.job.prompt, None, clip.frames, clip.fps, clip.sound, weights)
            save_noise(path, noise, preset)
        if self.job.knows_subject:
            told = self.check_subject()
            if noise.subject is None or "subject" not in project.summary:  # whoever deletes its video wants another
                noise = replace(noise, subject=self.subject(unet), contrasts=tuple(self.job.contrasts))
                save_noise(path, noise, preset)
            if "subject" not in project.summary:
                project.put("subject", spotlight(clip.frames, noise.subject), clip.fps, clip.sound, told)
        return replace(noise, frames=clip.frames, fps=clip.fps, sound=clip.sound)

    def compare_steps(self, noise: InvertedNoise, videos: list[Tensor], told: list[str]):
        """Draws the same edits by the weights of each step that is kept, beside those of the last, `videos`."""
        tuning, folder, job = self.job.preset.tuning, self.project.folder, self.job
        at = {step: edits_of_step(step, folder, self.checkpoint, self.source, job, noise, self.callback)
              for step in tuning.keep if step < tuning.steps}  # fmt: skip
        step_strip(at | {tuning.steps: videos}, told, folder / STEP_STRIP)

    def check_subject(self) -> dict[str, Any]:
        """How the job tells the subject; a TavError if the project's was told otherwise."""
        job, known = self.job, self.project.summary.get("subject", {})
        mask = None if job.mask is None else hash_tensors([job.mask])
        told = {"contrast": list(job.contrasts), "word": job.word, "softness": job.softness, "mask": mask}
        remedy = f"give what it was, or choose another {errors.field('output')}"
        for name, value in told.items():
            self.project.check_same(name, None if name == "mask" else value, known, name, value, remedy)
        return told

    def subject(self, unet: VideoUNet) -> Tensor:
        """The mask of the clip's subject, drawn or found."""
        job = self.job
        if job.mask is not None:
            return pipeline.drawn_subject(job.mask, self.clip.frames, job.softness)
        args = (self.checkpoint, unet, self.source, job.contrasts, job.preset, job.softness, job.word)
        return self.project.timed("find the subject", pipeline.find_subject, *args, callback=self.callback)

    def reconstruct(self, unet: VideoUNet, noise: InvertedNoise):
        """The clip drawn again from its noise with its own sentence, and how near to it that comes."""
        project, job = self.project, self.job
        preset = replace(job.preset, eta=0.0)  # leaves nothing to chance
        self.callback(Note("reconstruction ..."))
        settings = settings_of(Edit(job.prompt), self.checkpoint, preset, noise, job.negative_prompt)
        video = project.timed("sample", sampling.sample, self.checkpoint, unet, noise.latents, job.prompt, preset,
                              source_prompt=job.prompt, negative_prompt=job.negative_prompt, subject=noise.subject,
                              callback=self.callback)  # fmt: skip
        # without guidance, and what the VAE alone leaves of the clip
        walk = project.timed("sample", pipeline.reconstruct, self.checkpoint, unet, noise.latents, job.prompt,
                             job.preset, callback=self.callback)  # fmt: skip
        by_vae = decode_video(self.checkpoint, self.source.take.latents)
        for name, of in (("reconstruction_psnr", video), ("walk_psnr", walk), ("vae_psnr", by_vae)):
            project.summary[name] = round(psnr(of, self.clip.frames), 2)
        project.put("reconstruction", video, noise.fps, noise.sound, settings)
