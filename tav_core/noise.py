"""The noise file: what DDIM inversion found and how, and the pace of the clip, as one safetensors file."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_path
from .errors import TavError
from .limits import LIMITS
from .presets import Preset
from .sound import RATES, Sound
from .stored import Damaged, check_finite, reading
from .timeline import FASTEST, SLOWEST

FORMAT = "tune-a-video-noise-1"


def save_noise(
    path: Path,
    noise: Tensor,
    subject: Tensor | None,
    prompt: str,
    preset: Preset,
    fps: float | None = None,
    sound: Sound | None = None,
):
    """Writes what was inverted, and the rate and the sound of the clip, for what is sampled from it."""
    metadata = {"format": FORMAT, "prompt": prompt, "steps": str(preset.sampling_steps),
                "inverted_with": "caption" if preset.caption_as_negative else "empty prompt"}  # fmt: skip
    metadata |= ({} if fps is None else {"fps": repr(fps)}) | ({} if sound is None else {"sound_rate": str(sound.rate)})
    with atomic_path(path) as temporary:
        tensors = {"latents": noise.cpu().contiguous()} | ({} if subject is None else {"subject": subject})
        if sound is not None:
            tensors["sound"] = (sound.samples.clamp(-1, 1) * 32767).round().short().contiguous()
        save_file(tensors, temporary, metadata)


def read_noise(path: Path, preset: Preset) -> tuple[Tensor, Tensor | None, str]:
    """Inverted noise `1 c f h w`, the subject's mask `1 1 f h w` of pixels if one was found, and the clip's sentence.

    Raises:
        TavError: a file that isn't noise, or noise that was inverted in another way than `preset` samples.
    """
    with _reading(path) as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        noise, subject = tensors["latents"], tensors.get("subject")
        prompt, steps = metadata["prompt"], int(metadata["steps"])
        inverted_with = metadata.get("inverted_with", "empty prompt")
        _check(noise, subject, prompt, steps, inverted_with)
    if steps != preset.sampling_steps:
        problem = f"is not the {steps} that {path} was inverted with"
        raise TavError("sampling_steps", preset.sampling_steps, problem, f"give {steps}")
    if (inverted_with == "caption") != (preset.caption_as_negative > 0):
        remedy = "a value above 0" if inverted_with == "caption" else "0"
        problem = f"doesn't fit {path}, which was inverted with the {inverted_with}"
        raise TavError("caption_as_negative", preset.caption_as_negative, problem, f"give it {remedy}, or invert again")
    return noise, subject, prompt


def read_pace(path: Path) -> tuple[float | None, Sound | None]:
    """The rate and the sound of the clip that was inverted to the noise of a file, where it has them.

    Raises:
        TavError: a file that isn't noise, or that says nonsense.
    """
    with _reading(path) as file:
        metadata = file.metadata()
        fps = float(metadata["fps"]) if "fps" in metadata else None
        if fps is not None and not SLOWEST <= fps <= FASTEST:
            raise Damaged(f"it has {metadata['fps']} frames a second")
        if "sound_rate" not in metadata or "sound" not in file.keys():
            return fps, None
        samples, rate = file.get_tensor("sound"), int(metadata["sound_rate"])
        if samples.ndim != 2 or samples.dtype != torch.int16 or len(samples) not in (1, 2) or rate not in RATES:
            raise Damaged("its sound is none")
        return fps, Sound(samples.float() / 32767, rate)


def _reading(path: Path) -> AbstractContextManager[Any]:
    return reading(path, "noise", FORMAT, "inverted noise", "make one with tune-a-video invert")


def _check(noise: Tensor, subject: Tensor | None, prompt: str, steps: int, inverted_with: str):
    """Raises `Damaged` for what `save_noise` would not have written."""
    check_finite({"latents": noise} | ({} if subject is None else {"subject": subject}))
    if noise.ndim != 5 or len(noise) != 1 or 0 in noise.shape:
        raise Damaged(f"latents have shape {tuple(noise.shape)}")
    if subject is not None:
        (_, _, f, h, w), shape = noise.shape, tuple(subject.shape)
        if len(shape) != 5 or shape[:3] != (1, 1, f) or shape[3] * w != shape[4] * h or shape[3] % h:
            raise Damaged(f"subject has shape {shape}, latents {tuple(noise.shape)}")
        if subject.min() < 0 or subject.max() > 1:
            raise Damaged("subject is not from 0 to 1")
    if not prompt.strip() or steps not in LIMITS["sampling_steps"] or inverted_with not in ("caption", "empty prompt"):
        raise Damaged(f"it was inverted with {prompt!r} in {steps} steps with the {inverted_with}")
