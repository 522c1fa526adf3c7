"""Tune-A-Video from end to end: a clip and its sentence in, edited clips out.

    source = prepare(checkpoint, frames, prompt)        # latents and text embedding, computed once
    unet, result = tune_on(checkpoint, source, preset)   # one-shot tuning
    noise = invert(checkpoint, unet, source, preset)     # DDIM inversion
    video = sample(checkpoint, unet, noise, "an edited prompt", preset)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video
from .ddim import ddim_invert, ddim_sample
from .errors import TavError
from .inflate import VideoUNet, inflate
from .tuning import TuneConfig, TuneResult, tune
from .video import to_pixels

Callback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Preset:
    """Settings of a whole edit. `sampling_steps` serve inversion and sampling alike."""

    tuning: TuneConfig
    sampling_steps: int = 50
    guidance_scale: float = 12.5


PRESETS = {
    # section 4 of the paper and the authors' configuration files
    "paper": Preset(TuneConfig(steps=500, learning_rate=3e-5), sampling_steps=50, guidance_scale=12.5),
    # found with `python -m tav_core.mini benchmark`: the small checkpoint wants to learn fast; a large one doesn't
    "mini": Preset(TuneConfig(steps=200, learning_rate=2e-3, timestep_sampling="stratified"), sampling_steps=25,
                   guidance_scale=5.0),
}


def default_preset(checkpoint_name: str) -> str:
    """The name of the preset that suits a checkpoint."""
    return "mini" if checkpoint_name == "mini" else "paper"


@dataclass
class Source:
    """A clip as the model sees it: posterior mean and std of its latents (`1 c f h w`, scaled), text `1 n d`."""

    prompt: str
    latents: Tensor
    latents_std: Tensor
    hidden_states: Tensor


def prepare(checkpoint: Checkpoint, frames: Tensor, prompt: str) -> Source:
    """Encodes a clip (uint8 `f h w c`) and its sentence once, for all stages.

    Raises:
        TavError: an empty prompt, or a size that the model can't halve as often as it must.
    """
    if not prompt.strip():
        raise TavError('--prompt is empty; describe the clip in one sentence, e.g. "a man is skiing"')
    check_size(checkpoint, width=frames.shape[2], height=frames.shape[1])
    mean, std = encode_video(checkpoint, to_pixels(frames))
    return Source(prompt, mean, std, encode_prompt(checkpoint, prompt))


def check_size(checkpoint: Checkpoint, *, width: int, height: int):
    """Raises a TavError if the checkpoint can't take frames of this size."""
    multiple = checkpoint.downscale  # the U-Net itself takes any size
    for name, value in (("width", width), ("height", height)):
        if value % multiple or value <= 0:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise TavError(f"{name} {value} is not a multiple of {multiple}; use {nearest}")


def tune_on(checkpoint: Checkpoint, source: Source, preset: Preset, *, attention: str = "sparse-causal",
            temporal_causal: bool = False, norm: str = "video", state_path: str | Path | None = None,
            resume: bool = True, callback: Callback | None = None) -> tuple[VideoUNet, TuneResult]:  # fmt: skip
    """Inflates a copy of the checkpoint's U-Net and tunes it on the clip (see `inflate` and `tune`)."""
    unet = inflate(checkpoint.unet, attention=attention, temporal_causal=temporal_causal, norm=norm)
    result = tune(unet, checkpoint.scheduler, source.latents, source.hidden_states, preset.tuning,
                  latents_std=source.latents_std, state_path=state_path, resume=resume, callback=callback)  # fmt: skip
    return unet, result


def invert(checkpoint: Checkpoint, unet: VideoUNet, source: Source, preset: Preset,
           callback: Callback | None = None) -> Tensor:  # fmt: skip
    """The noise `1 c f h w` that carries the clip's structure: DDIM inversion with the empty prompt."""
    return ddim_invert(unet, source.latents, encode_prompt(checkpoint, ""), checkpoint.scheduler,
                       preset.sampling_steps, callback=callback)  # fmt: skip


def sample(checkpoint: Checkpoint, unet: VideoUNet, noise: Tensor, prompt: str, preset: Preset, *,
           negative_prompt: str = "", callback: Callback | None = None) -> Tensor:  # fmt: skip
    """The clip of `prompt` from `noise`, uint8 `f h w c`.

    Raises:
        TavError: an empty prompt.
    """
    if not prompt.strip():
        raise TavError("--edit is empty; describe the edited clip in one sentence")
    latents = ddim_sample(unet, noise.to(unet.device), encode_prompt(checkpoint, prompt), checkpoint.scheduler, preset.sampling_steps,
                          guidance_scale=preset.guidance_scale,
                          negative_hidden_states=encode_prompt(checkpoint, negative_prompt), callback=callback)  # fmt: skip
    return decode_video(checkpoint, latents)


def with_settings(preset: Preset, *, steps: int | None = None, learning_rate: float | None = None,
                  seed: int | None = None, dtype: str | None = None, gradient_checkpointing: bool | None = None,
                  sampling_steps: int | None = None, guidance_scale: float | None = None) -> Preset:  # fmt: skip
    """A preset with some of its settings replaced; None keeps the preset's own."""
    tuning = dict(steps=steps, learning_rate=learning_rate, seed=seed, dtype=dtype,
                  gradient_checkpointing=gradient_checkpointing)  # fmt: skip
    sampling = dict(sampling_steps=sampling_steps, guidance_scale=guidance_scale)
    tuning, sampling = ({k: v for k, v in s.items() if v is not None} for s in (tuning, sampling))
    return replace(preset, tuning=replace(preset.tuning, **tuning), **sampling)
