"""The command line: edit a video with one sentence (Tune-A-Video, arXiv 2212.11565)."""

import argparse
import math
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from . import __version__, bench, job, pipeline
from .attention import MODES
from .checkpoint import SD_PREDICTION_TYPES, Checkpoint, load_checkpoint
from .ddim import ddim_timesteps
from .errors import Cancelled, TavError, field
from .inflation import NORMS, VideoUNet
from .injection import REGIONS
from .noise import read_noise, read_pace, save_noise
from .precision import DTYPES
from .subject import SOFTNESS
from .terminal import Progress, add_preset_arguments, preset_of, run
from .tuned_weights import TunedInfo, load_tuned, read_tuned
from .video import FITS, Clip, load_video, save_video
from .windows import check_context_length

FRAMES = 8  # where nothing else says how many
FPS = 8.0  # where nothing else says how fast


# ------------------------------------------------------------------------------------------------ the stages


def _checkpoint(args) -> Checkpoint:
    checkpoint = load_checkpoint(args.checkpoint, prediction_type=args.prediction_type)
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


def _clip(args, checkpoint: Checkpoint, video: Path, progress: Progress, sound: bool = False) -> Clip:
    if args.context_length is not None:
        check_context_length(args.context_length, args.frames)
    width, height = args.size or (checkpoint.size, checkpoint.size)
    pipeline.check_size(checkpoint, width=width, height=height)
    return load_video(video, start=args.start, stride=args.stride, count=args.frames, width=width, height=height,
                      fit=args.fit, sound=sound, callback=progress)  # fmt: skip


def _load_tuned_unet(args, checkpoint: Checkpoint):
    """The inflated U-Net with the weights of --tuned, in the --dtype, and what the file says of them.

    Without --tuned, that of a Tune-A-Video --checkpoint, which doesn't say its sentence ("") or its frames (0).
    """
    if args.tuned is None:
        if not isinstance(checkpoint.unet, VideoUNet):
            remedy = f"give a file of `tune` or `edit`, or a {field('checkpoint')} that is a Tune-A-Video model"
            raise TavError("tuned", None, "is missing", remedy)
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
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    clip = _clip(args, checkpoint, args.video, progress, sound=args.audio)
    edits = [job.Edit(prompt, region) for prompt, region in zip(args.edit, _regions(args))]
    wanted = job.EditJob(args.prompt, edits, preset_of(args), args.contrast or (), args.softness, args.negative_prompt,
                         _inflation(args))  # fmt: skip
    with _told_how_to_go_on():
        summary, _ = job.run_edit(wanted, checkpoint, clip, args.output, resume=args.resume, callback=progress)
    _report(args.output, summary)


def _demo(args):
    from .mini import demo  # the world is needed here alone

    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    clip = load_video(demo.CLIP, count=FRAMES, width=checkpoint.size, height=checkpoint.size)
    edits = [job.Edit(prompt, demo.REGIONS[kind]) for kind, prompt in demo.EDITS.items()]
    wanted = job.EditJob(demo.PROMPT, edits, preset_of(args), demo.CONTRASTS)
    with _told_how_to_go_on("run the command again"):
        summary, videos = job.run_edit(wanted, checkpoint, clip, args.output, callback=progress)
    summary["judged"] = {kind: demo.score(kind, videos[prompt].numpy()) for kind, prompt in demo.EDITS.items()}
    job.write_json(args.output / "summary.json", summary)
    _report(args.output, summary)
    print("judged by the classifier that ships with the mini checkpoint (1 is best):")
    for kind, figures in summary["judged"].items():
        print(f"  {kind:<10} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))


def _report(output: Path, summary: dict[str, Any]):
    loss, seconds = summary["probe_loss"], summary["seconds"]
    print(f"probe loss {loss['before']:.4f} -> {loss['after']:.4f}, reconstruction {summary['reconstruction_psnr']} dB")
    print(", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    print(f"{output}: strip.png, comparison.mp4, " + ", ".join(summary["files"].values()))


def _tune(args):
    videos, prompts = len(args.video), len(args.prompt)
    if videos != prompts:
        remedy = f"give each {field('video')} its own {field('prompt')}, in the same order"
        raise TavError("video", None, f"has {videos} values, {field('prompt')} {prompts}", remedy)
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    sources = [
        pipeline.prepare(checkpoint, _clip(args, checkpoint, video, progress).frames, prompt)
        for video, prompt in zip(args.video, args.prompt)
    ]
    with _told_how_to_go_on():
        _, result = job.tune_into(args.output, checkpoint, sources, preset_of(args), inflation=_inflation(args),
                                  resume=args.resume, callback=progress)  # fmt: skip
    (args.output / job.STATE).unlink(missing_ok=True)
    print(f"probe loss {result.probe_losses[0][1]:.4f} -> {result.probe_losses[-1][1]:.4f}")
    print(args.output / "tuned.safetensors")


def _invert(args):
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    unet, info = _load_tuned_unet(args, checkpoint)
    if info.more_prompts and args.prompt is None:
        told = ", ".join(repr(prompt) for prompt in [info.prompt, *info.more_prompts])
        remedy = f"say with {field('prompt')} what {field('video')} shows"
        raise TavError("tuned", args.tuned, f"was tuned on several clips ({told})", remedy)
    prompt = info.prompt if args.prompt is None else args.prompt
    args.frames, args.size = args.frames or info.num_frames or FRAMES, args.size or (info.width, info.height)
    _window_if_longer(args, info, args.frames)
    preset, subject = preset_of(args), None
    clip = _clip(args, checkpoint, args.video, progress, sound=args.audio)
    source = pipeline.prepare(checkpoint, clip.frames, prompt)
    noise = pipeline.invert(checkpoint, unet, source, preset, callback=progress)
    if args.contrast:
        subject = pipeline.find_subject(checkpoint, unet, source, args.contrast, preset, args.softness)
    save_noise(args.output, noise, subject, prompt, preset, clip.fps, clip.sound)
    print(args.output)


def _sample(args):
    progress = Progress().stop_at_interrupt()
    checkpoint = _checkpoint(args)
    unet, info = _load_tuned_unet(args, checkpoint)
    preset, regions = preset_of(args), _regions(args)
    if args.frames is not None and (args.noise or args.frames < 1):
        problem = "can't be used here: it is the length of clips from random noise, 1 or more"
        raise TavError("count", args.frames, problem, "leave it out")
    fps = sound = None
    if args.noise:
        noise, subject, source_prompt = read_noise(args.noise, preset)
        fps, sound = read_pace(args.noise)
    else:
        factor, frames = checkpoint.downscale, args.frames or info.num_frames or FRAMES
        shape = (1, checkpoint.unet.config.in_channels, frames, info.height // factor, info.width // factor)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(preset.tuning.seed))
        subject = source_prompt = None
    rate = (fps or FPS) if args.fps is None else args.fps
    if not args.audio or not math.isclose(rate, fps or 0, rel_tol=1e-3):  # it would not be in time
        sound = None
    _window_if_longer(args, info, noise.shape[2])
    preset = preset_of(args)
    for number, (prompt, region) in enumerate(zip(args.edit, regions), 1):
        video = pipeline.sample(checkpoint, unet, noise, prompt, preset, source_prompt=source_prompt,
                                negative_prompt=args.negative_prompt, subject=subject, region=region,
                                callback=progress)  # fmt: skip
        path = args.output / f"{job.file_name(number, prompt)}.mp4"
        save_video(video, path, rate, sound)
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
    group.add_argument(
        "--prediction-type",
        choices=SD_PREDICTION_TYPES,
        help="what the checkpoint predicts, where neither its folder nor its file tells right",
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
    if not several:
        _audio_argument(group)
    group.add_argument(
        "--fit", choices=FITS, default="crop", help="how a clip of another shape is brought to --size (crop)"
    )


def _audio_argument(parser):
    parser.add_argument(
        "--no-audio", dest="audio", action="store_false", help="leave out the clip's sound, which videos have otherwise"
    )


def _tuning_arguments(parser):
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--attention",
        choices=MODES,
        default="sparse-causal",
        help="frames that each frame looks at (sparse-causal: the first and the previous)",
    )
    group.add_argument("--temporal-causal", action="store_true", help="temporal attention sees no later frames")
    group.add_argument("--norm", choices=NORMS, default="video", help="statistics of the group norms")
    group.add_argument("--resume", action="store_true", help="go on with the unfinished tuning in --output")


def _edits_arguments(parser):
    group = parser.add_argument_group("edits")
    group.add_argument(
        "--edit",
        action="append",
        required=True,
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


def _tuned_argument(parser):
    parser.add_argument(
        "--tuned",
        type=Path,
        metavar="FILE",
        help="tuned.safetensors of `tune` or `edit`; not needed with a Tune-A-Video model",
    )


def _demo_arguments(parser):
    parser.add_argument("--output", type=Path, default=Path("tav-demo"), metavar="DIR", help="(tav-demo)")
    _device_argument(parser)
    add_preset_arguments(parser)
    parser.set_defaults(checkpoint="mini", prediction_type=None)


def _edit_arguments(parser):
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="one sentence that describes the clip")
    _edits_arguments(parser)
    _contrast_argument(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    _video_arguments(parser)
    _model_arguments(parser)
    _tuning_arguments(parser)
    add_preset_arguments(parser)


def _tune_arguments(parser):
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="one sentence that describes the clip; one for each --video, in the same order",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    _video_arguments(parser, several=True)
    _model_arguments(parser)
    _tuning_arguments(parser)
    add_preset_arguments(parser)


def _invert_arguments(parser):
    _tuned_argument(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .safetensors file for the noise")
    parser.add_argument("--prompt", metavar="TEXT", help="one sentence that describes the clip (that of the tuning)")
    _contrast_argument(parser)
    _video_arguments(parser, frames=None)
    _model_arguments(parser)
    add_preset_arguments(parser)


def _sample_arguments(parser):
    _edits_arguments(parser)
    _tuned_argument(parser)
    parser.add_argument("--noise", type=Path, metavar="FILE", help="noise of `invert` or `edit`; random without it")
    parser.add_argument("--frames", type=int, metavar="N", help="length of clips from random noise (as tuned)")
    parser.add_argument(
        "--fps", type=float, metavar="X", help="frame rate of the written videos (that of the clip in --noise; else 8)"
    )
    _audio_argument(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    _model_arguments(parser)
    add_preset_arguments(parser)


def _bench_arguments(parser):
    _device_argument(parser)
    bench.add_arguments(parser)


COMMANDS = {
    "demo": (_demo, _demo_arguments, "tune, invert and edit the clip that ships with the pack, on its small "
                                     "checkpoint"),
    "edit": (_edit, _edit_arguments, "tune on a clip, invert it, and sample edited versions of it"),
    "tune": (_tune, _tune_arguments, "tune on a clip, or on several, and write DIR/tuned.safetensors"),
    "invert": (_invert, _invert_arguments, "invert a clip with tuned weights to the noise it would come from"),
    "sample": (_sample, _sample_arguments, "sample edited clips from inverted (or random) noise"),
    "bench": (bench.bench, _bench_arguments, "measure the speed and the memory of every stage, against the method "
                                             "written plainly"),
}  # fmt: skip


def main(prog: str = "tune-a-video"):
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split(": ", 1)[1])
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
