"""Sampling edits: clips of other sentences, from the noise that a clip was inverted to (Tune-A-Video, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint, decode_video, encode_prompt
from .condition import Condition, joined
from .control import ControlledUNet, Controls, each_of
from .ddim import Schedule, ddim_sample
from .errors import TavError
from .events import Callback, ignored
from .frames import as_frames
from .inflation import VideoUNet
from .injection import FOUND, ROOM, EditPlaces, SourceWalk
from .pipeline import check_edit, check_text, inversion_text, windowed
from .presets import Preset, with_settings
from .sentences import along, check_sentence, keyframes
from .subject import SOFTNESS, grown, outlined, pooled, put_back, softened, subject_mask
from .windows import WindowedUNet


@dataclass(frozen=True)
class Edit:
    """An edited sentence, what of the clip it may change (see `EditPlaces.of`), and settings of its own.

    Attributes:
        guidance_scale, attention_injection: instead of those of the preset.
        seed: of the fresh noise that an eta asks for, instead of that of the tuning.
    """

    prompt: str
    region: str = "everything"
    guidance_scale: float | None = None
    attention_injection: float | None = None
    seed: int | None = None

    def preset_of(self, preset: Preset) -> Preset:
        """The preset with its own settings."""
        own = dict(guidance_scale=self.guidance_scale, attention_injection=self.attention_injection)
        return with_settings(preset, **own)


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
    contrasts: Sequence[str] = (),
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
        contrasts: those that the subject was found by (see `find_subject`): with them what is drawn in its place is
            found as well, and the clip put back around both; and a new shape has more room around the old one.
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
                            negative_prompt=negative_prompt, subject=subject, contrasts=contrasts,
                            source_frames=source_frames,
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
    contrasts: Sequence[str] = (),
    source_frames: Tensor | None = None,
    class_labels: Tensor | None = None,
    negative_class_labels: Tensor | None = None,
    source_class_labels: Tensor | None = None,
    control: Controls = None,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback = ignored,
) -> list[Tensor]:
    """Edits of one clip, drawn together, each as `sample` draws it, to rounding: uint8 `f h w c`, in their order. (By
    rounding a pixel at the edge of a new subject that is found may also fall to its other side.)

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
    finder = _Finder(checkpoint, windowed(unet, preset), contrasts, preset.tuning.seed, class_labels, callback)
    walk = source = None
    negative = _along(checkpoint, negative_prompt, frames)
    if source_prompt is not None:
        negative = torch.lerp(negative, encode_prompt(checkpoint, source_prompt), preset.caption_as_negative)
        mask = None if subject is None else pooled(subject, checkpoint.downscale).to(unet.device)
        places = None if mask is None else _places_of(edits, mask, preset, finder)
        walk = SourceWalk(own[0].attention_injection, places, count)
        labels = class_labels if source_class_labels is None else source_class_labels
        source = Condition(inversion_text(checkpoint, source_prompt, preset), labels)
    latents = ddim_sample(
        windowed(ControlledUNet(unet, [each.model for each in controls]) if controls else unet, preset),
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
    return [_finished(edit, x, subject, source_frames, finder) for edit, x in zip(edits, latents.split(1))]


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


@dataclass(frozen=True)
class _Finder:
    """Finds what edits draw in the subject's place, as the subject of a clip is found: by sentences about others."""

    checkpoint: Checkpoint
    unet: VideoUNet | WindowedUNet
    contrasts: Sequence[str]
    seed: int
    class_labels: Tensor | None
    callback: Callback

    def others(self, edit: Edit) -> list[str]:
        """The contrasts that it can be found by."""
        return [other for other in self.contrasts if other != edit.prompt] if edit.region in FOUND else []

    def room(self, edit: Edit) -> float:
        """What a new shape has around the old one, as a share of its size."""
        return ROOM if self.others(edit) else 0.0

    def __call__(self, edit: Edit, latents: Tensor, video: Tensor, room: Tensor) -> Tensor:
        """Where it is, `1 1 f h w` of pixels, 0 or 1.

        Args:
            latents, video: of the edit, `1 c f h w` and uint8 `f h w c`.
            room: of latents, in which it is looked for, `1 1 f h w`.
        """
        checkpoint = self.checkpoint
        told = Condition(_along(checkpoint, edit.prompt, len(video)), self.class_labels)
        others = torch.cat([encode_prompt(checkpoint, other) for other in self.others(edit)])
        mask = subject_mask(
            self.unet, latents, told, others, checkpoint.scheduler, seed=self.seed, callback=self.callback
        )
        return outlined(mask * room, video)


def _places_of(edits: Sequence[Edit], mask: Tensor, preset: Preset, finder: _Finder) -> EditPlaces:
    """Where each edit may change the clip and is led, by the subject's mask of latents, `1 1 f h w`."""
    return EditPlaces.together(
        [EditPlaces.of(each.region, mask, 1, preset.steady, finder.room(each)) for each in edits]
    )


def _batch(of_each: Sequence[Condition], frames: int) -> Condition:
    """Those of several edits, one after the other."""
    return joined({f"edit {number}": (told, 1) for number, told in enumerate(of_each, 1)}, frames)


def _finished(
    edit: Edit, latents: Tensor, subject: Tensor | None, source_frames: Tensor | None, finder: _Finder
) -> Tensor:
    """The video of an edit, with the clip's own pixels outside of its region, and of what is drawn there."""
    video, scale = decode_video(finder.checkpoint, latents), finder.checkpoint.downscale
    if edit.region == "everything":
        return video
    region = EditPlaces.of(edit.region, subject, scale, room=finder.room(edit)).changeable.cpu()
    if finder.others(edit):
        found = finder(edit, latents, video, (pooled(region, scale) > 0).float())
        either = torch.maximum(found, (subject.cpu() > 0).float())
        region = region * softened(grown(either, scale // 4), SOFTNESS)
    return put_back(video, source_frames, region)


def _along(checkpoint: Checkpoint, prompt: str, frames: int) -> Tensor:
    """The embedding of a sentence, `1 n d`, or of one after the other along the frames, `f n d`."""
    if (told := keyframes(prompt)) is None:
        return encode_prompt(checkpoint, prompt)
    return along({frame: encode_prompt(checkpoint, sentence) for frame, sentence in told.items()}, frames)
