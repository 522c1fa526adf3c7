"""Edits of a project: what each is drawn with, and drawing those that the project lacks."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import sampling
from .checkpoint import Checkpoint, encode_prompt
from .control import Controls, facts_of
from .embeddings import named_in
from .events import Callback, Note, ignored
from .inflation import VideoUNet
from .injection import FOUND
from .memory import MARGIN, free_memory, is_out_of_memory, release, sampling_memory
from .noise import InvertedNoise
from .presets import Preset
from .project import Project, changeable, labels
from .sampling import Edit
from .tuning_state import hash_tensors

AT_ONCE = 4  # edits at most, where nobody says how many: a quarter off, of the third that any number could take off


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
    told = [settings_of(edit, checkpoint, preset, noise, negative_prompt, seed, control) for edit in edits]
    of_clip: dict[str, Any] = {}
    if seed is None:
        of_clip = dict(source_prompt=noise.prompt, subject=noise.subject, contrasts=noise.contrasts,
                       source_frames=noise.frames)  # fmt: skip
        if noise.frames is not None:  # figures are of these, not of what a codec has left of them
            project.videos["source.mp4"] = noise.frames
    missing = _missing(project, edits, told, callback)
    subject_known = bool(of_clip) and noise.subject is not None
    most = 1 if seed is not None else preset.edits_at_once  # no clip walks beside what begins in random noise
    if most is None:
        wanted = groups([edit for edit, _ in missing], preset, subject_known)
        most = _that_fit(checkpoint, unet, noise, preset, wanted, callback)
    sample = partial(sampling.sample_edits, checkpoint, unet, noise.latents, preset=preset, **of_clip,
                     negative_prompt=negative_prompt, control=control, callback=callback)  # fmt: skip
    while missing:
        group, *_ = groups([edit for edit, _ in missing], preset, subject_known, most)
        settings = [own for _, own in missing[: len(group)]]
        for label in labels([*project.edits, *settings])[-len(group) :]:
            callback(Note(f"{label} ..."))
        generators = [_fresh(own["seed"], noise) for own in settings]
        videos = project.timed("sample", _unless_out_of_memory, sample, group, generators)
        if videos is None:
            release(unet.device)
            most = (len(group) + 1) // 2
            callback(Note(f"edits at once: {most} from here on, since {len(group)} ran out of memory", "edits_at_once"))
            continue
        for edit, own, video in zip(group, settings, videos):
            project.add(own, video, noise.sound, changeable(edit.region, noise))
        project.write()  # of all at once: who goes on after a kill draws the same ones together
        missing = missing[len(group) :]
    return [project.find(own) for own in told]


def _missing(
    project: Project, edits: Sequence[Edit], settings: Sequence[dict[str, Any]], callback: Callback
) -> list[tuple[Edit, dict[str, Any]]]:
    """The edits that a project lacks, each once, with what decides on them."""
    missing: list[tuple[Edit, dict[str, Any]]] = []
    for edit, own in zip(edits, settings):
        if (known := project.find(own)) is not None:
            callback(Note(f"{project.folder / known['file']} is there already"))
        elif all(own != other for _, other in missing):
            missing.append((edit, own))
    return missing


def groups(edits: Sequence[Edit], preset: Preset, subject_known: bool, most: int = AT_ONCE) -> list[list[Edit]]:
    """Edits of a clip as they are drawn together, in their order: neighbours that the clip leads in as many steps.

    One that it needn't walk beside is drawn alone, as nothing would be gained.

    Args:
        most: in a group.
    """

    def led(edit: Edit) -> float | None:
        share = edit.preset_of(preset).attention_injection
        return share if share > 0 or is_held(edit, preset, subject_known) else None

    found = []
    for share, neighbours in groupby(edits, led):
        alike, size = list(neighbours), 1 if share is None else most
        found += [alike[at : at + size] for at in range(0, len(alike), size)]
    return found


def is_held(edit: Edit, preset: Preset, subject_known: bool) -> bool:
    """Whether the clip walks beside an edit in all of the steps, as a part of it is held or stands still."""
    return subject_known and (edit.region != "everything" or preset.steady)


def _that_fit(
    checkpoint: Checkpoint,
    unet: VideoUNet,
    noise: InvertedNoise,
    preset: Preset,
    wanted: list[list[Edit]],
    callback: Callback,
) -> int:
    """How many edits there is memory for at once, of those in the largest group; one always."""
    count = largest = max(map(len, wanted), default=1)
    latents, text = noise.latents[:, :, : preset.tuning.context_length], encode_prompt(checkpoint, "")
    free, needed = free_memory(unet.device), 0.0
    while count > 1 and (wants := MARGIN * sampling_memory(unet, latents, text, count)) > free:
        count, needed = count - 1, wants
    if count < largest:
        told = f"since {count + 1} need about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        callback(Note(f"edits at once: {count}, {told}", "edits_at_once"))
    return count


def _unless_out_of_memory(
    sample: Callable[..., list[Tensor]], edits: list[Edit], generators: list[torch.Generator | None]
) -> list[Tensor] | None:
    """Edits, drawn together; None if there is not the memory for several."""
    try:
        return sample(edits, generators=None if None in generators else generators)
    except RuntimeError as error:
        if len(edits) == 1 or not is_out_of_memory(error):
            raise
    return None  # only here: the error's traceback held what takes the memory


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
    mask = None if noise.subject is None else hash_tensors([noise.subject.float()])[:12]
    if of_clip and own.eta > 0:
        seed = tuning.seed if edit.seed is None else edit.seed
    return {
        "prompt": edit.prompt, "region": edit.region, "negative_prompt": negative_prompt, "seed": seed,
        "guidance_scale": own.guidance_scale, "sampling_steps": own.sampling_steps,
        "guidance_rescale": own.guidance_rescale or None, "guidance_start": own.guidance_start or None,
        "guidance_end": own.guidance_end if own.guidance_end < 1 else None,
        "attention_injection": own.attention_injection if of_clip else None,
        "caption_as_negative": own.caption_as_negative if of_clip else None,
        "contrast": " | ".join(noise.contrasts) or None if edit.region in FOUND else None,
        "subject": noise.subject is not None, "mask": mask, "steady": own.steady if noise.subject is not None else None,
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
