"""Measures the method where the truth is known: clips of the rendered world, tuned, inverted and edited.

Half of the clips show content that the checkpoint has never seen (patterns, unknown shapes and backgrounds), as
every real video does. Edits of the subject and of its colour may change the subject alone, edits of the background all
but the subject, edits of the style everything. For every edit the renderer knows the exact right picture.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint, decode_video
from ..errors import TavError, field
from ..events import Callback, Note, ignored
from ..inflation import VideoUNet
from ..metrics import mask_iou, missed
from ..pipeline import Source, find_subject, invert, prepare, reconstruct, tune_on, video_unet
from ..presets import PRESETS, Preset, with_settings
from ..project import write_json
from ..sampling import sample
from . import world
from .clips import ARMS, KINDS, REGIONS, BenchmarkClip, benchmark_clips
from .judge import Judge
from .scores import SCORES, masks, rmse, score_edit

CLIP_ERRORS = ("vae", "walk", "guided", "mask_iou", "mask_missed")
OnVideo = Callable[[str, np.ndarray], None]


def benchmark(
    checkpoint: Checkpoint,
    judge: Judge,
    preset: Preset,
    *,
    arms: Iterable[str] = tuple(ARMS),
    seeds: int = 2,
    clips: dict[int, BenchmarkClip] | None = None,
    folder: Path | None = None,
    on_video: OnVideo | None = None,
    callback: Callback = ignored,
) -> list[dict]:
    """Tunes, inverts and edits every clip with every seed.

    Args:
        checkpoint: computes where its VAE is.
        arms: of `ARMS`.
        clips: by their numbers; all of `benchmark_clips` without it.
        folder: keeps the figures of what is done, which another call with the same settings doesn't do again.
        on_video: receives every video by name, uint8 `f h w 3`.

    Returns: a row for every edit, with `arm`, `clip`, `seed`, `seen` (whether the checkpoint knows the content), `kind`
        and `SCORES`; and one for every clip, of kind "clip", with the errors of the whole clip `CLIP_ERRORS`: by the
        VAE alone, walked back from the noise without guidance, and with the preset's.

    Raises:
        TavError: a folder of other settings.
    """
    job, rows = {"checkpoint": checkpoint.name, "settings": json.loads(json.dumps(asdict(preset)))}, []
    for number, clip in (clips or dict(enumerate(benchmark_clips()))).items():
        for seed in range(seeds):
            runs = _Runs(checkpoint, judge, clip, with_settings(preset, seed=seed))
            for arm in (arm for arm in ARMS if arm in arms):
                if arm == "untuned" and seed:
                    continue  # without tuning and with eta 0 nothing is random: one run stands for all seeds
                name = f"clip{number}-seed{seed}-{arm}"
                show = on_video and (lambda kind, video, name=name: on_video(f"{name}-{kind}", video))
                facts = {"arm": arm, "clip": number, "seed": seed, "seen": clip.seen}
                path = folder and folder / f"{name}.json"
                if path is None or (found := _stored(path, job)) is None:
                    callback(Note(f"{name}: {clip.caption()}"))
                    found = runs.rows(arm, show)
                    if path is not None:
                        write_json(path, {"job": job, "rows": found})
                rows += [facts | row for row in found]
    return rows


def _stored(path: Path, job: dict) -> list[dict] | None:
    """The rows of an earlier call, if there are any."""
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    if stored["job"] != job:
        problem = "holds figures of other settings"
        raise TavError("output", path.parent, problem, f"choose another {field('output')}")
    return stored["rows"]


@dataclass
class _Runs:
    """A clip tuned with one seed, and what its arms share."""

    checkpoint: Checkpoint
    judge: Judge
    clip: BenchmarkClip
    preset: Preset

    @cached_property
    def source(self) -> Source:
        frames = torch.from_numpy(world.render_clip(self.clip.scenes()))
        return prepare(self.checkpoint, frames, self.clip.caption())

    @cached_property
    def tuned(self) -> VideoUNet:
        return tune_on(self.checkpoint, [self.source], self.preset)[0]

    @cached_property
    def noise(self) -> Tensor:
        return invert(self.checkpoint, self.tuned, self.source, self.preset)

    def rows(self, arm: str, show: OnVideo | None) -> list[dict]:
        """The rows of one arm (see `benchmark`)."""
        preset = self.preset
        if arm == "paper":
            tuning = self.preset.tuning
            preset = with_settings(PRESETS["paper"], seed=tuning.seed, dtype=tuning.dtype, memory=tuning.memory)
            unet, _ = tune_on(self.checkpoint, [self.source], preset)
        else:
            unet = video_unet(self.checkpoint) if arm == "untuned" else self.tuned
        if arm == "random_noise":
            generator = torch.Generator().manual_seed(preset.tuning.seed)
            noise, settings = torch.randn(self.source.take.latents.shape, generator=generator), {}
        else:
            noise = self.noise if arm in ("tuned", "no_region") else invert(self.checkpoint, unet, self.source, preset)
            settings = {"source_prompt": self.clip.caption(), "source_frames": self.source.frames}
        if arm in ("tuned", "untuned"):
            settings["contrasts"] = self.clip.contrasts()
            settings["subject"] = find_subject(self.checkpoint, unet, self.source, self.clip.contrasts(), preset)
        draw = partial(sample, self.checkpoint, unet, noise, preset=preset, **settings)
        rows = [self._whole_clip(draw, show)]
        if "subject" in settings:
            found, truth = settings["subject"][0, 0].cpu(), torch.from_numpy(masks(self.clip.scenes()))
            rows[0] |= {"mask_iou": mask_iou(found, truth), "mask_missed": missed(found, truth)}
        for kind, value in self.clip.edits.items():
            region = REGIONS[kind] if "subject" in settings else "everything"
            video = draw(self.clip.caption(**{KINDS[kind]: value}), region=region).numpy()
            rows.append({"kind": kind, **score_edit(self.judge, video, self.clip, kind)})
            if show:
                show(kind, video)
        return rows

    def _whole_clip(self, draw: Callable[..., Tensor], show: OnVideo | None) -> dict:
        """The row of the clip, sampled again by `draw`."""
        checkpoint, unet, noise = draw.args
        frames, caption = self.source.frames.numpy(), self.clip.caption()
        again = draw(caption).numpy()
        if show:
            show("again", again)
        row = {"kind": "clip", "guided": rmse(again, frames)}
        row["vae"] = rmse(decode_video(checkpoint, self.source.take.latents).numpy(), frames)
        if "source_prompt" in draw.keywords:
            row["walk"] = rmse(reconstruct(checkpoint, unet, noise, caption, draw.keywords["preset"]).numpy(), frames)
        return row


def means(rows: list[dict]) -> list[dict]:
    """Means of rows over clips and seeds, by content ("seen" or "unseen"), kind ("all": of all edits) and arm."""
    table = []
    for content, kind in product(("seen", "unseen"), ("clip", *KINDS, "all")):
        for arm in ARMS:
            chosen = [
                row
                for row in rows
                if row["arm"] == arm
                and row["seen"] == (content == "seen")
                and (row["kind"] == kind or kind == "all" and row["kind"] != "clip")
            ]
            figures = CLIP_ERRORS if kind == "clip" else SCORES
            values = {name: [row[name] for row in chosen if row.get(name) is not None] for name in figures}
            if chosen:
                mean = {name: round(float(np.mean(of)), 4) for name, of in values.items() if of}
                table.append({"content": content, "kind": kind, "arm": arm, **mean})
    return table


def as_markdown(table: list[dict]) -> str:
    """What `means` gives as two tables, of whole clips and of edits."""
    parts = []
    for figures, rows in (
        (CLIP_ERRORS, [row for row in table if row["kind"] == "clip"]),
        (SCORES, [row for row in table if row["kind"] != "clip"]),
    ):
        names = ["content", "kind", "arm", *figures]
        lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
    return value or ""
