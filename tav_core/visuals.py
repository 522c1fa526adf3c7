"""Pictures for people: before/after strips, side-by-side videos, loss curves."""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .atomic import atomic_path
from .errors import TavError
from .frames import Frames, as_frames

BACKGROUND, INK, MARGIN = (24, 25, 28), (232, 232, 235), 8
FRAME = 128  # pixels that a frame should at least measure to be read
LONGEST = 1000  # characters of a label; FreeType can't measure millions


def strip(videos: list[Frames], labels: list[str], path: str | Path | None = None, columns: int = 8) -> Image.Image:
    """A labelled row a video of `columns` evenly picked frames.

    Args:
        videos: uint8 `f h w c` each (see `as_frames`), of any size and length.
        labels: one a video, above its row; what doesn't fit into two lines ends in an ellipsis.
        path: also written there, in the format of its suffix.
        columns: at most; a video of fewer frames shows some of them twice.

    Raises:
        TavError: frames that are none, or a file that can't be written.
    """
    videos = [as_frames(video, "videos") for video in videos]
    columns = min(columns, max(len(video) for video in videos))
    rows = []
    for video, label in zip(videos, labels):
        picked = torch.linspace(0, len(video) - 1, columns).round().long()
        row = rearrange(_enlarged(video[picked]), "f h w c -> h (f w) c")
        rows.append(np.concatenate([_label(label, row.shape[1], row.shape[0]), row.numpy()]))
    width, gap = max(row.shape[1] for row in rows) + 2 * MARGIN, MARGIN
    canvas = Image.new("RGB", (width, sum(row.shape[0] + gap for row in rows) + gap), BACKGROUND)
    y = gap
    for row in rows:
        canvas.paste(Image.fromarray(row), (MARGIN, y))
        y += row.shape[0] + gap
    return _written(canvas, path)


def step_strip(
    videos: Mapping[int, Sequence[Tensor]], labels: list[str], path: str | Path | None = None
) -> Image.Image:
    """The same edits by the weights of several steps of a tuning: a labelled row an edit, a column a step.

    Args:
        videos: of each step the edits, uint8 `f h w c`; of each some evenly picked frames are shown.
        path: also written there.
    """
    shown = max(1, 8 // len(videos))
    rows = []
    for edits in zip(*videos.values()):
        cells = []
        for step, video in zip(videos, edits):
            picked = ((torch.arange(shown) + 0.5) / shown * len(video)).long()
            cell = rearrange(_enlarged(video[picked]), "f h w c -> h (f w) c")
            caption = torch.from_numpy(_label(f"step {step}", cell.shape[1], cell.shape[0]))
            cells.append(_framed(torch.cat([caption, cell])[None]))
        rows.append(torch.cat(cells, 2))
    return strip(rows, labels, path, columns=1)


def spotlight(video: Tensor, mask: Tensor) -> Tensor:
    """A video (uint8 `f h w c`) that is dark where a mask, `1 1 f h w`, is 0."""
    return (video * (0.25 + 0.75 * rearrange(mask.cpu(), "1 1 f h w -> f h w 1"))).to(torch.uint8)


def side_by_side(videos: list[Frames], labels: list[str]) -> Tensor:
    """One video of several, labelled: in a row up to three, then in a grid. Shorter ones hold their last frame.

    Args:
        videos: uint8 `f h w c` each (see `as_frames`), of one size.
        labels: one a video, above it.

    Returns: uint8 `f h w c`; small videos are enlarged until their labels can be read.

    Raises:
        TavError: frames that are none, or videos of several sizes.
    """
    videos = [as_frames(video, "videos") for video in videos]
    if len(sizes := {f"{video.shape[2]}x{video.shape[1]}" for video in videos}) > 1:
        raise TavError("videos", None, f"are of several sizes ({', '.join(sorted(sizes))})", "bring them to one")
    length = max(len(video) for video in videos)
    columns = len(videos) if len(videos) <= 3 else math.ceil(math.sqrt(len(videos)))
    tiles = []
    for video, label in zip(videos, labels):
        video = _enlarged(video)
        video = torch.cat([video, video[-1:].expand(length - len(video), -1, -1, -1)])
        caption = torch.from_numpy(_label(label, *video.shape[2:0:-1])).expand(length, -1, -1, -1)
        tiles.append(_framed(torch.cat([caption, video], 1)))
    empty = torch.tensor(BACKGROUND, dtype=torch.uint8).expand(tiles[0].shape)
    tiles += [empty] * (-len(tiles) % columns)
    return rearrange(torch.stack(tiles), "(r k) f h w c -> f (r h) (k w) c", k=columns).contiguous()


def grid(cells: list[list[Tensor]], rows: list[str], columns: list[str]) -> Tensor:
    """One video of a table of videos, columns named above and each row over it. Shorter ones hold their last frame.

    Args:
        cells: uint8 `f h w c` each, of one size, row by row.

    Returns: uint8 `f h w c`.
    """
    length, drawn = max(len(video) for row in cells for video in row), []
    for videos in cells:
        held = [torch.cat([video, video[-1:].expand(length - len(video), -1, -1, -1)]) for video in videos]
        drawn.append(torch.cat([_framed(_enlarged(video)) for video in held], 2))
    _, height, width, _ = drawn[0].shape
    head = np.concatenate([_label(name, width // len(columns), height) for name in columns], 1)
    parts = [torch.from_numpy(head).expand(length, -1, -1, -1)]
    for name, row in zip(rows, drawn):
        parts += [torch.from_numpy(_label(name, width, height)).expand(length, -1, -1, -1), row]
    return torch.cat(parts, 1).contiguous()


def loss_curve(
    losses: list[float], probe_losses: list[tuple[int, float]], path: str | Path | None = None
) -> Image.Image:
    """The training loss of every step (faint: it is mostly the noise of random timesteps), its running mean, and
    the loss on fixed draws, which shows the progress.

    Args:
        losses, probe_losses: those of a `TuneResult`.
        path: also written there, in the format of its suffix.

    Returns: RGB, 768 x 432 pixels.

    Raises:
        TavError: the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed here alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 15)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window}")
    axes.plot(*zip(*probe_losses), "o-", color="tab:orange", markersize=4, label="fixed draws")
    axes.set(xlabel="step", ylabel="loss", xlim=(0, max(1, len(losses))))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    canvas.draw()
    return _written(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def frame_curves(curves: dict[str, tuple[list[float], list[float]]]) -> Image.Image:
    """Figures along the frames, one below the other (see `by_frame`): those of an edit, and dashed
    those of its source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed here alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.7 * len(curves) + 0.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    rows = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(rows, curves.items()):
        for values, label, style in zip(lines, ("edit", "source"), ("o-", "--")):
            if values:
                axes.plot(range(1, len(values) + 1), values, style, color="tab:blue", markersize=4, label=label)
        axes.set_ylabel(name)
        axes.grid(alpha=0.2)
    rows[-1].set_xlabel("frame")
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    rows[-1].legend(frameon=False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _enlarged(video: Tensor) -> Tensor:
    """Frames `f h w c` repeated by the whole number that brings them to a readable size."""
    factor = max(1, math.ceil(FRAME / min(video.shape[1:3])))
    return video.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _framed(video: Tensor) -> Tensor:
    """`f h w c` with a margin around."""
    f, h, w, c = video.shape
    framed = torch.tensor(BACKGROUND, dtype=torch.uint8).repeat(f, h + MARGIN, w + MARGIN, 1)
    framed[:, MARGIN // 2 : MARGIN // 2 + h, MARGIN // 2 : MARGIN // 2 + w] = video
    return framed


def _label(text: str, width: int, height: int) -> np.ndarray:
    """Up to two lines of text for frames of that height, `h w 3`, ending in an ellipsis where it doesn't fit."""
    size = max(13, height // 18)
    font, step = ImageFont.load_default(size), round(size * 1.3)
    lines = _wrapped(text, font, width)
    image = Image.new("RGB", (width, 2 * step + 4), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((1, 2 + step * (i + (len(lines) == 1))), line, INK, font)
    return np.array(image)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 2) -> list[str]:
    """A text of any length in so many lines; what a font can't draw (line breaks, control characters) is a blank."""
    words = deque("".join(letter if letter.isprintable() else " " for letter in text[:LONGEST]).split())
    lines = []
    while words and len(lines) < most:
        line = [words.popleft()]
        room = width - 4 - font.getlength(line[0])
        while words and (room := room - font.getlength(f" {words[0]}")) >= 0:
            line.append(words.popleft())
        lines.append(" ".join(line))
    if lines and (words or len(text) > LONGEST):
        lines[-1] += " ..."
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a line as fits, and an ellipsis in place of the rest."""
    if font.getlength(line) <= width:
        return line
    kept = bisect_right(range(len(line) - 4), width, key=lambda count: font.getlength(line[:count] + " ..."))
    return line[: max(kept - 1, 0)] + " ..."


def _written(image: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        with atomic_path(path) as temporary:
            image.save(temporary)
    return image
