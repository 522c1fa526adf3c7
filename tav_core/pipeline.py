"""Tune-A-Video from end to end: a clip and its sentence in, edited clips out.

source = prepare(checkpoint, frames, prompt)        # latents and text embedding, computed once
unet, result = tune_on(checkpoint, source, preset)   # one-shot tuning
noise = invert(checkpoint, unet, source, preset)     # DDIM inversion
subject = find_subject(checkpoint, unet, source, contrasts, preset)  # optional
video = sample(checkpoint, unet, noise, "an edited prompt", preset, source_prompt=prompt, subject=subject)
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video
from .ddim import ddim_invert, ddim_sample
from .errors import TavError
from .inflation import VideoUNet, inflate, trainable_parameters
from .memory import offloaded
from .presets import Preset
from .subject import SOFTNESS, anchor_of, editable, outlined, pooled, put_back, softened, still_of, subject_mask
from .tuning import Take, TuneResult, tune
from .video import to_pixels
from .windows import ContextWindows, WindowedUNet

Callback = Callable[[dict[str, Any]], None]


@dataclass
class Source:
    """A clip, uint8 `f h w c`, and as the model sees it: posterior mean and std of its latents (`1 c f h w`, scaled), text
    `1 n d`, and for a U-Net with classes its labels, `1` or `f`."""

    frames: Tensor
    prompt: str
    latents: Tensor
    latents_std: Tensor
    hidden_states: Tensor
    class_labels: Tensor | None = None


def prepare(checkpoint: Checkpoint, frames: Tensor, prompt: str, class_labels: Tensor | None = None) -> Source:
    """Encodes a clip (uint8 `f h w c`) and its sentence once, for all stages.

    Raises:
        TavError: an empty prompt, or a size that the model can't halve as often as it must.
    """
    if not prompt.strip():
        raise TavError('--prompt is empty; describe the clip in one sentence, e.g. "a man is skiing"')
    check_size(checkpoint, width=frames.shape[2], height=frames.shape[1])
    mean, std = encode_video(checkpoint, to_pixels(frames))
    return Source(frames, prompt, mean, std, encode_prompt(checkpoint, prompt), class_labels)


def check_size(checkpoint: Checkpoint, *, width: int, height: int):
    """Raises a TavError if the checkpoint can't take frames of this size."""
    multiple = checkpoint.downscale  # the U-Net itself takes any size
    for name, value in (("width", width), ("height", height)):
        if value % multiple or value <= 0:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise TavError(f"{name} {value} is not a multiple of {multiple}; use {nearest}")


def video_unet(
    checkpoint: Checkpoint, *, attention: str = "sparse-causal", temporal_causal: bool = False, norm: str = "video"
) -> VideoUNet:
    """A video U-Net to tune or to load tuned weights into: the checkpoint's inflated, or a copy of it if it is one.

    It is on the device of the VAE; the checkpoint's own may wait on the CPU.

    Raises:
        TavError: options of `inflate` that it can't follow.
    """
    options = {"attention": attention, "temporal_causal": temporal_causal, "norm": norm}
    if not isinstance(checkpoint.unet, VideoUNet):
        return nn.Module.to(inflate(checkpoint.unet, **options), checkpoint.vae.device)
    if options != checkpoint.unet.inflation:
        raise TavError(
            f"--checkpoint {checkpoint.name} is a Tune-A-Video model, inflated with {checkpoint.unet.inflation}, not with "
            f"{options}; leave --attention, --temporal-causal and --norm as they are by default"
        )
    unet = copy.deepcopy(checkpoint.unet)
    for parameter in trainable_parameters(unet).values():
        parameter.requires_grad_(True)
    return nn.Module.to(unet, checkpoint.vae.device)


def tune_on(
    checkpoint: Checkpoint,
    source: Source,
    preset: Preset,
    *,
    attention: str = "sparse-causal",
    temporal_causal: bool = False,
    norm: str = "video",
    more_sources: Sequence[Source] = (),
    state_path: str | Path | None = None,
    resume: bool = True,
    callback: Callback | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[VideoUNet, TuneResult]:
    """Inflates a copy of the checkpoint's U-Net and tunes it on the clip, or on several (see `inflate` and `tune`).

    A published Tune-A-Video model is tuned further.
    """
    more = [Take(other.latents, other.hidden_states, other.latents_std, other.class_labels) for other in more_sources]
    unet = video_unet(checkpoint, attention=attention, temporal_causal=temporal_causal, norm=norm)
    with offloaded(checkpoint.vae, checkpoint.text_encoder):
        result = tune(
            unet,
            checkpoint.scheduler,
            source.latents,
            source.hidden_states,
            preset.tuning,
            latents_std=source.latents_std,
            class_labels=source.class_labels,
            more_takes=more,
            state_path=state_path,
            resume=resume,
            callback=callback,
            say=say,
        )
    return unet, result


def invert(
    checkpoint: Checkpoint, unet: VideoUNet, source: Source, preset: Preset, callback: Callback | None = None
) -> Tensor:
    """The noise `1 c f h w` that carries the clip's structure: DDIM inversion."""
    text = _inversion_text(checkpoint, source.prompt, preset)
    return ddim_invert(
        _windowed(unet, preset),
        source.latents,
        text,
        checkpoint.scheduler,
        preset.sampling_steps,
        callback=callback,
        class_labels=source.class_labels,
    )


def _windowed(unet: VideoUNet, preset: Preset) -> VideoUNet | WindowedUNet:
    length = preset.tuning.context_length
    return unet if length is None else WindowedUNet(unet, ContextWindows(length, preset.context_overlap))


def find_subject(
    checkpoint: Checkpoint,
    unet: VideoUNet,
    source: Source,
    contrasts: Sequence[str],
    preset: Preset,
    softness: int = SOFTNESS,
) -> Tensor:
    """Mask of the clip's subject, 0 ... 1, `1 1 f h w` of pixels (see `subject_mask` and `outlined`).

    Args:
        contrasts: the clip's sentence with other subjects: for "a red ball on the grass", "a blue star on the grass".
        softness: width of the mask's edge in pixels; 0 for a hard one.

    Raises:
        TavError: a contrast that is empty or the sentence itself.
    """
    check_contrasts(source.prompt, contrasts)
    others = torch.cat([encode_prompt(checkpoint, contrast) for contrast in contrasts])
    mask = subject_mask(
        _windowed(unet, preset),
        source.latents,
        source.hidden_states,
        others,
        checkpoint.scheduler,
        seed=preset.tuning.seed,
        class_labels=source.class_labels,
    )
    return softened(outlined(mask, source.frames), softness)


def check_contrasts(prompt: str, contrasts: Sequence[str]):
    """Raises a TavError for a contrast that is empty or the sentence itself."""
    for contrast in contrasts:
        if not contrast.strip() or contrast == prompt:
            raise TavError(
                f"--contrast {contrast!r} says nothing of another subject; change the subject's words in {prompt!r}"
            )


def sample(
    checkpoint: Checkpoint,
    unet: VideoUNet,
    noise: Tensor,
    prompt: str,
    preset: Preset,
    *,
    source_prompt: str | None = None,
    negative_prompt: str = "",
    subject: Tensor | None = None,
    region: str = "everything",
    class_labels: Tensor | None = None,
    negative_class_labels: Tensor | None = None,
    source_class_labels: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """The clip of `prompt` from `noise`, uint8 `f h w c`.

    Args:
        source_prompt: the sentence of the clip that was inverted to `noise`; None for random noise, which has no clip
            to take attention or a caption from.
        subject: mask of the clip's subject, `1 1 f h w` of pixels (see `find_subject`): attention injection keeps it in its place.
        region: what the edit may change: "everything", the "subject" or the "background"; the rest is what the noise
            reconstructs. The last two need `subject` and `source_prompt`.
        class_labels, negative_class_labels, source_class_labels: see `ddim_sample`.

    Raises:
        TavError: an empty prompt, settings out of range (see `ddim_sample`), or a region without subject.
    """
    if region != "everything" and (subject is None or source_prompt is None):
        raise TavError(f"--region {region} needs to know where the subject is; invert the clip with --contrast")
    if not prompt.strip():
        raise TavError("--edit is empty; describe the edited clip in one sentence")
    negative, settings, changeable = encode_prompt(checkpoint, negative_prompt), {}, None
    if source_prompt is not None:
        negative = torch.lerp(negative, encode_prompt(checkpoint, source_prompt), preset.caption_as_negative)
        settings = {"attention_injection": preset.attention_injection,
                    "source_hidden_states": _inversion_text(checkpoint, source_prompt, preset)}  # fmt: skip
        if subject is not None:
            mask = pooled(subject, checkpoint.downscale).to(unet.device)
            changeable = editable(region, mask, room=1)
            settings |= {
                "anchor": anchor_of(region, mask, changeable),
                "region": changeable,
                "return_source": changeable is not None,
                "still": still_of(region, mask, room=1) if preset.steady else None,
            }
    latents = ddim_sample(
        _windowed(unet, preset),
        noise.to(unet.device),
        encode_prompt(checkpoint, prompt),
        checkpoint.scheduler,
        preset.sampling_steps,
        guidance_scale=preset.guidance_scale,
        negative_hidden_states=negative,
        callback=callback,
        class_labels=class_labels,
        negative_class_labels=negative_class_labels,
        source_class_labels=source_class_labels,
        **settings,
    )
    if changeable is None:
        return decode_video(checkpoint, latents)
    edit, source = (decode_video(checkpoint, each) for each in latents)
    return put_back(edit, source, editable(region, subject, room=checkpoint.downscale))


def _inversion_text(checkpoint: Checkpoint, prompt: str, preset: Preset) -> Tensor:
    return encode_prompt(checkpoint, prompt if preset.caption_as_negative else "")
