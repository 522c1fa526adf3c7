"""The noise file: what DDIM inversion found and how, and the pace of the clip, as one safetensors file."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_path
from .errors import TavError, shortened
from .frames import as_frames, told, told_latents
from .limits import LIMITS
from .presets import Preset
from .sound import RATES, Sound
from .stored import Damaged, check_finite, reading

FORMAT = "tune-a-video-noise-1"
CAPTION, EMPTY, OTHER = "caption", "empty prompt", "other words"  # that a clip was inverted with; the last in graphs
CONDITION = "condition."  # before the names of what a graph inverted with


@dataclass(frozen=True)
class InvertedNoise:
    """What DDIM inversion found of a clip, and what its edits need of the clip itself.

    Attributes:
        latents: the noise, `1 c f h w`.
        prompt: the clip's sentence.
        subject: mask of its subject, `1 1 f h w` of pixels, if one was looked for.
        frames: the clip, uint8 `f h w c`: its own pixels stay where an edit may change nothing.
        fps, sound: its rate and its sound.
        weights: fingerprint of the tuned weights that it was inverted with (see `weights_fingerprint`).
        sigmas: the noise levels of a graph, which may be others than those of DDIM in as many steps, falling to 0.
        contrasts: the clip's sentence with other subjects, that the subject was found by.
        condition: what a graph inverted it with: "hidden_states", `1 n d` or `f n d`, and what else belongs to it.
    """

    latents: Tensor
    prompt: str
    subject: Tensor | None = None
    frames: Tensor | None = None
    fps: float | None = None
    sound: Sound | None = None
    weights: str | None = None
    sigmas: Tensor | None = None
    condition: dict[str, Tensor] = field(default_factory=dict)
    contrasts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        parts = [told_latents(self.latents), repr(shortened(self.prompt, 60))]
        parts += ["its subject"] * (self.subject is not None)
        parts += [] if self.frames is None else [f"the clip ({told(self.frames)})"]
        parts += [] if self.fps is None else [f"{self.fps:.4g} fps"]
        parts += [] if self.sound is None else [repr(self.sound)]
        return f"InvertedNoise({', '.join(parts)})"


def save_noise(path: Path, noise: InvertedNoise, preset: Preset):
    """Writes it, whole or not at all, and how `preset` inverted it: in so many steps, with which sentence.

    Args:
        path: a .safetensors file; one that is there is replaced.

    Raises:
        TavError: frames that are none (see `as_frames`), or a file that can't be written.
    """
    write_noise(path, noise, preset.sampling_steps, CAPTION if preset.caption_as_negative else EMPTY)


def write_noise(path: Path, noise: InvertedNoise, steps: int, inverted_with: str):
    """Writes it as `save_noise` does, and how it was inverted: in how many steps, and with what."""
    metadata = {"format": FORMAT, "prompt": noise.prompt, "steps": str(steps), "inverted_with": inverted_with}
    frames = None if noise.frames is None else as_frames(noise.frames)
    tensors = {"latents": noise.latents, "subject": noise.subject, "frames": frames, "sigmas": noise.sigmas}
    tensors |= {CONDITION + name: tensor for name, tensor in noise.condition.items()}
    if noise.contrasts:
        metadata["contrasts"] = json.dumps(noise.contrasts)
    if noise.weights is not None:
        metadata["weights"] = noise.weights
    if noise.fps is not None:
        metadata["fps"] = repr(noise.fps)
    if noise.sound is not None:
        metadata["sound_rate"] = str(noise.sound.rate)
        tensors["sound"] = (noise.sound.samples.clamp(-1, 1) * 32767).round().short()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_noise(path: Path, preset: Preset | None = None) -> InvertedNoise:
    """Reads it, with what the file has: earlier versions kept neither frames nor rate nor weights.

    Args:
        preset: how it will be sampled, if it shall be held against how it was inverted.

    Returns: on the CPU.

    Raises:
        TavError: a file that isn't noise, or noise that was inverted in another way than `preset` samples.
    """
    noise, steps, inverted_with = read_inversion(path)
    if preset is None:
        return noise
    if inverted_with == OTHER:
        problem = "was inverted in a graph, with other words than the clip's sentence"
        raise TavError("noise", path, problem, "sample it there, or invert it with that sentence or with none")
    if steps != preset.sampling_steps:
        problem = f"is not the {steps} that {path} was inverted with"
        raise TavError("sampling_steps", preset.sampling_steps, problem, f"give {steps}")
    if (inverted_with == CAPTION) != (preset.caption_as_negative > 0):
        remedy = "a value above 0" if inverted_with == CAPTION else "0"
        problem = f"doesn't fit {path}, which was inverted with the {inverted_with}"
        raise TavError("caption_as_negative", preset.caption_as_negative, problem, f"give it {remedy}, or invert again")
    return noise


def read_inversion(path: Path) -> tuple[InvertedNoise, int, str]:
    """The noise of a file, in how many steps it was inverted, and with what: one of `CAPTION`, `EMPTY` and `OTHER`.

    Raises:
        TavError: a file that isn't noise.
    """
    with reading(path, "noise", FORMAT, "inverted noise", "make one with tune-a-video invert") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        fps = float(metadata["fps"]) if "fps" in metadata else None
        sound = None
        if "sound_rate" in metadata and "sound" in tensors:
            sound = _sound(tensors["sound"], int(metadata["sound_rate"]))
        condition = {name.removeprefix(CONDITION): tensor for name, tensor in tensors.items()
                     if name.startswith(CONDITION)}  # fmt: skip
        noise = InvertedNoise(tensors["latents"], metadata["prompt"], tensors.get("subject"), tensors.get("frames"),
                              fps, sound, metadata.get("weights"), tensors.get("sigmas"), condition,
                              tuple(json.loads(metadata.get("contrasts", "[]"))))  # fmt: skip
        steps, inverted_with = int(metadata["steps"]), metadata.get("inverted_with", EMPTY)
        _check(noise, steps, inverted_with)
    return noise, steps, inverted_with


def _sound(samples: Tensor, rate: int) -> Sound:
    if samples.ndim != 2 or samples.dtype != torch.int16 or len(samples) not in (1, 2) or rate not in RATES:
        raise Damaged("its sound is none")
    return Sound(samples.float() / 32767, rate)


def _check(noise: InvertedNoise, steps: int, inverted_with: str):
    """Raises `Damaged` for what `save_noise` would not have written."""
    latents, subject, frames = noise.latents, noise.subject, noise.frames
    numbers = {"latents": latents, "subject": subject, "sigmas": noise.sigmas, **noise.condition}
    check_finite({name: tensor for name, tensor in numbers.items() if tensor is not None})
    if latents.ndim != 5 or len(latents) != 1 or 0 in latents.shape:
        raise Damaged(f"latents have shape {tuple(latents.shape)}")
    _, _, f, h, w = latents.shape
    if subject is not None:
        _check_size("subject", subject, subject.shape[3:], subject.shape[:3] == (1, 1, f), (h, w))
        if subject.min() < 0 or subject.max() > 1:
            raise Damaged("subject is not from 0 to 1")
    if frames is not None:
        kind = frames.ndim == 4 and len(frames) == f and frames.shape[3] == 3 and frames.dtype == torch.uint8
        _check_size("frames", frames, frames.shape[1:3], kind, (h, w))
    if noise.fps is not None and noise.fps not in LIMITS["fps"]:
        raise Damaged(f"it has {noise.fps} frames a second")
    if (
        not noise.prompt.strip()
        or steps not in LIMITS["sampling_steps"]
        or inverted_with not in (CAPTION, EMPTY, OTHER)
    ):
        raise Damaged(f"it was inverted with {noise.prompt!r} in {steps} steps with the {inverted_with}")
    if (sigmas := noise.sigmas) is not None and (
        sigmas.shape != (steps + 1,) or not (sigmas.diff() < 0).all() or sigmas[-1] != 0
    ):
        raise Damaged(f"it has {len(sigmas)} noise levels for {steps} steps, or they don't fall to 0")
    if not all(isinstance(contrast, str) and contrast.strip() for contrast in noise.contrasts):
        raise Damaged(f"its subject was found by {noise.contrasts}")
    hidden = noise.condition.get("hidden_states")
    if hidden is not None and (hidden.ndim != 3 or len(hidden) not in (1, f)):
        raise Damaged(f"it was inverted with what has shape {tuple(hidden.shape)}")


def _check_size(name: str, tensor: Tensor, size: tuple, kind: bool, latents: tuple[int, int]):
    """Raises `Damaged` for another kind of tensor, or for other sides than the latents' times one whole number."""
    (h, w) = latents
    if not kind or len(size) != 2 or size[0] * w != size[1] * h or size[0] % h:
        raise Damaged(f"{name} has shape {tuple(tensor.shape)}, latents {h} x {w}")
