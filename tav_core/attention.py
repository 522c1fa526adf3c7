"""Attention over the frames of a video: sparse-causal (spatial) and temporal.

Tune-A-Video (arXiv 2212.11565), section 3.2: the queries of frame i look at frame 0 and frame i-1; a temporal
self-attention follows the feed-forward of every transformer block.

Attention injection, beyond the paper: edits that attend as their source clip does keep its layout and motion (after
Plug-and-Play, arXiv 2211.12572, section 4.1, and FateZero, arXiv 2303.09535, section 3.2). The sources are the first
videos of the batch; all others take the queries and keys of self- and temporal attention from them, and the queries
of cross-attention. Values stay their own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor

from .errors import TavError

MODES = ("sparse-causal", "first", "full")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention on `b heads n d`; mask: bool (True: look) or additive, of shape `b heads n m`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass
class FrameContext:
    """What the modules of one video U-Net share.

    Attributes:
        frames: frames per video in the forward that is running (the batch is `(b f)`).
        attention_fn: computes every attention of the U-Net, `(q, k, v, mask=None)` on `b heads n d`.
        checkpointing: recompute resnets and transformer blocks in the backward pass.
        sources: so many videos of the batch, the first ones, lead the attention of the others (which are a
            multiple of them); 0 without attention injection.
        anchor: where the others take features from the sources as well, 0 ... 1, `(b f) 1 h w` (see `anchored`).
    """

    frames: int = 1
    attention_fn: Callable[..., Tensor] = sdpa
    checkpointing: bool = False
    sources: int = 0
    anchor: Tensor | None = None

    @contextmanager
    def running(self, frames: int, anchor: Tensor | None = None) -> Iterator[None]:
        """Set what belongs to one forward for its duration."""
        previous, self.frames, self.anchor = (self.frames, self.anchor), frames, anchor
        try:
            yield
        finally:
            self.frames, self.anchor = previous

    @contextmanager
    def led_by(self, sources: int) -> Iterator[None]:
        """Attention injection from the first `sources` videos of the batch, for the forwards inside."""
        previous, self.sources = self.sources, sources
        try:
            yield
        finally:
            self.sources = previous


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
    out = rearrange(out, "b heads n d -> b n (heads d)").to(dtype)
    return attn.to_out[1](attn.to_out[0](out))


def _led(project: Callable[[Tensor], Tensor], x: Tensor, leaders: int) -> Tensor:
    """`project(x)`, or with `leaders` that of the first entries of `x`, repeated for all."""
    if not leaders:
        return project(x)
    return project(x[:leaders]).repeat(len(x) // leaders, 1, 1)


def anchored(x: Tensor, context: FrameContext) -> Tensor:
    """Features `(b f) c h w`, where the anchor holds those of the sources (Plug-and-Play, section 4.1)."""
    if context.anchor is None or not context.sources:
        return x
    leaders = context.sources * context.frames
    led = x[:leaders].repeat(len(x) // leaders, 1, 1, 1)
    return torch.lerp(x, led, F.adaptive_max_pool2d(context.anchor.to(x), x.shape[-2:]))


def frame_attention(
    attn: Attention, x: Tensor, frames: int, mode: str, fn: Callable[..., Tensor] = sdpa, leaders: int = 0
) -> Tensor:
    """Spatial self-attention whose keys and values come from chosen frames; `(b f) n c` to the same.

    Modes: "sparse-causal" looks from frame i at [frame 0 | frame max(i-1, 0)], "first" at frame 0 alone,
    "full" at all frames. `leaders`: entries of the batch whose queries and keys serve all, 0 for their own.
    """
    q = _led(attn.to_q, x, leaders)
    k, v = (
        rearrange(y, "(b f) n c -> b f n c", f=frames) for y in (_led(attn.to_k, x, leaders), attn.to_v(x))
    )
    if mode == "sparse-causal":
        previous = torch.arange(frames, device=x.device).sub(1).clamp(min=0)
        k, v = (
            rearrange(torch.cat([y[:, :1].expand_as(y), y[:, previous]], dim=2), "b f n c -> (b f) n c")
            for y in (k, v)
        )
        return attend(attn, q, k, v, fn)

    # every frame looks at the same keys, so the queries of a video form one sequence
    looked_at = 1 if mode == "first" else frames
    q = rearrange(q, "(b f) n c -> b (f n) c", f=frames)
    k, v = (rearrange(y[:, :looked_at], "b f n c -> b (f n) c") for y in (k, v))
    return rearrange(attend(attn, q, k, v, fn), "b (f n) c -> (b f) n c", f=frames)


def temporal_attention(
    attn: Attention, x: Tensor, causal: bool = False, fn: Callable[..., Tensor] = sdpa, leaders: int = 0
) -> Tensor:
    """Self-attention over frames, `(b n) f c` to the same; `causal` hides later frames, `leaders` as above."""
    frames = x.shape[1]
    mask = torch.ones(frames, frames, dtype=torch.bool, device=x.device).tril() if causal else None  # f f
    return attend(attn, _led(attn.to_q, x, leaders), _led(attn.to_k, x, leaders), attn.to_v(x), fn, mask)


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
        fn, leaders = self.context.attention_fn, self.context.sources * self.context.frames
        if encoder_hidden_states is None and self.mode is not None:
            if attention_mask is not None:
                raise TavError("attention_mask is not defined over frames; leave it out")
            out = frame_attention(attn, hidden_states, self.context.frames, self.mode, fn, leaders)
        else:
            seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            if attention_mask is not None:
                mask = attn.prepare_attention_mask(attention_mask, seen.shape[1], hidden_states.shape[0])
                attention_mask = rearrange(mask, "(b heads) n m -> b heads n m", heads=attn.heads)
            q = _led(attn.to_q, hidden_states, leaders)
            k, v = _led(attn.to_k, seen, leaders if seen is hidden_states else 0), attn.to_v(seen)
            out = attend(attn, q, k, v, fn, attention_mask)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor
