"""Attention over the frames of a video: sparse-causal (spatial) and temporal.

Tune-A-Video (arXiv 2212.11565), section 3.2: the queries of frame i look at frame 0 and frame i-1; a temporal
self-attention follows the feed-forward of every transformer block.

Attention injection, beyond the paper: edits that attend as their source clip does keep its layout and motion (after
Plug-and-Play, arXiv 2211.12572, section 4.1, and FateZero, arXiv 2303.09535, section 3.2). The sources are the first
videos of the batch; all others take the queries and keys of self- and temporal attention from them, and the queries
of cross-attention. Values stay their own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor

from .attention_choice import choose_attention
from .errors import TavError

MODES = ("sparse-causal", "first", "full")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention on `b heads n d`; mask: bool (True: look) or additive, of shape `b heads n m`."""
    if q.device.type == "cpu" and mask is None:
        return choose_attention(q, k, v)(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class AttentionPatches(Protocol):
    """What another program does to self- and cross-attention, frame by frame; see `Forward.patches`."""

    def inputs(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, keys and values are projected from, `(b f) n c`; queries may return as tiles `(b f t) n c`."""

    def replacement(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """Computes, from projected queries, keys and values of each frame, what goes into the output projection."""


@dataclass(frozen=True)
class Forward:
    """What belongs to one forward of a video U-Net.

    Attributes:
        frames: frames per video (the batch is `(b f)`).
        sources: so many videos of the batch, the first ones, lead the attention of the others (which are a
            multiple of them); 0 without attention injection.
        anchor: how firmly the sources lead each place, -1 ... 1, `(b f) 1 h w`; None: their attention everywhere.
            Above 0 the others take features from them as well (see `anchored`), below 0 they attend by themselves.
        patches: asked in every self- and cross-attention; a replaced self-attention stays inside each frame.
        attention_fn: computes every attention of the U-Net, `(q, k, v, mask=None)` on `b heads n d`.
    """

    frames: int = 1
    sources: int = 0
    anchor: Tensor | None = None
    patches: AttentionPatches | None = None
    attention_fn: Callable[..., Tensor] = sdpa

    @property
    def leaders(self) -> int:
        """Entries of the batch `(b f)`, the first ones, that lead the others."""
        return self.sources * self.frames

    def free(self, places: int) -> Tensor | None:
        """How far each of so many places attends by itself though the others are led, 0 ... 1, `(b f) places 1`."""
        if self._unled is None:
            return None
        height, width = self._unled.shape[-2:]
        factor = round((height * width / places) ** 0.5)
        free = F.adaptive_max_pool2d(self._unled, (math.ceil(height / factor), math.ceil(width / factor)))
        return rearrange(free, "b 1 h w -> b (h w) 1")

    @cached_property
    def _unled(self) -> Tensor | None:
        if self.anchor is None or not self.sources or not (self.anchor < 0).any():
            return None
        return -self.anchor.clamp(max=0)


class FrameContext:
    """Shared by the modules of one video U-Net: the `Forward` that they are in."""

    def __init__(self, frames: int = 1, **fields):
        self.forward = Forward(frames, **fields)

    def set(self, **fields):
        """Changes what holds from now on."""
        self.forward = replace(self.forward, **fields)

    @contextmanager
    def running(self, frames: int | None = None, **fields) -> Iterator[None]:
        """Changes what holds for the forwards inside; None leaves the frames as they are."""
        if frames is not None:
            fields["frames"] = frames
        with self.resumed(replace(self.forward, **fields)):
            yield

    @contextmanager
    def resumed(self, forward: Forward) -> Iterator[None]:
        """Everything as it was in another forward."""
        before, self.forward = self.forward, forward
        try:
            yield
        finally:
            self.forward = before


def attend(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, fn: Callable[..., Tensor], mask: Tensor | None = None
) -> Tensor:
    """Multi-head attention and output projection of `attn` on projected `b n c`, `b m c`, `b m c`."""
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=attn.heads) for x in (q, k, v))
    dtype = q.dtype
    if attn.upcast_attention:
        with torch.autocast(q.device.type, enabled=False):
            out = fn(q.float(), k.float(), v.float(), mask=mask)
    else:
        out = fn(q, k, v, mask=mask)
    return _project_out(attn, rearrange(out, "b heads n d -> b n (heads d)").to(dtype))


def _project_out(attn: Attention, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


def _led(project: Callable[[Tensor], Tensor], x: Tensor, leaders: int, free: Tensor | None = None) -> Tensor:
    """`project(x)`, or with `leaders` that of the first entries of `x`, repeated for all, but where they are `free`."""
    if not leaders:
        return project(x)
    led = project(x[:leaders]).repeat(len(x) // leaders, 1, 1)
    return led if free is None else torch.lerp(led, project(x), free.to(led))


def anchored(x: Tensor, forward: Forward) -> Tensor:
    """Features `(b f) c h w`, where the anchor holds those of the sources (Plug-and-Play, section 4.1)."""
    if forward.anchor is None or not forward.sources:
        return x
    led = x[: forward.leaders].repeat(len(x) // forward.leaders, 1, 1, 1)
    return torch.lerp(x, led, F.adaptive_max_pool2d(forward.anchor.clamp(min=0).to(x), x.shape[-2:]))


def _same(x: Tensor) -> Tensor:
    return x


def frame_attention(
    attn: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: int,
    mode: str,
    fn: Callable[..., Tensor] = sdpa,
    tiles: int = 1,
) -> Tensor:
    """Spatial self-attention whose keys and values come from chosen frames; projected `(b f t) n c` to the same.

    Modes: "sparse-causal" looks from frame i at [frame 0 | frame max(i-1, 0)], "first" at frame 0 alone,
    "full" at all frames. A tile looks at the same tile of those frames.
    """
    q, k, v = (rearrange(y, "(b f t) n c -> b f t n c", f=frames, t=tiles) for y in (q, k, v))
    if mode == "sparse-causal":
        # frames 0 and 1 look at [frame 0 | frame 0], whose softmax is that over frame 0 once
        out = _attend_together(attn, q[:, :2], k[:, :1], v[:, :1], fn)
        if frames > 2:
            k, v = (torch.cat([y[:, :1].expand_as(y[:, 2:]), y[:, 1:-1]], dim=3) for y in (k, v))
            rest = attend(attn, *(rearrange(y, "b f t n c -> (b f t) n c") for y in (q[:, 2:], k, v)), fn)
            out = torch.cat([out, rearrange(rest, "(b f t) n c -> b f t n c", f=frames - 2, t=tiles)], dim=1)
    else:
        looked_at = 1 if mode == "first" else frames
        out = _attend_together(attn, q, k[:, :looked_at], v[:, :looked_at], fn)
    return rearrange(out, "b f t n c -> (b f t) n c")


def _attend_together(attn: Attention, q: Tensor, k: Tensor, v: Tensor, fn: Callable[..., Tensor]) -> Tensor:
    """`attend` of `b f t n c`, where every frame looks at all keys: the queries of a video form one sequence."""
    out = attend(attn, *(rearrange(y, "b f t n c -> (b t) (f n) c") for y in (q, k, v)), fn)
    return rearrange(out, "(b t) (f n) c -> b f t n c", b=len(q), f=q.shape[1])


def temporal_attention(
    attn: Attention,
    x: Tensor,
    causal: bool = False,
    fn: Callable[..., Tensor] = sdpa,
    leaders: int = 0,
    free: Tensor | None = None,
) -> Tensor:
    """Self-attention over frames, `(b n) f c` to the same; `causal` hides later frames.

    `leaders`: entries of the batch whose queries and keys serve all, 0 for their own; not where they are `free`, 0 ...
    1, `(b n) f 1`.
    """
    frames = x.shape[1]
    mask = torch.ones(frames, frames, dtype=torch.bool, device=x.device).tril() if causal else None  # f f
    q, k = (_led(project, x, leaders, free) for project in (attn.to_q, attn.to_k))
    return attend(attn, q, k, attn.to_v(x), fn, mask)


class FrameAttnProcessor:
    """Diffusers attention processor for `attn1` and `attn2` of a transformer block in a video U-Net.

    Where text is given, it is plain cross-attention. Without text, `mode` (see `frame_attention`) chooses the
    frames that are looked at; None stays inside each frame.
    """

    def __init__(self, context: FrameContext, mode: str | None):
        self.context = context
        self.mode = mode

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # (b f) n c
        encoder_hidden_states: Tensor | None = None,  # (b f) m c
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        forward, batch = self.context.forward, len(hidden_states)
        fn, patches, leaders = forward.attention_fn, forward.patches, forward.leaders
        own = encoder_hidden_states is None
        if attention_mask is not None and own and self.mode is not None:
            raise TavError("attention_mask", None, "is not defined over frames", "leave it out")
        x = hidden_states
        keys = values = hidden_states if own else encoder_hidden_states
        key_leaders, free = leaders if own else 0, forward.free(x.shape[1])
        if patches:  # those who are led take part in a patch with what leads them
            x, keys, values = patches.inputs(
                _led(_same, x, leaders, free), _led(_same, keys, key_leaders, free), values
            )
            if free is not None:  # what comes back is of either
                leaders = key_leaders = 0
        tiles = len(x) // batch
        q = _led(attn.to_q, x, leaders * tiles, free)
        k, v = _led(attn.to_k, keys, key_leaders * len(keys) // batch, free), attn.to_v(values)
        if patches and (instead := patches.replacement()):
            out = _project_out(attn, instead(q, k, v))
        else:
            if tiles > 1:  # a tile of the queries looks at a share of the keys
                k, v = (y.reshape(len(q), -1, y.shape[-1]) for y in (k, v))
            if own and self.mode is not None:
                out = frame_attention(attn, q, k, v, forward.frames, self.mode, fn, tiles)
            else:
                if attention_mask is not None:
                    mask = attn.prepare_attention_mask(attention_mask, keys.shape[1], batch)
                    attention_mask = rearrange(mask, "(b heads) n m -> b heads n m", heads=attn.heads)
                out = attend(attn, q, k, v, fn, attention_mask)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor
