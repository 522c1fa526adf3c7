"""Where the subject of a clip is, and which part of the frames an edit may change.

A sentence and the same sentence about another subject make the model predict different noise where the subject is
(DiffEdit, Couairon et al., arXiv 2210.11427, section 3.2). No attention map is read: in a causal text encoder the words
after the subject tell of it too, and its own word may look anywhere else.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from torch import Tensor

from .errors import TavError

REGIONS = ("everything", "subject", "background")
_LEVELS = (0.16, 0.28, 0.40, 0.52)  # of the training timesteps: below, the picture says it all, above, it says nothing
_ROOM = 1  # latent pixels around the subject, for one of another shape
SOFTNESS = 16  # pixels: two of the latents


@torch.no_grad()
def subject_mask(
    unet: Callable,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    contrast_hidden_states: Tensor,
    scheduler: SchedulerMixin,
    *,
    threshold: float = 0.25,
    seed: int = 0,
) -> Tensor:
    """Finds the subject by what sentences about other subjects change in the predicted noise.

    Args:
        unet: `(b c f h w, t, text) -> b c f h w`, with a `dtype`; tuned on the clip it finds more.
        latents: clean latents of the clip, `1 c f h w`.
        encoder_hidden_states: embedding of its sentence, `1 n d`.
        contrast_hidden_states: embeddings of the sentence with other subjects, `k n d`; three or more, each with
            another colour and shape, find all of the subject.
        threshold: 0 ... 1 of the largest difference; less finds more.
        seed: of the noise.

    Returns:
        float32 `1 1 f h w` of 0 and 1.

    Raises:
        TavError: a threshold out of range, or sentences that make no difference anywhere.
    """
    texts = torch.cat([encoder_hidden_states, contrast_hidden_states]).to(unet.dtype)
    predictions = []
    for t, alpha, noise in probes(latents, scheduler, seed):
        noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(unet.dtype)
        predictions.append(torch.cat([unet(noisy, t, text[None]).float() for text in texts]))
    return mask_of(predictions, threshold)


def probes(latents: Tensor, scheduler: SchedulerMixin, seed: int) -> list[tuple[int, Tensor, Tensor]]:
    """Where a model is asked: timestep, cumulative alpha and the noise, as `latents`, of each level."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = [round(level * scheduler.config.num_train_timesteps) for level in _LEVELS]
    return [(t, scheduler.alphas_cumprod[t].to(latents.device),
             randn_tensor(latents.shape, generator, latents.device, torch.float32)) for t in timesteps]  # fmt: skip


def mask_of(predictions: list[Tensor], threshold: float) -> Tensor:
    """The mask `1 1 f h w` from what was predicted at each level, `1+k c f h w`: for the sentence, then for the others."""
    if not 0 < threshold < 1:
        raise TavError(f"threshold={threshold} is out of range; give a number between 0 and 1")
    difference = torch.zeros(())
    for prediction in predictions:
        changes = (prediction[1:] - prediction[:1]).square().mean(1, keepdim=True)  # k 1 f h w
        share = changes / changes.mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-12)
        difference = difference + share.sum(0, keepdim=True).cpu()
    low, high = difference.flatten().quantile(torch.tensor([0.02, 0.98]))
    if high <= low:
        raise TavError("the contrast sentences change nothing; name another subject in them")
    return (difference > torch.lerp(low, high, threshold)).float()


def editable(region: str, mask: Tensor) -> Tensor | None:
    """What an edit of `region` may change, 0 ... 1, `1 1 f h w`, given the subject's mask; None for everything.

    An edit of the subject may go a little beyond it.

    Raises:
        TavError: an unknown region.
    """
    if region not in REGIONS:
        raise TavError(f"region is {region!r}; choose one of {', '.join(REGIONS)}")
    return {"everything": None, "subject": grown(mask, _ROOM), "background": 1 - mask}[region]


def grown(mask: Tensor, margin: int) -> Tensor:
    """A mask `1 1 f h w` that is `margin` pixels wider on each side."""
    flat = F.max_pool2d(rearrange(mask, "1 1 f h w -> f 1 h w"), 2 * margin + 1, 1, margin)
    return rearrange(flat, "f 1 h w -> 1 1 f h w")


def softened(mask: Tensor, softness: int, scale: int = 1) -> Tensor:
    """A mask `1 1 f h w` whose edges are ramps, half of them inside.

    Args:
        softness: width of the ramps in pixels; 0 leaves the edges hard.
        scale: pixels a side that make one of the mask's.
    """
    if softness == 0:
        return mask
    pixels = rearrange(mask, "1 1 f h w -> f 1 h w").repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    reach = softness // 2
    box = (softness / 2 + 0.5 - torch.arange(-reach, reach + 1.0).abs()).clamp(max=1) / softness  # an even one has half ends
    pixels = F.pad(pixels, (reach,) * 4, mode="replicate")
    pixels = F.conv2d(F.conv2d(pixels, box.to(mask)[None, None, None]), box.to(mask)[None, None, :, None])
    return rearrange(F.avg_pool2d(pixels, scale), "f 1 h w -> 1 1 f h w").clamp(0, 1)
