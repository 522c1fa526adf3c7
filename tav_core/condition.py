"""What a U-Net is told of a clip: the embedding of its sentence and, where it has classes, labels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Union

import torch
from torch import Tensor

from .errors import TavError
from .frames import told_numbers


class VideoModel(Protocol):
    """What inversion and sampling ask for: a `VideoUNet`, one seen in windows, or anything that is called alike.

    Beside a `SourceWalk` it has a `frame_context` as well.
    """

    dtype: torch.dtype

    def __call__(
        self, latents: Tensor, timesteps: Tensor | int, encoder_hidden_states: Tensor, **settings: Tensor
    ) -> Tensor:
        """`b c f h w` to the same; `settings` may be class_labels, under attention injection an anchor, and beside a
        ControlNet its hints and strengths.
        """


@dataclass(frozen=True)
class Condition:
    """What the videos of a batch are conditioned on.

    Attributes:
        encoder_hidden_states: embedding of the sentence, for all `1 n d`, per video `b n d` or per frame `(b f) n d`.
        class_labels: for a U-Net that has classes, `1`, `b` or `(b f)` likewise.
    """

    encoder_hidden_states: Tensor
    class_labels: Tensor | None = None

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.encoder_hidden_states.shape))
        labels = "" if self.class_labels is None else ", with class labels"
        return f"Condition(text {shape}, {told_numbers([self.encoder_hidden_states])}{labels})"

    @classmethod
    def of(cls, given: Union[Tensor, "Condition"]) -> "Condition":
        """A condition as it is, or that of a text alone."""
        return given if isinstance(given, Condition) else cls(given)

    def or_labels_of(self, other: "Condition") -> "Condition":
        """With the labels of another one, where it has none."""
        return self if self.class_labels is not None else Condition(self.encoder_hidden_states, other.class_labels)

    def to(self, device: torch.device) -> "Condition":
        """On that device in float32, but for labels that are integers."""
        moved = (None if x is None else x.to(device) for x in vars(self).values())
        return Condition(*(x.float() if x is not None and x.is_floating_point() else x for x in moved))

    def at(self, b: int, f: int, frames: Tensor) -> "Condition":
        """That of those frames of every one of `b` videos of `f` frames."""
        return Condition(**{name: at_frames(name, value, b, f, frames) for name, value in vars(self).items()})

    @property
    def keywords(self) -> dict[str, Tensor]:
        """Arguments of a U-Net's forward beside the text: most U-Nets take no labels, and then there are none."""
        return {} if self.class_labels is None else {"class_labels": self.class_labels}


def joined(conditions: Mapping[str, tuple[Condition, int]], f: int) -> Condition:
    """One after the other, each for so many videos of `f` frames, as a batch of all of them; names are for errors.

    Raises:
        TavError: texts of several encoders, or a batch that fits neither videos nor frames.
    """
    texts = {name: per_frame(name, told.encoder_hidden_states, b, f) for name, (told, b) in conditions.items()}
    texts = of_one_length(texts)
    labels = {name: per_frame("class_labels", told.class_labels, b, f) for name, (told, b) in conditions.items()}
    if lost := [name for name, of in labels.items() if of is None]:
        if len(lost) < len(labels):
            raise TavError("class_labels", None, f"are missing beside {lost[0]}", "give them to all, or to none")
        return Condition(torch.cat(list(texts.values())))
    return Condition(torch.cat(list(texts.values())), torch.cat(list(labels.values())))


def of_one_length(texts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Texts `b n d`, each repeated until all have as many tokens, as ComfyUI's samplers do; names are for errors.

    Attention over a text several times over is, to rounding, that over it once: so a sentence of one chunk of 77 tokens
    stands beside one of two.

    Raises:
        TavError: texts of several widths.
    """
    if len({text.shape[2] for text in texts.values()}) > 1:
        widths = ", ".join(f"{name} {text.shape[2]}" for name, text in texts.items())
        problem = f"differs from the other texts in its width ({widths})"
        raise TavError(next(iter(texts)), None, problem, "use one text encoder for all")
    length = math.lcm(*(text.shape[1] for text in texts.values()))
    return {name: text.repeat(1, length // text.shape[1], 1) for name, text in texts.items()}


def predict(
    unet: VideoModel, latents: Tensor, timesteps: Tensor | int, condition: Condition, **settings: Tensor
) -> Tensor:
    """What a U-Net says of latents `b c f h w`, computed in its `dtype`: float32 `b c f h w`.

    The text may be on another device: while a U-Net is tuned, the text encoder waits on the CPU.
    """
    text = condition.encoder_hidden_states.to(latents.device, unet.dtype)
    return unet(latents.to(unet.dtype), timesteps, text, **condition.keywords, **settings).float()


def per_frame(name: str, value: Any, b: int, f: int) -> Any:
    """Repeat tensors that come once for all (`1 ...`) or per video (`b ...`) to one per frame (`(b f) ...`).

    Dictionaries, lists and tuples are walked (and copied: diffusers pops from the lists it is given).

    Raises:
        TavError: a batch that fits neither the videos nor their frames.
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
    wanted = f"give 1, {b} (one per video) or {b * f} (one per frame)"
    raise TavError(name, None, f"has a batch of {len(value)} for {b} videos of {f} frames", wanted)


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
