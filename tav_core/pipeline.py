"""Tune-A-Video from end to end: a clip and its sentence in, edited clips out.

source = prepare(checkpoint, frames, prompt)        # latents and text embedding, computed once
unet, result = tune_on(checkpoint, source, preset)   # one-shot tuning
noise = invert(checkpoint, unet, source, preset)     # DDIM inversion
subject = find_subject(checkpoint, unet, source, contrasts, preset)  # optional
video = sample(checkpoint, unet, noise, "an edited prompt", preset, source_prompt=prompt, subject=subject)
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video
from .ddim import ddim_invert, ddim_sample
from .errors import TavError
from .inflate import VideoUNet, inflate, trainable_parameters
from .subject import SOFTNESS, anchor_of, editable, outlined, pooled, put_back, softened, still_of, subject_mask
from .tuning import Take, TuneConfig, TuneResult, tune
from .video import to_pixels
from .windows import ContextWindows, WindowedUNet

Callback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Preset:
    """Settings of a whole edit. `sampling_steps` serve inversion and sampling alike.

    Attributes:
        attention_injection: share of the sampling steps in which the edit attends as the clip does, 0 ... 1: more
            keeps more of its layout and motion (see `attention`; 0 in the paper).
        caption_as_negative: how much of the negative prompt is the clip's own sentence, 0 ... 1: guidance then
            follows what an edit changes in it, and the clip is inverted with it. 0 is the paper, 1 negative-prompt
            inversion (arXiv 2305.16807).
        steady: with a mask of the subject, a background that an edit draws anew stands still where the clip's does (see
            `steady`). Turn it off for one that should move, such as a fire or a crowd.
        context_overlap: frames that neighbouring windows share; with `tuning.context_length` all stages see a clip
            window by window (see `windows`).
    """

    tuning: TuneConfig
    sampling_steps: int = 50
    guidance_scale: float = 12.5
    attention_injection: float = 0.0
    caption_as_negative: float = 0.0
    steady: bool = True
    context_overlap: int = 4

    def __post_init__(self):
        for name in ("attention_injection", "caption_as_negative"):
            if not 0 <= getattr(self, name) <= 1:
                raise TavError(f"{name}={getattr(self, name)} is out of range; give a number from 0 to 1")
        if self.tuning.context_length is not None:
            ContextWindows(self.tuning.context_length, self.context_overlap)


PRESETS = {
    # section 4 of the paper and the authors' configuration files
    "paper": Preset(TuneConfig(steps=500, learning_rate=3e-5), sampling_steps=50, guidance_scale=12.5),
    # found with `python -m tav_core.mini benchmark`: the small checkpoint wants to learn fast; a large one doesn't
    "mini": Preset(
        TuneConfig(steps=200, learning_rate=2e-3, timestep_sampling="stratified"),
        sampling_steps=25,
        guidance_scale=5.0,
        attention_injection=0.6,
        caption_as_negative=0.25,
    ),
}


def default_preset(checkpoint_name: str) -> str:
    """The name of the preset that suits a checkpoint."""
    return "mini" if checkpoint_name == "mini" else "paper"


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


@contextmanager
def offloaded(*models: nn.Module) -> Iterator[None]:
    """Models that aren't needed for a while wait on the CPU: those of Stable Diffusion leave 0.8 GB to the tuning."""
    devices = [next(model.parameters()).device for model in models]
    try:
        for model in models:
            nn.Module.to(model, "cpu")
        yield
    finally:
        for model, device in zip(models, devices):
            nn.Module.to(model, device)


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


def with_settings(
    preset: Preset,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    memory: str | None = None,
    sampling_steps: int | None = None,
    guidance_scale: float | None = None,
    attention_injection: float | None = None,
    caption_as_negative: float | None = None,
    steady: bool | None = None,
    context_length: int | None = None,
    context_overlap: int | None = None,
) -> Preset:
    """A preset with some of its settings replaced; None keeps the preset's own."""
    tuning = dict(
        steps=steps, learning_rate=learning_rate, seed=seed, dtype=dtype, memory=memory, context_length=context_length
    )
    sampling = dict(
        sampling_steps=sampling_steps,
        guidance_scale=guidance_scale,
        attention_injection=attention_injection,
        caption_as_negative=caption_as_negative,
        steady=steady,
        context_overlap=context_overlap,
    )
    tuning, sampling = ({k: v for k, v in s.items() if v is not None} for s in (tuning, sampling))
    return replace(preset, tuning=replace(preset.tuning, **tuning), **sampling)
