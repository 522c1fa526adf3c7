"""ControlNets (Zhang et al., arXiv 2302.05543): a hint picture for each frame leads an edit, beside its sentence."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ControlNetModel
from einops import rearrange
from torch import Tensor

from .attention import FrameContext
from .condition import per_frame
from .errors import TavError
from .errors import field as mentioned
from .inflation import VideoUNet
from .limits import check
from .tuned_weights import base_fingerprint
from .tuning_state import hash_tensors

Family = tuple[int, tuple[int, ...], tuple[int, ...]]  # width of the text, channels and resnets of the levels


@dataclass(frozen=True)
class Control:
    """A ControlNet, what it sees, and how much it says.

    Attributes:
        model: computes where it is and in its own dtype (see `load_controlnet`).
        hints: uint8 `f h w c` in the size of the clip, one for each frame, or one for all.
        strength: of what it adds to the U-Net, 0 ... 10.
        start, end: shares of the sampling steps, 0 ... 1, between which it acts, as in diffusers.

    Raises:
        TavError: hints of another shape, numbers out of range, an end that isn't behind the start.
    """

    model: ControlNetModel = field(repr=False)
    hints: Tensor = field(repr=False)
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        check(control_strength=self.strength, control_start=self.start, control_end=self.end)
        if self.start >= self.end:
            problem = f"is not behind {mentioned('control_start')}, {self.start:g}"
            raise TavError("control_end", self.end, problem, "give it a larger number")
        if self.hints.ndim != 4 or self.hints.shape[3] != 3 or self.hints.dtype != torch.uint8:
            problem = f"are {self.hints.dtype} of shape {tuple(self.hints.shape)}"
            raise TavError("hints", None, problem, "give uint8 f h w c with three colours")

    def check(self, unet: VideoUNet, frames: int, height: int, width: int):
        """Raises a TavError for hints of another clip, or a ControlNet of another family of checkpoints."""
        own, wanted = family(self.model.config), family(unet.config)
        if own != wanted:
            problem = f"is for another family of checkpoints ({told(own)}; the checkpoint: {told(wanted)})"
            raise TavError("controlnet", None, problem, "use one for the family of the checkpoint")
        count, *size, _ = self.hints.shape
        if count not in (1, frames):
            remedy = "give one picture for all frames, or one for each"
            raise TavError("hints", None, f"are {count}, and the clip has {frames} frames", remedy)
        if size != [height, width]:
            problem = f"are {size[1]} x {size[0]}, the clip is {width} x {height}"
            raise TavError("hints", None, problem, "give them in the size of the clip")

    def strength_at(self, step: int, steps: int) -> float:
        """At a step, from 0 on; 0 where it doesn't act."""
        return 0.0 if step / steps < self.start or (step + 1) / steps > self.end else self.strength

    @property
    def facts(self) -> tuple[Any, ...]:
        """What decides on an edit, in the order of `FACTS`."""
        return (base_fingerprint(self.model)[:12], hash_tensors([self.hints])[:12], self.strength, self.start, self.end)


Controls = Control | Sequence[Control] | None  # as callers give one, several, or none
FACTS = ("controlnet", "hints", "control_strength", "control_start", "control_end")


def each_of(control: Controls) -> Sequence[Control]:
    return [control] if isinstance(control, Control) else control or ()


def facts_of(control: Controls) -> dict[str, Any]:
    """What of ControlNets decides on an edit: a value for one, a list for several, None for none."""
    values = list(zip(*(each.facts for each in each_of(control)))) or [(None,)] * len(FACTS)
    return {name: of[0] if len(of) == 1 else list(of) for name, of in zip(FACTS, values, strict=True)}


def hints_at(
    controls: Sequence[Control], step: int, steps: int, videos: int, sources: int, frames: int
) -> dict[str, Tensor]:
    """What a `ControlledUNet` is given at a step, from 0 on, for a batch of videos whose first are sources."""
    strengths = torch.tensor([control.strength_at(step, steps) for control in controls])
    if not strengths.any():
        return {}
    strengths = strengths.repeat(videos, frames, 1)
    strengths[:sources] = 0  # the clip itself is led by no hint
    hints = torch.stack([control.hints.expand(frames, -1, -1, -1) for control in controls], 1)  # f n h w c
    return {"hints": hints.repeat(videos, 1, 1, 1, 1), "strengths": strengths.flatten(0, 1)}


@dataclass(frozen=True)
class ControlledUNet:
    """A video U-Net with ControlNets beside it, which see each frame alone; what they say adds up."""

    unet: VideoUNet
    models: Sequence[ControlNetModel]

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def frame_context(self) -> FrameContext:
        return self.unet.frame_context

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor | int,
        text: Tensor,
        hints: Tensor | None = None,
        strengths: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """`VideoUNet.forward` with what the ControlNets add.

        Args:
            hints: uint8 `(b f) n h w c`, of the n ControlNets; None: the U-Net alone.
            strengths: `(b f) n`; a frame of strength 0 isn't shown to that ControlNet.
        """
        if hints is None or not strengths.any():
            return self.unet(latents, timesteps, text, **kwargs)
        b, _, f, _, _ = latents.shape
        t = torch.as_tensor(timesteps, device=latents.device).reshape(-1).expand(b).repeat_interleave(f)
        seen = (rearrange(latents, "b c f h w -> (b f) c h w"), t, per_frame("encoder_hidden_states", text, b, f))
        of_each = [_residuals(model, seen, hints[:, at], strengths[:, at]) for at, model in enumerate(self.models)
                   if strengths[:, at].any()]  # fmt: skip
        *down, middle = (functools.reduce(torch.add, parts) for parts in zip(*of_each, strict=True))
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
        return self.unet(latents, timesteps, text, **residuals, **kwargs)


def _residuals(
    model: ControlNetModel, seen: tuple[Tensor, Tensor, Tensor], hints: Tensor, strengths: Tensor
) -> list[Tensor]:
    """What a ControlNet adds to the down blocks and, last, to the middle: nothing for frames that it doesn't lead.

    Args:
        seen: latents `(b f) c h w`, timesteps `(b f)` and text `(b f) n d`.
        hints: uint8 `(b f) h w c`.
        strengths: `(b f)`.
    """
    latents, led = seen[0], (strengths != 0).to(seen[0].device)
    pictures = rearrange(hints.to(latents.device)[led], "f h w c -> f c h w").to(model.dtype) / 255
    x, t, words = (each[led].to(model.device) for each in seen)
    down, middle = model(x.to(model.dtype), t, words.to(model.dtype), pictures.to(model.device), return_dict=False)
    strengths = strengths.to(latents)[led][:, None, None, None]

    def for_all(residual: Tensor) -> Tensor:
        whole = latents.new_zeros(len(latents), *residual.shape[1:])
        whole[led] = residual.to(latents) * strengths
        return whole

    return [for_all(each) for each in (*down, middle)]


def family(config: Any) -> Family:
    """Of the configuration of a diffusers U-Net or ControlNet: what must be alike in both."""
    widths, layers = tuple(config.block_out_channels), config.layers_per_block
    return config.cross_attention_dim, widths, (layers,) * len(widths) if isinstance(layers, int) else tuple(layers)


def told(of: Family | None) -> str:
    return "text of width {}, channels {}, resnets {}".format(*of) if of else "not a U-Net"
