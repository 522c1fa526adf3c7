"""Judges pictures of the mini world: where the subject is, and its shape, colour, background and style.

Two small nets. The first sees the whole picture and gives the subject's mask, the background and the style; the
second sees a crop around that mask and gives shape and colour (one net for all is weak on shape).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from . import world

SHAPES = (*world.SHAPES, *world.UNKNOWN_SHAPES)
COLOURS = tuple(world.COLOURS)
BACKGROUNDS = (*world.BACKGROUNDS, *world.UNKNOWN_BACKGROUNDS)
STYLES = world.STYLES
JUDGE = Path(__file__).parent / "judge.safetensors"
CROP = 32  # pixels a side of the second net's input
MARGIN = 1.35  # half the crop's side over the subject's radius


@dataclass
class Verdict:
    """What the judge says of `b` pictures: names, and the subject's mask `b h w`, centre `b 2` (x, y) and radius `b`
    as fractions of the side."""

    shape: list[str]
    colour: list[str]
    background: list[str]
    style: list[str]
    mask: torch.Tensor
    centre: torch.Tensor
    radius: torch.Tensor


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs), nn.SiLU())


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            [_conv(3, 16, 2), _conv(16, 32, 2), _conv(32, 64, 2), _conv(64, 96, 2), _conv(96, 96, 2)]
        )
        self.up = nn.ModuleList([_conv(96 + 96, 96), _conv(96 + 64, 64), _conv(64 + 32, 32)])
        self.mask = nn.Conv2d(32, 1, 1)
        self.scene = nn.Linear(16 + 32 + 64 + 96 + 96, len(BACKGROUNDS) + len(STYLES))
        self.crop = nn.Sequential(
            _conv(3, 24),
            _conv(24, 48, 2),
            _conv(48, 64, 2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * 64, len(SHAPES) + len(COLOURS)),
        )

    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels `b 3 h w` in -1..1 -> mask logits `b h/4 w/4`, background logits, style logits."""
        skips, pooled, x = [], [], pixels
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            pooled.append(x.mean((2, 3)))
        background, style = self.scene(torch.cat(pooled, 1)).split([len(BACKGROUNDS), len(STYLES)], 1)
        for layer, skip in zip(self.up, skips[-2::-1]):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        return self.mask(x)[:, 0], background, style

    def inspect(
        self, pixels: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shape and colour logits of the subject at `centre` (`b 2`, fractions) with `radius` (`b`)."""
        unit = torch.linspace(-1, 1, CROP, device=pixels.device)
        grid = torch.stack(torch.meshgrid(unit, unit, indexing="xy"), -1)  # h w (x y)
        grid = (centre * 2 - 1)[:, None, None] + grid * (radius * 2 * MARGIN)[:, None, None, None]
        crop = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
        return self.crop(crop).split([len(SHAPES), len(COLOURS)], 1)


def locate(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre `b 2` and radius `b` of masks `b h w` in 0..1: the middle of the box around the largest mass.

    The box comes from the 2 % and 98 % points of the mask's row and column sums, so a stray pixel doesn't move it.
    """
    edges = []
    for axis in (1, 2):  # sum over rows gives columns (x), over columns gives rows (y)
        mass = mask.sum(axis).cumsum(1)
        mass = mass / mass[:, -1:].clamp(min=1e-6)
        size = mass.shape[1]
        low = (mass < 0.02).sum(1) / size
        high = ((mass < 0.98).sum(1) + 1) / size
        edges.append((low, high))
    (x0, x1), (y0, y1) = edges
    centre = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2], 1)
    radius = torch.maximum(x1 - x0, y1 - y0) / 2
    return centre, radius.clamp(min=0.06)


def judge_loss(judge: Judge, pixels: torch.Tensor, scenes: list[world.Scene], seed: int) -> torch.Tensor:
    """Cross entropy of the four attributes and of the mask; pictures are softened and shifted in tone at random."""
    generator = torch.Generator().manual_seed(seed)
    device = pixels.device
    masks = torch.stack([torch.from_numpy(world.subject_mask(s, world.SIZE // 4)) for s in scenes]).to(device)
    soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    mix = torch.rand(len(scenes), 1, 1, 1, generator=generator).to(device)
    gain = 1 + 0.1 * torch.randn(len(scenes), 3, 1, 1, generator=generator).to(device)
    noise = torch.randn(pixels.shape, generator=generator).to(device)
    pixels = ((pixels + (soft - pixels) * mix) * gain + 0.06 * mix * noise).clamp(-1, 1)
    mask, background, style = judge.look(pixels)
    centre, radius = locate(masks)
    jitter = torch.randn(len(scenes), 3, generator=generator).to(device)
    centre = centre + 0.08 * radius[:, None] * jitter[:, :2]
    shape, colour = judge.inspect(pixels, centre, radius * (0.08 * jitter[:, 2]).exp())

    def names(kinds, attribute):
        return torch.tensor([kinds.index(getattr(s, attribute)) for s in scenes], device=device)

    return (
        F.binary_cross_entropy_with_logits(mask, masks) * 4
        + F.cross_entropy(background, names(BACKGROUNDS, "background"))
        + F.cross_entropy(style, names(STYLES, "style"))
        + F.cross_entropy(shape, names(SHAPES, "shape"))
        + F.cross_entropy(colour, names(COLOURS, "colour"))
    )


@torch.no_grad()
def verdict(judge: Judge, pixels: torch.Tensor) -> Verdict:
    """Judges pictures `b 3 h w` in -1..1. Where no subject is seen, its shape and colour are "none"."""
    mask, background, style = judge.look(pixels)
    mask = F.interpolate(mask.sigmoid()[:, None], scale_factor=4.0, mode="bilinear")[:, 0]
    mask = mask * (mask > 0.5)
    centre, radius = locate(mask)
    shape, colour = judge.inspect(pixels, centre, radius)

    def names(kinds, logits):
        return [kinds[i] for i in logits.argmax(1).tolist()]

    seen = mask.amax((1, 2)) > 0
    shapes, colours = (
        [name if there else "none" for name, there in zip(found, seen)]
        for found in (names(SHAPES, shape), names(COLOURS, colour))
    )
    return Verdict(shapes, colours, names(BACKGROUNDS, background), names(STYLES, style), mask, centre, radius)


def load_judge() -> Judge:
    """The judge that ships with the pack, float32 on the CPU."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(JUDGE).items()})
    return judge.eval()
