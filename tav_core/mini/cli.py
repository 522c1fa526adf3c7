"""python -m tav_core.mini: render, train, evaluate and benchmark the small checkpoint."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import MINI, load_checkpoint, load_controlnet
from ..terminal import add_preset_arguments, preset_of, run
from . import world
from .judge import load_judge


def _train(args):
    from . import train  # training needs more of transformers and tokenizers than using the checkpoint does

    device = torch.device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("vae", "all"):
        train.train_vae(args.work, device, args.vae_steps, 16, 1.5e-3)
    if args.stage in ("unet", "all"):
        train.train_unet(args.work, device, args.unet_steps, 64, 1e-3)
    if args.stage in ("judge", "all"):
        train.train_judge(args.work, device, args.judge_steps, 48, 2e-3)
    if args.stage in ("export", "all"):
        train.export(args.work, args.output)
    if args.stage in ("controlnet", "all"):
        from .train_controlnet import export_controlnet, train_controlnet

        train_controlnet(args.work, args.output / "checkpoint", device, args.controlnet_steps, 32, 1e-3)
        export_controlnet(args.work, args.output)
    if args.stage in ("lora", "all"):
        from .train_lora import export_lora, train_lora

        train_lora(args.work, args.output / "checkpoint", device, args.lora_steps, 32, 2e-3)
        export_lora(args.work, args.output)


def _render(args):
    scene = world.Scene(args.shape, args.colour, args.background, args.style, layout=args.layout, pattern=args.pattern)
    from ..video import save_video

    scenes = world.clip_scenes(scene, args.motion, args.frames)
    frames = world.silhouette_clip(scenes) if args.silhouette else world.render_clip(scenes)
    save_video(torch.from_numpy(frames), args.output, fps=8)
    print(f"{args.output}: {world.caption(scene, args.motion)}")


def _previews(args):
    from .preview import LATENT_COLOURS, write_latent_colours

    write_latent_colours(load_checkpoint(args.checkpoint).vae, args.output or args.checkpoint / LATENT_COLOURS)


def _evaluate(args):
    from .evaluate import contact_sheet, evaluate

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


def _benchmark(args):
    from ..video import save_video
    from .benchmark import benchmark, benchmark_clips

    def keep(name: str, video: np.ndarray):
        save_video(torch.from_numpy(video), args.videos / f"{name}.mp4", fps=8)

    clips = benchmark_clips()
    clips = [clips[i] for i in args.clips] if args.clips else clips
    figures = benchmark(
        load_checkpoint(args.checkpoint),
        load_judge(),
        preset_of(args),
        seeds=args.seeds,
        clips=clips,
        on_video=keep if args.videos else None,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(figures, indent=2))


def _regions(args):
    from .benchmark import benchmark_clips, untouched

    clips = benchmark_clips()
    clips = [clips[i] for i in args.clips] if args.clips else clips
    figures = untouched(
        load_checkpoint("mini"),
        preset_of(args),
        clips=clips,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(figures, indent=2))


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tav_core.mini", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=parser.formatter_class)
        sub.set_defaults(run=function)
        return sub

    train = command("train", _train, "train the checkpoint, or one stage of it; starts again where it stopped")
    train.add_argument("stage", choices=["vae", "unet", "judge", "export", "controlnet", "lora", "all"])
    train.add_argument("--work", type=Path, required=True, help="folder for renders, latents and states")
    train.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        help="where checkpoint/, the judge, controlnet/ and lora/ go",
    )
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--vae-steps", type=int, default=3600, help="batches of 16")
    train.add_argument("--unet-steps", type=int, default=3000, help="batches of 64")
    train.add_argument("--judge-steps", type=int, default=1600, help="batches of 48")
    train.add_argument("--controlnet-steps", type=int, default=2000, help="batches of 32")
    train.add_argument("--lora-steps", type=int, default=450, help="batches of 32")

    render = command("render", _render, "render a clip of the world")
    for name, choices in (
        ("shape", [*world.SHAPES, *world.UNKNOWN_SHAPES]),
        ("colour", [*world.COLOURS]),
        ("background", [*world.BACKGROUNDS, *world.UNKNOWN_BACKGROUNDS]),
        ("style", [*world.STYLES, *world.UNKNOWN_STYLES]),
        ("pattern", [*world.PATTERNS]),
        ("motion", [*world.MOTIONS]),
    ):
        render.add_argument(f"--{name}", choices=choices, default=choices[0])
    render.add_argument("--frames", type=int, default=8)
    render.add_argument("--layout", type=int, default=0, help="seed of the background's details")
    render.add_argument(
        "--silhouette", action="store_true", help="the subject white on black: hints for the ControlNet"
    )
    render.add_argument("--output", type=Path, required=True, help="an .mp4, .webm or .gif file")

    previews = command("previews", _previews, "fit the colours of quick previews to renders of the world, in a minute")
    previews.add_argument("--checkpoint", type=Path, default=MINI, help="a diffusers folder")
    previews.add_argument("--output", type=Path, help="a .safetensors file; the one in the folder without it")

    evaluate = command("evaluate", _evaluate, "text-to-image accuracy, judged by a classifier; prints JSON")
    evaluate.add_argument("--checkpoint", default="mini")
    evaluate.add_argument("--count", type=int, default=256, help="prompts, a third of them unseen combinations")
    evaluate.add_argument("--guidance-scale", type=float, default=3.0)
    evaluate.add_argument("--sampling-steps", type=int, default=50)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--sheet", type=Path, help="write the pictures here as one PNG")

    controlnet = command("controlnet", _controlnet, "how well the ControlNet obeys silhouettes; prints JSON")
    controlnet.add_argument("--controlnet", default="mini")
    controlnet.add_argument(
        "--count", type=int, default=64, help="silhouettes of known shapes, and as many of unknown ones"
    )
    controlnet.add_argument("--guidance-scale", type=float, default=3.0)
    controlnet.add_argument("--sampling-steps", type=int, default=25)
    controlnet.add_argument("--seed", type=int, default=0)
    controlnet.add_argument("--sheet", type=Path, help="write hints and pictures here as one PNG")

    lora = command("lora", _lora, "how far the LoRA draws in its style, by strength; prints JSON")
    lora.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    lora.add_argument("--count", type=int, default=32, help="captions")
    lora.add_argument("--guidance-scale", type=float, default=3.0)
    lora.add_argument("--sampling-steps", type=int, default=25)
    lora.add_argument("--seed", type=int, default=0)
    lora.add_argument("--sheet", type=Path, help="write the pictures here as one PNG")

    benchmark = command("benchmark", _benchmark, "tune, invert and edit clips of known truth; prints JSON")
    benchmark.add_argument("--checkpoint", default="mini")
    benchmark.add_argument("--seeds", type=int, default=2, help="runs of every clip")
    benchmark.add_argument("--clips", type=int, nargs="*", help="numbers of the clips to run; all without it")
    benchmark.add_argument("--videos", type=Path, help="write every video into this folder")
    add_preset_arguments(benchmark)

    regions = command("regions", _regions, "how well edits of a region leave the rest alone (PSNR in dB); prints JSON")
    regions.add_argument("--clips", type=int, nargs="*", help="numbers of the clips to run; all without it")
    add_preset_arguments(regions)
    regions.set_defaults(checkpoint="mini")  # which the preset follows

    run(parser)
