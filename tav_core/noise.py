"""The noise file: what DDIM inversion found and how, and the pace of the clip, as one safetensors file."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_path
from .errors import TavError
from .presets import Preset
from .sound import RATES, Sound
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
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise TavError("noise", path, "is not a file of `invert`", "make one with tune-a-video invert")
            noise = file.get_tensor("latents")
            subject = file.get_tensor("subject") if "subject" in file.keys() else None
    except (OSError, SafetensorError) as error:
        raise TavError("noise", path, f"can't be read ({error})", "make one with tune-a-video invert") from error
    steps, inverted_with = int(metadata["steps"]), metadata.get("inverted_with", "empty prompt")
    if steps != preset.sampling_steps:
        problem = f"is not the {steps} that {path} was inverted with"
        raise TavError("sampling_steps", preset.sampling_steps, problem, f"give {steps}")
    if (inverted_with == "caption") != (preset.caption_as_negative > 0):
        remedy = "a value above 0" if inverted_with == "caption" else "0"
        problem = f"doesn't fit {path}, which was inverted with the {inverted_with}"
        raise TavError("caption_as_negative", preset.caption_as_negative, problem, f"give it {remedy}, or invert again")
    return noise, subject, metadata["prompt"]


def read_pace(path: Path) -> tuple[float | None, Sound | None]:
    """The rate and the sound of the clip that was inverted to the noise of a file, where it has them.

    Raises:
        TavError: a file that can't be read, or that says nonsense.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            fps = float(metadata["fps"]) if "fps" in metadata else None
            if fps is not None and not SLOWEST <= fps <= FASTEST:
                raise ValueError(f"{metadata['fps']} frames a second")
            if "sound_rate" not in metadata or "sound" not in file.keys():
                return fps, None
            samples, rate = file.get_tensor("sound"), int(metadata["sound_rate"])
            if samples.ndim != 2 or samples.dtype != torch.int16 or len(samples) not in (1, 2) or rate not in RATES:
                raise ValueError("its sound is none")
            return fps, Sound(samples.float() / 32767, rate)
    except (OSError, SafetensorError, ValueError) as error:
        raise TavError("noise", path, f"can't be read ({error})", "make one with tune-a-video invert") from error
