"""What the options of a command give: its settings, checkpoint, clip and mask, tuned weights and noise."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import pipeline
from .arguments import FRAMES
from .checkpoint import Checkpoint, load_checkpoint
from .clip_metrics import load_clip, load_dino
from .ddim import Schedule, ddim_timesteps
from .drawing import Edit
from .errors import TavError, field
from .inflation import VideoUNet
from .limits import LIMITS, check_pixels
from .measure import Models, mask_of
from .noise import InvertedNoise
from .pictures import IMAGES, is_animated
from .precision import DTYPES
from .presets import Preset
from .sound import Sound
from .subject import SOFTNESS
from .terminal import Progress, check_needs, preset_of, tell
from .trainable import trainable_parameters
from .tuned_weights import TunedInfo, load_tuned, read_tuned, weights_fingerprint
from .video import Clip, load_video
from .where import MINI, MINI_KNOWS, MINI_SIZE, find_checkpoint
from .windows import check_context_length

FPS = 8.0  # where nothing else says how fast


def preset(args) -> Preset:
    """The settings of a command, whose checkpoint is looked for first: before anything is read."""
    args.found = find_checkpoint(args.checkpoint, args.comfyui)
    args.dtype = args.dtype or _dtype_for(args.device)
    return preset_of(args)


def _dtype_for(device: torch.device) -> str:
    """bf16 where it is fast, else fp32."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if fast else "fp32"


def checkpoint(args, preset: Preset) -> Checkpoint:
    if args.found == MINI and args.command != "demo" and not args.quiet:
        width, height = getattr(args, "size", None) or (MINI_SIZE, MINI_SIZE)
        large = f" ({width} x {height} is larger than anything it has seen)" * (max(width, height) > MINI_SIZE)
        tell(f"mini {MINI_KNOWS}{large}")
    checkpoint = load_checkpoint(args.found, prediction_type=args.prediction_type)
    for part in (checkpoint.vae, checkpoint.text_encoder):  # of the U-Net, only what is inflated from it goes there
        nn.Module.to(part, args.device)
    ddim_timesteps(checkpoint.scheduler, preset.sampling_steps)  # a wrong count should not surface after tuning
    return checkpoint


def clip(args, checkpoint: Checkpoint, video: Path, sound: bool = False) -> Clip:
    """The wanted frames of a video.

    Raises:
        TavError: what `load_video` refuses, or what could not be tuned on.
    """
    if args.frames == 1 and args.stride != 1:
        raise TavError("stride", args.stride, "does nothing for a single frame", "leave it out")
    if args.context_length is not None:
        check_context_length(args.context_length, args.frames)
    width, height = size(args, checkpoint)
    return load_video(video, start=args.start, stride=args.stride, count=args.frames, width=width, height=height,
                      fit=args.fit, sound=sound, callback=Progress(args.quiet))  # fmt: skip


def size(args, checkpoint: Checkpoint) -> tuple[int, int]:
    """The width and height to work at; a TavError if the checkpoint or no memory can take so many such frames."""
    width, height = args.size or (checkpoint.size, checkpoint.size)
    pipeline.check_size(checkpoint, width=width, height=height)
    check_pixels(args.frames, width, height)
    return width, height


def check_subject(args):
    if args.word is not None and not args.word.strip():
        raise TavError("word", args.word, "is no word", f"name the subject as {field('prompt')} does")
    for name in ("contrast", "word"):
        if args.mask is not None and getattr(args, name) is not None:
            problem = f"does nothing with {field('mask')}, which says where the subject is"
            raise TavError(name, None, problem, "leave it out")


def mask(args, clip: Clip) -> torch.Tensor | None:
    """That of --mask, `f h w` in 0 ... 1, brought to the clip's size as the clip was."""
    if args.mask is None:
        return None
    count, height, width = clip.frames.shape[:3]
    one = args.mask.suffix.lower() in IMAGES and args.mask.is_file() and not is_animated(args.mask)
    cut = dict(count=1) if one else dict(start=args.start, stride=args.stride, count=count)
    size = dict(width=width, height=height, fit=args.fit)
    try:
        return mask_of(load_video(args.mask, **cut, **size, sound=False, callback=Progress(args.quiet)).frames, count)
    except TavError as error:
        named = "mask" if error.field == "video" else error.field
        raise TavError(named, error.value, error.problem, error.remedy) from error


def tuned_info(args) -> TunedInfo | None:
    return None if args.tuned is None else read_tuned(args.tuned)


def tuned_unet(args, checkpoint: Checkpoint) -> tuple[VideoUNet, TunedInfo, str]:
    """The inflated U-Net with the weights of --tuned, in the --dtype, what the file says of them, their fingerprint.

    Without --tuned, that of a Tune-A-Video --checkpoint, which doesn't say its sentence ("") or its frames (0).
    """
    info = tuned_info(args)
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


def window_if_longer(args, info: TunedInfo, frames: int):
    """A clip longer than the tuned one is seen in windows of the tuned length, unless --context-length is given."""
    if args.context_length is None and LIMITS["context_length"].least <= info.num_frames < frames:
        args.context_length = info.num_frames
    check_needs(args, context_overlap="context_length")


def regions(args) -> list[str]:
    """The region of each edit.

    Raises:
        TavError: neither one for all nor one for each.
    """
    regions = args.region or ["everything"]
    if len(regions) not in (1, len(args.edit)):
        problem = f"has {len(regions)} values for {len(args.edit)} {field('edit')}"
        raise TavError("region", None, problem, "give one for all, or one for each in the same order")
    return regions * len(args.edit) if len(regions) == 1 else regions


def edits(args) -> list[Edit]:
    """Every sentence with its region, under each combination of the settings of which there are several values."""
    swept = [values if values and len(values) > 1 else [None] for values in (args.guidance_scale,
                                                                            args.attention_injection)]  # fmt: skip
    sentences = zip(args.edit, regions(args))
    return [Edit(prompt, region, *own) for (prompt, region), *own in product(sentences, *swept)]


def softness(args) -> int:
    return SOFTNESS if args.softness is None else args.softness


def inflation(args) -> dict[str, Any]:
    return {"attention": args.attention, "temporal_causal": args.temporal_causal, "norm": args.norm}


def prompt(args, info: TunedInfo | None) -> str:
    """What the clip shows: as --prompt says, or else the file of --tuned; "" if neither does."""
    if args.prompt is not None:
        pipeline.check_prompt(args.prompt)
        return args.prompt
    if info is not None and info.more_prompts:
        told = ", ".join(repr(prompt) for prompt in [info.prompt, *info.more_prompts])
        remedy = f"say with {field('prompt')} what {field('video')} shows"
        raise TavError("tuned", args.tuned, f"was tuned on several clips ({told})", remedy)
    return "" if info is None else info.prompt


def random_noise(args, checkpoint: Checkpoint, info: TunedInfo, seed: int) -> torch.Tensor:
    factor, frames = checkpoint.downscale, args.frames or info.num_frames or FRAMES
    check_pixels(frames, info.width, info.height)
    shape = (1, checkpoint.unet.config.in_channels, frames, info.height // factor, info.width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pace(args, inverted: InvertedNoise | None) -> tuple[float, Sound | None]:
    """The rate of what is written, and the sound of the clip if it is in time then."""
    fps, sound = (None, None) if inverted is None else (inverted.fps, inverted.sound)
    rate = (fps or FPS) if args.fps is None else args.fps
    return rate, sound if args.audio and math.isclose(rate, fps or 0, rel_tol=1e-3) else None


def check_noise(path: Path, noise: InvertedNoise, checkpoint: Checkpoint, weights: str):
    """Raises a TavError for noise of another kind of checkpoint, or inverted with other weights or on other levels."""
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
    if noise.sigmas is not None:  # of a graph, and the end is no level: there a schedule stops just short of 0
        levels = Schedule.of(checkpoint.scheduler, len(noise.sigmas) - 1).sigmas
        if not torch.allclose(noise.sigmas[:-1], levels[:-1], rtol=1e-3):
            problem = "was inverted in a graph on other noise levels than DDIM takes"
            raise TavError("noise", path, problem, "invert it on the scheduler ddim_uniform, or sample it there")


def models(args) -> Models:
    return Models(
        args.clip and load_clip(args.clip),
        args.pickscore and load_clip(args.pickscore, "pickscore"),
        args.dino and load_dino(args.dino),
    )
