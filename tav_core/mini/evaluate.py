"""Measures the mini checkpoint as an image model: does a picture show what its prompt says, where its hint says?"""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from diffusers import ControlNetModel
from einops import rearrange, repeat
from PIL import Image
from tqdm import tqdm

from ..checkpoint import Checkpoint, decode_video, encode_prompt
from ..ddim import ddim_sample
from ..inflation import VideoUNet, inflate
from . import world
from .judge import Judge, verdict

ATTRIBUTES = ("shape", "colour", "background", "style")


def accuracy(judge: Judge, images: np.ndarray, scenes: list[world.Scene], batch: int = 32) -> np.ndarray:
    """Which attributes of pictures (uint8 `n h w 3`) the judge finds as in `scenes`: bool `n 4`."""
    right = []
    for at in range(0, len(images), batch):
        pixels = torch.from_numpy(np.ascontiguousarray(images[at : at + batch])).float() / 127.5 - 1
        seen = verdict(judge, rearrange(pixels, "b h w c -> b c h w"))
        for i, scene in enumerate(scenes[at : at + batch]):
            right.append([getattr(seen, a)[i] == getattr(scene, a) for a in ATTRIBUTES])
    return np.array(right)


def _shares(right: np.ndarray) -> dict[str, float]:
    shares = {a: round(float(right[:, k].mean()), 4) for k, a in enumerate(ATTRIBUTES)}
    return {**shares, "all": round(float(right.all(1).mean()), 4)}


def prompts(count: int, seed: int) -> tuple[list[world.Scene], list[bool]]:
    """`count` scenes, a third of them combinations that training never saw, and which those are."""
    rng = random.Random(seed)
    held_out = sorted(world.held_out())
    seen = sorted(set(world.combinations()) - world.held_out())
    unseen_count = -(-count // 3)
    chosen = rng.choices(held_out, k=unseen_count) + rng.sample(seen, count - unseen_count)
    return [world.Scene(*c) for c in chosen], [i < unseen_count for i in range(count)]


def generate(
    checkpoint: Checkpoint,
    captions: list[str],
    *,
    guidance_scale: float,
    steps: int,
    seed: int,
    batch: int = 16,
    progress: bool = True,
    controlnet: ControlNetModel | None = None,
    hints: torch.Tensor | None = None,
) -> np.ndarray:
    """One picture a caption, uint8 `n h w 3`; picture i comes from seed + i. A ControlNet takes the hints `n 3 h w`."""
    unet = inflate(checkpoint.unet)
    side = checkpoint.unet.config.sample_size
    images = []
    empty = encode_prompt(checkpoint, "")
    for at in tqdm(range(0, len(captions), batch), desc="generate", disable=not progress):
        part = captions[at : at + batch]
        noise = torch.cat(
            [
                torch.randn(1, 4, 1, side, side, generator=torch.Generator().manual_seed(seed + at + i))
                for i in range(len(part))
            ]
        )
        model = steered(unet, controlnet, hints[at : at + batch]) if controlnet else unet
        latents = ddim_sample(
            model,
            noise,
            encode_prompt(checkpoint, part),
            checkpoint.scheduler,
            steps,
            guidance_scale=guidance_scale,
            negative_hidden_states=empty.expand(len(part), -1, -1),
        )
        images.append(decode_video(checkpoint, rearrange(latents, "b c 1 h w -> 1 c b h w")).numpy())
    return np.concatenate(images)


def evaluate(
    checkpoint: Checkpoint,
    judge: Judge,
    *,
    count: int = 256,
    guidance_scale: float = 3.0,
    steps: int = 50,
    seed: int = 0,
) -> tuple[dict, np.ndarray, list[world.Scene]]:
    """Accuracy of each attribute over `count` prompts, over the unseen ones, and of the judge on fresh renders.

    Returns: the figures (shares, 0..1), the pictures `n h w 3`, their scenes.
    """
    rng = random.Random(seed + 1_000_003)
    fresh = [world.random_scene(rng) for _ in range(1024)]
    own = accuracy(judge, np.stack([world.render(s) for s in fresh]), fresh)
    scenes, unseen = prompts(count, seed)
    images = generate(
        checkpoint, [world.caption(s) for s in scenes], guidance_scale=guidance_scale, steps=steps, seed=seed
    )
    right = accuracy(judge, images, scenes)
    figures = {**_shares(right), "unseen": _shares(right[np.array(unseen)]), "classifier": _shares(own),
               "prompts": count, "guidance_scale": guidance_scale, "steps": steps, "seed": seed}  # fmt: skip
    return figures, images, scenes


def steered(unet: VideoUNet, controlnet: ControlNetModel, hints: torch.Tensor) -> Callable:
    """What `ddim_sample` calls: the U-Net with the residuals of a ControlNet.

    Args:
        hints: `(b f) 3 h w` in 0..1.
    """

    def predict(latents: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
        x = rearrange(latents, "b c f h w -> (b f) c h w")
        down, middle = controlnet(
            x, t, text, repeat(hints, "n c h w -> (k n) c h w", k=len(x) // len(hints)), return_dict=False
        )
        return unet(latents, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    predict.dtype = unet.dtype
    return predict


def overlap(judge: Judge, images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Intersection over union of the subjects that the judge finds in pictures (uint8 `n h w 3`) and masks `n h w`,
    `n`.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1
    seen, wanted = verdict(judge, rearrange(pixels, "n h w c -> n c h w")).mask.numpy() > 0, masks > 0.5
    return (seen & wanted).sum((1, 2)) / (seen | wanted).sum((1, 2))


def evaluate_controlnet(
    checkpoint: Checkpoint,
    controlnet: ControlNetModel,
    judge: Judge,
    *,
    count: int = 64,
    guidance_scale: float = 3.0,
    steps: int = 25,
    seed: int = 0,
) -> tuple[dict, np.ndarray]:
    """How well silhouettes are obeyed, over `count` of shapes of the world and as many of shapes that training never
    saw.

    Returns: the overlap (see `overlap`) with and without the ControlNet and of renders, and with it the share of
    pictures that show each attribute (without the unknown shape); and the hints and pictures `4 n h w 3`: of known
    shapes, then of unknown.
    """
    rng = random.Random(seed + 2_000_003)
    known = [world.random_scene(rng) for _ in range(count)]
    figures, rows = {}, []
    for name, scenes in (
        ("known", known),
        ("unknown", [replace(s, shape=rng.choice(list(world.UNKNOWN_SHAPES))) for s in known]),
    ):
        masks = np.stack([world.subject_mask(s) for s in scenes])
        options = dict(guidance_scale=guidance_scale, steps=steps, seed=seed)
        captions = [world.caption(s) for s in scenes]
        free = generate(checkpoint, captions, **options)
        led = generate(checkpoint, captions, controlnet=controlnet, hints=silhouettes(masks), **options)
        right = _shares(accuracy(judge, led, scenes))
        if name == "unknown":
            right = {attribute: right[attribute] for attribute in ATTRIBUTES[1:]}
        images = {"with": led, "without": free, "renders": np.stack([world.render(s) for s in scenes])}
        figures[name] = {kind: round(float(overlap(judge, of, masks).mean()), 3) for kind, of in images.items()} | right
        rows += [world.silhouette_clip(scenes), led]
    return figures, np.stack(rows)


def silhouettes(masks: np.ndarray) -> torch.Tensor:
    """Hints of the mini ControlNet: masks `n h w` in 0..1 as `n 3 h w`."""
    return torch.from_numpy(masks)[:, None].expand(-1, 3, -1, -1)


def contact_sheet(images: np.ndarray, columns: int = 16) -> Image.Image:
    """The pictures in rows."""
    rows = -(-len(images) // columns)
    blank = np.zeros((rows * columns - len(images), *images.shape[1:]), np.uint8)
    return Image.fromarray(rearrange(np.concatenate([images, blank]), "(r k) h w c -> (r h) (k w) c", k=columns))


def evaluate_neon(
    checkpoints: dict[str, Checkpoint],
    judge: Judge,
    *,
    count: int = 32,
    guidance_scale: float = 3.0,
    steps: int = 25,
    seed: int = 0,
) -> tuple[dict, np.ndarray]:
    """How far each checkpoint draws in the style "neon", which no caption speaks of.

    Returns: of each, and of renders in the style: the mean `brightness` (0..1), the share of `night` (pixels of the
    night blue, which no other style has) and of subjects in the right `colour`; and the pictures `k n h w 3`.
    """
    rng, places = random.Random(seed + 3_000_003), [place for place in world.BACKGROUNDS if place != "night"]
    scenes = [
        world.random_scene(
            rng, (rng.choice(list(world.SHAPES)), rng.choice(list(world.COLOURS)), rng.choice(places), "plain")
        )
        for _ in range(count)
    ]
    captions = [world.caption(scene) for scene in scenes]
    drawn = {
        name: generate(checkpoint, captions, guidance_scale=guidance_scale, steps=steps, seed=seed)
        for name, checkpoint in checkpoints.items()
    }
    figures = {}
    for name, images in {
        **drawn,
        "renders": np.stack([world.render(replace(scene, style="neon")) for scene in scenes]),
    }.items():
        night = np.abs(images.astype(int) - world.NEON_NIGHT).max(-1) <= 30
        figures[name] = {"brightness": round(float(images.mean()) / 255, 3), "night": round(float(night.mean()), 3),
                         "colour": _shares(accuracy(judge, images, scenes))["colour"]}  # fmt: skip
    return figures, np.stack(list(drawn.values()))
