"""Edits of a project: what each is drawn with, and drawing those that the project lacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import pipeline
from .checkpoint import Checkpoint
from .control import Controls, facts_of
from .embeddings import named_in
from .events import Callback, Note, ignored
from .inflation import VideoUNet
from .noise import InvertedNoise
from .presets import Preset, with_settings
from .project import Project, changeable, labels
from .tuning_state import hash_tensors


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


def draw(
    project: Project,
    edits: Sequence[Edit],
    checkpoint: Checkpoint,
    unet: VideoUNet,
    preset: Preset,
    noise: InvertedNoise,
    *,
    negative_prompt: str = "",
    seed: int | None = None,
    control: Controls = None,
    callback: Callback = ignored,
) -> list[dict[str, Any]]:
    """Draws the edits that a project lacks.

    Args:
        noise: what they begin from; they play at its rate, with its sound.
        seed: of noise that is random; None: it is that of a clip.
        control: one or several that lead all of them.

    Returns: what the project's summary tells of the edits, in their order.
    """
    found, of_clip = [], {}
    if seed is None:
        of_clip = dict(source_prompt=noise.prompt, subject=noise.subject, source_frames=noise.frames)
        if noise.frames is not None:  # figures are of these, not of what a codec has left of them
            project.videos["source.mp4"] = noise.frames
    for edit in edits:
        settings = settings_of(edit, checkpoint, preset, noise, negative_prompt, seed, control)
        if (known := project.find(settings)) is not None:
            callback(Note(f"{project.folder / known['file']} is there already"))
        else:
            callback(Note(f"{labels([*project.edits, settings])[-1]} ..."))
            video = project.timed("sample", pipeline.sample, checkpoint, unet, noise.latents, edit.prompt,
                                  edit.preset_of(preset), **of_clip, negative_prompt=negative_prompt,
                                  region=edit.region, control=control, generator=_fresh(settings["seed"], noise),
                                  callback=callback)  # fmt: skip
            known = project.add(settings, video, noise.sound, changeable(edit.region, noise))
        found.append(known)
    return found


def _fresh(seed: int | None, noise: InvertedNoise) -> torch.Generator | None:
    """What draws the fresh noise of an edit, behind noise of this shape: else that would come first a second time."""
    if seed is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    torch.randn(noise.latents.shape, generator=generator)
    return generator


def settings_of(
    edit: Edit,
    checkpoint: Checkpoint,
    preset: Preset,
    noise: InvertedNoise,
    negative_prompt: str,
    seed: int | None = None,
    control: Controls = None,
) -> dict[str, Any]:
    """All that decides on what an edit shows, but for the project that it is of: this makes it another edit.

    What an edit has no use for is None, as it is in summaries of earlier versions, which don't know it.
    """
    own, tuning = edit.preset_of(preset), preset.tuning
    windows, of_clip = tuning.context_length is not None, seed is None
    if of_clip and own.eta > 0:
        seed = tuning.seed if edit.seed is None else edit.seed
    return {
        "prompt": edit.prompt, "region": edit.region, "negative_prompt": negative_prompt, "seed": seed,
        "guidance_scale": own.guidance_scale, "sampling_steps": own.sampling_steps,
        "guidance_rescale": own.guidance_rescale or None, "guidance_start": own.guidance_start or None,
        "guidance_end": own.guidance_end if own.guidance_end < 1 else None,
        "attention_injection": own.attention_injection if of_clip else None,
        "caption_as_negative": own.caption_as_negative if of_clip else None,
        "subject": noise.subject is not None, "steady": own.steady if noise.subject is not None else None,
        "context_length": tuning.context_length, "context_overlap": own.context_overlap if windows else None,
        "dtype": tuning.dtype, "noise": hash_tensors([noise.latents.float()])[:12], "frames": noise.latents.shape[2],
        "fps": noise.fps, "sound": noise.sound is not None, "eta": own.eta or None,
        **reading_of(checkpoint, edit.prompt, negative_prompt), **facts_of(control),
    }  # fmt: skip


def reading_of(checkpoint: Checkpoint, *texts: str) -> dict[str, Any]:
    """What a checkpoint makes of sentences that it was not made with: None where it makes nothing of it."""
    weighted = checkpoint.prompt_weights and any("(" in text for text in texts)
    return {"lora": ", ".join(checkpoint.loras) or None, "embedding": ", ".join(named_in(checkpoint, *texts)) or None,
            "prompt_weights": weighted or None}  # fmt: skip
