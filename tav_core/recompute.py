"""Gradient checkpointing: which parts of a video U-Net the backward pass computes again, so that they keep nothing.

A unit is a module that changes class in place (`Recomputed`).
"""

import functools

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import FrameContext

MEMORY = ("fast", "selective", "checkpointing", "low")  # each takes less memory and more time than the one before
MEMORY_OR_AUTO = ("auto", *MEMORY)
_PARTS = 4


class Recomputed:
    """Mixin: a unit of gradient checkpointing, recomputed in the backward pass as it was in its own forward.

    Attributes:
        recomputed: whether it is so now.
        modes: the `MEMORY` modes in which it is so.
    """

    frame_context: FrameContext
    recomputed: bool = False
    modes: tuple[str, ...]

    def forward(self, *args, **kwargs):
        context, run = self.frame_context, super().forward
        if not (self.recomputed and torch.is_grad_enabled()):
            return run(*args, **kwargs)
        own = context.forward  # another forward may run before the backward of this one

        def again(*args, **kwargs):
            with context.resumed(own):
                return run(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    def __reduce__(self):
        return _blank, (*type(self).made_of,), self.__dict__


class RecomputedInParts(Recomputed):
    """The same for a module that treats every frame alike: a few frames at a time, so that no part takes much."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:  # (b f) n c
        forward = super().forward
        return (
            torch.cat([forward(part, *args, **kwargs) for part in x.chunk(_PARTS)])
            if self.recomputed
            else forward(x, *args, **kwargs)
        )


def make_units(block: nn.Module, context: FrameContext):
    """Chooses what of a block of the U-Net is recomputed in which `MEMORY` modes (see `VideoUNet.set_memory`)."""
    for module in list(block.modules()):
        if isinstance(module, ResnetBlock2D):
            _recompute(module, context, MEMORY[1:])
        elif isinstance(module, Transformer2DModel):
            blocks = module.transformer_blocks
            for unit in [module] if len(blocks) == 1 else blocks:  # a transformer of many blocks would be too large
                _recompute(unit, context, ("checkpointing", "low"))
        elif isinstance(module, Attention):
            _recompute(module, context, ("low",))
        elif isinstance(module, FeedForward):
            _recompute(module, context, ("selective", "low"), RecomputedInParts)
    _recompute(block, context, ("low",))


def _recompute(module: nn.Module, context: FrameContext, modes: tuple[str, ...], how: type[Recomputed] = Recomputed):
    module.__class__ = _unit_class(how, type(module), modes)
    module.frame_context = context


@functools.cache
def _unit_class(how: type[Recomputed], kind: type[nn.Module], modes: tuple[str, ...]) -> type[nn.Module]:
    return type(kind.__name__, (how, kind), {"modes": modes, "made_of": (how, kind, modes)})


def _blank(how: type[Recomputed], kind: type[nn.Module], modes: tuple[str, ...]) -> nn.Module:
    """A unit without content, which a pickle or a copy fills: the classes have no name to be found by."""
    made = _unit_class(how, kind, modes)
    return made.__new__(made)
