"""Tune-A-Video from end to end: a clip and its sentence in, edited clips out.

The stages in their order:

    source = prepare(checkpoint, frames, prompt)          # latents and text embedding, computed once
    unet, result = tune_on(checkpoint, [source], preset)  # one-shot tuning
    noise = invert(checkpoint, unet, source, preset)      # DDIM inversion
    subject = find_subject(checkpoint, unet, source, contrasts, preset)  # optional
    video = sample(checkpoint, unet, noise, "an edited prompt", preset, source_prompt=prompt, subject=subject)
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
from .condition import Condition, joined
from .control import ControlledUNet, Controls, each_of
from .ddim import Schedule, ddim_invert, ddim_sample
from .errors import TavError, field, shortened
from .events import Callback, Step, ignored
from .frames import Frames, as_frames, as_mask, told
from .inflation import VideoUNet, inflate
from .injection import EditPlaces, SourceWalk
from .memory import offloaded
from .presets import Edit, Preset
from .sentences import along, check_sentence, keyframes, tokens_of
from .subject import SOFTNESS, outlined, pooled, put_back, softened, subject_mask, subject_steps, word_mask, word_places
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
    if not isinstance(checkpoint.unet, VideoUNet):
        return nn.Module.to(inflate(checkpoint.unet, **options), checkpoint.vae.device)
    if options != checkpoint.unet.inflation:
        problem = f"is a Tune-A-Video model, inflated with {checkpoint.unet.inflation}, not with {options}"
        names = f"{field('attention')}, {field('temporal_causal')} and {field('norm')}"
        raise TavError("checkpoint", checkpoint.name, problem, f"leave {names} as they are by default")
    unet = copy.deepcopy(checkpoint.unet)
    for parameter in trainable_parameters(unet).values():
        parameter.requires_grad_(True)
    return nn.Module.to(unet, checkpoint.vae.device)


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
    condition = Condition(_inversion_text(checkpoint, source.prompt, preset), source.take.condition.class_labels)
    unet, latents, steps = _windowed(unet, preset), source.take.latents, preset.sampling_steps
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
    unet, text = _windowed(unet, preset), _inversion_text(checkpoint, prompt, preset)
    noise, steps = noise.to(checkpoint.vae.device), preset.sampling_steps
    latents = ddim_sample(unet, noise, text, checkpoint.scheduler, steps, guidance_scale=1.0, callback=callback)
    return decode_video(checkpoint, latents)


def _windowed(unet: VideoUNet | ControlledUNet, preset: Preset) -> VideoUNet | ControlledUNet | WindowedUNet:
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
        seen, seed = _windowed(unet, preset), preset.tuning.seed
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
    source_frames: Tensor | None = None,
    class_labels: Tensor | None = None,
    negative_class_labels: Tensor | None = None,
    source_class_labels: Tensor | None = None,
    control: Controls = None,
    generator: torch.Generator | None = None,
    callback: Callback = ignored,
) -> Tensor:
    """The clip of `prompt` from `noise`, uint8 `f h w c`.

    Args:
        prompt: a sentence, or several with the frames that they begin at, "0: a red ball | 4: a blue ball": between
            them the embedding changes evenly, the last one stays. So may `negative_prompt` be.
        source_prompt: the sentence of the clip that was inverted to `noise`; None for random noise, which has no clip
            to take attention or a caption from.
        subject: mask of the clip's subject, `1 1 f h w` of pixels (see `find_subject`): attention injection keeps it in
            its place.
        region: what the edit may change: "everything"; with `subject` and `source_prompt` also the "subject", its
            "shape" (another one takes its place) or the "background".
        source_frames: the clip, uint8 `f h w c`, whose own pixels are put back outside of the region; without it what
            the noise reconstructs of them.
        class_labels: of the edit, `1` or `f`, for a U-Net with classes; those beside the negative prompt (the label for
            no class if the U-Net has one) and those that the source was inverted with are the same by default.
        control: a ControlNet with its hints, for the edit alone, or several, which add up.
        generator: of the fresh noise that the `eta` of the preset asks for; by default torch's own.

    Raises:
        TavError: an empty prompt, frames that the clip hasn't, hints that don't fit it, settings out of range (see
            `ddim_sample`), or a region without subject.
    """
    (video,) = sample_edits(checkpoint, unet, noise, [Edit(prompt, region)], preset, source_prompt=source_prompt,
                            negative_prompt=negative_prompt, subject=subject, source_frames=source_frames,
                            class_labels=class_labels, negative_class_labels=negative_class_labels,
                            source_class_labels=source_class_labels, control=control,
                            generators=None if generator is None else [generator], callback=callback)  # fmt: skip
    return video


def sample_edits(
    checkpoint: Checkpoint,
    unet: VideoUNet,
    noise: Tensor,
    edits: Sequence[Edit],
    preset: Preset,
    *,
    source_prompt: str | None = None,
    negative_prompt: str = "",
    subject: Tensor | None = None,
    source_frames: Tensor | None = None,
    class_labels: Tensor | None = None,
    negative_class_labels: Tensor | None = None,
    source_class_labels: Tensor | None = None,
    control: Controls = None,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback = ignored,
) -> list[Tensor]:
    """Edits of one clip, drawn together, each as `sample` draws it, to rounding: uint8 `f h w c`, in their order.

    Where the clip walks back beside an edit (under attention injection, or to hold what stays), it does so once beside
    all: E guided edits are batches of 1 + 2 E videos, not E batches of 3. They take as much more memory.

    Args:
        edits: sentences, regions and settings of their own, but for their seeds, in whose place there are `generators`.
        source_prompt, ..., control: as in `sample`, for all of them.
        generators: of the fresh noise of each; by default torch's own.
        callback: gets a `DDIMStep` of stage "sample", with a video for each edit, after every step; raises to stop.

    Raises:
        TavError: edits that differ in their attention_injection, and what `sample` raises.
    """
    frames, count, own = noise.shape[2], len(edits), [edit.preset_of(preset) for edit in edits]
    _check_together(own)
    _check_sampled(checkpoint, edits, negative_prompt, frames, subject is not None and source_prompt is not None)
    source_frames = None if source_frames is None else as_frames(source_frames, "source_frames")
    for each in (controls := each_of(control)):
        each.check(unet, frames, *(checkpoint.downscale * side for side in noise.shape[3:]))
    walk = source = None
    negative = _along(checkpoint, negative_prompt, frames)
    if source_prompt is not None:
        negative = torch.lerp(negative, encode_prompt(checkpoint, source_prompt), preset.caption_as_negative)
        walk = SourceWalk(own[0].attention_injection, _places_of(checkpoint, unet, edits, subject, preset), count)
        labels = class_labels if source_class_labels is None else source_class_labels
        source = Condition(_inversion_text(checkpoint, source_prompt, preset), labels)
    latents = ddim_sample(
        _windowed(ControlledUNet(unet, [each.model for each in controls]) if controls else unet, preset),
        noise.to(unet.device).repeat(count, 1, 1, 1, 1),
        _batch([Condition(_along(checkpoint, edit.prompt, frames), class_labels) for edit in edits], frames),
        checkpoint.scheduler,
        preset.sampling_steps,
        guidance_scale=[each.guidance_scale for each in own],
        guidance_rescale=preset.guidance_rescale,
        guidance_start=preset.guidance_start,
        guidance_end=preset.guidance_end,
        negative_hidden_states=_batch([Condition(negative, negative_class_labels)] * count, frames),
        source_walk=walk,
        source_hidden_states=source,
        controls=controls,
        eta=preset.eta,
        generator=None if generators is None else list(generators),
        callback=callback,
    )
    if source_frames is None and any(edit.region != "everything" for edit in edits):
        end = Schedule.of(checkpoint.scheduler, preset.sampling_steps).sigmas[-1]
        source_frames = decode_video(checkpoint, walk.latents(end))
    return [_finished(checkpoint, edit, x, subject, source_frames) for edit, x in zip(edits, latents.split(1))]


def _check_together(presets: Sequence[Preset]):
    """Raises a TavError for no edits, or those that the clip leads in several shares of the steps, by their presets."""
    if not presets:
        raise TavError("edit", None, "is missing", "give at least one")
    if len(shares := sorted({each.attention_injection for each in presets})) > 1:
        problem = f"differs among edits that are drawn together ({', '.join(f'{share:g}' for share in shares)})"
        raise TavError("attention_injection", None, problem, "draw them apart")


def _check_sampled(checkpoint: Checkpoint, edits: Sequence[Edit], negative_prompt: str, frames: int, of_region: bool):
    check_text("negative_prompt", negative_prompt)
    for edit in edits:
        check_edit(edit.prompt, edit.region, of_region)
        check_sentence(edit.prompt, frames, "edit", checkpoint.prompt_weights)
    check_sentence(negative_prompt, frames, "negative_prompt", checkpoint.prompt_weights)


def _places_of(
    checkpoint: Checkpoint, unet: VideoUNet, edits: Sequence[Edit], subject: Tensor | None, preset: Preset
) -> EditPlaces | None:
    """Where each edit may change the clip and is led, in latents."""
    if subject is None:
        return None
    mask = pooled(subject, checkpoint.downscale).to(unet.device)
    return EditPlaces.together([EditPlaces.of(each.region, mask, margin=1, steady=preset.steady) for each in edits])


def _batch(of_each: Sequence[Condition], frames: int) -> Condition:
    """Those of several edits, one after the other."""
    return joined({f"edit {number}": (told, 1) for number, told in enumerate(of_each, 1)}, frames)


def _finished(
    checkpoint: Checkpoint, edit: Edit, latents: Tensor, subject: Tensor | None, source_frames: Tensor | None
) -> Tensor:
    """The video of an edit, with the clip's own pixels outside of its region."""
    video = decode_video(checkpoint, latents)
    if edit.region == "everything":
        return video
    return put_back(video, source_frames, EditPlaces.of(edit.region, subject, margin=checkpoint.downscale).changeable)


def _along(checkpoint: Checkpoint, prompt: str, frames: int) -> Tensor:
    """The embedding of a sentence, `1 n d`, or of one after the other along the frames, `f n d`."""
    if (told := keyframes(prompt)) is None:
        return encode_prompt(checkpoint, prompt)
    return along({frame: encode_prompt(checkpoint, sentence) for frame, sentence in told.items()}, frames)


def _inversion_text(checkpoint: Checkpoint, prompt: str, preset: Preset) -> Tensor:
    return encode_prompt(checkpoint, prompt if preset.caption_as_negative else "")
