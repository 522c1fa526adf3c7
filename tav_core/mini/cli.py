"""python -m tav_core.mini: render, train, evaluate and benchmark the small checkpoint."""

import argparse
import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..arguments import checkpoint, device_argument, path
from ..checkpoint import MINI, SD_PREDICTION_TYPES, load_checkpoint, load_controlnet
from ..errors import TavError
from ..events import Note
from ..job import check_file, check_folder, claimed
from ..limits import LIMITS, Range
from ..terminal import SETTINGS, Parser, add_preset_arguments, check_needs, preset_of, run, tell
from ..windows import check_context_length
from . import world
from .clips import ARMS
from .judge import load_judge

# of the training: how many, and of how many pictures
STEPS = {"vae": (3600, 16), "unet": (3000, 64), "judge": (1600, 48), "controlnet": (2000, 32), "lora": (450, 32),
         "clip": (4000, 96)}  # fmt: skip
NEEDED = {"unet": ["vae"], "judge": ["vae"], "export": ["vae", "unet", "judge"]}  # stages before it, in --work
WRITTEN = ("export", "controlnet", "lora", "clip", "all")  # stages that write to --output
RENDERS = Range(48, 1_000_000)
CHANNELS = Range(16, 512)
FRAMES = Range(2, 1000)  # of a clip of the world
PICTURES = Range(1, 1000)  # to judge; there are not many more combinations that training never saw
LAYOUTS = Range(0, 2**31 - 1)
STRENGTHS = Range(-10.0, 10.0)


def _train(args):
    for stage in STEPS:
        given = getattr(args, f"{stage}_steps", None)
        if given is not None and args.stage not in (stage, "all"):
            raise TavError(f"{stage}_steps", given, f"does nothing for stage {args.stage}", "leave it out")
        setattr(args, f"{stage}_steps", given or STEPS[stage][0])
    if args.stage not in ("unet", "export", "all"):
        for name, given in (("channels", args.channels), ("prediction_type", args.prediction_type)):
            if given is not None:
                raise TavError(name, given, f"does nothing for stage {args.stage}", "leave it out")
    for width in args.channels or ():
        if width % 16:
            remedy = f"use {round(width / 16) * 16}"
            raise TavError("channels", width, "is not a multiple of 16, the groups of its norms", remedy)
    for stage in NEEDED.get(args.stage, ()):
        if not (args.work / f"{stage}.safetensors").is_file():
            raise TavError("work", args.work, f"holds no {stage}.safetensors", f"train {stage} there first")
    folders = {args.work.resolve()} | ({args.output.resolve()} if args.stage in WRITTEN else set())
    for folder, of in ((args.work, "work"), (args.output, "output")):
        check_folder(folder, [], of)
    with ExitStack() as claims:
        for folder in folders:
            claims.enter_context(claimed(folder))
        _train_stages(args)


def _train_stages(args):
    from . import train  # training needs more of transformers and tokenizers than using the checkpoint does

    device, batch = args.device, {stage: size for stage, (_, size) in STEPS.items()}
    kind = {"channels": args.channels or train.CHANNELS, "prediction_type": args.prediction_type or "epsilon"}
    if args.stage in ("vae", "all"):
        train.train_vae(args.work, device, args.renders, args.vae_steps, batch["vae"], 1.5e-3)
    if args.stage in ("unet", "all"):
        train.train_unet(args.work, device, args.renders, args.unet_steps, batch["unet"], 1e-3, **kind)
    if args.stage in ("judge", "all"):
        renders = min(args.renders, 16_000)
        train.train_judge(args.work, device, renders, args.judge_steps, batch["judge"], 2e-3)
    if args.stage in ("export", "all"):
        train.export(args.work, args.output, **kind)
    if args.stage in ("controlnet", "all"):
        from .train_controlnet import export_controlnet, train_controlnet

        checkpoint = args.output / "checkpoint"
        train_controlnet(args.work, checkpoint, device, args.renders, args.controlnet_steps, batch["controlnet"], 1e-3)
        export_controlnet(args.work, args.output)
    if args.stage in ("lora", "all"):
        from .train_lora import export_lora, train_lora

        checkpoint, renders = args.output / "checkpoint", min(args.renders, 4000)
        train_lora(args.work, checkpoint, device, renders, args.lora_steps, batch["lora"], 2e-3)
        export_lora(args.work, args.output)
    if args.stage in ("clip", "all"):
        from .train_clip import export_clip, train_clip

        checkpoint, renders = args.output / "checkpoint", min(args.renders, 12_000)
        train_clip(args.work, checkpoint, device, renders, args.clip_steps, batch["clip"], 1.5e-3)
        export_clip(args.work, args.output)


def _render(args):
    scene = world.Scene(args.shape, args.colour, args.background, args.style, layout=args.layout, pattern=args.pattern)
    from ..video import save_video

    check_file(args.output, (".mp4", ".webm", ".gif"))
    scenes = world.clip_scenes(scene, args.motion, args.frames)
    frames = world.silhouette_clip(scenes) if args.silhouette else world.render_clip(scenes)
    save_video(torch.from_numpy(frames), args.output, fps=8)
    tell(f"{args.output}: {world.caption(scene, args.motion)}")


def _previews(args):
    from .preview import LATENT_COLOURS, write_latent_colours

    output = args.output or args.checkpoint / LATENT_COLOURS
    check_file(output, (".safetensors",))
    write_latent_colours(load_checkpoint(args.checkpoint).vae, output)


def _check_sheet(args):
    if args.sheet is not None:
        check_file(args.sheet, (".png",), "sheet")


def _evaluate(args):
    from .evaluate import contact_sheet, evaluate

    _check_sheet(args)
    figures, images, _ = evaluate(
        load_checkpoint(args.checkpoint),
        load_judge(),
        count=args.count,
        guidance_scale=args.guidance_scale,
        steps=args.sampling_steps,
        seed=args.seed,
    )
    if args.sheet:
        contact_sheet(images).save(args.sheet)
    print(json.dumps(figures, indent=2))


def _controlnet(args):
    from .evaluate import contact_sheet, evaluate_controlnet

    _check_sheet(args)
    figures, rows = evaluate_controlnet(
        load_checkpoint("mini"),
        load_controlnet(args.controlnet),
        load_judge(),
        count=args.count,
        guidance_scale=args.guidance_scale,
        steps=args.sampling_steps,
        seed=args.seed,
    )
    if args.sheet:
        contact_sheet(rows[:, :16].reshape(-1, *rows.shape[2:]), min(16, args.count)).save(args.sheet)
    print(json.dumps(figures, indent=2))


def _lora(args):
    from .evaluate import contact_sheet, evaluate_neon
    from .train_lora import load_lora, with_lora

    _check_sheet(args)
    strengths = {
        f"{strength:g}": with_lora(load_checkpoint("mini"), load_lora(), strength) for strength in args.strengths
    }
    figures, rows = evaluate_neon(
        strengths,
        load_judge(),
        count=args.count,
        guidance_scale=args.guidance_scale,
        steps=args.sampling_steps,
        seed=args.seed,
    )
    if args.sheet:
        columns = min(16, args.count)
        contact_sheet(rows[:, :columns].reshape(-1, *rows.shape[2:]), columns).save(args.sheet)
    print(json.dumps(figures, indent=2))


def _noted(note: Note):
    print(note.text, file=sys.stderr, flush=True)


def _benchmark(args):
    from ..video import save_video
    from .benchmark import as_markdown, benchmark, means
    from .clips import benchmark_clips

    check_needs(args, context_overlap="context_length")
    preset, clips = preset_of(args), dict(enumerate(benchmark_clips()))
    clips = {number: clips[number] for number in args.clips or clips}
    if args.context_length is not None:
        for clip in clips.values():
            check_context_length(args.context_length, clip.num_frames)

    def keep(name: str, video: np.ndarray):
        save_video(torch.from_numpy(video), args.output / f"{name}.mp4", fps=8)

    if args.output is not None:
        check_folder(args.output, [])
    with nullcontext() if args.output is None else claimed(args.output):
        checkpoint = load_checkpoint(args.checkpoint)
        for part in (checkpoint.vae, checkpoint.text_encoder):
            nn.Module.to(part, args.device)
        rows = benchmark(
            checkpoint,
            load_judge(),
            preset,
            arms=args.arms,
            seeds=args.seeds,
            clips=clips,
            folder=args.output,
            on_video=keep if args.output else None,
            callback=_noted,
        )
    print(as_markdown(means(rows)) if args.markdown else json.dumps(means(rows), indent=1))


def _train_arguments(parser):
    parser.add_argument("stage", choices=["vae", "unet", "judge", "export", "controlnet", "lora", "clip", "all"])
    parser.add_argument("--work", type=path, required=True, help="folder for renders, latents and states")
    parser.add_argument(
        "--output",
        type=path,
        default=Path(__file__).parent,
        help="where checkpoint/, the judge, controlnet/, lora/ and clip/ go",
    )
    device_argument(parser)
    parser.add_argument(
        "--renders",
        type=RENDERS,
        default=24_000,
        help="pictures to learn from, at most; at least 48, and the same for all stages",
    )
    told = "of the U-Net's two levels, multiples of 16 (default: 64 128); the same for unet and export"
    parser.add_argument("--channels", type=CHANNELS, nargs=2, help=told)
    told = "what the U-Net learns to predict (default: epsilon); the same for unet and export"
    parser.add_argument("--prediction-type", choices=SD_PREDICTION_TYPES, help=told)
    for stage, (steps, batch) in STEPS.items():
        told = f"batches of {batch} (default: {steps})"
        kind = LIMITS["steps"]
        parser.add_argument(f"--{stage}-steps", type=kind, default=argparse.SUPPRESS, help=told)


def _render_arguments(parser):
    for name, choices in (
        ("shape", [*world.SHAPES, *world.UNKNOWN_SHAPES]),
        ("colour", [*world.COLOURS]),
        ("background", [*world.BACKGROUNDS, *world.UNKNOWN_BACKGROUNDS]),
        ("style", [*world.STYLES, *world.UNKNOWN_STYLES]),
        ("pattern", [*world.PATTERNS]),
        ("motion", [*world.MOTIONS]),
    ):
        parser.add_argument(f"--{name}", choices=choices, default=choices[0])
    parser.add_argument("--frames", type=FRAMES, default=8)
    parser.add_argument("--layout", type=LAYOUTS, default=0, help="seed of the background's details")
    parser.add_argument(
        "--silhouette", action="store_true", help="the subject white on black: hints for the ControlNet"
    )
    parser.add_argument("--output", type=path, required=True, help="an .mp4, .webm or .gif file")


def _previews_arguments(parser):
    parser.add_argument("--checkpoint", type=path, default=MINI, help="a diffusers folder")
    parser.add_argument("--output", type=path, help="a .safetensors file; the one in the folder without it")


def _pictures_arguments(parser, count: int, of: str, sampling_steps: int):
    parser.add_argument("--count", type=PICTURES, default=count, help=of)
    for name, default in (("guidance_scale", 3.0), ("sampling_steps", sampling_steps), ("seed", 0)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=LIMITS[name], default=default)
    parser.add_argument("--sheet", type=path, help="write the pictures here, with their hints if any, as one PNG")


def _evaluate_arguments(parser):
    parser.add_argument("--checkpoint", type=checkpoint, default="mini")
    _pictures_arguments(parser, 256, "prompts, a third of them unseen combinations", sampling_steps=50)


def _controlnet_arguments(parser):
    parser.add_argument("--controlnet", type=checkpoint, default="mini")
    _pictures_arguments(parser, 64, "silhouettes of known shapes, and as many of unknown ones", sampling_steps=25)


def _lora_arguments(parser):
    parser.add_argument("--strengths", type=STRENGTHS, nargs="+", default=[0.0, 0.5, 1.0])
    _pictures_arguments(parser, 32, "captions", sampling_steps=25)


def _benchmark_arguments(parser):
    parser.add_argument("--checkpoint", type=checkpoint, default="mini")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="what is compared")
    parser.add_argument("--seeds", type=Range(1, 100), default=2, help="runs of every clip")
    told = "numbers of the clips to run; all without it"
    parser.add_argument("--clips", type=Range(0, 7), nargs="+", help=told)
    told = "keep every video and every figure in this folder; the same command goes on there"
    parser.add_argument("--output", type=path, metavar="DIR", help=told)
    parser.add_argument("--markdown", action="store_true", help="print tables instead of JSON")
    device_argument(parser)
    add_preset_arguments(parser, *_settings("seed", "eta"))


def _settings(*without: str) -> list[str]:
    """Of the presets, but for those that mean nothing without a folder of output."""
    return [name for name in SETTINGS if name not in ("save_minutes", "keep", "edits_at_once", *without)]


COMMANDS = {
    "train": (_train, _train_arguments, "train the checkpoint, or one stage of it; starts again where it stopped"),
    "render": (_render, _render_arguments, "render a clip of the world"),
    "previews": (_previews, _previews_arguments, "fit the colours of quick previews to renders, in a minute"),
    "evaluate": (_evaluate, _evaluate_arguments, "text-to-image accuracy, judged by a classifier; prints JSON"),
    "controlnet": (_controlnet, _controlnet_arguments, "how well the ControlNet obeys silhouettes; prints JSON"),
    "lora": (_lora, _lora_arguments, "how far the LoRA draws in its style, by strength; prints JSON"),
    "benchmark": (_benchmark, _benchmark_arguments, "tune, invert and edit clips of known truth; prints JSON"),
}  # fmt: skip


def main():
    kind = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog="python -m tav_core.mini", description=__doc__, formatter_class=kind)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, add_arguments, help) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help, formatter_class=kind)
        add_arguments(sub)
        sub.set_defaults(run=function)
    run(parser)
