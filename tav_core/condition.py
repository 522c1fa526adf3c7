"""What a U-Net is told of a clip: the embedding of its sentence and, where it has classes, labels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import TavError


def per_frame(name: str, value: Any, b: int, f: int) -> Any:
    """Repeat tensors that come once for all (`1 ...`) or per video (`b ...`) to one per frame (`(b f) ...`).

    Dictionaries, lists and tuples are walked (and copied: diffusers pops from the lists it is given).
    """
    if isinstance(value, dict):
        return {key: per_frame(f"{name}[{key!r}]", entry, b, f) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [per_frame(name, entry, b, f) for entry in value]
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == b * f:
        return value
    if len(value) == b:
        return value.repeat_interleave(f, dim=0)
    if len(value) == 1:
        return value.expand(b * f, *value.shape[1:])
    wanted = f"1, {b} (one per video) or {b * f} (one per frame)"
    raise TavError(name, None, f"has a batch of {len(value)} for {b} videos of {f} frames", f"give {wanted}")


def labelled(class_labels: Tensor | None) -> dict[str, Tensor]:
    """Keyword arguments of a U-Net's forward: most U-Nets take no labels, and then there are none."""
    return {} if class_labels is None else {"class_labels": class_labels}


def predict(
    unet: Callable, latents: Tensor, timesteps: Tensor | int, encoder_hidden_states: Tensor, **settings
) -> Tensor:
    """What a U-Net says of latents `b c f h w`, computed in its `dtype`: float32 `b c f h w`."""
    return unet(latents.to(unet.dtype), timesteps, encoder_hidden_states.to(unet.dtype), **settings).float()


def at_frames(name: str, value: Any, b: int, f: int, frames: Tensor) -> Any:
    """What belongs to those frames of every video, of a value for `b` videos of `f` frames (see `per_frame`)."""
    rows = (torch.arange(b)[:, None] * f + frames).flatten()

    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pick(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [pick(entry) for entry in value]
        return value[rows.to(value.device)] if isinstance(value, Tensor) and value.ndim else value

    return pick(per_frame(name, value, b, f))
