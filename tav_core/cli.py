"""The command line: edit a video with one sentence (Tune-A-Video, arXiv 2212.11565)."""

import argparse
import json
import os
import platform
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from . import __version__, bench, pipeline
from .atomic import atomic_path
from .checkpoint import Checkpoint, load_checkpoint
from .ddim import ddim_timesteps
from .errors import Cancelled, TavError
from .inflation import VideoUNet
from .metrics import frame_difference, psnr
from .noise import read_noise, save_noise
from .presets import Preset, default_preset
from .subject import REGIONS, SOFTNESS
from .terminal import Progress, add_preset_arguments, preset_of, run
from .tuned_weights import TunedInfo, load_tuned, read_tuned, save_tuned
from .tuning import DTYPES
from .video import Clip, load_video, save_video
from .visuals import loss_curve, side_by_side, spotlight, strip
from .windows import check_context_length

FRAMES = 8  # where nothing else says how many


# ------------------------------------------------------------------------------------------------ the stages


def _checkpoint(args) -> Checkpoint:
    checkpoint = load_checkpoint(args.checkpoint)
    for part in (checkpoint.vae, checkpoint.text_encoder):  # of the U-Net, only what is inflated from it goes there
        nn.Module.to(part, args.device)
    args.dtype = args.dtype or _dtype_for(args.device)
    preset = preset_of(args)
    ddim_timesteps(checkpoint.scheduler, preset.sampling_steps)  # a wrong count should not surface after tuning
    return checkpoint


def _dtype_for(device: torch.device) -> str:
    """bf16 where it is fast, else fp32."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if fast else "fp32"


def _clip(args, checkpoint: Checkpoint, video: Path) -> Clip:
    if args.context_length is not None:
        check_context_length(args.context_length, args.frames)
    width, height = args.size or (checkpoint.size, checkpoint.size)
    pipeline.check_size(checkpoint, width=width, height=height)
    return load_video(
        video, start=args.start, stride=args.stride, count=args.frames, width=width, height=height, fit=args.fit
    )


def _make_folder(path: Path):
    """Makes --output, or says now rather than after the tuning that nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TavError(f"--output {path} can't be made ({error.strerror}); choose another --output") from error
    if not os.access(path, os.W_OK):
        raise TavError(f"--output {path} can't be written to; choose another --output")


def _tune(args, checkpoint: Checkpoint, sources: list[pipeline.Source], progress: Progress):
    """Tunes on the takes, with the state kept in the output folder; weights and loss curve are written there.

    Returns: the U-Net, in the --dtype, and the result.
    """
    _make_folder(args.output)
    preset, (source, *more), state_path = preset_of(args), sources, args.output / "tuning-state.safetensors"
    if state_path.exists() and not args.resume:
        raise TavError(
            f"--output {args.output} holds an unfinished tuning; add --resume to go on with it, or delete "
            f"{state_path.name} to start over"
        )
    try:
        unet, result = pipeline.tune_on(
            checkpoint,
            source,
            preset,
            attention=args.attention,
            temporal_causal=args.temporal_causal,
            norm=args.norm,
            more_sources=more,
            state_path=state_path,
            resume=args.resume,
            callback=progress,
            say=tqdm.write,
        )
    except Cancelled as stop:
        raise Cancelled(f"{stop}; add --resume to go on") from None
    height, width = (n * checkpoint.downscale for n in source.latents.shape[-2:])
    frames = preset.tuning.context_length or source.latents.shape[2]
    save_tuned(
        args.output / "tuned.safetensors",
        unet,
        prompt=source.prompt,
        num_frames=frames,
        width=width,
        height=height,
        config=asdict(preset.tuning),
        base_name=checkpoint.name,
        more_prompts=[other.prompt for other in more],
    )
    loss_curve(result.losses, result.probe_losses, args.output / "loss.png")
    return nn.Module.to(unet, DTYPES[preset.tuning.dtype]), result


def _load_tuned_unet(args, checkpoint: Checkpoint):
    """The inflated U-Net with the weights of --tuned, in the --dtype, and what the file says of them.

    Without --tuned, that of a Tune-A-Video --checkpoint, which doesn't say its sentence ("") or its frames (0).
    """
    if args.tuned is None:
        if not isinstance(checkpoint.unet, VideoUNet):
            raise TavError(
                "--tuned is missing; give a file of `tune` or `edit`, or a --checkpoint that is a Tune-A-Video model"
            )
        return nn.Module.to(checkpoint.unet, args.device, DTYPES[args.dtype]), TunedInfo(
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
    info = read_tuned(args.tuned)
    unet = pipeline.video_unet(checkpoint, **info.inflation)
    load_tuned(args.tuned, unet)
    return nn.Module.to(unet, DTYPES[args.dtype]), info


def _window_if_longer(args, info: TunedInfo, frames: int):
    """A clip longer than the tuned one is seen in windows of the tuned length, unless --context-length is given."""
    if args.context_length is None and 0 < info.num_frames < frames:
        args.context_length = info.num_frames


def _subject(args, checkpoint: Checkpoint, unet, source: pipeline.Source, preset: Preset) -> Tensor | None:
    """The mask of the subject, if there are sentences to find it by."""
    return (
        pipeline.find_subject(checkpoint, unet, source, args.contrast, preset, args.softness) if args.contrast else None
    )


def _regions(args) -> list[str]:
    """The region of each edit.

    Raises:
        TavError: neither one for all nor one for each.
    """
    regions = args.region or ["everything"]
    if len(regions) not in (1, len(args.edit)):
        raise TavError(
            f"there are {len(regions)} --region for {len(args.edit)} --edit; give one for all, or one for "
            "each in the same order"
        )
    return regions * len(args.edit) if len(regions) == 1 else regions


def _name(number: int, prompt: str) -> str:
    return f"edit-{number}-{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}"


def _write_json(path: Path, content: dict):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def run_edit(args, checkpoint: Checkpoint, clip: Clip, progress: Progress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tune, invert, reconstruct, edit; writes everything to --output.

    Returns: the summary, and the videos by label (uint8 `f h w c`).
    """
    preset, seconds = preset_of(args), {}

    def timed(stage: str, function, *rest, **named):
        started = time.monotonic()
        value = function(*rest, **named)
        seconds[stage] = round(seconds.get(stage, 0) + time.monotonic() - started, 2)
        return value

    for edit in args.edit:
        if not edit.strip():
            raise TavError("--edit is empty; describe the edited clip in one sentence")
    regions = ["everything", *_regions(args)]
    if set(regions) != {"everything"} and not args.contrast:
        raise TavError(
            "--region needs to know where the subject is; give --contrast, the clip's sentence with another subject"
        )
    source = timed("encode", pipeline.prepare, checkpoint, clip.frames, args.prompt)
    pipeline.check_contrasts(args.prompt, args.contrast or [])
    unet, result = timed("tune", _tune, args, checkpoint, [source], progress)
    noise = timed("invert", pipeline.invert, checkpoint, unet, source, preset, callback=progress)
    subject = timed("find the subject", _subject, args, checkpoint, unet, source, preset)
    save_noise(args.output / "noise.safetensors", noise, subject, args.prompt, preset)
    save_video(clip.frames, args.output / "source.mp4", clip.fps)
    videos = {"source": clip.frames}
    files = {}
    for number, (prompt, region) in enumerate(zip([args.prompt, *args.edit], regions)):
        label = "reconstruction" if number == 0 else prompt
        print(f"{label} ...", flush=True)
        videos[label] = timed(
            "sample",
            pipeline.sample,
            checkpoint,
            unet,
            noise,
            prompt,
            preset,
            source_prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            subject=subject,
            region=region,
            callback=progress,
        )
        files[label] = f"{_name(number, prompt) if number else 'reconstruction'}.mp4"
        save_video(videos[label], args.output / files[label], clip.fps)
    shown = videos if subject is None else {"source": clip.frames, "subject": spotlight(clip.frames, subject), **videos}
    strip(list(shown.values()), list(shown), args.output / "strip.png")
    save_video(side_by_side(list(videos.values()), list(videos)), args.output / "comparison.mp4", clip.fps)
    summary = {
        "prompt": args.prompt, "checkpoint": checkpoint.name, "frames": len(clip.frames), "fps": round(clip.fps, 3),
        "size": [clip.frames.shape[2], clip.frames.shape[1]],
        "preset": args.preset or default_preset(args.checkpoint), "steps": result.steps,
        "probe_loss": {"before": result.probe_losses[0][1], "after": result.probe_losses[-1][1]},
        "reconstruction_psnr": round(psnr(videos["reconstruction"], clip.frames), 2),
        "frame_difference": {label: round(frame_difference(video), 4) for label, video in videos.items()},
        "regions": dict(zip(args.edit, regions[1:])), "files": files, "seconds": seconds,
    }  # fmt: skip
    _write_json(args.output / "summary.json", summary)
    (args.output / "tuning-state.safetensors").unlink(missing_ok=True)  # all that it was for is written
    return summary, videos


# ---------------------------------------------------------------------------------------------- the commands


def _edit(args):
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    summary, _ = run_edit(args, checkpoint, _clip(args, checkpoint, args.video), progress)
    _report(args.output, summary)


def _demo(args):
    from .mini.demo import CLIP, CONTRASTS, EDITS, PROMPT, REGIONS, score  # the world is needed here alone

    args.video, args.prompt, args.edit = CLIP, PROMPT, list(EDITS.values())
    args.contrast, args.softness, args.region = CONTRASTS, SOFTNESS, [REGIONS[kind] for kind in EDITS]
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    summary, videos = run_edit(args, checkpoint, _clip(args, checkpoint, args.video), progress)
    summary["judged"] = {kind: score(kind, videos[prompt].numpy()) for kind, prompt in EDITS.items()}
    _write_json(args.output / "summary.json", summary)
    _report(args.output, summary)
    print("judged by the classifier that ships with the mini checkpoint (1 is best):")
    for kind, figures in summary["judged"].items():
        print(f"  {kind:<10} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))


def _report(output: Path, summary: dict[str, Any]):
    loss, seconds = summary["probe_loss"], summary["seconds"]
    print(f"probe loss {loss['before']:.4f} -> {loss['after']:.4f}, reconstruction {summary['reconstruction_psnr']} dB")
    print(", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    print(f"{output}: strip.png, comparison.mp4, " + ", ".join(summary["files"].values()))


def _tune_command(args):
    videos, prompts = len(args.video), len(args.prompt)
    if videos != prompts:
        raise TavError(
            f"there are {videos} --video and {prompts} --prompt; give each --video its own --prompt, in the same order"
        )
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    sources = [
        pipeline.prepare(checkpoint, _clip(args, checkpoint, video).frames, prompt)
        for video, prompt in zip(args.video, args.prompt)
    ]
    _, result = _tune(args, checkpoint, sources, progress)
    (args.output / "tuning-state.safetensors").unlink(missing_ok=True)
    print(f"probe loss {result.probe_losses[0][1]:.4f} -> {result.probe_losses[-1][1]:.4f}")
    print(args.output / "tuned.safetensors")


def _invert_command(args):
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    unet, info = _load_tuned_unet(args, checkpoint)
    if info.more_prompts and args.prompt is None:
        said = ", ".join(repr(prompt) for prompt in [info.prompt, *info.more_prompts])
        raise TavError(
            f"--tuned {args.tuned} was tuned on several clips ({said}); say with --prompt what --video shows"
        )
    prompt = info.prompt if args.prompt is None else args.prompt
    args.frames, args.size = args.frames or info.num_frames or FRAMES, args.size or (info.width, info.height)
    _window_if_longer(args, info, args.frames)
    preset = preset_of(args)
    source = pipeline.prepare(checkpoint, _clip(args, checkpoint, args.video).frames, prompt)
    noise = pipeline.invert(checkpoint, unet, source, preset, callback=progress)
    save_noise(args.output, noise, _subject(args, checkpoint, unet, source, preset), prompt, preset)
    print(args.output)


def _sample_command(args):
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    unet, info = _load_tuned_unet(args, checkpoint)
    preset, regions = preset_of(args), _regions(args)
    if args.frames is not None and (args.noise or args.frames < 1):
        raise TavError(
            f"--frames {args.frames} can't be used here: it is the length of clips from random noise, 1 or "
            "more; leave it out"
        )
    if args.noise:
        noise, subject, source_prompt = read_noise(args.noise, preset)
    else:
        factor, frames = checkpoint.downscale, args.frames or info.num_frames or FRAMES
        shape = (1, checkpoint.unet.config.in_channels, frames, info.height // factor, info.width // factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(preset.tuning.seed))
        subject = source_prompt = None
    _window_if_longer(args, info, noise.shape[2])
    preset = preset_of(args)
    for number, (prompt, region) in enumerate(zip(args.edit, regions), 1):
        video = pipeline.sample(
            checkpoint,
            unet,
            noise,
            prompt,
            preset,
            source_prompt=source_prompt,
            negative_prompt=args.negative_prompt,
            subject=subject,
            region=region,
            callback=progress,
        )
        path = args.output / f"{_name(number, prompt)}.mp4"
        save_video(video, path, args.fps)
        print(path)


# ---------------------------------------------------------------------------------------------- the arguments


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 512 or 512x320 (width x height)")
    return int(match[1]), int(match[2] or match[1])


def _softness(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no width; give a number of pixels, 0 for a hard edge")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise argparse.ArgumentTypeError(f"{text!r} can't be used here ({str(error).splitlines()[0]})") from error


def _model_arguments(parser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        default="mini",
        metavar="PATH",
        help="a diffusers folder (also of a published Tune-A-Video model), a .safetensors file of SD 1.x or 2.x, "
        'or "mini" (the default)',
    )
    _device_argument(group)


def _device_argument(group):
    group.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, mps ... (cuda where there is one)",
    )


def _video_arguments(parser, frames: int | None = FRAMES, several: bool = False):
    group = parser.add_argument_group("video")
    takes = "; several times, each with its --prompt, to learn from several takes" if several else ""
    group.add_argument(
        "--video",
        required=True,
        type=Path,
        metavar="FILE",
        action="append" if several else "store",
        help=f"mp4, webm or gif, or a folder of images{takes}",
    )
    group.add_argument("--start", type=int, default=0, metavar="N", help="first frame to take (0)")
    group.add_argument("--stride", type=int, default=1, metavar="N", help="take every N-th frame (1)")
    group.add_argument(
        "--frames",
        type=int,
        metavar="N",
        default=frames,
        help=f"how many frames ({frames or 'as tuned'}; 8 to 32 are usual)",
    )
    group.add_argument(
        "--size",
        type=_size,
        metavar="WxH",
        help=f"size to work at ({'the size of the checkpoint' if frames else 'as tuned'})",
    )
    group.add_argument(
        "--fit",
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="how a clip of another shape is brought to --size (crop)",
    )


def _tuning_arguments(parser):
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--attention",
        choices=("sparse-causal", "first", "full"),
        default="sparse-causal",
        help="frames that each frame looks at (sparse-causal: the first and the previous)",
    )
    group.add_argument("--temporal-causal", action="store_true", help="temporal attention sees no later frames")
    group.add_argument("--norm", choices=("video", "frame"), default="video", help="statistics of the group norms")
    group.add_argument("--resume", action="store_true", help="go on with the unfinished tuning in --output")


def _edit_arguments(parser, required: bool):
    group = parser.add_argument_group("edits")
    group.add_argument(
        "--edit",
        action="append",
        required=required,
        metavar="TEXT",
        help="an edited sentence; give the option several times for several edits",
    )
    group.add_argument(
        "--region",
        action="append",
        choices=REGIONS,
        help="what an edit may change, once for all or once for each --edit (everything); needs --contrast",
    )
    group.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance steers away from")


def _contrast_argument(parser):
    parser.add_argument(
        "--contrast",
        action="append",
        metavar="TEXT",
        help="the clip's sentence with another subject; finds the subject, keeps it in its place, and lets "
        "--region work; best three times, each with another colour and shape",
    )
    parser.add_argument(
        "--softness",
        type=_softness,
        default=SOFTNESS,
        metavar="PIXELS",
        help=f"width of the edge of the subject's mask; 0 for a hard one ({SOFTNESS})",
    )


def main(prog: str = "tune-a-video"):
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--version",
        action="version",
        version=f"tune-a-video {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=function)
        return sub

    demo = command("demo", _demo, "tune, invert and edit the clip that ships with the pack, on its small checkpoint")
    demo.add_argument("--output", type=Path, default=Path("tav-demo"), metavar="DIR", help="(tav-demo)")
    _device_argument(demo)
    add_preset_arguments(demo)
    demo.set_defaults(
        checkpoint="mini",
        start=0,
        stride=1,
        frames=8,
        size=None,
        fit="crop",
        attention="sparse-causal",
        temporal_causal=False,
        norm="video",
        resume=True,
        negative_prompt="",
    )

    edit = command("edit", _edit, "tune on a clip, invert it, and sample edited versions of it")
    edit.add_argument("--prompt", required=True, metavar="TEXT", help="one sentence that describes the clip")
    _edit_arguments(edit, required=True)
    _contrast_argument(edit)
    edit.add_argument("--output", required=True, type=Path, metavar="DIR")
    _video_arguments(edit)
    _model_arguments(edit)
    _tuning_arguments(edit)
    add_preset_arguments(edit)

    tune = command("tune", _tune_command, "tune on a clip, or on several, and write DIR/tuned.safetensors")
    tune.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="one sentence that describes the clip; one for each --video, in the same order",
    )
    tune.add_argument("--output", required=True, type=Path, metavar="DIR")
    _video_arguments(tune, several=True)
    _model_arguments(tune)
    _tuning_arguments(tune)
    add_preset_arguments(tune)

    invert = command("invert", _invert_command, "invert a clip with tuned weights to the noise it would come from")
    invert.add_argument(
        "--tuned",
        type=Path,
        metavar="FILE",
        help="tuned.safetensors of `tune` or `edit`; not needed with a Tune-A-Video model",
    )
    invert.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .safetensors file for the noise")
    invert.add_argument("--prompt", metavar="TEXT", help="one sentence that describes the clip (that of the tuning)")
    _contrast_argument(invert)
    _video_arguments(invert, frames=None)
    _model_arguments(invert)
    add_preset_arguments(invert)

    sample = command("sample", _sample_command, "sample edited clips from inverted (or random) noise")
    _edit_arguments(sample, required=True)
    sample.add_argument(
        "--tuned",
        type=Path,
        metavar="FILE",
        help="tuned.safetensors of `tune` or `edit`; not needed with a Tune-A-Video model",
    )
    sample.add_argument("--noise", type=Path, metavar="FILE", help="noise of `invert` or `edit`; random without it")
    sample.add_argument("--frames", type=int, metavar="N", help="length of clips from random noise (as tuned)")
    sample.add_argument("--fps", type=float, default=8.0, help="frame rate of the written videos (8)")
    sample.add_argument("--output", required=True, type=Path, metavar="DIR")
    _model_arguments(sample)
    add_preset_arguments(sample)

    measure = command(
        "bench", bench.bench, "measure the speed and the memory of every stage, against the method written plainly"
    )
    _device_argument(measure)
    bench.add_arguments(measure)

    run(parser)
