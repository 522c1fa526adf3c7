"""Attention injection: the source clip walks back from the noise beside an edit, or beside several that are drawn
together, leads it, and holds what it may not change.

Beyond the paper. In the first steps of a sampling the edit attends as its source clip does, which keeps the clip's
layout and motion (after Plug-and-Play, arXiv 2211.12572, section 4.1, and FateZero, arXiv 2303.09535, section 3.2); the
U-Net's part of it is in `attention`. Where the subject is known, the clip's features hold it in its place, an edit of a
region leaves the rest as the noise reconstructs it, a background that is drawn anew stands as still as the clip's, and
a subject that is drawn anew is the same one in all frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .ddim import ddim_step, to_latents
from .errors import TavError
from .subject import filled_out, grown

REGIONS = ("everything", "subject", "shape", "background")
ANCHORED = 2 / 3  # of the led steps, the first, in which an anchor holds; longer, and an edit may lose its subject
FOUND = ("subject", "shape")  # of those, where something is drawn in the subject's place, and can be found there
ROOM = 0.25  # of the subject's size, around the old shape, where a new one can be found: a triangle fits about a moon
STILL = 0.1  # root mean square over the channels, of latents with a standard deviation of about 1
ALIKE = 0.7  # the same, of a subject brought from one frame to another
AGREED = 9 / 10  # of the steps, the first, in which the frames of a subject agree; the others draw crisply


@dataclass(frozen=True)
class EditPlaces:
    """What of a clip an edit may change and where the clip leads it, each 0 ... 1, `b 1 f h w`; None: see there.

    Attributes:
        changeable: what the edit may change. A step goes towards the blend of the clean latents that the two walks
            predict, `lerp(x0_source, x0, changeable)`; where it is 0, the source's walk is taken as it is. None: all.
        anchor: how firmly the clip leads, -1 ... 1: 1 with its features as well, which keeps the subject in its place,
            -1 not at all. None: with its attention alone, everywhere.
        still: where the edit stands still if the clip does (see `steadied`). None: nowhere.
        moving: where a subject is that all frames agree about (see `agreed`). None: nowhere.

    Of several edits of a clip they are one for all, or one for each (see `EditPlaces.together`).
    """

    changeable: Tensor | None = None
    anchor: Tensor | None = None
    still: Tensor | None = None
    moving: Tensor | None = None

    def __repr__(self) -> str:
        return f"EditPlaces({', '.join(name for name, value in vars(self).items() if value is not None)})"

    @classmethod
    def together(cls, of_each: Sequence["EditPlaces"]) -> "EditPlaces":
        """Those of several edits as one, `b 1 f h w`; where some have None, what means the same for them."""
        same, joined = {"changeable": 1.0, "anchor": 0.0, "still": 0.0, "moving": 0.0}, {}
        for name, value in same.items():
            masks = [getattr(places, name) for places in of_each]
            given = next((mask for mask in masks if mask is not None), None)
            if given is not None:
                masks = [torch.full_like(given, value) if mask is None else mask for mask in masks]
                joined[name] = torch.cat(masks)
        return cls(**joined)

    @classmethod
    def of(cls, region: str, subject: Tensor, margin: int, steady: bool = True, room: float = 0.0) -> "EditPlaces":
        """Those of an edit of a region, given the subject's mask, `1 1 f h w`.

        An edit of everything is anchored at the subject. One of the subject may go beyond it by `margin` pixels of the
        mask, and is anchored there: it would lose the subject in some frames if the clip led it no farther than the
        old outline. One of its shape has room around the old one, and is not led there, where it would be led to the
        old shape. Both have one content that moves as the subject does. One of the background needs no anchor: its
        subject is held already.

        Args:
            region: one of `REGIONS`.
            steady: whether what is drawn anew keeps from frame to frame: a background stands still, a subject agrees.
            room: of a new shape, around the old one: a share of the subject's size. Beyond a margin (0) what is drawn
                there must be found and all else put back (see `ROOM`).

        Raises:
            TavError: an unknown region.
        """
        if region not in REGIONS:
            raise TavError("region", region, "is unknown", f"choose one of {', '.join(REGIONS)}")
        if region == "shape":
            place = grown(filled_out(subject, room), margin)
            return cls(place, -place, None, subject if steady else None)
        wide, rest = grown(subject, margin), 1 - subject
        if region == "everything":
            return cls(None, subject, 1 - wide if steady else None)
        if region == "subject":
            return cls(wide, wide, None, subject if steady else None)
        return cls(rest, None, rest if steady else None)


@dataclass(frozen=True)
class LedSteps:
    """In which steps the clip leads: the first share of a sampling whose N + 1 noise levels fall along `sigmas`.

    Of 25 steps at a share of 0.6 the first 15 lead, the first 10 of them anchor. A sampler's second look at a step,
    at a level that is none of `sigmas`, counts as well.
    """

    sigmas: Tensor
    share: float

    def leads(self, sigma: Tensor) -> bool:
        return self._within(round(self.share * (len(self.sigmas) - 1)), sigma)

    def anchors(self, sigma: Tensor) -> bool:
        return self._within(round(ANCHORED * round(self.share * (len(self.sigmas) - 1))), sigma)

    def _within(self, steps: int, sigma: Tensor) -> bool:
        return steps > 0 and bool(sigma >= self.sigmas[steps - 1] * (1 - 1e-4))


@dataclass(frozen=True)
class Led:
    """How the source, the first videos of a batch, leads the others.

    Attributes:
        sources: so many videos lead the attention; 0 if they only walk beside.
        anchor: see `VideoUNet.forward`, `(b f) 1 h w` of the whole batch.
    """

    sources: int
    anchor: Tensor | None

    @property
    def keywords(self) -> dict[str, Tensor]:
        return {} if self.anchor is None else {"anchor": self.anchor}


class SourceWalk:
    """The source clip's own way back from the noise, beside an edit's, without guidance.

    It begins with the sampling and goes from level to level by `ddim_step`, whatever the sampler of the edit does. Only
    the first call at a level takes it further: guidance of some kinds calls the model again, changed.

    Args:
        share: of the steps, from the first on, in which the clip leads, 0 ... 1. 0: nowhere, as in the paper.
        places: what it holds or anchors, for all of the sampling.
        edits: of each clip, that are drawn together: it walks once beside them. Of several clips a batch has the first
            edit of each, then the second of each, and so on.

    Raises:
        TavError: a share out of range.
    """

    def __init__(self, share: float, places: EditPlaces | None = None, edits: int = 1):
        if not 0 <= share <= 1:
            raise TavError("attention_injection", share, "is out of range", "give a number from 0 to 1")
        self.share, self.edits = share, edits
        self.begin(places or EditPlaces())

    def begin(self, places: EditPlaces | None = None):
        """Another sampling begins, with other places if there are any."""
        self.places = places or self.places
        self.x = self.x0 = self.sigma = None  # of the source, at the level of the last call

    @property
    def holds(self) -> bool:
        return self.places.changeable is not None or self.places.still is not None

    def __call__(
        self, ask: Callable[[Tensor, Led | None], Tensor], x: Tensor, sigma: Tensor, sigmas: Tensor, prompts: int
    ) -> Tensor:
        """The clean latents of edits at a noise level, as `ask` predicts them beside the source.

        Args:
            ask: `(x, led) -> x0`; with a `led`, `x` has the source's videos in front.
            x: the videos of the edits under each prompt, `(prompts b) c f h w`, all alike.
            sigma, sigmas: the level, and all of the sampling, falling.
        """
        if not self.walks(sigma, sigmas):
            return ask(x, None)
        clips = len(x) // (prompts * self.edits)
        source, (leads, anchor) = self.source(x[:clips], sigma), self.leading(sigma, sigmas)
        if anchor is not None:
            anchor = _for_all(anchor, x)
            anchor = rearrange(torch.cat([anchor[:clips], anchor]), "b 1 f h w -> (b f) 1 h w")
        out = ask(torch.cat([source, x]), Led(clips if leads else 0, anchor))
        self.advance(source, out[:clips], sigma)
        return self.kept(out[clips:], sigmas)

    def walks(self, sigma: Tensor, sigmas: Tensor) -> bool:
        """Whether the source is needed at a level of a sampling."""
        return self.holds or self.leading(sigma, sigmas)[0]

    def leading(self, sigma: Tensor, sigmas: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the source leads at a level, and its anchor there, as in `EditPlaces`."""
        steps, anchor = LedSteps(sigmas, self.share), self.places.anchor
        leads = steps.leads(sigma)
        if anchor is not None and not steps.anchors(sigma):
            anchor = anchor.clamp(max=0) if leads and (anchor < 0).any() else None
        return leads, anchor

    def source(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The source at a level, `b c f h w`: the edit itself (the first of several), `x`, where both begin."""
        return x if self.sigma is None else self.at(sigma)

    def is_new(self, sigma: Tensor) -> bool:
        """Whether the walk has yet to be taken to this level."""
        return self.sigma is None or bool(sigma != self.sigma)

    def advance(self, source: Tensor, x0: Tensor, sigma: Tensor):
        """Takes the walk to a level, where a model sees the clean latents `x0` in `source`; twice is once."""
        if self.is_new(sigma):
            self.x, self.x0, self.sigma = source, x0, sigma

    def kept(self, x0: Tensor, sigmas: Tensor) -> Tensor:
        """Clean latents of the edits under each prompt, `(prompts b) c f h w`, where the source's may not change.

        It is the same for all prompts, so that guidance keeps to it.
        """
        places, clip = self.places, _repeated(self.x0, x0)
        if places.moving is not None and LedSteps(sigmas, AGREED).leads(self.sigma):
            x0 = agreed(x0, clip, *(_for_all(of, x0) for of in (places.moving, places.changeable)))
        if places.still is not None:
            x0 = steadied(x0, clip, _for_all(places.still, x0))
        if places.changeable is not None:
            x0 = torch.lerp(clip, x0, _for_all(places.changeable, x0))
        return x0

    def at(self, sigma: Tensor) -> Tensor:
        """Where the walk has come to at a level, `b c f h w` with that much noise."""
        return self.x if sigma == self.sigma else ddim_step(self.x, self.x0, self.sigma, sigma)

    def held(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Edits at their next level, where they may change nothing the source itself: no rounding, no fresh noise."""
        if self.places.changeable is None:
            return x
        return torch.where(self.places.changeable.to(x.device) > 0, x, _repeated(self.at(sigma), x))

    def latents(self, sigma: Tensor) -> Tensor:
        """The latents that the walk ends in, at the last level of a sampling of a walk that holds something."""
        return to_latents(self.at(sigma), sigma)


def _for_all(mask: Tensor, videos: Tensor) -> Tensor:
    """A mask, `1 1 f h w` or `b 1 f h w`, for so many videos, one or several times `b`, `n c f h w`."""
    return _repeated(mask.to(videos).expand(-1, 1, *videos.shape[2:]), videos)


def _repeated(x: Tensor, videos: Tensor) -> Tensor:
    return x.repeat(len(videos) // len(x), 1, 1, 1, 1)


def steadied(x0: Tensor, clip: Tensor, places: Tensor) -> Tensor:
    """Latents of an edit, averaged over the frames in which the clip is alike, so that the edit stands as still as it.

    An edit is drawn from noise that differs a little from frame to frame, and what it makes up (waves, blades of grass)
    differs with it. Frame g counts in frame f, at each place, as exp(-|clip_f - clip_g|^2 / 2 STILL^2), with the mean
    square over the channels (a cross-bilateral filter along time, Petschnig et al., SIGGRAPH 2004). The steps that
    follow draw crisply what the average only hints at. Nothing is averaged where a camera or a thing moves.

    Args:
        x0: clean latents of the edit, `b c f h w`.
        clip: those of the clip, `b c f h w`.
        places: where, 0 ... 1, `b 1 f h w`; elsewhere `x0` neither changes nor counts.
    """
    frames = []
    for f in range(x0.shape[2]):
        here = slice(f, f + 1)
        distance = (clip - clip[:, :, here]).square().mean(1, keepdim=True)  # b 1 f h w
        weights = torch.exp(distance / (-2 * STILL**2)) * places
        mean = (weights * x0).sum(2) / weights.sum(2).clamp(min=1e-6)
        frames.append(torch.lerp(x0[:, :, f], mean, places[:, :, f]))
    return torch.stack(frames, 2)


def agreed(x0: Tensor, clip: Tensor, subject: Tensor, places: Tensor) -> Tensor:
    """Latents of an edit that shows one content in all frames, which moves and grows as the clip's subject does.

    Each frame is drawn from noise of its own, and a shape that the clip doesn't have comes out differently in each. In
    frame f it is the mean of all frames g, brought to where the subject is in f and to its size there (the centre and
    the square root of the area of its mask); g counts at each place as exp(-|clip_f - clip_g|^2 / 2 ALIKE^2) with the
    clip brought there likewise, as in `steadied`: where a subject bends, turns or is hidden, its frames agree less.

    Args:
        x0: clean latents of the edit, `b c f h w`.
        clip: those of the clip, `b c f h w`.
        subject: its mask, `b 1 f h w`; a frame without any of it keeps its own.
        places: where, 0 ... 1, `b 1 f h w`; elsewhere `x0` neither changes nor counts.
    """
    f, h, w = x0.shape[2:]
    y, x = ((torch.arange(n, device=x0.device) + 0.5) / n * 2 - 1 for n in (h, w))  # -1 ... 1
    area = subject.sum((1, 3, 4))  # b f
    centre = torch.stack([(subject * at).sum((1, 3, 4)) for at in (x, y[:, None])], -1) / area[..., None].clamp(
        min=1e-6
    )
    square, size = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1), area.sqrt()  # h w (x y); b f
    content = rearrange(torch.cat([x0, clip, places * (area > 0)[:, None, :, None, None]], 1), "b c f h w -> b f c h w")
    frames = []
    for here in range(f):
        scale = size / size[:, here : here + 1].clamp(min=1e-6)
        grid = (square - centre[:, here, None, None, None]) * scale[..., None, None, None] + centre[:, :, None, None]
        brought = F.grid_sample(
            content.flatten(0, 1), grid.flatten(0, 1), "bicubic", padding_mode="zeros", align_corners=False
        ).unflatten(0, (-1, f))  # b g c h w
        edit, source, share = brought.split([x0.shape[1], clip.shape[1], 1], 2)
        distance = (source - clip[:, None, :, here]).square().mean(2, keepdim=True)
        weights = torch.exp(distance / (-2 * ALIKE**2)) * share.clamp(0, 1)
        mean = (weights * edit).sum(1) / weights.sum(1).clamp(min=1e-6)
        # beyond what any frame shows of the subject's surroundings there is no mean
        known = places[:, :, here] * (weights.sum(1) > 0.5) * (area[:, here] > 0)[:, None, None, None]
        frames.append(torch.lerp(x0[:, :, here], mean, known))
    return torch.stack(frames, 2)
