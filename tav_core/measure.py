"""All figures of an edited video beside those of its source: a table for people, CSV and JSON for programs, a page."""

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import metrics
from .atomic import atomic_path
from .clip_metrics import (
    TGVE_SIZE,
    ClipModel,
    DinoModel,
    dino_consistency,
    directional_similarity,
    frame_accuracy,
    frame_consistency,
    load_clip,
    load_dino,
    look,
    temporal_consistency,
    text_alignment,
)
from .errors import TavError
from .flow import dis_flow
from .frames import as_frames
from .noise import read_noise
from .page import page
from .perceptual import LPIPS_SIDE, RAFT_SIDE, LpipsModel, RaftModel, load_lpips, load_raft, lpips_distance, raft_flow
from .project import NOISE, changeable, labels, read_summary
from .video import load_video
from .visuals import strip

# what each figure is, and which way it is better; in the order of the table
FIGURES = {
    "psnr_rest": "PSNR in dB against the source outside of the mask, as in PIE-Bench; higher",
    "ssim_rest": "SSIM there; higher",
    "mse_rest": "mean squared error there, of pixels in 0 ... 1; lower",
    "lpips_alex_rest": "LPIPS there, by AlexNet; lower",
    "lpips_squeeze_rest": "LPIPS there, by SqueezeNet, as PIE-Bench and FiVE have it; lower",
    "motion_fidelity": "how much tracks of corners move as the source's (Yatim et al.); higher",
    "warp_error": "mean squared error along the source's optical flow (Lai et al.); lower",
    "warp_error_raft": "the same along the flow that RAFT finds (torchvision's raft_large); lower",
    "flicker": "difference of frames from the mean of their neighbours; lower",
    "frame_difference": "difference of neighbouring frames, of motion and flicker together: about the source's",
    "tgve_text": "LOVEU-TGVE, CLIPScore (text): 100 times the cosine to the sentence; higher",
    "tgve_pickscore": "LOVEU-TGVE, PickScore; higher",
    "fram_acc": "FateZero, Fram-Acc: share of frames nearer to the edited sentence than to the source's; higher",
    "directional": "change of the frames along the change of the sentence; higher",
    "tgve_frame": "LOVEU-TGVE, CLIPScore (frame): cosine of all pairs of frames; a video that stands still has 1",
    "tem_con": "FateZero, Tem-Con: cosine of neighbouring frames; a video that stands still has 1",
    "v2vbench_consistency": "V2VBench: the same of unprojected features; a video that stands still has 1",
    "dino_consistency": "VBench, subject consistency by DINO: to the first and the last frame; still is 1",
}


_WIDEST_HEAD = 24  # letters of a name at the head of a column of the table
REPORT = ("metrics.csv", "metrics.json", "metrics.html")


@dataclass(frozen=True)
class Models:
    """The models that are at hand; the figures of those that aren't are left out."""

    clip: ClipModel | None = None
    pickscore: ClipModel | None = None
    dino: DinoModel | None = None
    lpips: LpipsModel | None = None
    raft: RaftModel | None = None

    def to(self, device: torch.device) -> "Models":
        """Moves them there, and gives them back."""
        for name in MODELS:
            if (each := getattr(self, name)) is not None:
                torch.nn.Module.to(each.model, device)
        return self

    def check_frames(self, width: int, height: int):
        """Raises a TavError for frames that are too small for one of them."""
        for name, side in (("lpips", LPIPS_SIDE), ("raft", RAFT_SIDE)):
            if getattr(self, name) and min(width, height) < side:
                problem = f"takes frames of {side} pixels or more a side, not of {width}x{height}"
                raise TavError(name, None, problem, "leave it out, or take larger frames")


MODELS = tuple(field.name for field in fields(Models))


def load_models(
    clip: str | Path | None = None,
    pickscore: str | Path | None = None,
    dino: str | Path | None = None,
    lpips: str | Path | None = None,
    raft: str | Path | None = None,
) -> Models:
    """The models of some folders (`load_clip`, `load_dino`) and files (`load_lpips`, `load_raft`).

    Raises:
        TavError: one can't be read, or its package isn't there.
    """
    return Models(
        clip and load_clip(clip),
        pickscore and load_clip(pickscore, "pickscore"),
        dino and load_dino(dino),
        lpips and load_lpips(lpips),
        raft and load_raft(raft),
    )


@dataclass(frozen=True)
class Measured:
    """The figures of a video by their names in `FIGURES`, and those of its source where it has one of its own."""

    name: str
    prompt: str
    figures: dict[str, float]
    of_source: dict[str, float]


def measure(
    name: str,
    video: Tensor,
    source: Tensor,
    prompt: str,
    source_prompt: str | None = None,
    mask: Tensor | None = None,
    models: Models | None = None,
) -> Measured:
    """All figures that can be had.

    Args:
        video, source: uint8 `f h w c` (see `as_frames`), of one size and length.
        prompt: what the video should show.
        source_prompt: what the source shows; without it there are no fram_acc and directional.
        mask: where the edit may change something, 0 ... 1, `f h w`.

    Raises:
        TavError: videos of several sizes or lengths, or too small for one of the models.
    """
    video, source = as_frames(video, "edited"), as_frames(source, "source")
    if video.shape != source.shape:
        (f, h, w, _), (g, i, j, _) = video.shape, source.shape
        problem = f"has {f} frames of {w}x{h}, its source {g} of {j}x{i}"
        raise TavError("edited", name, problem, "give the frames that were edited, in their size")
    models = models or Models()
    models.check_frames(width=video.shape[2], height=video.shape[1])
    figures = {
        "psnr_rest": metrics.psnr(video, source, mask),
        "ssim_rest": metrics.ssim(video, source, mask),
        "mse_rest": metrics.mse(video, source, mask),
        "motion_fidelity": metrics.motion_fidelity(video, source),
    }
    own = [_own(each, [prompt, *([source_prompt] if source_prompt else [])], models) for each in (video, source)]
    flows = {"warp_error": dis_flow()} | ({"warp_error_raft": raft_flow(models.raft)} if models.raft else {})
    for key, flow in flows.items():
        for values, error in zip(own, metrics.warp_errors([video, source], source, flow)):
            values[key] = error
    figures |= own[0]
    if models.lpips:
        figures[f"lpips_{models.lpips.net}_rest"] = lpips_distance(models.lpips, video, source, mask)
    if models.clip and source_prompt:
        seen = [look(models.clip, each, [prompt, source_prompt]) for each in (video, source)]
        figures["directional"] = directional_similarity(*seen)
    in_order = ({key: values[key] for key in FIGURES if key in values} for values in (figures, own[1]))
    return Measured(name, prompt, *in_order)


def _own(video: Tensor, sentences: list[str], models: Models) -> dict[str, float]:
    """What can be said of a video alone, so of the source too."""
    figures = {"flicker": metrics.flicker(video), "frame_difference": metrics.frame_difference(video)}
    if models.clip:
        tgve, seen = look(models.clip, video, sentences, TGVE_SIZE), look(models.clip, video, sentences)
        figures |= {
            "tgve_text": text_alignment(tgve),
            "tgve_frame": frame_consistency(tgve),
            "tem_con": temporal_consistency(seen.frames),
            "v2vbench_consistency": temporal_consistency(seen.pooled),
        }
        if len(sentences) > 1:
            figures["fram_acc"] = frame_accuracy(seen)
    if models.pickscore:
        figures["tgve_pickscore"] = text_alignment(look(models.pickscore, video, sentences, TGVE_SIZE))
    if models.dino:
        figures["dino_consistency"] = dino_consistency(models.dino, video)
    return figures


def by_frame(
    video: Tensor, source: Tensor, prompt: str, mask: Tensor | None = None, clip: ClipModel | None = None
) -> dict[str, tuple[list[float], list[float]]]:
    """Some of the figures for each frame, which show where an edit fails: those of a video, and of its source.

    Args:
        video, source, prompt, mask: as for `measure`.

    Returns:
        by name in `FIGURES`, a value a frame; none for the source where it has no such figure. The first frame has no
        frame_difference (nan).
    """
    video, source = as_frames(video, "edited"), as_frames(source, "source")
    masks = [None] * len(video) if mask is None else mask.split(1)
    fidelity = [metrics.psnr(*each) for each in zip(video.split(1), source.split(1), masks)]
    steps = [(each[1:].float() - each[:-1].float()).abs().mean((1, 2, 3)) / 255 for each in (video, source)]
    curves = {"psnr_rest": (fidelity, []), "frame_difference": tuple([math.nan, *each.tolist()] for each in steps)}
    if clip:
        looks = [look(clip, each, [prompt], TGVE_SIZE) for each in (video, source)]
        curves["tgve_text"] = tuple((seen.scale * seen.frames @ seen.texts[0]).tolist() for seen in looks)
    return curves


def as_table(rows: Sequence[Measured]) -> str:
    """For a terminal: a line a figure, a column a video, in brackets the source's own. Names that are long, as
    sentences are, stand above it with the numbers of their columns.
    """
    heads, above = [row.name for row in rows], []
    if len(rows) > 1 and max(map(len, heads)) > _WIDEST_HEAD:
        above = [f"{number}: {name}" for number, name in enumerate(heads, 1)]
        heads = [str(number) for number in range(1, len(rows) + 1)]
    cells = [["", *heads], *([name, *(_cell(row, name) for row in rows)] for name in _names(rows))]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)
    return "\n".join([*above, *lines])


def _cell(row: Measured, name: str) -> str:
    if name not in row.figures:
        return "-"
    own = f" ({_short(row.of_source[name])})" if name in row.of_source else ""
    return _short(row.figures[name]) + own


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def write_report(rows: Sequence[Measured], videos: Sequence[Tensor], source: Tensor, folder: Path):
    """metrics.csv, metrics.json and metrics.html, a page with pictures, all in the folder.

    Args:
        videos: of the rows, in their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "metrics.csv")
    with atomic_path(folder / "metrics.json") as path:
        path.write_text(
            json.dumps({"figures": FIGURES, "videos": [*map(as_json, rows)]}, indent=2) + "\n", encoding="utf-8"
        )
    with atomic_path(folder / "metrics.html") as path:
        path.write_text(_page(rows, videos, source), encoding="utf-8")


def write_csv(rows: Sequence[Measured], path: Path):
    """A line a video: its figures, and its source's own."""
    names = _names(rows)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "prompt", *names, *(f"source_{name}" for name in names)])
        for row in rows:
            values = [[figures.get(name, "") for name in names] for figures in (row.figures, row.of_source)]
            writer.writerow([row.name, row.prompt, *values[0], *values[1]])


def _names(rows: Sequence[Measured]) -> list[str]:
    return [key for key in FIGURES if any(key in row.figures for row in rows)]


def as_json(row: Measured) -> dict[str, Any]:
    """A row for programs."""
    return {"video": row.name, "prompt": row.prompt, "figures": _json(row.figures), "source": _json(row.of_source)}


def of_json(row: dict[str, Any]) -> Measured:
    """What `as_json` made a row."""
    figures = ({name: float(value) for name, value in row[key].items()} for key in ("figures", "source"))
    return Measured(row["video"], row["prompt"], *figures)


def _json(figures: dict[str, float]) -> dict[str, float | str]:
    """JSON knows neither nan nor inf."""
    return {name: value if math.isfinite(value) else str(value) for name, value in figures.items()}


def _page(rows: Sequence[Measured], videos: Sequence[Tensor], source: Tensor) -> str:
    picture = io.BytesIO()
    strip([source, *videos], ["source", *(row.name for row in rows)]).save(picture, "PNG")
    shown = base64.b64encode(picture.getvalue()).decode()
    return page("metrics.html", strip=shown, rows=rows, lines=lines_of(rows))


def lines_of(rows: Sequence[Measured]) -> list[tuple[str, str, list[str]]]:
    """Of the table on a page: each figure, what it is, and its values."""
    return [(name, FIGURES[name], [_cell(row, name) for row in rows]) for name in _names(rows)]


def measure_job(folder: Path, models: Models | None = None) -> tuple[list[Measured], list[Tensor], Tensor]:
    """The figures of all edits in the output folder of `run_edit`, the edits, and their source.

    Raises:
        TavError: another folder, or one that lacks something.
    """
    summary = read_summary(folder, "edited", "give a video, or the folder that tune-a-video edit wrote")
    noise, rows, videos = read_noise(folder / NOISE), [], []
    if noise.frames is None:
        raise TavError("edited", folder, "was written by an earlier version", "give the videos in it")
    # those of random noise have no source, and no clip beside them
    of_clip = [edit for edit in summary["edits"] if edit["attention_injection"] is not None]
    for label, edit in zip(labels(of_clip), of_clip):
        mask = changeable(edit["region"], noise)
        videos.append(load_video(folder / edit["file"], sound=False).frames)
        rows.append(measure(label, videos[-1], noise.frames, edit["prompt"], noise.prompt, mask, models))
    return rows, videos, noise.frames


def mask_of(video: Tensor, frames: int) -> Tensor:
    """A mask `f h w` in 0 ... 1 from a video or a picture of one: white is where the edit may change something.

    Raises:
        TavError: neither one frame nor one for each.
    """
    if len(video) not in (1, frames):
        raise TavError("mask", None, f"has {len(video)} frames for {frames}", f"give 1 or {frames}")
    grey = video.float().mean(-1) / 255
    return (grey if len(video) == frames else grey.expand(frames, -1, -1)).to(torch.float32)
