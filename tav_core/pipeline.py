"""The stages of Tune-A-Video, from a clip and its sentence to where its edits begin; `sampling` draws them.

In their order:

    source = prepare(checkpoint, frames, prompt)          # latents and text embedding, computed once
    unet, result = tune_on(checkpoint, [source], preset)  # one-shot tuning
    noise = invert(checkpoint, unet, source, preset)      # DDIM inversion
    subject = find_subject(checkpoint, unet, source, contrasts, preset)  # optional
    video = sampling.sample(checkpoint, unet, noise, "an edited prompt", preset, source_prompt=prompt, subject=subject)
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video
from .condition import Condition
from .control import ControlledUNet
from .ddim import ddim_invert, ddim_sample
from .errors import TavError, field, shortened
from .events import Callback, Step, ignored
from .frames import Frames, as_frames, as_mask, told
from .inflation import VideoUNet, inflate
from .memory import offloaded
from .presets import Preset
from .sentences import keyframes, tokens_of
from .subject import SOFTNESS, outlined, softened, subject_mask, subject_steps, word_mask, word_places
from .take import Take
from .trainable import trainable_parameters
from .tuning import TuneResult, tune
from .video import to_pixels
from .windows import ContextWindows, WindowedUNet

LARGEST = 8  # times the size of a checkpoint: beyond it nothing is drawn well, and memory ends before


@dataclass(frozen=True)
class Source:
    """A clip as people see it, and as the model does: what `prepare` makes.

    Attributes:
        frames: uint8 `f h w 3` (RGB), on the CPU.
        prompt: the sentence that describes it.
        take: both, encoded.
    """

    frames: Tensor
    prompt: str
    take: Take

    def __repr__(self) -> str:
        return f"Source({told(self.frames)}, {shortened(self.prompt, 60)!r})"


def prepare(checkpoint: Checkpoint, frames: Frames, prompt: str, class_labels: Tensor | None = None) -> Source:
    """Encodes a clip and its sentence once, for all stages.

    Args:
        frames: uint8 `f h w 3` (RGB), a tensor, an array or images of Pillow (see `as_frames`).
        prompt: one sentence that describes the clip; what is beyond 77 tokens, the tokenizer's length, is left out with
            a warning.
        class_labels: `1` or `f`, for a U-Net with classes.

    Raises:
        TavError: frames of another kind, an empty prompt, or a width or height that is no multiple of
            `Checkpoint.downscale`, or more than 8 times `Checkpoint.size`.
    """
    check_prompt(prompt)
    frames = as_frames(frames)
    check_size(checkpoint, width=frames.shape[2], height=frames.shape[1])
    mean, std = encode_video(checkpoint, to_pixels(frames))
    return Source(frames, prompt, Take(mean, Condition(encode_prompt(checkpoint, prompt), class_labels), std))


def check_text(name: str, text: str):
    """Raises a TavError for text that no file holds: of bytes that aren't UTF-8 Python makes halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TavError(name, text, "is not UTF-8", "give it in that encoding") from None


def check_edit(prompt: str, region: str, subject_known: bool):
    """Raises a TavError for an empty edit, or one of a region that nobody knows."""
    check_text("edit", prompt)
    if not prompt.strip():
        raise TavError("edit", None, "is empty", "describe the edited clip in one sentence")
    keyframes(prompt)  # raises for a text that is out of order
    if region != "everything" and not subject_known:
        problem = "needs to know where the subject is"
        remedy = f"invert the clip with {field('contrast')}, {field('word')} or {field('mask')}"
        raise TavError("region", region, problem, remedy)


def check_prompt(prompt: str):
    """Raises a TavError for an empty sentence."""
    check_text("prompt", prompt)
    if not prompt.strip():
        raise TavError("prompt", None, "is empty", 'describe the clip in one sentence, e.g. "a man is skiing"')
    if keyframes(prompt):
        problem = "has a sentence for each of some frames, which edits alone may have"
        raise TavError("prompt", prompt, problem, "describe the clip in one sentence")


def check_size(checkpoint: Checkpoint, *, width: int, height: int):
    """Raises a TavError if the checkpoint can't take frames of this size."""
    multiple, most = checkpoint.downscale, LARGEST * checkpoint.size  # the U-Net itself takes any size
    for name, value in (("width", width), ("height", height)):
        if value > most:
            problem = f"is more than {LARGEST} times the {checkpoint.size} that the checkpoint was made for"
            raise TavError(name, value, problem, f"use {most} or less")
        if value % multiple or value <= 0:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise TavError(name, value, f"is not a multiple of {multiple}", f"use {nearest}")


def video_unet(
    checkpoint: Checkpoint, *, attention: str = "sparse-causal", temporal_causal: bool = False, norm: str = "video"
) -> VideoUNet:
    """A video U-Net to tune or to load tuned weights into: the checkpoint's inflated, or a copy of it if it is one.

    It is on the device of the VAE; the checkpoint's own may wait on the CPU.

    Raises:
        TavError: options of `inflate` that it can't follow.
    """
    options = {"attention": attention, "temporal_causal": temporal_causal, "norm": norm}
    check_inflation(checkpoint, options)
    if not isinstance(checkpoint.unet, VideoUNet):
        return nn.Module.to(inflate(checkpoint.unet, **options), checkpoint.vae.device)
    unet = copy.deepcopy(checkpoint.unet)
    for parameter in trainable_parameters(unet).values():
        parameter.requires_grad_(True)
    return nn.Module.to(unet, checkpoint.vae.device)


def check_inflation(checkpoint: Checkpoint, options: dict[str, Any]):
    """Raises a TavError for a checkpoint that is a video U-Net already, by other options of `inflate`."""
    if isinstance(checkpoint.unet, VideoUNet) and options != checkpoint.unet.inflation:
        problem = f"is a Tune-A-Video model, inflated with {checkpoint.unet.inflation}, not with {options}"
        names = f"{field('attention')}, {field('temporal_causal')} and {field('norm')}"
        raise TavError("checkpoint", checkpoint.name, problem, f"leave {names} as they are by default")


def untuned_weights(checkpoint: Checkpoint, **inflation) -> dict[str, Tensor]:
    """The `trainable_parameters` of `video_unet`, as they are before a tuning."""
    return {name: weight.detach() for name, weight in trainable_parameters(video_unet(checkpoint, **inflation)).items()}


def tune_on(
    checkpoint: Checkpoint,
    sources: Sequence[Source],
    preset: Preset,
    *,
    inflation: dict[str, Any] | None = None,
    state_path: str | Path | Callable[[dict[str, Any]], Path] | None = None,
    resume: bool = True,
    callback: Callback = ignored,
) -> tuple[VideoUNet, TuneResult]:
    """Inflates a copy of the checkpoint's U-Net and tunes it on the clip, or on several: one-shot tuning (Tune-A-Video,
    sections 3.2 and 3.3).

    A published Tune-A-Video model is tuned further. It runs on the device of the checkpoint's VAE; meanwhile VAE and
    text encoder wait on the CPU, where what the callback asks of them is computed.

    Args:
        checkpoint: is left as it is.
        sources: from `prepare`: the clip, or several, each with its own sentence, size and length.
        preset: nothing but its `tuning` counts.
        inflation: options of `inflate` that aren't as by default.
        state_path, resume: the state file of an unfinished run, as in `tune`.
        callback: gets a `TuningStep` after every step, and `Note`; raises to stop (see `tune`).

    Returns: the tuned U-Net, in float32 if the checkpoint is, and how it went.

    Raises:
        TavError: what `inflate` and `tune` refuse, or inflation options that a published model doesn't have.
    """
    unet, takes = video_unet(checkpoint, **(inflation or {})), [source.take for source in sources]
    with offloaded(checkpoint.vae, checkpoint.text_encoder):
        result = tune(
            unet, checkpoint.scheduler, takes, preset.tuning, state_path=state_path, resume=resume, callback=callback
        )
    return unet, result


def invert(
    checkpoint: Checkpoint, unet: VideoUNet, source: Source, preset: Preset, callback: Callback = ignored
) -> Tensor:
    """The noise that carries the clip's structure and motion: DDIM inversion (Tune-A-Video, section 3.3; DDIM, Song et
    al., arXiv 2010.02502), by the mean of the VAE's posterior.

    Args:
        unet: tuned on the clip; in windows, if `preset.tuning.context_length` says so.
        source: from `prepare`.
        preset: `sampling_steps`, which `sample` takes as many of, and `caption_as_negative`: above 0 the clip is
            inverted with its own sentence, else with the empty prompt, as in the paper.
        callback: gets a `DDIMStep` of stage "invert" after every step; raises to stop.

    Returns: float32 `1 c f h w` on the device of the U-Net, about standard normal.

    Raises:
        TavError: more steps than the noise schedule has, or a clip shorter than a window.
    """
    condition = Condition(inversion_text(checkpoint, source.prompt, preset), source.take.condition.class_labels)
    unet, latents, steps = windowed(unet, preset), source.take.latents, preset.sampling_steps
    return ddim_invert(unet, latents, condition, checkpoint.scheduler, steps, callback=callback)


def reconstruct(
    checkpoint: Checkpoint, unet: VideoUNet, noise: Tensor, prompt: str, preset: Preset, callback: Callback = ignored
) -> Tensor:
    """The clip as it is found back from its noise without guidance: what an edit starts from.

    Args:
        unet, preset: those of `invert`.
        noise: `1 c f h w`, from `invert`.
        prompt: the sentence of the clip, which it was inverted with if `preset` says so.
        callback: gets a `DDIMStep` of stage "sample" after every step; raises to stop.

    Returns: uint8 `f h w c`, on the CPU.

    Raises:
        TavError: as `invert`.
    """
    unet, text = windowed(unet, preset), inversion_text(checkpoint, prompt, preset)
    noise, steps = noise.to(checkpoint.vae.device), preset.sampling_steps
    latents = ddim_sample(unet, noise, text, checkpoint.scheduler, steps, guidance_scale=1.0, callback=callback)
    return decode_video(checkpoint, latents)


def windowed(unet: VideoUNet | ControlledUNet, preset: Preset) -> VideoUNet | ControlledUNet | WindowedUNet:
    """A U-Net that sees a clip as a preset says."""
    length = preset.tuning.context_length
    return unet if length is None else WindowedUNet(unet, ContextWindows(length, preset.context_overlap))


def find_subject(
    checkpoint: Checkpoint,
    unet: VideoUNet,
    source: Source,
    contrasts: Sequence[str],
    preset: Preset,
    softness: int = SOFTNESS,
    word: str = "",
    callback: Callback = ignored,
) -> Tensor:
    """Mask of the clip's subject, 0 ... 1, `1 1 f h w` of pixels (see `subject_mask`, `word_mask` and `outlined`).

    Args:
        unet: tuned on the clip.
        source: from `prepare`.
        contrasts: the clip's sentence with other subjects: for "a red ball on the grass", "a blue star on the grass".
            Best three, each of another colour and shape.
        preset: its seed, and the windows that the clip is seen in.
        softness: width of the mask's edge in pixels, 0 ... 512; 0 for a hard one.
        word: that names the subject in the clip's sentence; with contrasts, what either of them finds.
        callback: gets a `Step` of stage "subject" after every prediction; raises to stop.

    Raises:
        TavError: a contrast that is empty or the sentence itself, a word that isn't in it, or neither.
    """
    check_contrasts(source.prompt, contrasts)
    if not contrasts and not word:
        raise TavError("contrast", None, "is missing", f"give it, or {field('word')}")
    take, scheduler, found = source.take, checkpoint.scheduler, []
    done, total = itertools.count(1), subject_steps(len(contrasts), bool(word))

    def tell(event: Step):
        callback(Step("subject", next(done), total))

    if word:
        places = places_of(checkpoint, source.prompt, word, preset)
        found.append(word_mask(unet, take.latents, take.condition, places, scheduler, callback=tell))
    if contrasts:
        others = torch.cat([encode_prompt(checkpoint, contrast) for contrast in contrasts])
        seen, seed = windowed(unet, preset), preset.tuning.seed
        found.append(subject_mask(seen, take.latents, take.condition, others, scheduler, seed=seed, callback=tell))
    mask = torch.stack(found).amax(0)
    return softened(outlined(mask, source.frames), softness)


def drawn_subject(mask: Tensor, frames: Tensor, softness: int) -> Tensor:
    """A mask `f h w` of a clip (see `as_mask`) as `find_subject` gives it, `1 1 f h w`.

    Raises:
        TavError: another size or length than the clip's, another scale than 0 ... 1, or one that shows nothing.
    """
    mask = as_mask(mask, as_frames(frames))
    if mask.max() == 0:
        raise TavError("mask", None, "is black", "make it white where the subject is")
    return softened(mask[None, None], softness)


def places_of(checkpoint: Checkpoint, prompt: str, word: str, preset: Preset) -> list[int]:
    """Where a word stands among the tokens of a sentence.

    Raises:
        TavError: nowhere; or a clip that is seen in windows, as a word is looked for in all of it at once.
    """
    if preset.tuning.context_length is not None:
        problem = f"is looked for in the whole clip at once, {field('context_length')} shows parts of it"
        raise TavError("word", word, problem, f"use {field('contrast')}")
    sentence, named = (tokens_of(checkpoint.tokenizer, text, checkpoint.prompt_weights)[0] for text in (prompt, word))
    return word_places(sentence, named[1:-1], word)


def check_contrasts(prompt: str, contrasts: Sequence[str]):
    """Raises a TavError for a contrast that is empty or the sentence itself."""
    for contrast in contrasts:
        check_text("contrast", contrast)
        if not contrast.strip() or contrast == prompt:
            remedy = f"change the subject's words in {prompt!r}"
            raise TavError("contrast", contrast, "says nothing of another subject", remedy)


def inversion_text(checkpoint: Checkpoint, prompt: str, preset: Preset) -> Tensor:
    """The embedding of what a clip of that sentence is inverted with."""
    return encode_prompt(checkpoint, prompt if preset.caption_as_negative else "")
