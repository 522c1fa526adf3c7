"""Measures the method where the truth is known: clips of the rendered world, tuned, inverted and edited.

Half of the clips show content that the checkpoint has never seen (patterns, unknown shapes and backgrounds), as
every real video does. Three arms: `tuned`, `untuned` (the inflated model as it is, noise inverted and subject found
with it) and `random_noise` (the tuned model from Gaussian noise). Edits of the subject and of its colour may change the
subject alone, edits of the background all but the subject, edits of the style everything. For every edit the renderer
knows the exact answer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import cv2
import numpy as np
import torch
from einops import rearrange

from ..checkpoint import Checkpoint
from ..events import Callback, Note, ignored
from ..inflation import inflate
from ..injection import EditPlaces
from ..metrics import psnr
from ..pipeline import Source, find_subject, invert, prepare, sample, tune_on
from ..presets import Preset, with_settings
from . import world
from .evaluate import ATTRIBUTES
from .judge import Judge, Verdict, locate, verdict

ARMS = ("tuned", "untuned", "random_noise")
KINDS = {"subject": "shape", "colour": "colour", "background": "background", "style": "style"}
REGIONS = {"subject": "subject", "colour": "subject", "background": "background", "style": "everything"}  # of a kind
METRICS = ("edited", "kept", "identity", "trajectory_corr", "trajectory_px", "stability", "reconstruction")


@dataclass(frozen=True)
class BenchmarkClip:
    """A clip of known content, and the scene's attribute that each kind of edit sets."""

    scene: world.Scene
    motion: str
    edits: dict[str, str]
    num_frames: int = 8

    @property
    def seen(self) -> bool:
        """Whether the checkpoint knows everything in it."""
        return (
            self.scene.pattern == "solid"
            and self.scene.shape in world.SHAPES
            and self.scene.background in world.BACKGROUNDS
        )

    def scenes(self, **changes: str) -> list[world.Scene]:
        return world.clip_scenes(replace(self.scene, **changes), self.motion, self.num_frames)

    def caption(self, **changes: str) -> str:
        return world.caption(replace(self.scene, **changes), self.motion)

    def contrasts(self) -> list[str]:
        """Its sentence with five other subjects."""
        colours = [c for c in world.COLOURS if c != self.scene.colour]
        return [
            self.caption(colour=c, shape=s) for c, s in zip(colours, (s for s in world.SHAPES if s != self.scene.shape))
        ]


def benchmark_clips(seed: int = 0) -> list[BenchmarkClip]:
    """Eight clips, four of them with content that the checkpoint has never seen."""
    known = [
        (world.Scene("ball", "red", "grass"), "slide"),
        (world.Scene("star", "yellow", "night"), "bounce"),
        (world.Scene("heart", "purple", "sand"), "circle"),
        (world.Scene("square", "green", "snow"), "grow"),
    ]
    unknown = [
        (world.Scene("ball", "blue", "sand", pattern="two-tone", second_colour="yellow"), "slide"),
        (world.Scene("cross", "green", "snow"), "bounce"),
        (world.Scene("star", "red", "checks", pattern="dots", second_colour="yellow"), "circle"),
        (world.Scene("moon", "orange", "hills", pattern="stripes", second_colour="purple"), "grow"),
    ]
    rng = random.Random(seed)
    clips = []
    for scene, motion in known + unknown:
        others = {
            "shape": [s for s in world.SHAPES if s != scene.shape],
            "colour": [c for c in world.COLOURS if c not in (scene.colour, scene.second_colour)],
            "background": [b for b in world.BACKGROUNDS if b != scene.background],
            "style": [s for s in world.STYLES if s != scene.style],
        }
        edits = {kind: rng.choice(others[attribute]) for kind, attribute in KINDS.items()}
        clips.append(BenchmarkClip(replace(scene, layout=rng.randrange(1 << 30)), motion, edits))
    return clips


@dataclass
class Scores:
    """Values of each metric, one entry an edit (or a clip)."""

    values: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in METRICS})

    def add(self, **figures: float):
        for name, value in figures.items():
            self.values[name].append(value)

    def means(self) -> dict[str, float | None]:
        return {m: round(float(np.mean(v)), 4) if v else None for m, v in self.values.items()}


def look(judge: Judge, video: np.ndarray) -> Verdict:
    """Judges the frames of a clip, uint8 `f h w 3`."""
    return verdict(judge, rearrange(torch.from_numpy(video), "f h w c -> f c h w").float() / 127.5 - 1)


def _trajectory(centre: torch.Tensor, radius: torch.Tensor) -> np.ndarray:
    """Centre x, y and radius in pixels, `f 3`."""
    return torch.cat([centre, radius[:, None]], 1).numpy() * world.SIZE


def trajectory_agreement(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Correlation of all coordinates that move (pooled, each less its mean), and mean distance of the centres in px."""
    moving = truth.std(0) > 1
    a, b = found[:, moving] - found[:, moving].mean(0), truth[:, moving] - truth[:, moving].mean(0)
    correlation = float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-9))
    return correlation, float(np.linalg.norm(found[:, :2] - truth[:, :2], axis=1).mean())


def _rmse(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Root of the mean squared difference of pixels (0..1), where `mask` (`f h w`) holds."""
    error = ((a.astype(np.float32) - b.astype(np.float32)) / 255) ** 2
    error = error.mean(-1)
    return float(np.sqrt(error[mask].mean() if mask is not None else error.mean()))


def _masks(scenes: list[world.Scene]) -> np.ndarray:
    return np.stack([world.subject_mask(s) for s in scenes])


def score_edit(judge: Judge, video: np.ndarray, clip: BenchmarkClip, kind: str) -> dict[str, float]:
    """The figures of one edited video (uint8 `f h w 3`)."""
    attribute, value = KINDS[kind], clip.edits[kind]
    scenes = clip.scenes(**{attribute: value})
    seen = look(judge, video)
    wanted = {a: {getattr(scenes[0], a)} for a in ATTRIBUTES}
    if clip.scene.pattern != "solid":
        wanted["colour"].add(clip.scene.second_colour)  # the judge may name either of the two
    if attribute == "colour":
        wanted["colour"] = {value}
    right = {a: float(np.mean([v in wanted[a] for v in getattr(seen, a)])) for a in ATTRIBUTES}
    truth = _masks(scenes)
    correlation, distance = trajectory_agreement(
        _trajectory(seen.centre, seen.radius), _trajectory(*locate(torch.from_numpy(truth)))
    )
    # the stage of two frames, away from the subject in either (as it should be and as it is)
    subject = np.maximum(truth, seen.mask.numpy())
    wide = np.stack([cv2.dilate(m, np.ones((13, 13))) for m in subject]) > 0.05
    stage = ~(wide[1:] | wide[:-1])
    steps = np.abs(video[1:].astype(np.float32) - video[:-1]).mean(-1) / 255
    figures = dict(
        edited=right[attribute],
        kept=float(np.mean([right[a] for a in ATTRIBUTES if a != attribute])),
        trajectory_corr=correlation,
        trajectory_px=distance,
        stability=float(steps[stage].mean()),
    )
    if kind == "background":  # the subject should look as it did: compare with the exact picture
        figures["identity"] = _rmse(video, world.render_clip(scenes), truth > 0.99)
    return figures


def benchmark(
    checkpoint: Checkpoint,
    judge: Judge,
    preset: Preset,
    *,
    seeds: int = 2,
    clips: list[BenchmarkClip] | None = None,
    on_video: Callable[[str, np.ndarray], None] | None = None,
    callback: Callback = ignored,
) -> dict:
    """Tunes, inverts and edits every clip with every seed.

    Errors (`identity`, `stability`, `reconstruction`) are differences of pixel values in 0..1: root mean square
    over the subject in background edits; mean difference of neighbouring frames over the still stage; root mean
    square of the whole clip sampled again with its own prompt and the preset's guidance.

    Args:
        on_video: receives every video by name, uint8 `f h w 3`.

    Returns: arm -> "seen" | "unseen" -> metric -> mean.
    """
    scores = {arm: {"seen": Scores(), "unseen": Scores()} for arm in ARMS}
    clips = clips or benchmark_clips()
    for number, clip in enumerate(clips):
        frames = world.render_clip(clip.scenes())
        source: Source = prepare(checkpoint, torch.from_numpy(frames), clip.caption())

        def run(arm: str, name: str, unet, noise, subject=None, clip=clip, frames=frames):
            into, source_prompt = scores[arm]["seen" if clip.seen else "unseen"], clip.caption()
            settings = {"source_prompt": None if arm == "random_noise" else source_prompt, "subject": subject}
            drawn = partial(sample, checkpoint, unet, noise, preset=preset, **settings)
            keep = on_video and (lambda kind, video: on_video(f"{name}-{arm}-{kind}", video))
            _score_edits(into, judge, clip, frames, drawn, keep)

        untuned = inflate(checkpoint.unet)
        callback(Note(f"clip {number + 1}/{len(clips)}: {clip.caption()}, untuned"))
        # without tuning and with eta 0 nothing is random: one run stands for all seeds
        subject = find_subject(checkpoint, untuned, source, clip.contrasts(), preset)
        run("untuned", f"clip{number}", untuned, invert(checkpoint, untuned, source, preset), subject)
        for seed in range(seeds):
            callback(Note(f"clip {number + 1}/{len(clips)}: {clip.caption()}, tuned with seed {seed}"))
            seeded, name = with_settings(preset, seed=seed), f"clip{number}-seed{seed}"
            tuned, _ = tune_on(checkpoint, [source], seeded)
            subject = find_subject(checkpoint, tuned, source, clip.contrasts(), seeded)
            run("tuned", name, tuned, invert(checkpoint, tuned, source, preset), subject)
            noise = torch.randn(source.take.latents.shape, generator=torch.Generator().manual_seed(seed))
            run("random_noise", name, tuned, noise)
    return {arm: {content: s.means() for content, s in by.items()} for arm, by in scores.items()}


def _score_edits(
    into: "Scores",
    judge: Judge,
    clip: BenchmarkClip,
    frames: np.ndarray,
    drawn: Callable[..., torch.Tensor],
    on_video: Callable[[str, np.ndarray], None] | None,
):
    """Adds the figures of one clip, sampled again and edited in every way, by `drawn(prompt, region=...)`."""
    again = drawn(clip.caption()).numpy()
    into.add(reconstruction=_rmse(again, frames))
    if on_video:
        on_video("again", again)
    for kind, value in clip.edits.items():
        region = "everything" if drawn.keywords["subject"] is None else REGIONS[kind]
        video = drawn(clip.caption(**{KINDS[kind]: value}), region=region).numpy()
        into.add(**score_edit(judge, video, clip, kind))
        if on_video:
            on_video(kind, video)


def untouched(
    checkpoint: Checkpoint, preset: Preset, *, clips: list[BenchmarkClip] | None = None, callback: Callback = ignored
) -> dict[str, dict[str, float]]:
    """How well edits of the subject and of the background leave all else as the noise reconstructs the clip.

    PSNR in dB against the walk back without guidance, over the pixels outside of the region, whose edge is taken as
    hard; mean of the clips. With a region those pixels are the same but for that edge (see `put_back`).

    Returns: kind -> "no_mask", "subject_held" (in its place, the region is everything), "region", and "least_gain",
    from the first to the last, of a clip.
    """
    figures: dict[str, list[list[float]]] = {"subject": [], "background": []}
    clips = clips or benchmark_clips()
    for number, clip in enumerate(clips):
        callback(Note(f"clip {number + 1}/{len(clips)}: {clip.caption()}"))
        source = prepare(checkpoint, torch.from_numpy(world.render_clip(clip.scenes())), clip.caption())
        unet, _ = tune_on(checkpoint, [source], preset)
        noise = invert(checkpoint, unet, source, preset)
        subject = find_subject(checkpoint, unet, source, clip.contrasts(), preset)
        draw = partial(sample, checkpoint, unet, noise, source_prompt=clip.caption())
        again = draw(clip.caption(), replace(preset, guidance_scale=1.0, attention_injection=0.0))
        for kind, rows in figures.items():
            caption, region = clip.caption(**{KINDS[kind]: clip.edits[kind]}), REGIONS[kind]
            places = EditPlaces.of(region, subject.round(), margin=checkpoint.downscale)
            outside = places.changeable[0, 0] == 0  # f h w
            edits = (
                draw(caption, preset),
                draw(caption, preset, subject=subject),
                draw(caption, preset, subject=subject, region=region),
            )
            rows.append([psnr(edit[outside], again[outside]) for edit in edits])
    summary = {}
    for kind, rows in figures.items():
        no_mask, held, region = np.mean(rows, 0).round(2).tolist()
        least = min(row[2] - row[0] for row in rows)
        summary[kind] = {"no_mask": no_mask, "subject_held": held, "region": region, "least_gain": round(least, 2)}
    return summary
