"""Where the subject of a clip is: masks of it, and what is made of them.

By contrast: a sentence and the same sentence about another subject make the model predict different noise where the
subject is (DiffEdit, Couairon et al., arXiv 2210.11427, section 3.2). By a word: its cross-attention is high there
(Prompt-to-Prompt, Hertz et al., arXiv 2208.01626, section 3). The second needs no other sentence, but a model whose
words keep apart: in a causal text encoder those after the subject tell of it too, and in a small one (the mini
checkpoint's) they take its place.

Either knows latent pixels alone; the outline is found in the clip itself (GrabCut, Rother et al., SIGGRAPH 2004).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from torch import Tensor, nn

from .condition import Condition, VideoModel, predict
from .ddim import ddim_invert
from .errors import TavError
from .events import Callback, Step, ignored
from .flow import neighbours, told_by_neighbours
from .frames import as_frames
from .limits import check

WORD_STEPS = 10  # of the inversion in which a word is looked for
_LEVELS = (0.16, 0.28, 0.40, 0.52)  # of the training timesteps: below, the picture says it all, above, it says nothing
SOFTNESS = 3  # pixels
ROUNDS = 2  # in which frames learn of the subject from those around them


@torch.no_grad()
def subject_mask(
    unet: VideoModel,
    latents: Tensor,
    condition: Tensor | Condition,
    contrast_hidden_states: Tensor,
    scheduler: SchedulerMixin,
    *,
    threshold: float = 0.15,
    seed: int = 0,
    callback: Callback = ignored,
) -> Tensor:
    """Finds the subject by what sentences about other subjects change in the predicted noise.

    Args:
        unet: tuned on the clip it finds more.
        latents: clean latents of the clip, `1 c f h w`.
        condition: its sentence, or the embedding `1 n d` alone.
        contrast_hidden_states: embeddings of the sentence with other subjects, `k n d`; three or more, each with
            another colour and shape, find all of the subject.
        threshold: 0 ... 1 of the largest difference; less finds more.
        seed: of the noise.
        callback: gets a `Step` of stage "subject" after every prediction; raises to stop.

    Returns:
        float32 `1 1 f h w` of 0 and 1.

    Raises:
        TavError: a threshold out of range, or sentences that make no difference anywhere.
    """
    condition, predictions, done = Condition.of(condition), [], 0
    texts = [condition.encoder_hidden_states, *contrast_hidden_states.split(1)]
    sentences = [Condition(text, condition.class_labels) for text in texts]
    for t, alpha, noise in probes(latents, scheduler, seed):
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = []
        for sentence in sentences:
            predicted.append(predict(unet, noisy, t, sentence))
            done += 1
            callback(Step("subject", done, subject_steps(len(sentences) - 1)))
        predictions.append(torch.cat(predicted))
    return mask_of(predictions, threshold)


def subject_steps(contrasts: int, word: bool = False) -> int:
    """How many predictions finding a subject takes, by so many other sentences and by a word."""
    return len(_LEVELS) * (1 + contrasts) * (contrasts > 0) + WORD_STEPS * word


def probes(latents: Tensor, scheduler: SchedulerMixin, seed: int) -> list[tuple[int, Tensor, Tensor]]:
    """Where a model is asked: timestep, cumulative alpha and the noise, as `latents`, of each level."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = [round(level * scheduler.config.num_train_timesteps) for level in _LEVELS]
    alphas = [scheduler.alphas_cumprod[t].to(latents.device) for t in timesteps]
    noises = [randn_tensor(latents.shape, generator, latents.device, torch.float32) for _ in timesteps]
    return list(zip(timesteps, alphas, noises))


def mask_of(predictions: list[Tensor], threshold: float) -> Tensor:
    """The mask `1 1 f h w` from what was predicted at each level, `1+k c f h w`: for the sentence, then the others."""
    difference = torch.zeros(())
    for prediction in predictions:
        changes = (prediction[1:] - prediction[:1]).square().mean(1, keepdim=True)  # k 1 f h w
        share = changes / changes.mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-12)
        difference = difference + share.sum(0, keepdim=True).cpu()
    problem = "can't be told from the clip's sentence by what is predicted"
    flat = TavError("contrast", None, problem, "name another subject")
    return _above(threshold, difference, flat)


def _above(threshold: float, values: Tensor, flat: TavError) -> Tensor:
    """Where values are above a share of their range; raises `flat` if they have none."""
    if not 0 < threshold < 1:
        raise TavError("threshold", threshold, "is out of range", "give a number between 0 and 1")
    low, high = values.flatten().quantile(torch.tensor([0.02, 0.98]))
    if high <= low:
        raise flat
    return (values > torch.lerp(low, high, threshold)).float()


@torch.no_grad()
def word_mask(
    unet: nn.Module,
    latents: Tensor,
    condition: Tensor | Condition,
    places: Sequence[int],
    scheduler: SchedulerMixin,
    *,
    steps: int = WORD_STEPS,
    threshold: float = 0.3,
    callback: Callback = ignored,
) -> Tensor:
    """Finds the subject by where its word is looked at, while the clip is inverted with its sentence.

    Args:
        unet: a `VideoUNet`; tuned on the clip it finds more.
        latents: clean latents of the clip, `1 c f h w`.
        condition: its sentence, or the embedding `1 n d` alone.
        places: of the word among the tokens (see `word_places`).
        steps: of the inversion.
        threshold: 0 ... 1 of the largest attention; less finds more.
        callback: gets a `Step` of stage "subject" after every step; raises to stop.

    Returns:
        float32 `1 1 f h w` of 0 and 1.
    """
    with word_attention(unet, places) as maps:
        ddim_invert(unet, latents, condition, scheduler, steps,
                    callback=lambda event: callback(Step("subject", event.step, event.total)))  # fmt: skip
    return mask_of_attention(maps, *latents.shape[-2:], threshold)


def word_places(sentence: Sequence[int], word: Sequence[int], name: str) -> list[int]:
    """Where the tokens of a word are among those of a sentence, wherever it is said.

    Raises:
        TavError: nowhere; `name` is the word as it is written.
    """
    starts = [i for i in range(len(sentence) - len(word) + 1) if list(sentence[i : i + len(word)]) == list(word)]
    if not word or not starts:
        raise TavError("word", name, "is not in the sentence", "name one of its words")
    return [start + i for start in starts for i in range(len(word))]


@contextmanager
def word_attention(unet: nn.Module, places: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Adds up, over the forwards inside, how much each place of the frames looks at some tokens of the text.

    Yields:
        by number of places n, the sum over all cross-attentions of that size, `(b f) n`, float32 on the CPU.
    """
    maps: dict[int, Tensor] = {}

    def look(attn: nn.Module, args: tuple, kwargs: dict):
        q, k = (attn.head_to_batch_dim(y) for y in (attn.to_q(args[0]), attn.to_k(kwargs["encoder_hidden_states"])))
        weights = attn.get_attention_scores(q, k)[..., list(places)]  # (b f heads) n places
        weights = rearrange(weights.float().cpu(), "(b heads) n k -> b heads n k", heads=attn.heads).sum(3).mean(1)
        maps[weights.shape[1]] = maps.get(weights.shape[1], 0) + weights

    with ExitStack() as stack:
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        yield maps


def mask_of_attention(maps: dict[int, Tensor], height: int, width: int, threshold: float) -> Tensor:
    """The mask `1 1 f h w` from what `word_attention` yields of one clip: from the maps nearest to 16 x 16 places,
    where attention speaks of things rather than of texture."""
    places = min(maps, key=lambda n: abs(math.log(n / 256)))
    factor = round((height * width / places) ** 0.5)
    grid = rearrange(maps[places], "f (h w) -> f 1 h w", h=math.ceil(height / factor))
    values = F.interpolate(grid, (height, width), mode="bilinear")
    flat = TavError("word", None, "is looked at alike everywhere", "name another")
    return _above(threshold, rearrange(values, "f 1 h w -> 1 1 f h w"), flat)


def outlined(mask: Tensor, frames: Tensor) -> Tensor:
    """A mask of latents, `1 1 f h w`, at the pixels of the clip, along the outline of what it covers.

    GrabCut: colours in and out of the mask are learned from all frames; then each frame is cut where the colours say so
    and the picture has an edge, at most 1.5 latent pixels outside of the mask, and not in its core. What the frames
    around a frame found of the subject, and itself did not, is then held for probable in it (see `told_by_neighbours`),
    and all are cut anew. Last, holes go that are smaller than a latent pixel.

    Args:
        mask: of 0 and 1; one of either alone has no outline.
        frames: the clip, uint8 `f h w c`, some whole number of times as large.

    Returns:
        float32 of 0 and 1, `1 1 f h w` of pixels.
    """
    scale = frames.shape[1] // mask.shape[-2]
    coarse = rearrange(mask.cpu(), "1 1 f h w -> f 1 h w").repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    if mask.min() == mask.max():
        return rearrange(coarse, "f 1 h w -> 1 1 f h w")
    core, near = 1 - _grown(1 - coarse, scale), _grown(coarse, scale * 3 // 2)
    inside = _cut(coarse, near, core, frames)
    around = neighbours(frames)
    for _ in range(ROUNDS):
        told = torch.from_numpy(told_by_neighbours(inside[:, 0], around))[:, None].float()
        inside = _cut(torch.maximum(coarse, told), torch.maximum(near, told), core, frames)
    return rearrange(torch.stack([_closed(frame, scale**2) for frame in inside]), "f 1 h w -> 1 1 f h w")


def _cut(probable: Tensor, near: Tensor, core: Tensor, frames: Tensor) -> Tensor:
    """GrabCut of all frames, given what is probable, possible and certain of them: all `f 1 h w`, of 0 and 1."""
    import cv2

    kinds = (
        torch.where(probable > 0, cv2.GC_PR_FGD, torch.where(near > 0, cv2.GC_PR_BGD, cv2.GC_BGD))[:, 0]
        .to(torch.uint8)
        .numpy()
    )
    frames, colours = frames.numpy(), (np.zeros((1, 65)), np.zeros((1, 65)))
    step = max(1, min(frames.shape[1:3]) // 128)  # colours are the same at any size
    cv2.setRNGSeed(0)
    cv2.grabCut(
        *(np.concatenate(x[:, ::step, ::step]) for x in (frames, kinds)), None, *colours, 2, cv2.GC_INIT_WITH_MASK
    )
    for frame, kind in zip(frames, kinds):
        cv2.grabCut(np.ascontiguousarray(frame), kind, None, *colours, 1, cv2.GC_EVAL_FREEZE_MODEL)
    return (torch.from_numpy((kinds == cv2.GC_FGD) | (kinds == cv2.GC_PR_FGD))[:, None] | (core > 0)).float()


def _closed(mask: Tensor, pixels: int) -> Tensor:
    """A mask of one frame, `1 h w`, without holes of fewer pixels."""
    import cv2

    _, parts, stats, _ = cv2.connectedComponentsWithStats((mask[0] == 0).to(torch.uint8).numpy(), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] < pixels
    small[0] = False  # the mask itself
    return torch.where(torch.from_numpy(small[parts])[None], torch.ones(()), mask)


def put_back(edit: Tensor, source: Tensor, region: Tensor) -> Tensor:
    """An edit (uint8 `f h w c`) within the region (0 ... 1, `1 1 f h w` of its pixels), and the source around it.

    Where an edit may change no latents a decoder still draws them otherwise beside others: it sees the whole picture.
    """
    source = as_frames(source, "source_frames")
    share = rearrange(region.cpu(), "1 1 f h w -> f h w 1")
    return torch.lerp(source.float(), edit.float(), share).round().to(torch.uint8)


def grown(mask: Tensor, margin: int) -> Tensor:
    """A mask `1 1 f h w` that is `margin` pixels wider on each side."""
    return rearrange(_grown(rearrange(mask, "1 1 f h w -> f 1 h w"), margin), "f 1 h w -> 1 1 f h w")


def filled_out(mask: Tensor, beyond: float = 0.0) -> Tensor:
    """A mask `1 1 f h w` with all that lies between its parts: the convex hull of what it covers by half or more.

    Args:
        beyond: how far around the hull as well, as a share of the subject's size (the square root of its area).
    """
    import cv2

    hulls = np.zeros(mask.shape[2:], np.uint8)
    for hull, frame in zip(hulls, mask[0, 0].cpu().numpy()):
        places = np.argwhere(frame >= 0.5)[:, ::-1].astype(np.int32)
        if len(places):
            cv2.fillConvexPoly(hull, cv2.convexHull(places), 1)
            side = 2 * round(beyond * len(places) ** 0.5) + 1
            cv2.dilate(hull, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), dst=hull)
    return torch.maximum(mask, torch.from_numpy(hulls).to(mask)[None, None])


def _grown(mask: Tensor, margin: int) -> Tensor:  # f 1 h w
    side = 2 * margin + 1  # rows first, then columns, which is the same, and quick
    return F.max_pool2d(F.max_pool2d(mask, (1, side), 1, (0, margin)), (side, 1), 1, (margin, 0))


def softened(mask: Tensor, softness: int) -> Tensor:
    """A mask `1 1 f h w` whose edges are ramps of `softness` pixels, half of them inside; 0 leaves the edges hard."""
    check(softness=softness)
    if softness == 0:
        return mask
    reach = softness // 2
    box = (softness / 2 + 0.5 - torch.arange(-reach, reach + 1.0).abs()).clamp(max=1)  # an even one has half ends
    box = (box / softness).to(mask)[None, None, None]
    pixels = F.pad(rearrange(mask, "1 1 f h w -> f 1 h w"), (reach,) * 4, mode="replicate")
    return rearrange(F.conv2d(F.conv2d(pixels, box), box.mT), "f 1 h w -> 1 1 f h w").clamp(0, 1)


def pooled(mask: Tensor, scale: int) -> Tensor:
    """A mask of pixels as one of latents, `1 1 f h w`: the share of each that it covers."""
    return F.avg_pool3d(mask, (1, scale, scale))
