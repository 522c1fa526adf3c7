"""What the options of a command give: its settings, checkpoint, clip and mask, tuned weights and noise."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from . import pipeline
from .arguments import FRAMES
from .checkpoint import Checkpoint, load_checkpoint, load_controlnet
from .control import Control
from .ddim import Schedule, ddim_timesteps
from .embeddings import load_embedding
from .errors import TavError, field
from .inflation import VideoUNet
from .limits import LIMITS, check_pixels
from .lora import load_lora
from .measure import MODELS, Models, load_models, mask_of
from .noise import InvertedNoise
from .pictures import IMAGES, is_animated
from .precision import DTYPES
from .presets import Preset
from .sampling import Edit
from .sentences import seems_weighted
from .sound import Sound
from .subject import SOFTNESS
from .terminal import Progress, check_needs, preset_of, tell
from .trainable import trainable_parameters
from .tuned_weights import TunedInfo, load_tuned, read_tuned, weights_fingerprint
from .video import Clip, load_video
from .where import MINI, MINI_KNOWS, MINI_SIZE, find_checkpoint, find_model
from .windows import check_context_length

FPS = 8.0  # where nothing else says how fast


def preset(args) -> Preset:
    """The settings of a command, whose checkpoint is looked for first: before anything is read."""
    args.found = find_checkpoint(args.checkpoint, args.comfyui)
    args.added = {  # to it
        "lora": loras(args, "lora"),
        "embedding": [find_model("embedding", name, "embeddings", args.comfyui) for name in args.embedding or ()],
    }
    args.dtype = args.dtype or _dtype_for(args.device)
    return preset_of(args)


def loras(args, of: str) -> list[tuple[Path, float]]:
    """The files and strengths of --lora or --edit-lora."""
    return [(find_model(of, name, "loras", args.comfyui), strength) for name, strength in getattr(args, of) or ()]


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
    checkpoint = replace(with_added(checkpoint, **args.added), prompt_weights=args.prompt_weights)
    for part in (checkpoint.vae, checkpoint.text_encoder):  # of the U-Net, only what is inflated from it goes there
        nn.Module.to(part, args.device)
    ddim_timesteps(checkpoint.scheduler, preset.sampling_steps)  # a wrong count should not surface after tuning
    return checkpoint


def with_added(
    checkpoint: Checkpoint, lora: Sequence[tuple[str | Path, float]], embedding: Sequence[str | Path]
) -> Checkpoint:
    """The checkpoint with LoRAs, files and strengths, and textual inversions."""
    for path, strength in lora:
        checkpoint = load_lora(checkpoint, path, strength)
    for path in embedding:
        checkpoint = load_embedding(checkpoint, path)
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
    cut = dict(start=args.start, stride=args.stride, count=count)
    return mask_of(_pictures(args, "mask", args.mask, width, height, args.fit, cut), count)


def _pictures(args, of: str, path: Path, width: int, height: int, fit: str, cut: dict[str, int | None]) -> torch.Tensor:
    """Those of an option that takes an image or a video, uint8 `f h w c`; an image isn't cut."""
    one = path.suffix.lower() in IMAGES and path.is_file() and not is_animated(path)
    read = dict(width=width, height=height, fit=fit, sound=False, callback=Progress(args.quiet))
    try:
        return load_video(path, **(dict(count=1) if one else cut), **read).frames
    except TavError as error:
        named = of if error.field == "video" else error.field
        raise TavError(named, error.value, error.problem, error.remedy) from error


def control_models(args) -> list[ControlNetModel]:
    """Those of --controlnet, on the device, in the precision of the U-Net.

    Raises:
        TavError: one without hints, hints or settings without one, more or fewer of them, an end that isn't behind the
            start.
    """
    of_control = ("hints", "control_strength", "control_start", "control_end")
    check_needs(args, **dict.fromkeys(of_control, "controlnet"))
    if args.controlnet is None:
        return []
    if args.hints is None:
        raise TavError("hints", None, "is missing", f"give {field('controlnet')} a picture for each frame, or for all")
    count = len(args.controlnet)
    for name in of_control:
        for_all = "" if name == "hints" else "one for all, or "
        if (values := getattr(args, name)) and len(values) != count and not (for_all and len(values) == 1):
            problem = f"has {len(values)} values for {count} {field('controlnet')}"
            raise TavError(name, None, problem, f"give {for_all}one for each in the same order")
    for own in _control_settings(args):
        Control(None, torch.zeros(1, 1, 1, 3, dtype=torch.uint8), **own)
    paths = [find_model("controlnet", name, "controlnet", args.comfyui) for name in args.controlnet]
    models = {path: nn.Module.to(load_controlnet(path), args.device, DTYPES[args.dtype]) for path in {*paths}}
    return [models[path] for path in paths]


def _control_settings(args) -> list[dict[str, float]]:
    """Those of each ControlNet, where they are given."""
    given = {name: getattr(args, f"control_{name}") for name in ("strength", "start", "end")}
    count = len(args.controlnet)
    return [{name: (values * count)[at] for name, values in given.items() if values} for at in range(count)]


def control(
    args, models: Sequence[ControlNetModel], checkpoint: Checkpoint, frames: int, height: int, width: int, **cut
) -> list[Control]:
    """The ControlNets with their hints, for a clip of that shape.

    Args:
        cut: how the clip was cut, where that is known; else there must be one picture for each of its frames.
    """
    if not models:
        return []
    made = []
    for model, name, path, own in zip(models, args.controlnet, args.hints, _control_settings(args), strict=True):
        hints = _pictures(args, "hints", path, width, height, getattr(args, "fit", "crop"), cut)
        made.append(Control(model, hints, **own))
        try:
            made[-1].check(checkpoint.unet, frames, height, width)
        except TavError as error:
            value = {"controlnet": name, "hints": path}[error.field]
            raise TavError(error.field, value, error.problem, error.remedy) from error
    return made


def check_sentences(args, *sentences: str):
    """Tells of weights that are none, and refuses a textual inversion that no sentence names."""
    said = " ".join(sentences).lower()
    for path in args.added["embedding"]:
        if path.stem.lower() not in said:
            problem = f"does nothing: no sentence has the word {path.stem!r}"
            raise TavError("embedding", path, problem, "use it in one, or leave it out")
    odd = [] if args.prompt_weights or args.quiet else list(filter(seems_weighted, sentences))
    if odd:
        tell(f"note: parentheses and numbers are read as words in {odd[0]!r}; with --prompt-weights they are weights")


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


def edits(args, seeds: Sequence[int] | None = None) -> list[Edit]:
    """Every sentence with its region, under each combination of the settings of which there are several values.

    Args:
        seeds: of the fresh noise of an eta.
    """
    swept = [values if values and len(values) > 1 else [None] for values in (args.guidance_scale,
                                                                            args.attention_injection)]  # fmt: skip
    swept.append(seeds or [None])
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
    return load_models(**{name: getattr(args, name) for name in MODELS})
