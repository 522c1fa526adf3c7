"""The command line: edit a video with one sentence (Tune-A-Video, arXiv 2212.11565)."""

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from . import __version__, bench, job, pipeline
from .arguments import (
    FRAMES,
    demo_arguments,
    device_argument,
    edit_arguments,
    invert_arguments,
    metrics_arguments,
    sample_arguments,
    tune_arguments,
)
from .checkpoint import Checkpoint, load_checkpoint
from .clip_metrics import load_clip, load_dino
from .ddim import ddim_timesteps
from .drawing import Edit, draw
from .errors import Cancelled, TavError, field
from .inflation import VideoUNet
from .limits import LIMITS, check_pixels
from .measure import REPORT, Measured, Models, as_table, mask_of, measure, measure_job, write_report
from .noise import InvertedNoise, read_noise, save_noise
from .pictures import IMAGES, is_animated
from .precision import DTYPES
from .presets import Preset
from .project import SHOWN, SUMMARY, Project, file_name, write_json
from .sound import Sound
from .subject import SOFTNESS
from .terminal import Parser, Progress, check_needs, preset_of, run, tell
from .trainable import trainable_parameters
from .tuned_weights import TunedInfo, load_tuned, read_tuned, weights_fingerprint
from .tuning_state import hash_tensors
from .video import Clip, load_video
from .windows import check_context_length

FPS = 8.0  # where nothing else says how fast
SUBJECT = ("contrast", "word", "mask")  # what tells where it is


# ------------------------------------------------------------------------------------------------ the stages


def _preset(args) -> Preset:
    args.dtype = args.dtype or _dtype_for(args.device)
    return preset_of(args)


def _dtype_for(device: torch.device) -> str:
    """bf16 where it is fast, else fp32."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if fast else "fp32"


def _checkpoint(args, preset: Preset) -> Checkpoint:
    checkpoint = load_checkpoint(args.checkpoint, prediction_type=args.prediction_type)
    for part in (checkpoint.vae, checkpoint.text_encoder):  # of the U-Net, only what is inflated from it goes there
        nn.Module.to(part, args.device)
    ddim_timesteps(checkpoint.scheduler, preset.sampling_steps)  # a wrong count should not surface after tuning
    return checkpoint


def _clip(args, checkpoint: Checkpoint, video: Path, sound: bool = False) -> Clip:
    """The wanted frames of a video.

    Raises:
        TavError: what `load_video` refuses, or what could not be tuned on.
    """
    if args.frames == 1 and args.stride != 1:
        raise TavError("stride", args.stride, "does nothing for a single frame", "leave it out")
    if args.context_length is not None:
        check_context_length(args.context_length, args.frames)
    width, height = args.size or (checkpoint.size, checkpoint.size)
    pipeline.check_size(checkpoint, width=width, height=height)
    check_pixels(args.frames, width, height)
    return load_video(video, start=args.start, stride=args.stride, count=args.frames, width=width, height=height,
                      fit=args.fit, sound=sound, callback=Progress())  # fmt: skip


def _check_subject(args):
    if args.word is not None and not args.word.strip():
        raise TavError("word", args.word, "is no word", f"name the subject as {field('prompt')} does")
    for name in ("contrast", "word"):
        if args.mask is not None and getattr(args, name) is not None:
            problem = f"does nothing with {field('mask')}, which says where the subject is"
            raise TavError(name, None, problem, "leave it out")


def _mask(args, clip: Clip) -> torch.Tensor | None:
    """That of --mask, `f h w` in 0 ... 1, brought to the clip's size as the clip was."""
    if args.mask is None:
        return None
    count, height, width = clip.frames.shape[:3]
    one = args.mask.suffix.lower() in IMAGES and args.mask.is_file() and not is_animated(args.mask)
    cut = dict(count=1) if one else dict(start=args.start, stride=args.stride, count=count)
    size = dict(width=width, height=height, fit=args.fit)
    try:
        return mask_of(load_video(args.mask, **cut, **size, sound=False, callback=Progress()).frames, count)
    except TavError as error:
        named = "mask" if error.field == "video" else error.field
        raise TavError(named, error.value, error.problem, error.remedy) from error


def _tuned_info(args) -> TunedInfo | None:
    return None if args.tuned is None else read_tuned(args.tuned)


def _load_tuned_unet(args, checkpoint: Checkpoint) -> tuple[VideoUNet, TunedInfo, str]:
    """The inflated U-Net with the weights of --tuned, in the --dtype, what the file says of them, their fingerprint.

    Without --tuned, that of a Tune-A-Video --checkpoint, which doesn't say its sentence ("") or its frames (0).
    """
    info = _tuned_info(args)
    if info is None:
        if not isinstance(checkpoint.unet, VideoUNet):
            remedy = f"give a file of `tune` or `edit`, or a {field('checkpoint')} that is a Tune-A-Video model"
            raise TavError("tuned", None, "is missing", remedy)
        info = TunedInfo(
            base="",
            base_name=checkpoint.name,
            prompt="",
            num_frames=0,
            width=checkpoint.size,
            height=checkpoint.size,
            inflation=checkpoint.unet.inflation,
            config={},
            versions={},
        )
        unet = nn.Module.to(checkpoint.unet, args.device)
    else:
        unet = pipeline.video_unet(checkpoint, **info.inflation)
        load_tuned(args.tuned, unet)
    weights = weights_fingerprint(trainable_parameters(unet))
    return nn.Module.to(unet, DTYPES[args.dtype]), info, weights


def _window_if_longer(args, info: TunedInfo, frames: int):
    """A clip longer than the tuned one is seen in windows of the tuned length, unless --context-length is given."""
    if args.context_length is None and LIMITS["context_length"].least <= info.num_frames < frames:
        args.context_length = info.num_frames
    check_needs(args, context_overlap="context_length")


def _regions(args) -> list[str]:
    """The region of each edit.

    Raises:
        TavError: neither one for all nor one for each.
    """
    regions = args.region or ["everything"]
    if len(regions) not in (1, len(args.edit)):
        problem = f"has {len(regions)} values for {len(args.edit)} {field('edit')}"
        raise TavError("region", None, problem, "give one for all, or one for each in the same order")
    return regions * len(args.edit) if len(regions) == 1 else regions


def _edits(args) -> list[Edit]:
    """Every sentence with its region, under each combination of the settings of which there are several values."""
    swept = [values if values and len(values) > 1 else [None] for values in (args.guidance_scale,
                                                                            args.attention_injection)]  # fmt: skip
    sentences = zip(args.edit, _regions(args))
    return [Edit(prompt, region, *own) for (prompt, region), *own in product(sentences, *swept)]


def _softness(args) -> int:
    return SOFTNESS if args.softness is None else args.softness


def _inflation(args) -> dict[str, Any]:
    return {"attention": args.attention, "temporal_causal": args.temporal_causal, "norm": args.norm}


@contextmanager
def _told_how_to_go_on(how: str = "add --resume") -> Iterator[None]:
    try:
        yield
    except Cancelled as stop:
        raise Cancelled(f"{stop}; {how} to go on") from None


# ---------------------------------------------------------------------------------------------- the commands


def _edit(args):
    check_needs(args, context_overlap="context_length", softness=SUBJECT, steady=SUBJECT)
    _check_subject(args)
    if args.seed is not None and len(args.seed) > 1:
        problem = "has several values, and is that of the tuning: a project is tuned once"
        raise TavError("seed", None, problem, f"give one for each {field('output')}")
    edits = _edits(args)
    found_by = dict(word=args.word or "", mask=None if args.mask is None else torch.ones(1, 1, 1))  # till it is read
    wanted = job.EditJob(args.prompt, edits, _preset(args), args.contrast or (), _softness(args), args.negative_prompt,
                         _inflation(args), **found_by)  # fmt: skip
    if args.overwrite and args.resume:
        raise TavError("resume", None, f"has nothing to go on with after {field('overwrite')}", "leave one of them out")
    _check_project(args, wanted, args.resume, video=args.video, mask=args.mask)
    checkpoint = _checkpoint(args, wanted.preset)
    clip = _clip(args, checkpoint, args.video, sound=args.audio)
    wanted = replace(wanted, mask=_mask(args, clip))
    with job.claimed(args.output), _told_how_to_go_on():
        progress = Progress().stop_at_interrupt()
        summary, _ = job.run_edit(wanted, checkpoint, clip, args.output, resume=args.resume, overwrite=args.overwrite,
                                  callback=progress)  # fmt: skip
    _report(args.output, summary)


def _check_project(args, wanted: job.EditJob, resume: bool, **inputs: Path | None):
    """Says before any work what is in the way of a project in --output."""
    first = 1 if args.overwrite else Project.at(args.output).next_number
    job.check_folder(args.output, wanted.files(first), **inputs)
    if not args.overwrite:
        job.check_free(args.output, resume)


def _demo(args):
    from .mini import demo  # the world is needed here alone

    check_needs(args, context_overlap="context_length")
    edits = [Edit(prompt, demo.REGIONS[kind]) for kind, prompt in demo.EDITS.items()]
    wanted = job.EditJob(demo.PROMPT, edits, _preset(args), demo.CONTRASTS)
    if args.context_length is not None:
        check_context_length(args.context_length, FRAMES)
    _check_project(args, wanted, resume=True)
    checkpoint = _checkpoint(args, wanted.preset)
    clip = load_video(demo.CLIP, count=FRAMES, width=checkpoint.size, height=checkpoint.size)
    with job.claimed(args.output):
        with _told_how_to_go_on("run the command again"):
            progress = Progress().stop_at_interrupt()
            summary, videos = job.run_edit(wanted, checkpoint, clip, args.output, overwrite=args.overwrite,
                                           callback=progress)  # fmt: skip
        summary["judged"] = {kind: demo.score(kind, video.numpy()) for kind, video in zip(demo.EDITS, videos)}
        write_json(args.output / SUMMARY, summary)
    _report(args.output, summary)
    print("judged by the classifier that ships with the mini checkpoint (1 is best):")
    for kind, figures in summary["judged"].items():
        print(f"  {kind:<10} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))


def _report(output: Path, summary: dict[str, Any]):
    loss, seconds = summary["probe_loss"], summary["seconds"]
    reached = f"reconstruction {summary['reconstruction_psnr']} dB (the VAE alone: {summary['vae_psnr']} dB)"
    print(f"probe loss {loss['before']:.4f} -> {loss['after']:.4f}, {reached}")
    print(", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    files = [each["file"] for each in (summary["reconstruction"], *summary["edits"])]
    tell(f"{output}: {', '.join([*SHOWN, *files])}")


def _tune(args):
    videos, prompts = len(args.video), len(args.prompt)
    if videos != prompts:
        remedy = f"give each {field('video')} its own {field('prompt')}, in the same order"
        raise TavError("video", None, f"has {videos} values, {field('prompt')} {prompts}", remedy)
    for prompt in args.prompt:
        pipeline.check_prompt(prompt)
    preset = _preset(args)
    for video in args.video:
        job.check_folder(args.output, job.TUNED_FILES, video=video)
    job.check_unfinished(args.output, args.resume)
    if (args.output / SUMMARY).exists():
        raise TavError("output", args.output, "holds a project, which has its tuned weights", "choose another one")
    checkpoint = _checkpoint(args, preset)
    clips = [_clip(args, checkpoint, video) for video in args.video]
    sources = [pipeline.prepare(checkpoint, clip.frames, prompt) for clip, prompt in zip(clips, args.prompt)]
    with job.claimed(args.output), _told_how_to_go_on():
        progress = Progress().stop_at_interrupt()
        _, result = job.tune_into(args.output, checkpoint, sources, preset, inflation=_inflation(args),
                                  resume=args.resume, callback=progress)  # fmt: skip
        (args.output / job.STATE).unlink(missing_ok=True)
    print(f"probe loss {result.probe_losses[0][1]:.4f} -> {result.probe_losses[-1][1]:.4f}")
    tell(args.output / "tuned.safetensors")


def _invert(args):
    check_needs(args, softness=SUBJECT, seed="contrast")
    _check_subject(args)
    job.check_file(args.output, (".safetensors",), video=args.video, tuned=args.tuned, mask=args.mask)
    preset, prompt = _preset(args), _prompt(args, _tuned_info(args))
    if prompt:
        pipeline.check_contrasts(prompt, args.contrast or ())
    checkpoint = _checkpoint(args, preset)
    unet, info, weights = _load_tuned_unet(args, checkpoint)
    args.frames, args.size = args.frames or info.num_frames or FRAMES, args.size or (info.width, info.height)
    _window_if_longer(args, info, args.frames)
    preset, subject = preset_of(args), None
    if args.word:
        pipeline.places_of(checkpoint, prompt, args.word, preset)
    clip = _clip(args, checkpoint, args.video, sound=args.audio)
    mask, source = _mask(args, clip), pipeline.prepare(checkpoint, clip.frames, prompt)
    progress = Progress().stop_at_interrupt()
    noise = pipeline.invert(checkpoint, unet, source, preset, callback=progress)
    if mask is not None:
        subject = pipeline.drawn_subject(mask, clip.frames, _softness(args))
    elif args.contrast or args.word:
        given = (args.contrast or (), preset, _softness(args), args.word or "")
        subject = pipeline.find_subject(checkpoint, unet, source, *given)
    inverted = InvertedNoise(noise, prompt, subject, clip.frames, clip.fps, clip.sound, weights)
    save_noise(args.output, inverted, preset)
    tell(args.output)


def _prompt(args, info: TunedInfo | None) -> str:
    """What the clip shows: as --prompt says, or else the file of --tuned; "" if neither does."""
    if args.prompt is not None:
        pipeline.check_prompt(args.prompt)
        return args.prompt
    if info is not None and info.more_prompts:
        told = ", ".join(repr(prompt) for prompt in [info.prompt, *info.more_prompts])
        remedy = f"say with {field('prompt')} what {field('video')} shows"
        raise TavError("tuned", args.tuned, f"was tuned on several clips ({told})", remedy)
    return "" if info is None else info.prompt


def _sample(args):
    if args.noise is None:
        check_needs(args, attention_injection="noise", caption_as_negative="noise", steady="noise")
    for name, given in (("frames", args.frames), ("seed", args.seed and " ".join(map(str, args.seed)))):
        if args.noise is not None and given is not None:
            problem = f"does nothing with {field('noise')}: it is of random noise"
            raise TavError(name, given, problem, "leave it out")
    edits, preset = _edits(args), _preset(args)
    _tuned_info(args)  # a damaged file should not surface after the checkpoint is loaded
    inverted = None if args.noise is None else read_noise(args.noise, preset)
    subject = inverted and inverted.subject
    if args.steady is not None and subject is None:
        problem = f"does nothing: {args.noise} knows no subject"
        raise TavError("steady", args.steady, problem, f"leave it out, or invert with {field('contrast')}")
    for edit in edits:
        pipeline.check_edit(edit.prompt, edit.region, subject is not None)
    files = [
        f"{file_name(number, edit.prompt)}.mp4"
        for number, edit in enumerate(edits, Project.at(args.output).next_number)
    ]
    job.check_folder(args.output, [*files, *SHOWN, SUMMARY], noise=args.noise, tuned=args.tuned)
    checkpoint = _checkpoint(args, preset)
    unet, info, weights = _load_tuned_unet(args, checkpoint)
    rate, sound = _pace(args, inverted)
    if inverted is None:
        starts = {seed: InvertedNoise(_random_noise(args, checkpoint, info, seed), "", fps=rate)
                  for seed in args.seed or [preset.tuning.seed]}  # fmt: skip
    else:
        _check_noise(args.noise, inverted, checkpoint, weights)
        starts = {None: replace(inverted, fps=rate, sound=sound)}
    _window_if_longer(args, info, next(iter(starts.values())).latents.shape[2])
    preset, drawn = preset_of(args), []
    with job.claimed(args.output):
        project = _shared(args, info, checkpoint, weights, next(iter(starts.values())))
        progress = Progress().stop_at_interrupt()
        if inverted is not None and inverted.frames is not None and "source" not in project.summary:
            project.put("source", inverted.frames, rate, sound)
        for seed, start in starts.items():
            drawn += draw(project, edits, checkpoint, unet, preset, start, negative_prompt=args.negative_prompt,
                          seed=seed, callback=progress)  # fmt: skip
        project.show_grid(drawn, rate)
        project.show(rate, sound)
    for edit in drawn:
        tell(args.output / edit["file"])


def _shared(args, info: TunedInfo, checkpoint: Checkpoint, weights: str, start: InvertedNoise) -> Project:
    """The project in --output, which knows what its edits share.

    Raises:
        TavError: it has other weights, another clip or another size.
    """
    project, remedy = Project.at(args.output), f"choose another {field('output')}"
    (_, _, count, height, width), factor = start.latents.shape, checkpoint.downscale
    facts = {"prompt": start.prompt or info.prompt, "checkpoint": checkpoint.name, "frames": count,
             "fps": round(start.fps, 3), "size": [width * factor, height * factor], "weights": weights}  # fmt: skip
    if start.frames is not None:
        facts["clip"] = hash_tensors([start.frames])
    for of, shown, name in (("tuned", args.tuned, "weights"), ("noise", args.noise, "clip"),
                            ("size", facts["size"], "size")):  # fmt: skip
        if name in facts:
            project.check_same(of, shown, project.summary, name, facts[name], remedy)
    project.summary = facts | project.summary
    return project


def _metrics(args):
    folders = [path for path in args.edited if (path / "summary.json").is_file()]
    if folders and (len(args.edited) > 1 or args.source or args.prompt or args.mask or args.source_prompt):
        problem = "is the folder of an edit, which knows its source, its sentences and its masks"
        raise TavError("edited", folders[0], problem, "give it alone, or videos")
    if not folders:
        _check_measured(args)
    output = args.output or (folders[0] if folders else Path("."))
    job.check_folder(output, REPORT, mask=args.mask, source=args.source)
    models = Models(
        args.clip and load_clip(args.clip),
        args.pickscore and load_clip(args.pickscore, "pickscore"),
        args.dino and load_dino(args.dino),
    )
    with job.claimed(output):
        rows, videos, source = measure_job(folders[0], models) if folders else _measured(args, models)
        for line in as_table(rows).splitlines():
            tell(line)
        write_report(rows, videos, source, output)
    tell(f"{output}: " + ", ".join(REPORT))


def _measured(args, models: Models) -> tuple[list[Measured], list[torch.Tensor], torch.Tensor]:
    """The figures of single videos, the videos, and their source."""
    videos = [load_video(path, sound=False, callback=Progress()).frames for path in args.edited]
    count, height, width = videos[0].shape[:3]
    source = load_video(args.source, count=count, width=width, height=height, sound=False).frames
    mask = args.mask and mask_of(load_video(args.mask, width=width, height=height, sound=False).frames, count)
    rows = [measure(path.name, video, source, prompt, args.source_prompt, mask, models)
            for path, video, prompt in zip(args.edited, videos, args.prompt)]  # fmt: skip
    return rows, videos, source


def _check_measured(args):
    if args.source is None:
        raise TavError("source", None, "is missing", "give the video that was edited, in the frames of the edit")
    if len(args.prompt or ()) != len(args.edited):
        problem = f"has {len(args.prompt or ())} values for {len(args.edited)} {field('edited')}"
        raise TavError("prompt", None, problem, "give each video the sentence that it should show, in the same order")
    for prompt in args.prompt:
        pipeline.check_prompt(prompt)
    if args.source_prompt is not None and args.clip is None:
        raise TavError("source_prompt", args.source_prompt, f"does nothing without {field('clip')}", "leave it out")


def _random_noise(args, checkpoint: Checkpoint, info: TunedInfo, seed: int) -> torch.Tensor:
    factor, frames = checkpoint.downscale, args.frames or info.num_frames or FRAMES
    check_pixels(frames, info.width, info.height)
    shape = (1, checkpoint.unet.config.in_channels, frames, info.height // factor, info.width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pace(args, inverted: InvertedNoise | None) -> tuple[float, Sound | None]:
    """The rate of what is written, and the sound of the clip if it is in time then."""
    fps, sound = (None, None) if inverted is None else (inverted.fps, inverted.sound)
    rate = (fps or FPS) if args.fps is None else args.fps
    return rate, sound if args.audio and math.isclose(rate, fps or 0, rel_tol=1e-3) else None


def _check_noise(path: Path, noise: InvertedNoise, checkpoint: Checkpoint, weights: str):
    """Raises a TavError for noise of another kind of checkpoint, or that was inverted with other weights."""
    shape, channels = noise.latents.shape, checkpoint.unet.config.in_channels
    heights = {shape[3] * checkpoint.downscale}
    heights |= set() if noise.subject is None else {noise.subject.shape[3]}
    heights |= set() if noise.frames is None else {noise.frames.shape[1]}
    if shape[1] != channels or len(heights) > 1:
        problem = f"is of a checkpoint with other latents: {tuple(shape)}, with {channels} channels here"
        raise TavError("noise", path, problem, f"give the {field('checkpoint')} that it was inverted with")
    if noise.weights not in (None, weights):  # earlier versions noted none
        problem = f"was inverted with other weights than those of {field('tuned')}"
        raise TavError("noise", path, problem, "give the file that it was inverted with, or invert the clip again")


def _bench_arguments(parser):
    device_argument(parser)
    bench.add_arguments(parser)


COMMANDS = {
    "demo": (_demo, demo_arguments, "tune, invert and edit the clip that ships with the pack, on its small "
                                    "checkpoint"),
    "edit": (_edit, edit_arguments, "tune on a clip, invert it, and sample edited versions of it"),
    "tune": (_tune, tune_arguments, "tune on a clip, or on several, and write DIR/tuned.safetensors"),
    "invert": (_invert, invert_arguments, "invert a clip with tuned weights to the noise it would come from"),
    "sample": (_sample, sample_arguments, "sample edited clips from inverted (or random) noise"),
    "metrics": (_metrics, metrics_arguments, "measure edits beside their source: fidelity, motion, and by CLIP"),
    "bench": (bench.bench, _bench_arguments, "measure the speed and the memory of every stage, against the method "
                                             "written plainly"),
}  # fmt: skip


def main(prog: str = "tune-a-video"):
    parser = Parser(prog=prog, description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--version",
        action="version",
        version=f"tune-a-video {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, add_arguments, help) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        add_arguments(sub)
        sub.set_defaults(run=function)
    run(parser)
